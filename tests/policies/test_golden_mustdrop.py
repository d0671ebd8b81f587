"""MustDrop against the numbers of the official code (liuting20/MustDrop)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from vtr.integrations.llava import tile_layout

import vtr
from tests import official
from tests.official import close
from tests.policies.stages import prompt_of, text_model, tokens_of
from tests.seen import GivenTower, seen
from vtr.image import Image
from vtr.policies.decoder._windows import merged_windows
from vtr.policies.decoder.mustdrop import MEMO

META = official.meta("mustdrop")


def numbers(name: str, case: str) -> dict[str, Tensor]:
    prefix = case + "."
    return {k.removeprefix(prefix): v for k, v in official.tensors("mustdrop", name).items() if k.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- stage 1
@pytest.mark.parametrize("case", META["merge"], ids=lambda c: c["case"])
def test_merged_windows(case: dict[str, Any]) -> None:
    given = numbers("merge", case["case"])
    merged = merged_windows(given["hidden"][:, 1:], case["threshold"])
    assert merged.shape[1] + 1 == case["length"]
    close(torch.cat([given["hidden"][:, :1], merged], 1), given["merged"])


def test_patches_that_are_no_whole_windows() -> None:
    with pytest.raises(ValueError, match="whole 3 × 3 windows"):
        merged_windows(torch.zeros(1, 16, 4))


@functools.cache
def tower() -> Any:
    """The official tower; the merging is hung behind its first layer."""
    made: Any = CLIPVisionModel(CLIPVisionConfig(**META["tower_config"]))
    own = {name.removeprefix("vision_model."): name for name in made.state_dict()}
    given = official.tensors("mustdrop", "tower_weights")
    missing, unexpected = made.load_state_dict(
        {own[name.removeprefix("vision_model.")]: t for name, t in given.items()}, strict=False
    )
    assert not unexpected and all("position_ids" in name for name in missing)
    made.set_attn_implementation("eager")

    def merge(module: Any, args: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1], merged_windows(out[:, 1:])], 1)

    next(m for name, m in made.named_modules() if name.endswith("encoder.layers.0")).register_forward_hook(merge)
    return made.eval()


@pytest.mark.parametrize("case", META["tower"], ids=lambda c: c["case"])
def test_key_set(case: dict[str, Any]) -> None:
    """With the windows merged inside the tower, as the official code does: states, and which tokens never go."""
    given = numbers("tower", case["case"])
    with torch.no_grad():
        out = tower()(given["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert out.hidden_states[-2].shape[1] - 1 == case["kept"]
    close(out.hidden_states[-2][:, 1:], given["features"].view(1, case["kept"], -1))
    n = case["kept"]
    image = seen(torch.zeros(1, n, 4), tile_layout(1, n), GivenTower(from_cls={-1: out.attentions[-1][:, :, 0, 1:]}))
    vtr.MustDrop().compress(image)
    assert image.memo[MEMO][0].nonzero()[:, 0].tolist() == given["key_set"].flatten().sort().values.tolist()
    assert given["key_set"].numel() == math.ceil(0.08 * n) == case["key_set"]


# ------------------------------------------------------------------------------------------------------------- stage 2
@dataclass
class Keyed(vtr.MustDrop):
    """Its key tokens are given."""

    chosen: list[int] = field(default_factory=list)
    wants = ()

    def compress(self, image: Image) -> None:
        keys = torch.zeros(len(image), dtype=torch.bool)
        image.memo[MEMO] = {0: keys.index_fill(0, torch.tensor(self.chosen), True)}


@functools.cache
def model() -> Any:
    return text_model(META["text_config"], official.tensors("mustdrop", "llm_weights"), "")


@pytest.mark.parametrize("case", META["llm"], ids=lambda c: c["case"])
def test_prefill(case: dict[str, Any]) -> None:
    """Decoded logits hold the official third stage and its positions, which are not repeated."""
    given, made, seen_by_head = numbers("llm", case["case"]), model(), list[Tensor]()
    policy = Keyed(
        share=case["global_thr"], single=case["individual_thr"], layers=[n + 1 for n in case["pruning_layers"]],
        scale=None, chosen=given["key_set"].tolist(),
    )  # fmt: skip
    hook = made.get_decoder().norm.register_forward_hook(lambda m, a, out: seen_by_head.append(out))
    inputs = prompt_of(made, given["ids"], [given["vision"]])
    with torch.no_grad():
        out = made(**inputs, policy=policy)
    hook.remove()
    text = inputs["input_ids"].shape[1] - case["V"]
    assert [n + text for n in vtr.report(made).rows[0].vision_tokens] == case["entering"]
    close(seen_by_head[-1].view_as(given["hidden"]), given["hidden"])
    close(out.logits[0, -1], given["logits"][0])


def cut(policy: vtr.MustDrop, total: list[float], strongest: list[float], memo: dict[str, Any]) -> list[int]:
    fields = {"place": torch.arange(len(total))}
    kept = policy.prune(3, tokens_of(3, 32, fields, (torch.tensor(total), torch.tensor(strongest)), memo))
    assert kept is not None
    return kept.tolist()


def test_one_token_stays_at_least() -> None:
    policy = vtr.MustDrop(share=1.0, single=1.0, scale=None)
    assert cut(policy, [0.1, 0.3, 0.2], [0.1, 0.3, 0.2], {}) == [1]


def test_thresholds_follow_the_number_of_tokens() -> None:
    assert vtr.MustDrop(192).thresholds(576) == (0.001, 0.001)
    assert vtr.MustDrop(192).thresholds(288) == (0.002, 0.002)
    assert vtr.MustDrop(192, scale=None).thresholds(288) == (0.001, 0.001)


def test_without_key_tokens_a_compressor_may_stand_in_front() -> None:
    assert vtr.policy("cls:0.5+mustdrop:192,keys=0").wants == ("cls",)
