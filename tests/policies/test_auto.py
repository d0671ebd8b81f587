"""Auto: its settings as data, what it makes of what a try begins to say, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vtr.integrations.vllm.specs import RequestError, read

import vtr
from tests import tiny
from vtr.auto_policy import PLAIN, agreement, confidence, features
from vtr.base import Began

CHOICES = ["m3:tokens=1", "m3:tokens=4", "none"]


def began(sure: list[list[float]], ids: list[list[int]], there: list[list[bool]] | None = None) -> Began:
    rows = torch.tensor(sure)
    flags = torch.ones_like(rows, dtype=torch.bool) if there is None else torch.tensor(there)
    return Began(torch.tensor(ids), rows, flags, torch.zeros(len(sure), 4), torch.tensor([0.9, 0.4][: len(sure)]))


ONE = began([[0.9, 0.5], [0.8, 0.1]], [[3, 4], [5, 0]], [[True, True], [True, False]])
TWO = began([[0.7, 0.7], [0.9, 0.2]], [[3, 5], [5, 9]], [[True, True], [True, False]])


def test_signals() -> None:
    assert confidence(ONE, 1).tolist() == pytest.approx([0.9, 0.8])
    assert confidence(ONE, 2).tolist() == pytest.approx([0.5, 0.8])  # behind its end an answer is not seen
    assert agreement(ONE, TWO, 1).tolist() == [True, True]
    assert agreement(ONE, TWO, 2).tolist() == [False, True]
    seen = features([ONE, TWO], 2)
    assert seen.shape == (2, PLAIN + 4)
    assert torch.allclose(seen[:, 0], torch.logit(torch.tensor([0.7, 0.9])), atol=1e-4)
    assert seen[:, 2].tolist() == [0.0, 1.0]
    assert features([ONE], 2)[:, 1:3].tolist() == [[0.0, 0.0]] * 2


def test_what_is_accepted() -> None:
    made = vtr.AutoPolicy(CHOICES, thresholds=[0.85, 0.75])
    assert made.accept(0, [ONE]).tolist() == [True, False]
    assert made.accept(1, [ONE, TWO]).tolist() == [False, True]
    calibrated = vtr.AutoPolicy(CHOICES, 0.5, calibration=[[0.0, 1.0], [0.0, -1.0]])
    assert calibrated.accept(0, [ONE]).all() and not calibrated.accept(1, [ONE, TWO]).any()
    agrees = vtr.AutoPolicy(CHOICES, 0.1, signal="agreement", tokens=2)
    assert not agrees.accept(0, [ONE]).any()
    assert agrees.accept(1, [ONE, TWO]).tolist() == [False, True]


def test_attention_is_judged_as_it_is_or_calibrated() -> None:
    choices = ["fastv:keep=0.1,layer=1", "fastv:keep=0.5,layer=1", "none"]
    made = vtr.AutoPolicy(choices, [0.5, 0.3], "attention")
    assert made.gauges and not vtr.AutoPolicy(choices).gauges
    assert made.accept(0, [ONE]).tolist() == [True, False] and made.accept(1, [ONE, TWO]).all()
    lines = vtr.AutoPolicy(choices, 0.5, "attention", calibration=[[-1.0, 0.0], [0.0, 1.0]])
    assert lines.accept(0, [ONE]).tolist() == [False, True] and lines.accept(1, [ONE, TWO]).all()
    assert vtr.policy(lines.spec) == lines
    with pytest.raises(ValueError, match="not gauged"):
        made.accept(0, [Began(ONE.ids, ONE.sure, ONE.there, ONE.states)])


def probe(width: int = 4, bias: float = 0.0) -> dict[str, torch.Tensor]:
    weight = torch.zeros(2, PLAIN + width)
    weight[:, 0] = 1.0
    return {
        "probe.mean": torch.zeros(PLAIN + width), "probe.scale": torch.ones(PLAIN + width),
        "probe.weight": weight, "probe.bias": torch.tensor([bias, 100.0]),
    }  # fmt: skip


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = vtr.AutoPolicy(CHOICES, [0.85, 0.1], "probe", promise={"loss": 0.01})
    made.load_tensors(probe())
    assert made.accept(0, [ONE]).tolist() == [True, False] and made.accept(1, [ONE, TWO]).all()
    made.save_pretrained(tmp_path / "auto")
    again = vtr.policy(f"auto:weights={tmp_path / 'auto'}")
    assert isinstance(again, vtr.AutoPolicy) and again == made and again.promise == {"loss": 0.01}
    assert again.spec == f"auto:weights={tmp_path / 'auto'}"
    assert all(torch.equal(again.probe[name], made.probe[name]) for name in made.probe)
    other = vtr.policy(f"auto:weights={tmp_path / 'auto'},thresholds=0.5")
    assert isinstance(other, vtr.AutoPolicy) and other.promise is None and other.thresholds == 0.5
    assert other.accept(0, [ONE]).all() and vtr.policy(other.spec) == other
    plain = vtr.AutoPolicy(CHOICES, 0.7, calibration=[[1.0, 0.0]] * 2)
    assert vtr.policy(plain.spec) == plain
    plain.save_pretrained(tmp_path / "auto")
    assert not (tmp_path / "auto" / "vtr_policy.safetensors").exists()
    assert vtr.Policy.from_pretrained(tmp_path / "auto") == plain


def test_choices_with_weights_keep_them(tmp_path: Path) -> None:
    from tests import learned

    pmod = learned.pmod()
    vtr.AutoPolicy([pmod, "none"]).save_pretrained(tmp_path)
    found = vtr.Policy.from_pretrained(tmp_path)
    assert isinstance(found, vtr.AutoPolicy) and found.choices[0] == pmod


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({**probe(), "probe.scale": torch.zeros(PLAIN + 4)}, "above 0"),
        ({**probe(), "probe.weight": torch.zeros(3, PLAIN + 4)}, "3 choices"),
        ({**probe(), "probe.more": torch.zeros(1)}, "unknown"),
        ({**probe(), "9.weight": torch.zeros(1)}, "belong to no policy"),
        ({**probe(), "probe.bias": torch.tensor([0.0, torch.nan])}, "NaN"),
        ({"probe.weight": torch.zeros(2, 4)}, "probe.mean"),
    ],
)
def test_tensors_that_are_no_probe(tensors: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        vtr.AutoPolicy(CHOICES, signal="probe").load_tensors(tensors)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"choices": []}, "vtr tune auto"),
        ({"choices": "m3:9"}, "a list"),
        ({"choices": ["autoscale", "none"]}, "chooses itself"),
        ({"choices": ["fewer_crops", "none"]}, r"takes few tokens .*vtr\.processor\(processor, 'fewer_crops"),
        ({"choices": ["downsample:0.5+m3:tokens=9", "none"]}, r"'m3:tokens=9' instead; or .*'downsample:scale=0\.5"),
        ({"choices": [3]}, "spec strings"),
        ({"choices": CHOICES, "thresholds": [0.5]}, "1 thresholds for 2"),
        ({"choices": CHOICES, "thresholds": 1.5}, "from 0 to 1"),
        ({"choices": CHOICES, "signal": "mood"}, "confidence"),
        ({"choices": CHOICES, "signal": "attention"}, "drops or pools tokens before the decoder"),
        ({"choices": CHOICES, "tokens": 0}, "tokens"),
        ({"choices": CHOICES, "calibration": [[1.0, 0.0]]}, "every choice but the last"),
        ({"choices": CHOICES, "promise": 3}, "mapping"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], what: str) -> None:
    with pytest.raises((ValueError, TypeError), match=what):
        vtr.AutoPolicy(**settings)


def test_where_it_cannot_stand() -> None:
    made = vtr.AutoPolicy(CHOICES)
    with pytest.raises(ValueError, match="part of it"):
        made + vtr.FastV(0.5)
    with pytest.raises(ValueError, match="a fixed policy for each image"):
        vtr.ByImage(made)
    with pytest.raises(RequestError, match="tries answers"):
        read('auto:choices=["m3:9","none"]', 1, 12)


def test_another_model_than_it_was_tuned_on() -> None:
    model = vtr.patch(tiny.llava())
    batch = tiny.batch(model, [["a", tiny.IMAGE, "b"]])
    from vtr.learned import fingerprint

    mine = dict(list(fingerprint(model).items())[:6])
    choices = ["random:keep=0.3", "none"]
    tiny.generate(model, batch, policy=vtr.AutoPolicy(choices, promise={"model": mine}), max_new_tokens=1)
    wrong = {name: [a + 1, b] for name, (a, b) in mine.items() if "embed" not in name}
    other = vtr.AutoPolicy(choices, promise={"model": wrong})
    with pytest.raises(ValueError, match="tuned on another model"):
        tiny.generate(model, batch, policy=other, max_new_tokens=1)
    other.allow_mismatch = True
    tiny.generate(model, batch, policy=other, max_new_tokens=1)
    with pytest.raises(ValueError, match="hidden states of 99"):
        wide = vtr.AutoPolicy(choices, signal="probe")
        wide.load_tensors({n: t[:1] if "weight" in n or "bias" in n else t for n, t in probe(99).items()})
        tiny.generate(model, batch, policy=wide, max_new_tokens=1)
    with pytest.raises(ValueError, match="has no weights"):
        tiny.generate(model, batch, policy=vtr.AutoPolicy(choices, signal="probe"), max_new_tokens=1)
