"""SCM, Mini-Monkey's scale compression (Huang et al., ICLR 2025, arXiv 2408.02034): half of the finest tiles stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from vtr.base import LayerAttention, Policy, Tokens, Tries
from vtr.checks import check_depth, check_layer, check_on_continue, check_placement
from vtr.image import Image
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.settings import register_policy

MEMO = "scm"


def groups(tokens: Tokens, which: str) -> list[torch.Tensor]:
    """int64 indices, ascending: of each image the tokens of its finest tiles, or ("all") all of them."""
    found = []
    for image in range(len(tokens.per_image)):
        mine = tokens.image == image
        fine = mine & (tokens.group == 1)
        found.append((fine if which == "detail" and bool(fine.any()) else mine).nonzero().squeeze(1))
    return [group for group in found if len(group)]


@register_policy("scm")
@dataclass
class SCM(Policy):
    """Of the finest tiles of an image the tokens stay that all behind them look at most; coarser tiles stay whole.

    Two layers look ahead. The attention of the second (``layer - 1``), mean over heads, says how much each token of the
    tiles gets from everything behind them: coarser tiles, other images, text. The best half enters ``layer``, at their
    positions. An image of one tile is its own finest. Newline tokens belong to their tile. Tiles that nothing stands
    behind stay whole. The device is waited for once a prompt.

    Huang et al., ICLR 2025, arXiv 2408.02034. The official code then starts again at layer 0 with the shorter prompt,
    numbered anew: ``restart=True``. Its token behind the tiles is always lost, which is a slip
    (``placement="official"``). By default nothing is computed twice, so what was dropped has left its trace in the two
    layers.

    Args:
        keep: tokens of each image's finest tiles that stay: a ratio (float) or a count (int).
        layer: how many layers look ahead; by default the cut is before it. At least 1.
        restart: start again with what stays. The look-ahead's layers are paid twice (``rows[b].tries`` of the report),
            and it works around ``generate`` alone, without beams, streamers or a conversation that goes on.
        group: "detail": the finest tiles. "all": all tiles, the thumbnail too. In a video, whose frames are tiles that
            all count the same, "detail" leaves the first frame whole: take "all".
        placement: "true"; "official" loses the first vision token behind the tiles as well.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.5
    layer: int = 2
    restart: bool = False
    group: Literal["detail", "all"] = "detail"
    placement: Literal["true", "official"] = "true"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """A cut among all tokens; how many of them the finest tiles have depends on the picture."""
        return super().settings_at(share, num_hidden_layers, side, layer) | {"group": "all"}

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(
            self.layer, 1, f"SCM ranks by the attention of the layer before, so layer={self.layer} is too small"
        )
        if not isinstance(self.restart, bool):
            raise TypeError(f"restart must be true or false, got {self.restart!r}")
        if self.group not in ("detail", "all"):
            raise ValueError(f"group={self.group!r}: choose 'detail' or 'all'")
        check_placement(self.placement)
        check_on_continue(self.on_continue)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers, 1)

    def asks(self, question: str) -> bool:
        return question == "resolve" if self.restart else question in ("prune", "attend")

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """As the base class says; of a row with one image.

        Raises:
            ValueError: how many of the tokens are in the finest tiles depends on the picture's size.
        """
        if self.group == "detail" or self.placement == "official":
            raise ValueError(f"how many tokens {self.spec} drops depends on the tiles of a picture: give group='all'")
        whole = 0 if self.restart else self.layer
        return [total] * whole + [keep_count(self.keep, total)] * (num_hidden_layers - whole)

    def attend(self, layer: int, tokens: Tokens, attention: LayerAttention) -> None:
        """Everybody takes part; how much each token of a group gets from behind it goes into the memo."""
        if layer != self.layer - 1:
            return
        found, prompt = [], torch.cat([tokens.place, tokens.text_place]).sort().values
        for group in groups(tokens, self.group):
            behind = prompt[prompt > tokens.place[group[-1]]]
            if len(behind):
                found.append((group, attention.received(behind)[tokens.place[group]]))
        tokens.memo[MEMO] = found

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        return self.left(tokens) if layer == self.layer else None

    def left(self, tokens: Tokens) -> torch.Tensor:
        """int64, ascending: the tokens that stay, by what the memo says."""
        stays = torch.ones(len(tokens), dtype=torch.bool, device=tokens.place.device)
        for group, scores in tokens.memo[MEMO]:
            stays[group] = False
            stays[group[top(scores, keep_count(self.keep, len(group)))]] = True
            if self.placement == "official" and int(group[-1]) + 1 < len(tokens):
                stays[int(group[-1]) + 1] = False
        return stays.nonzero().squeeze(1)

    def resolve(self, tries: Tries) -> list[Policy | None]:
        """Looks ahead with all images at once, and leaves the restart to a policy that compresses."""
        settings = self.config()
        looks = {row: _Look(**{**settings, "restart": False}) for row, found in enumerate(tries.layouts) if found}
        if looks:
            tries.answer(dict(looks))
        chosen = [looks[row].found if row in looks else None for row in range(len(tries.layouts))]
        return [None if found is None else _Left(**settings).of(found) for found in chosen]


@dataclass
class _Look(SCM):
    """Writes down what would stay, and goes on without images. Of one row and one try."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: torch.Tensor | None = None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        if layer != self.layer:
            return None
        self.found = self.left(tokens).cpu()
        return tokens.place[:0]


@dataclass
class _Left(SCM):
    """The row again, from the start, with what was found; of one row and one ``generate``."""

    def of(self, found: torch.Tensor) -> _Left:
        self.found = found
        return self

    def asks(self, question: str) -> bool:
        return question == "compress"

    def compress_row(self, images: Sequence[Image]) -> list[torch.Tensor]:
        bounds = pairwise(torch.tensor([0, *map(len, images)]).cumsum(0).tolist())
        return [self.found[(self.found >= start) & (self.found < end)] - start for start, end in bounds]
