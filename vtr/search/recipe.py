"""FitPrune's recipe for a model (Ye et al., AAAI 2025, arXiv 2409.10197): how many tokens may go after each layer.

From the official code: after each layer those tokens go that are among the least looked at both by the vision tokens
and by the text, as long as either sum keeps a share 1 - alpha of what it is in the unreduced model; alpha is found by
bisection, so that the FLOPs are what is wanted. Ours: a recipe is in shares of a prompt's tokens, not in counts of 576;
bisection goes on to 0.001; the recipe is the last one that saves enough, not the last one tried.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtr import chat
from vtr.base import Attention, Policy, Tokens
from vtr.engine.install import patch_of
from vtr.engine.trace import Geometry
from vtr.policies.decoder.fitprune import FitPrune
from vtr.search.data import Example, examples
from vtr.search.found import RECORD_NAME

FINE = 0.001
"""How near to each other the alphas come."""


@dataclass(frozen=True)
class Recipe:
    """What FitPrune does to a model.

    Attributes:
        scheme: for each layer the share of the vision tokens that goes behind it.
        record: JSON data on how it was found.
    """

    scheme: Sequence[float]
    record: dict[str, Any] = field(default_factory=dict)

    def policy(self) -> FitPrune:
        """The policy it was made for."""
        return FitPrune(scheme=list(self.scheme))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write policy and record; ``vtr.FitPrune.from_pretrained(folder)`` reads the policy back."""
        folder = Path(folder)
        self.policy().save_pretrained(folder)
        (folder / RECORD_NAME).write_text(json.dumps({"scheme": list(self.scheme), **self.record}, indent=1) + "\n")


@dataclass
class _Look(Policy):
    """Keeps everything, and notes who is looked at.

    Attributes:
        seen: of each layer but the last, float32 [2, n] on the CPU: attention from vision tokens, and from text.
    """

    seen: list[torch.Tensor] = field(default_factory=list)

    def needs(self, layer: int) -> tuple[Attention, Attention] | None:
        return FitPrune().needs(layer)

    def prune(self, layer: int, tokens: Tokens) -> None:
        if tokens.scores is not None:
            self.seen.append(torch.stack(tokens.scores).float().cpu())


def fitprune(model: Any, processor: Any, data: Any, *, reduction: float = 0.6, progress: bool = True) -> Recipe:
    """The recipe that saves a share of the decoder's prefill FLOPs and takes least attention away.

    Args:
        model: patched. data: some hundred questions, see :func:`vtr.search.examples`.
        reduction: the share to be saved, between 0 and 1.

    Raises:
        ValueError, TypeError: settings or data that cannot work; a share that no recipe saves.
    """
    if isinstance(reduction, bool) or not isinstance(reduction, float) or not 0 < reduction < 1:
        raise ValueError(f"reduction={reduction!r}: a share of the FLOPs, a float between 0 and 1")
    model = patch_of(model).model
    asked = examples(data)
    with tqdm(asked, desc="fitprune", unit=" prompts", disable=not progress) as bar:
        looked, sizes = zip(*[_looked_at(model, processor, one) for one in bar], strict=True)
    depth, geometry = patch_of(model).decoder.depth, patch_of(model).decoder.geometry
    full = flops(geometry, sizes, [0.0] * depth)
    low, high = 0.0, 1.0
    best = recipe_of(looked, 1.0, depth)
    if flops(geometry, sizes, best) > (1 - reduction) * full:
        least = 1 - flops(geometry, sizes, best) / full
        raise ValueError(f"reduction={reduction}: without any vision token behind layer 0, {least:.3f} is saved")
    while high - low > FINE:
        alpha = (low + high) / 2
        scheme = recipe_of(looked, alpha, depth)
        if flops(geometry, sizes, scheme) <= (1 - reduction) * full:
            best, high = scheme, alpha
        else:
            low = alpha
    record = {
        "method": "fitprune", "reduction": reduction, "saved": 1 - flops(geometry, sizes, best) / full, "alpha": high,
        "questions": len(asked), "sizes": list(sizes), "pictures": sorted({one.picture for one in asked}),
    }  # fmt: skip
    return Recipe(best, record)


def recipe_of(looked: Sequence[Sequence[torch.Tensor]], alpha: float, depth: int) -> list[float]:
    """For each layer the mean share of tokens that may go behind it, rounded down to four digits.

    Args:
        looked: of each question the attention of each layer but the last, float32 [kinds, n].
        alpha: the share of each kind that may be lost in a layer.
    """
    shares = torch.zeros(depth, dtype=torch.float64)
    for one in looked:
        stays = torch.ones(one[0].shape[1], dtype=torch.bool)
        for layer, attention in enumerate(one):
            goes = stays.clone()
            for kind in attention:
                goes &= _least(kind.double(), stays, alpha)
            shares[layer] += float(goes.sum()) / len(stays) / len(looked)
            stays &= ~goes
    return [int(share * 1e4 + 1e-6) / 1e4 for share in shares.tolist()]


def _least(kind: torch.Tensor, stays: torch.Tensor, alpha: float) -> torch.Tensor:
    """bool [n]: the least looked at of those that stay, as long as the rest keeps 1 - alpha of the whole sum."""
    order = kind.masked_fill(~stays, torch.inf).argsort(stable=True)[: int(stays.sum())]
    sums = kind[order].cumsum(0)
    may = kind[stays].sum() - sums >= kind.sum() * (1 - alpha) - 1e-12
    return torch.zeros_like(stays).index_fill(0, order[: int(may.sum())], True)


def flops(geometry: Geometry, sizes: Sequence[tuple[int, int]], scheme: Sequence[float]) -> float:
    """Decoder prefill FLOPs of prompts of so many (vision, text) tokens, as :attr:`vtr.Report.prefill_flops` counts."""
    policy, total = FitPrune(scheme=list(scheme)), 0
    for vision, text in sizes:
        counts = policy.entering(geometry.num_hidden_layers, vision)
        for linear, count in zip(geometry.linear_flops, counts, strict=True):
            n = count + text
            total += linear * n + 4 * geometry.heads * geometry.head_dim * n * n
    return total


@torch.inference_mode()
def _looked_at(model: Any, processor: Any, one: Example) -> tuple[list[torch.Tensor], tuple[int, int]]:
    look = _Look()
    inputs = chat.encode(processor, [one.question], [one.image]).to(model.device, model.dtype)
    model(**inputs, policy=look, use_cache=False, logits_to_keep=1)
    if not look.seen:
        raise ValueError(f"{one.question!r} has no vision tokens to look at")
    vision = look.seen[0].shape[1]
    return look.seen, (vision, int(inputs["attention_mask"].sum()) - vision)
