"""MustDrop (Liu et al., arXiv 2411.10803): tokens that no text looks at go in four layers; key patches never do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtr.base import Attention, Tokens
from vtr.checks import check_number, check_on_continue, check_positions
from vtr.image import Image, Layout, tokens_at
from vtr.policies.decoder._stages import Staged
from vtr.policies.picture._saliency import saliency
from vtr.policies.picture._tiles import available, best_of
from vtr.settings import register_policy

MEMO, KEYS = "mustdrop", "mustdrop.keys"
SCRIPTS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}
"""Published thresholds: (share of all, of a single text token), by the mean count they leave on LLaVA-1.5."""


def ignored(total: torch.Tensor, strongest: torch.Tensor, share: float, single: float) -> torch.Tensor:
    """bool [n]: tokens that the text as a whole and each of its tokens look at less than a threshold.

    Args:
        total, strongest: float32 [n], attention got of the text rows: their sum, and the most any of them pays.
    """
    return (total < share * total.sum()) & (strongest < single)


@register_policy("mustdrop")
@dataclass
class MustDrop(Staged):
    """Four cuts by threshold: vision tokens that no text looks at go, but the patches the tower looks at most never do.

    MustDrop (arXiv 2411.10803), its second stage: on entering layers 3, 7, 11, 15 of 32 (elsewhere as deep) a token
    goes if the text behind the image pays it less than a share of all attention it pays to vision tokens, and no single
    text token pays it as much as a threshold, mean over heads, in the layer before; unless it is one of the key tokens:
    of each tile the 8 % that the tower's CLS token looks at most in its last layer (of towers without one: that get
    most attention there). Tokens are numbered anew after each cut. How many stay depends on picture and question.
    Differs from the official code: the first stage, which merges windows of like patches inside the vision tower, and
    the third, which also cuts the caches of earlier layers after the prompt, are not done; decoded tokens go on from
    the row's own numbering; at least one token stays; and the thresholds, found for 576 tokens, follow the row's number
    of tokens.

    Args:
        tokens: 192, 128 or 64: the published thresholds that leave so many of LLaVA-1.5's 576 in the mean.
        share: of the attention paid to all vision tokens, below which a token may go; None: as ``tokens`` says.
        single: attention of a single text token, below which it may go; None: as ``tokens`` says.
        keys: the share of each tile's patches that never go; 0: none, and any compressor may stand in front.
        layers: the decoder layers before which the cuts happen, from 1 on; None for the published four.
        scale: how many tokens the thresholds are meant for: in a row of n they are multiplied by ``scale / n``. None:
            they are what they are, as in the official code.
        positions: "reindex" numbers the tokens that stay contiguously after each cut (published code); "keep" leaves
            them their own positions, which models whose positions have several axes (Qwen-VL) need.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    tokens: int = 64
    share: float | None = None
    single: float | None = None
    keys: float = 0.08
    layers: Sequence[int] | None = None
    scale: int | None = 576
    positions: Literal["keep", "reindex"] = "reindex"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    published: ClassVar[tuple[tuple[int, ...], int]] = ((3, 7, 11, 15), 32)

    def __post_init__(self) -> None:
        if self.tokens not in SCRIPTS:
            known = ", ".join(map(str, SCRIPTS))
            raise ValueError(f"tokens={self.tokens!r}: published are {known}; or give share and single yourself")
        for name in ("share", "single"):
            if getattr(self, name) is not None and check_number(getattr(self, name), name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= check_number(self.keys, "keys") <= 1:
            raise ValueError(f"keys={self.keys} is a share of each tile's patches, in [0, 1]")
        if self.scale is not None and check_number(self.scale, "scale") <= 0:
            raise ValueError(f"scale={self.scale} is a number of tokens: above 0, or None for thresholds as they are")
        self.check_layers()
        check_positions(self.positions)
        check_on_continue(self.on_continue)

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("attentions[-1]",) if self.keys else ()

    def asks(self, question: str) -> bool:
        return super().asks(question) and (question != "compress" or self.keys > 0)

    def thresholds(self, total: int) -> tuple[float, float]:
        """(share of all, of a single text token) for a row of ``total`` vision tokens."""
        share, single = SCRIPTS[self.tokens]
        factor = 1.0 if self.scale is None else self.scale / max(total, 1)
        own = share if self.share is None else self.share, single if self.single is None else self.single
        return own[0] * factor, own[1] * factor

    # -- before the decoder ----------------------------------------------------------------------------------------
    def kept_of(self, layout: Layout) -> int:
        """All tokens of an image enter the decoder."""
        return len(layout) if self.keys else super().kept_of(layout)

    def compress(self, image: Image) -> None:
        """Notes the key tokens, and lets all stay."""
        scores, there = saliency(image.tower, -1, without_cls=-1).cpu(), available(image.layout)
        chosen = best_of(scores, [math.ceil(self.keys * n) for n in there.sum(1).tolist()], there)
        keys = torch.zeros(len(image), dtype=torch.bool)
        image.memo.setdefault(MEMO, {})[image.index] = keys.index_fill(
            0, tokens_at(image.layout)[chosen.flatten()], True
        )

    # -- inside it -------------------------------------------------------------------------------------------------
    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        raise ValueError(f"how many tokens {self.spec} leaves depends on picture and question")

    def needs(self, layer: int) -> tuple[Attention, ...] | None:
        return (Attention("behind", over="sum"), Attention("behind", over="max")) if self.acts(layer) else None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        """Which tokens stay. It waits for the device: how many, only that knows."""
        memo = tokens.memo
        if layer == 0 and (noted := memo.get(MEMO)):
            marks = torch.cat([noted[image] for image in sorted(noted)])
            memo[KEYS] = marks.to(tokens.place.device) if len(marks) == len(tokens) else None
        if layer not in self.cuts(tokens.num_hidden_layers) or tokens.scores is None:
            return None
        total, strongest = tokens.scores
        stays = ~ignored(total, strongest, *self.thresholds(tokens.total))
        keys: torch.Tensor | None = memo.get(KEYS)
        stays = stays if keys is None else stays | keys
        best = torch.zeros_like(stays).index_fill(0, total.argmax(), True)
        kept = (stays | (best & ~stays.any())).nonzero()[:, 0]
        if keys is not None:
            memo[KEYS] = keys.index_select(0, kept)
        return kept
