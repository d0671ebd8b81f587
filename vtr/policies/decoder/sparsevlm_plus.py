"""SparseVLM+, v2.0 of SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): some heads rate, without rope's pull."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from vtr.base import Attention, Best, Tokens
from vtr.checks import check_count
from vtr.policies.decoder._sparse import best_heads, gravity
from vtr.policies.decoder.sparsevlm import SparseVLM
from vtr.settings import register_policy


@register_policy("sparsevlm-plus")
@dataclass
class SparseVLMPlus(SparseVLM):
    """Three cuts rated as SparseVLM rates, by the heads with most to say, without rope's pull; nothing is put together.

    SparseVLM+ (v2.0 of the official code): attention is divided by what rope alone makes of two places, the 14 heads
    that then pay most count. Far away rope's part comes near to 0, and the division would
    blow up noise: it is bounded by a tenth of what it is at the same place (ours; LLaVA-1.5 does not come so far).
    ``placement="official"`` is without that bound, and cuts at least one token.

    Args:
        retain, keeps, layers, positions, seed, placement, on_continue: as SparseVLM has them; nothing is random here.
        heads: how many heads count, at most.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    positions: Literal["keep", "reindex"] = "keep"
    heads: int = 14

    lists: ClassVar[Mapping[int, tuple[int, ...]]] = {
        192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.heads, "heads", 1, 4096)

    def made_of(self, gone: int) -> int:
        return 0

    def request(self) -> Attention:
        return Attention("raters", heads="each", over="each")

    def cut(self, tokens: Tokens, count: int) -> Best:
        rows = tokens.memo["raters"]
        cosine, sine = tokens.text_rope
        pull = gravity((cosine[rows], sine[rows]), tokens.rope, None if self.placement == "official" else 0.1)
        tokens.flops += 2 * pull.numel() * cosine.shape[-1]
        return Best(best_heads(tokens.scores / pull, min(self.heads, len(tokens.scores))), count)
