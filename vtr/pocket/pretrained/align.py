"""The first half of training: the projector alone learns to make a thing's tokens look like its name and its place.

No decoder runs, and the tower sees each canvas once. The projector is a layer norm and a linear map; behind them lies
GELU where it is straight, then a scale. Its target are the decoder's own words: what the decoder can read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .canvases import Canvas
from .drawings import things

SHARP_TOKENS, SHARP_THINGS = 15.0, 20.0
"""What cosines are multiplied with before the softmax over names: of single tokens, of the mean over a thing's."""
SMOOTHING = 0.1
LOUD = 1.3
"""How much further than words from the middle of all names the projector's tokens are put: they are unsure."""
BENT = 4.0
"""Where GELU is straight: around it the projector is a linear map."""
PLACED = 0.9
"""How far "top" or "bottom", and "left" or "right", move a token."""
PLACES = (("top", "bottom"), ("left", "right"))
SPREAD = 0.11
"""What a hidden unit of the projector is multiplied with behind GELU; it makes their spread about 1."""


@dataclass(frozen=True)
class Seen:
    """Canvases as the tower gives them.

    Attributes:
        features: float16 [canvases, tokens, 4 · width]. owners: int64 [canvases, tokens], the number of the thing
            that covers a token (-1: none).
    """

    features: Tensor
    owners: Tensor


def owners(canvas: Canvas, across: int) -> Tensor:
    """Of each token, the number among ``things()`` of what covers a third of it at least; -1: nothing does."""
    found = torch.full((across, across), -1)
    for place, thing in canvas.shown.items():
        inked = torch.from_numpy(canvas.inked[place]).float()
        found[F.adaptive_avg_pool2d(inked[None], across)[0] > 1 / 3] = things().index(thing)
    return found.flatten()


def pooled(tokens: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """The mean token of every thing on every canvas, [things, width], and the things' numbers."""
    canvas = torch.arange(len(owned))[:, None].expand_as(owned)
    there = owned >= 0
    keys, which = torch.unique(canvas[there] * len(things()) + owned[there], return_inverse=True)
    sums = tokens.new_zeros(len(keys), tokens.shape[-1]).index_add(0, which, tokens[there])
    return sums / which.bincount(minlength=len(keys))[:, None], keys % len(things())


class Map(nn.Module):
    """A layer norm and a linear map, from what the tower gives to what the decoder reads."""

    words: Tensor
    middle: Tensor

    def __init__(self, width: int, words: Tensor) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, words.shape[1])
        self.register_buffer("words", words)
        self.register_buffer("middle", words.mean(0))
        nn.init.normal_(self.linear.weight, std=0.01)
        with torch.no_grad():
            self.linear.bias.copy_(self.middle)

    def forward(self, features: Tensor, drop: float = 0.0) -> Tensor:
        out: Tensor = self.linear(F.dropout(self.norm(features.float()), drop))
        return out

    def near(self, tokens: Tensor) -> Tensor:
        """Cosines of tokens with all names, seen from the names' middle."""
        return F.normalize(tokens - self.middle, dim=-1) @ F.normalize(self.words - self.middle, dim=1).T

    def loss(self, features: Tensor, owned: Tensor) -> Tensor:
        """Names told by single tokens and by the mean of a thing's tokens, and the distance to the words."""
        tokens, there = self(features, drop=0.3), owned >= 0
        means, which = pooled(tokens, owned)
        told = F.cross_entropy(SHARP_TOKENS * self.near(tokens)[there], owned[there], label_smoothing=SMOOTHING)
        told = told + F.cross_entropy(SHARP_THINGS * self.near(means), which, label_smoothing=SMOOTHING)
        wanted = torch.where(there[..., None], self.words[owned.clamp_min(0)], self.middle)
        spread = (self.words - self.middle).norm(dim=1).mean() ** 2
        return told + 0.5 * (tokens - wanted).square().sum(-1).mean() / spread

    @torch.no_grad()
    def put_into(self, projector: Any, seen: Seen, ways: Tensor) -> None:
        """Make InternVL's projector this map, and a token say where it lies.

        Args:
            seen: canvases to learn from how features tell a place. ways: [2, width], from "bottom" to "top" and from
                "right" to "left" in the decoder's words.
        """
        norm, first, second = projector.layer_norm, projector.linear_1, projector.linear_2
        norm.load_state_dict(self.norm.state_dict())
        place, middle = placed(self.norm(seen.features.float()))
        ways = PLACED * F.normalize(ways, dim=1)
        first.weight.copy_((self.linear.weight * LOUD + ways.T @ place) / SPREAD)
        first.bias.copy_(((self.linear.bias - self.middle) * LOUD - ways.T @ place @ middle) / SPREAD + BENT)
        second.weight.copy_(torch.eye(len(second.weight)) * SPREAD)
        second.bias.copy_(self.middle - BENT * SPREAD)


def placed(features: Tensor) -> tuple[Tensor, Tensor]:
    """How features tell where a token lies, by ridge regression: map [2, width] and middle [width], so that
    ``map @ (x - middle)`` is about 1 or -1 for the upper or lower half, and for the left or right one.

    Args:
        features: float32 [canvases, tokens, width], tokens of a square grid line by line.
    """
    across = math.isqrt(features.shape[1])
    at = torch.arange(features.shape[1])
    half = torch.stack([at // across, at % across], 1) < across / 2
    wanted = (2.0 * half - 1).repeat(len(features), 1)
    flat = features.flatten(0, 1)
    middle = flat.mean(0)
    spread = (flat - middle).T @ (flat - middle) + 0.02 * len(flat) * torch.eye(flat.shape[1])
    return torch.linalg.solve(spread.double(), ((flat - middle).T @ wanted).double()).float().T, middle


def align(
    seen: Seen, held: Seen, words: Tensor, epochs: int = 8, rate: float = 1e-3, say: Callable[[str], None] = print
) -> Map:
    """Train a map.

    Args:
        seen: canvases to learn from. held: of another style, to say how it goes. words: float32 [things, width], the
            decoder's embedding of each name (the mean of its tokens).
    """
    model = Map(seen.features.shape[-1], words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = math.ceil(len(seen.owners) / 32) * epochs
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    for epoch in range(epochs):
        for some in torch.randperm(len(seen.owners)).split(32):
            model.loss(seen.features[some], seen.owners[some]).backward()
            optimizer.step()
            slower.step()
            optimizer.zero_grad()
        single, whole = right(model, held)
        say(f"projector, epoch {epoch + 1}: the right name is nearest to {single:.0%} of tokens, {whole:.0%} of things")
    return model


@torch.no_grad()
def right(model: Map, seen: Seen) -> tuple[float, float]:
    """How often the nearest name is the right one: of single tokens, of the mean of a thing's tokens."""
    tokens, there = model(seen.features), seen.owners >= 0
    means, which = pooled(tokens, seen.owners)
    single = (model.near(tokens).argmax(-1) == seen.owners)[there].float().mean()
    return float(single), float((model.near(means).argmax(1) == which).float().mean())


def joined(parts: Sequence[Seen]) -> Seen:
    """Several as one."""
    return Seen(torch.cat([one.features for one in parts]), torch.cat([one.owners for one in parts]))
