"""Golden numbers of methods that keep patches of every tile: pictures of given tiles, runs of a tiny LLaVA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout

import vtr
from tests import official
from tests.seen import seen
from vtr.image import Image, Layout, Tower


def layout_of(case: dict[str, Any], pixels: int = 14) -> Layout:
    """Of a case with ``side``, ``image_size_wh`` and ``grid_wh`` (None: a single tile)."""
    if case["grid_wh"] is None:
        return tile_layout(case["side"], case["side"])
    (width, height), (columns, rows) = case["image_size_wh"], case["grid_wh"]
    return anyres_layout((height, width), ((rows * pixels, columns * pixels),), pixels, case["side"])


def mask_of(image: Image, answer: Any) -> Tensor:
    """bool [n]: which patches of an image of one tile are kept, all of them as they were."""
    assert isinstance(answer, Tensor) and len(answer.unique()) == len(answer)
    return torch.zeros(len(image), dtype=torch.bool).index_fill(0, answer, True)


def each_tile(policy: vtr.Policy, features: Tensor, tower: Callable[[int], Tower]) -> Tensor:
    """bool [tiles, n]: what the policy keeps of tiles that are images of their own."""
    images = [seen(features[i : i + 1], tower=tower(i)) for i in range(len(features))]
    return torch.stack([mask_of(image, policy.compress(image)) for image in images])


@functools.cache
def tiny_model(method: str, anyres: bool) -> Any:
    e2e = official.meta(method)["e2e"]
    return official.model(method, e2e["config"], e2e["clip"]["num_attention_heads"], anyres)


def inputs_of(method: str, run: str) -> tuple[Any, dict[str, Tensor]]:
    """(model, what it takes) for a run of ``e2e``."""
    e2e, size = official.tensors(method, "e2e"), official.meta(method)["e2e"]["runs"][run]["image_size"]
    pixels, model = e2e[run.split(".")[0] + ".pixel_values"], tiny_model(method, size is not None)
    images = {"pixel_values": pixels} if size is None else official.anyres(pixels, size)
    return model, official.prompt(model, e2e["input_ids"], images)


def check_run(method: str, run: str, policy: vtr.Policy) -> None:
    """What the decoder gets, the prompt's last logits and the answer are the official ones."""
    model, inputs = inputs_of(method, run)
    want = {k.removeprefix(run + "."): v for k, v in official.tensors(method, "e2e").items() if k.startswith(run + ".")}
    embeds, logits = official.run(model, inputs, policy)
    assert embeds.shape == want["embeds"].shape
    official.close(embeds, want["embeds"])
    official.close(logits[:, -1, : want["logits"].shape[1]], want["logits"], 1e-4)
    answer = want["greedy"][0, 1:].tolist()
    assert official.greedy(model, inputs, policy, len(answer)) == answer


def runs_of(method: str) -> Any:
    return pytest.mark.parametrize("run", official.meta(method)["e2e"]["runs"])
