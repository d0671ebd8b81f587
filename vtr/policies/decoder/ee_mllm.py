"""EE-MLLM (Ma et al., arXiv 2408.11795): composite attention, in which vision tokens are keys and never queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vtr.base import Attend, LayerAttention, Policy, Tokens
from vtr.checks import check_count, check_depth
from vtr.keep import keep_count
from vtr.settings import register_policy


@register_policy("ee-mllm")
@dataclass
class EEMLLM(Policy):
    """In some layers vision tokens ask nobody: text sees them as ever, they get nothing of the layer but its MLP.

    No token is gone and the cache is whole; what is saved is the vision tokens' queries, their share of the attention
    and its output projection. Blind to the question. With 2,880 vision and 256 text tokens a layer of a 7B model costs
    0.761 of a full one, with 576 vision tokens 0.866: the MLP stays, so the saving grows with the square of their
    number.

    Ma et al., arXiv 2408.11795. No official code can be had; the definition is the one that gives the paper's costs to
    the digit. The paper trains the model for it. Its training-free variant ("-F") does not say which layers: here the
    deeper half. Newline tokens inside an image count as vision, text between images as text.

    Args:
        layers: which decoder layers: "all", a list, or the share of the layers (float) that the deepest make up.
        mode: what a vision token sees in them: "none". The papers' texts also allow itself alone ("diagonal") or itself
            and the text in front ("text"), which agree with neither the costs nor the code's peers; refused.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    layers: float | Sequence[int] | Literal["all"] = 0.5
    mode: Literal["none"] = "none"

    def __post_init__(self) -> None:
        if self.mode != "none":
            raise ValueError(f"mode={self.mode!r}: vision tokens can only see nothing at all, choose 'none'")
        if isinstance(self.layers, (list, tuple)):
            self.layers = list(self.layers)
            for layer in self.layers:
                check_count(layer, "layers", 0, 2**16)
        elif isinstance(self.layers, bool) or not isinstance(self.layers, (float, str)):
            raise TypeError(f"layers={self.layers!r}: give 'all', a list of layers, or a share of them (float)")
        elif isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f"layers={self.layers!r}: choose 'all', a list of layers, or a share of them (float)")
        elif isinstance(self.layers, float) and not 0 <= self.layers <= 1:
            raise ValueError(f"layers={self.layers!r}: a share of the layers lies in [0, 1]")

    def among(self, layer: int, num_hidden_layers: int) -> bool:
        """Whether the attention of ``layer`` is composite."""
        if isinstance(self.layers, float):
            return layer >= num_hidden_layers - keep_count(self.layers, num_hidden_layers)
        return self.layers == "all" or layer in self.layers

    def check(self, num_hidden_layers: int) -> None:
        if isinstance(self.layers, list):
            for layer in self.layers:
                check_depth(layer, num_hidden_layers)

    def attend(self, layer: int, tokens: Tokens, attention: LayerAttention) -> Attend | None:
        if not self.among(layer, tokens.num_hidden_layers):
            return None
        return Attend(asks=tokens.place[:0])
