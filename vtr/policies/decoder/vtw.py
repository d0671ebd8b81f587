"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803): behind one layer there is no picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vtr.base import Policy, Tokens
from vtr.checks import check_depth, check_layer, check_positions
from vtr.settings import register_policy

if TYPE_CHECKING:
    import torch


@register_policy("vtw")
@dataclass
class VTW(Policy):
    """All vision tokens leave on entering one decoder layer; what the text has read of them until then must do.

    :func:`vtr.search.vtw` (``vtr search vtw``) finds the layer for a model. As in the official code, which also has a
    random choice of tokens as a control: that is :class:`vtr.Random`.

    Args:
        layer: the decoder layer that no vision token enters, the paper's K. None: 15 of 32 layers (the official
            code's), as much of another depth. With 0 the picture is not seen at all.
        positions: "keep" leaves the text its positions (official default); "reindex" closes the gap from that layer on.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    layer: int | None = None
    positions: Literal["keep", "reindex"] = "keep"

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The budget is the layer: a share of the depth, the first layer at least."""
        return {"layer": min(max(round(share * num_hidden_layers), 1), num_hidden_layers - 1)}

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_layer(self.layer)
        check_positions(self.positions)

    def check(self, num_hidden_layers: int) -> None:
        if self.layer is not None:
            check_depth(self.layer, num_hidden_layers)

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        last = 15 * tokens.num_hidden_layers // 32 if self.layer is None else self.layer
        return tokens.place[:0] if layer == last else None
