"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): tokens about the question that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtr.checks import check_number
from vtr.image import Image
from vtr.policies.picture._greedy import determinant, only, unit
from vtr.policies.picture._tiles import Tilewise, first_of
from vtr.policies.question._clip_text import ClipGuided, Segments
from vtr.settings import register_policy


def likeness(units: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """float32 [tiles, n]: the mean cosine of ``units`` [tiles, n, width], of length 1, with texts [m, width]; 0 without
    any."""
    if not len(texts):
        return torch.zeros_like(units[..., 0])
    return torch.matmul(units, unit(texts).mean(0)[:, None])[..., 0]


def scaled(goal: torch.Tensor, floor: float, there: torch.Tensor | None = None) -> torch.Tensor:
    """``(goal + floor − min) / (max − min)`` over all tiles together, [tiles, n]; 1 where all are equal, 0 where no
    token is."""
    away = None if there is None else ~there.to(goal.device, non_blocking=True)
    lowest = goal.amin() if away is None else goal.masked_fill(away, torch.inf).amin()
    span = (goal.amax() if away is None else goal.masked_fill(away, -torch.inf).amax()) - lowest
    tiniest = 0.0 if floor else 1e-6
    out = torch.where(span > tiniest, (goal - lowest + floor) / span, 1.0)
    return out if away is None else out.masked_fill(away, 0.0)


@register_policy("cdpruner")
@dataclass
class CDPruner(Tilewise, ClipGuided):
    """Of every tile, keep tokens that are about the question and differ from each other.

    CDPruner, Zhang et al., NeurIPS 2025, arXiv 2506.10967: a determinantal point process whose kernel is the cosine of
    the tokens that enter the decoder, times the relevance of both; its greedy MAP by an incremental Cholesky
    factorisation. How relevant a token is, CLIP says: minus the cosine of its patch and the question in CLIP's joint
    space (in the layer that LLaVA uses, low means alike). LLaVA checkpoints hold no text tower, so it is loaded beside
    them: :meth:`load_text_tower`. Without one (and for towers that are not CLIP's) relevance is that of OpenVINO GenAI:
    the cosine of a token and the question's words as the language model embeds them; a warning says so. The kernel is
    the paper's, to which OpenVINO GenAI's code falls back.
    Unlike the official code, relevance is scaled over one image, not over all of a call; newline tokens stay, padding
    takes no part; and if tokens run out that still add something, the most relevant others follow.

    Args:
        keep: patches of each tile that stay: a ratio (float; above 0 at least one), or a count (int).
        placement: "true" leaves every token where it was; "official" repeats the published code: no unpadding, no
            newline tokens, and long questions cut as there.
        relevance: "clip" wants a text tower; "embeddings" never uses one; "auto" is "clip" where one is loaded.
        theta: in [0, 1), weight of relevance (``r ← exp(r · theta / (2 (1 − theta)))``; 0 is diversity alone). None:
            r as it is for "clip", as shipped; 0.5 for "embeddings".
        text_tower: a CLIP checkpoint, a folder or a name on the hub, that is loaded; None for none.
        question: the question as text, for CLIP; None reads the row's text behind its last image.

    Raises:
        TypeError, ValueError: settings out of range. OSError: there is no such checkpoint.
    """

    relevance: Literal["auto", "clip", "embeddings"] = "auto"
    theta: float | None = None
    text_tower: str | None = None
    question: str | None = None

    question_guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Tilewise.__post_init__(self)
        if self.theta is not None and not 0 <= check_number(self.theta, "theta") < 1:
            raise ValueError(f"theta={self.theta} must lie in [0, 1): 0 is diversity alone")
        ClipGuided.__post_init__(self)

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("tiles", "question", *(("hidden_states",) if self.asks_clip else ()))

    @torch.no_grad()
    def relevance_of(self, image: Image, units: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
        """float32 [tiles, n], at least 0: how much each token has to do with the question.

        Args:
            units: the image's tiles, every token of length 1.
        """
        clip, theta = self.asks_clip, self.theta
        if clip:
            r = scaled(self._unlike_the_question(image), 1e-6, there)
        else:
            self.tell()
            assert image.question is not None
            r = scaled(likeness(units, image.question), 0.0, there)
            image.flops += 2 * units.numel() * bool(len(image.question))
            theta = 0.5 if theta is None else theta
        if theta is None:
            return r
        r = torch.exp(r * theta / (2 * (1 - theta)))
        return r if there is None else r * there.to(r.device, non_blocking=True)

    def _unlike_the_question(self, image: Image) -> torch.Tensor:
        segments: Segments = "official" if self.placement == "official" else "whole"
        patches, text = self.in_joint_space(image, segments)
        image.flops += 2 * patches.numel()
        return -likeness(unit(patches), text)

    @torch.no_grad()
    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tiles is not None
        some, units = only(there), unit(image.tiles)
        picks, flops = determinant(units, self.relevance_of(image, units, some), max(counts), some)
        image.flops += flops
        return first_of(picks, counts, there.shape[1])
