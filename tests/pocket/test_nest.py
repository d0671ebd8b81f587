"""The M3 objective, and the stage of the pocket model's training that uses it."""

from __future__ import annotations

import random

import pytest
import torch

import vtr
from vtr.chat import encode
from vtr.pocket import nest
from vtr.pocket import scenes as S
from vtr.pocket.internvl import model as internvl
from vtr.pocket.language import Batch
from vtr.pocket.model import answer_states, pixels_of
from vtr.pocket.model import encode as words_of
from vtr.training.m3 import backward_nested


def test_gradients_are_those_of_the_mean_of_the_losses() -> None:
    torch.manual_seed(0)
    tower, head = torch.nn.Linear(5, 7), torch.nn.Linear(7, 1)
    pictures = torch.randn(4, 36, 5)

    def loss_at(features: torch.Tensor, scale: int) -> torch.Tensor:
        return head(features.unflatten(1, (scale, -1)).mean(2).relu()).square().mean()

    scales = [36, 9, 1]
    features = tower(pictures)
    whole = torch.stack([loss_at(features, scale) for scale in scales])
    whole.mean().backward()
    want = [p.grad.clone() for p in (*tower.parameters(), *head.parameters())]
    tower.zero_grad(), head.zero_grad()
    runs = []
    tower.register_forward_hook(lambda *_: runs.append(1))
    losses = backward_nested(tower(pictures), scales, loss_at)
    assert list(losses) == scales and len(runs) == 1
    torch.testing.assert_close(torch.tensor(list(losses.values())), whole.detach())
    for parameter, grad in zip((*tower.parameters(), *head.parameters()), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_features_that_do_not_learn() -> None:
    head = torch.nn.Linear(5, 1)
    backward_nested(torch.randn(3, 5), [2, 1], lambda features, scale: head(features).mean() * scale)
    torch.testing.assert_close(head.bias.grad, torch.tensor([1.5]))
    for scales in ([], [9, 9]):
        with pytest.raises(ValueError, match="once"):
            backward_nested(torch.randn(3, 5), scales, lambda features, scale: features.mean())


SHOWN = [
    *(("llava-next", nest.LLAVA_NEXT, tokens, 0, 2e-4) for tokens in nest.SCALES),
    *(("internvl", internvl.SHOWING, tokens, 2, 5e-4) for tokens in internvl.SCALES),
]
"""Family, its showing, tokens a tile, words around a picture, and how much logits may differ."""


@pytest.mark.parametrize(("family", "showing", "tokens", "frame", "exact"), SHOWN)
@pytest.mark.parametrize("size", S.SIZES)
def test_the_stage_trains_what_the_policy_runs(
    size: tuple[int, int], family: str, showing: nest.Showing, tokens: int, frame: int, exact: float
) -> None:
    """Logits of the training forward are those of the patched model under Matryoshka."""
    model, processor = vtr.pocket.load(family)
    scene = S.make_scene(random.Random(3), "val", size)
    question = S.questions(scene, random.Random(3), 1)[0].text
    pixels = pixels_of(torch.from_numpy(S.tiles_of(scene.image)))[None]
    ids = torch.tensor([words_of(question)])
    none = torch.zeros_like(ids)
    batch = Batch(pixels, size[1] // S.TILE, size[0] // S.TILE, ids, none, none, none, none)
    with torch.inference_mode():
        vision = showing.at_scale(model, showing.project(model, pixels), batch, tokens)
        where = torch.arange(1, vision.shape[1] + 1)[None]
        places = torch.arange(vision.shape[1] + 1, vision.shape[1] + 1 + ids.shape[1])[None]
        trained = model.lm_head(answer_states(model, vision, where, ids, places, none))[0, -1]
        vtr.patch(model)
        ran = model(**encode(processor, [question], [scene.image]), policy=vtr.Matryoshka(tokens)).logits[0, -1]
    assert vtr.report(model).rows[0].vision_tokens[0] == vision.shape[1] - frame
    torch.testing.assert_close(trained, ran, rtol=0, atol=exact)
