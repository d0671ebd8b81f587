"""TRIM (Song et al., COLING 2025, arXiv 2409.10994): the patches that CLIP finds to be about the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vtr.checks import check_placement
from vtr.image import Image, Layout, Pooled
from vtr.keep import Keep, check_keep, keep_count
from vtr.policies.picture._merge import in_place, members, outliers, summed, tokens_of
from vtr.policies.picture._tiles import Placement, available, best_of, check_official, layout_of
from vtr.policies.question._clip_text import ClipGuided
from vtr.settings import register_policy

TEMPERATURE = 0.02
"""Of the softmax over cosines, where the language model's embeddings take CLIP's place."""


def probabilities(patches: torch.Tensor, text: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """float32 [tiles, n]: softmax over a tile of minus the dot product with the question; low products mean alike.

    Args:
        patches: [tiles, n, C] in CLIP's joint space, not normalised. text: [1, C] or [tiles, C]. there: bool [tiles, n]
            on the CPU; the others get 0.
    """
    logits = -(patches.float() * text.float()[:, None]).sum(-1)
    away = ~there.to(logits.device, non_blocking=True)
    return logits.masked_fill(away, -torch.inf).softmax(-1).nan_to_num()


def kept_and_rest(shares: torch.Tensor, counts: list[int], there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Who stays: bool [tiles, n]; and where each patch of the rest goes: int64 [tiles, n], to the last of its tile's.

    Args:
        shares: float32 [tiles, n] on the CPU. counts: how many of each tile stay. there: bool [tiles, n] on the CPU.
    """
    stays = best_of(shares, counts, there)
    rest = there & ~stays
    last = torch.where(rest, torch.arange(there.shape[1]), -1).amax(1, keepdim=True)
    return stays, torch.where(rest, last, -1)


@register_policy("trim")
@dataclass
class Trim(ClipGuided):
    """Keep the patches of a tile that CLIP finds to be about the question, and the mean of the rest as one more token.

    TRIM (Song et al., COLING 2025, arXiv 2409.10994). Patches and the question are compared in CLIP's joint space; a
    softmax of minus their dot product says how much each patch has to do with it. Outliers (above Q3 + 1.5 · IQR) stay,
    so the number depends on picture and question, and the mean of all others, taken in front of the projector, is one
    more token. LLaVA checkpoints hold no text tower, so it is loaded beside them: :meth:`load_text_tower`. Without one
    patches are compared with the question's words as the language model embeds them, which is ours, not the paper's; a
    warning says so. Questions longer than CLIP's 77 tokens are cut there, as published.

    Here each tile counts its own outliers, tokens stay at their places with all newline tokens, and the mean stands at
    the last patch in it. A tile of which every patch stays has no mean.

    Args:
        keep: tokens of each tile, the mean included: None for as many as stand out, a ratio (float) of those that are
            there, or a count (int).
        placement: "official" repeats the published code: tile after tile, the mean last; all tiles of an image count
            outliers together, padding takes part, and no newline token stays.
        relevance: "clip" wants a text tower; "embeddings" never uses one; "auto" is "clip" where one is loaded.
        text_tower: a CLIP checkpoint, a folder or a name on the hub, that is loaded; None for none.
        question: the question as text, for CLIP; None reads the row's text behind its last image.

    Raises:
        TypeError, ValueError: settings out of range. OSError: there is no such checkpoint.
    """

    keep: Keep | None = None
    placement: Placement = "true"
    relevance: Literal["auto", "clip", "embeddings"] = "auto"
    text_tower: str | None = None
    question: str | None = None

    question_guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        check_placement(self.placement)
        super().__post_init__()

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("hidden_states", "projector", "question", *(() if self.asks_clip else ("tiles",)))

    def kept_of(self, layout: Layout) -> int:
        """How many tokens an image of this layout keeps, newlines included.

        Raises:
            ValueError: keep is None, so it depends on picture and question.
        """
        if self.keep is None:
            return super().kept_of(layout)
        sizes = available(layout, self.placement).sum(1).tolist()
        lines = 0 if self.placement == "official" else int(layout.newline.sum())
        return sum(keep_count(self.keep, n) for n in sizes) + lines

    @torch.no_grad()
    def shares(self, image: Image, there: torch.Tensor) -> torch.Tensor:
        """float32 [tiles, h * w]: how much each patch has to do with the question; of a tile they sum to 1."""
        if self.asks_clip:
            return probabilities(*self.in_joint_space(image, "cut"), there)
        self.tell()
        assert image.tiles is not None and image.question is not None
        words = normalize(image.question.float(), dim=-1).mean(0, keepdim=True)
        return probabilities(normalize(image.tiles.float(), dim=-1), -words / TEMPERATURE, there)

    def counts(self, shares: torch.Tensor, there: torch.Tensor) -> tuple[list[int], list[bool]]:
        """How many patches of each tile stay, and whether there is a mean of the others. shares: on the CPU."""
        sizes = there.sum(1).tolist()
        if self.keep is not None:
            total = [keep_count(self.keep, n) for n in sizes]
            rest = [0 < k < n for k, n in zip(total, sizes, strict=True)]
            return [k - some for k, some in zip(total, rest, strict=True)], rest
        if self.placement == "official":
            share = outliers(shares) / max(shares.numel(), 1)
            found = [int(n * share) for n in sizes]
        else:
            found = [outliers(row[mask]) for row, mask in zip(shares, there, strict=True)]
        return found, [k < n for k, n in zip(found, sizes, strict=True)]

    def compress(self, image: Image) -> Pooled:
        layout, tower = image.layout, image.tower
        check_official(layout, self.placement)
        there = available(layout, self.placement)
        known = self.shares(image, there).cpu()
        counts, has_rest = self.counts(known, there)
        stays, into = kept_and_rest(known, counts, there)
        who = members(torch.where(torch.tensor(has_rest)[:, None], into, -1))
        own, last = stays.flatten().nonzero().squeeze(1), torch.tensor(list(who), dtype=torch.int64)
        assert tower is not None
        states = tower.hidden_states()
        kept = states.flatten(0, 1).index_select(0, own.to(states.device))
        sums, sizes = summed(states, into.to(states.device), last.to(states.device))
        features = tower.project(torch.cat([kept, (sums / sizes).to(states.dtype)]))
        sources, cells = [[i] for i in own.tolist()] + list(who.values()), torch.cat([own, last])
        if self.placement != "official":
            return in_place(image, cells, features, sources)
        n, made = there.shape[1], tokens_of(layout, sources)
        order = torch.cat([own // n * 2, last // n * 2 + 1]).argsort(stable=True)
        features = features.index_select(0, order.to(features.device))
        return Pooled(features, [made[i] for i in order.tolist()], layout_of(layout, cells[order]))
