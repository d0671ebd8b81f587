"""Policies with random weights for the tiny models, and what they do, written without the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtr
from tests import oracle

WIDTH = 48
"""The tiny models' hidden_size."""


def randomized(policy: Any, layers: int, seed: int) -> Any:
    """``policy`` with random weights large enough to decide one way and the other."""
    policy.start(WIDTH, layers)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5, generator=made)
            elif len(parameter) > 2:
                parameter.add_(torch.randn(parameter.shape, generator=made) * 0.1)
    policy.module.requires_grad_(False).eval()
    return policy


def pmod(layers: int = 5, seed: int = 0, **settings: Any) -> vtr.PMoD:
    return randomized(vtr.PMoD(**{"high": 0.9, **settings}), layers, seed)


def dynamic(layers: int = 5, seed: int = 0, **settings: Any) -> vtr.DynamicLLaVA:
    small = {"keep": 0.4, "width": 16, "heads": 2, "inner": 24, "blocks": 2}
    return randomized(vtr.DynamicLLaVA(**{**small, **settings}), layers, seed)


@dataclass
class Said:
    """What the slow reference says of one row: logits [n, vocab], slots of vision tokens that enter each layer."""

    logits: Tensor
    kept: list[list[int]]
    held: list[tuple[int, int]]
    """Keys that a cache of each layer holds: at least, at most."""


@torch.no_grad()
def reference(model: Any, row: oracle.Row, policy: Any, images: list[int], asked: int) -> Said:
    """One row through all layers at full length, whoever is dropped hidden from the others.

    images: tokens of each image. asked: how many tokens are the prompt; the ones behind were decoded.
    """
    config, text = model.config.text_config, model.get_decoder()
    x, n, vision = row.embeds, len(row.vision), row.slots
    positions, alive, kept = torch.arange(n), torch.ones(n).bool(), []
    held: list[tuple[int, int]] = []
    positions = positions if row.positions is None else row.positions
    for depth, layer in enumerate(text.layers):
        here, weights = vision, None
        if isinstance(policy, vtr.PMoD):  # who went around the layer before is back
            alive = torch.ones(n).bool()
        if isinstance(policy, vtr.PMoD) and (ratio := policy.layers(len(text.layers))[depth]) is not None:
            z = policy.module.routers[str(depth)](x[vision])[:, 0]  # type: ignore[union-attr,index]
            act, scale, bias = policy.norm.split("_")
            w = float(scale) * getattr(torch, act)(z) + float(bias)
            weights = torch.ones(n).index_copy(0, torch.tensor(vision).long(), w)
            here = oracle.best(weights, vision, max(int(len(vision) * ratio), int(ratio > 0)), None)
            alive = ~row.vision
            alive[here] = True
        elif isinstance(policy, vtr.DynamicLLaVA) and depth >= policy.layer:
            if depth == policy.layer:
                alive, stay = _decided(policy, row, x, images, asked)
            here = stay
        kept.append(here)
        forgotten = ~alive
        mask = oracle.hidden_keys(alive, positions, oracle.window(config, depth))
        after, _ = oracle.block(layer, x, mask, positions, config, weights)
        around = x if weights is None else x * weights[:, None]
        x = torch.where((forgotten & row.vision)[:, None], around, after)
        if depth < len(row.behind):
            x = x.index_add(0, row.vision.nonzero().squeeze(1), row.behind[depth])
        window, most = oracle.window(config, depth), int(alive.sum())
        least = int((alive & (torch.arange(n) > n - (window or 10**6))).sum())  # what the next token can see
        forgets = isinstance(policy, vtr.DynamicLLaVA)  # a row's last word may be forgotten, and with it how far it got
        held.append((least, most if forgets else least))
    standing = alive if isinstance(policy, vtr.DynamicLLaVA) else torch.ones(n).bool()
    standing = standing | ~row.vision  # a forgotten word still says its own next one
    return Said(model.lm_head(oracle.norm(text.norm, x))[oracle.standing_in(standing)], kept, held)


def _decided(
    policy: vtr.DynamicLLaVA, row: oracle.Row, x: Tensor, images: list[int], asked: int
) -> tuple[Tensor, list[int]]:
    """Who stays from the policy's layer on ([n] bool), and the slots of its vision tokens."""
    module: Any = policy.module
    stay, start = [], 0
    for count in images:
        mine = row.slots[start : start + count]
        score = module.image_score_predictor(x[None, mine])[0].log_softmax(-1)[:, 0]
        spread = torch.zeros(len(x)).index_copy(0, torch.tensor(mine), score)
        share = max(int(count * policy.keep), int(policy.keep > 0))  # of a ratio, which leaves one at least
        keep = min(policy.keep, count) if isinstance(policy.keep, int) else share
        stay += oracle.best(spread, mine, keep, None)
        start += count
    alive = ~row.vision
    alive[stay] = True
    said = module.output_text_score_predictor(x[asked:])
    alive[asked:] = said[:, 0] > said[:, 1]
    return alive, sorted(stay)
