"""``vtr convert`` on what LoRA trainings and pretraining save: merged as written out by hand, or words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.training.test_convert import TOWER, checkpoint
from vtr.cli import app
from vtr.convert import convert_checkpoint

RANK, ALPHA = 2, 6
TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMES = {"pmod": "pmod", "dynamic-llava": "dynamic_llava", "m3": "m3"}


def lora_config(**more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none",
        "fan_in_fan_out": False, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "modules_to_save": None,
        "init_lora_weights": True, "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip


class Training:
    """A whole checkpoint of a method, taken apart: base, adapter, and what learnt beside it."""

    def __init__(self, tmp: Path, method: str = "dynamic-llava", how: str = "safetensors") -> None:
        self.tmp, self.method = tmp, method
        self.source = checkpoint(tmp / "source", NAMES[method], "safetensors")
        self.whole = load_file(self.source / "model.safetensors")
        self.config = json.loads((self.source / "config.json").read_text())
        self.depth = self.config["num_hidden_layers"]
        torch.manual_seed(1)
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.whole:
            if any(f".{target}.weight" in name for target in TARGETS) and "layers." in name and "vision" not in name:
                out, into = self.whole[name].shape
                self.pairs[name] = (torch.randn(RANK, into) * 0.1, torch.randn(out, RANK) * 0.1)
        self.base, self.adapter = tmp / "base", tmp / "adapter"
        own = ("layers.", "model.norm", "embed_tokens", "lm_head")
        others = ("predictor", "router", "vision_tower")
        self.below = {
            n: t for n, t in self.whole.items() if any(o in n for o in own) and not any(o in n for o in others)
        }
        plain = {n.replace(".decoder_layer.", "."): t for n, t in self.below.items()}
        text = {n: v for n, v in self.config.items() if not n.startswith(("mm_", "mod_", "sparse_config", "image_"))}
        self._write(self.base, "model.safetensors", plain)
        (self.base / "config.json").write_text(json.dumps(text | {"model_type": "llama"}))
        self._write(self.adapter, f"adapter_model.{how}", self.lora())
        rest = {f"base_model.model.{n}": t for n, t in self.whole.items() if n not in self.below}
        torch.save(rest, self.adapter / "non_lora_trainables.bin")
        (self.adapter / "config.json").write_text(json.dumps(self.config))
        (self.adapter / "tower").mkdir()
        (self.adapter / "tower" / "config.json").write_text(json.dumps(TOWER.to_dict()))
        self.say(lora_config())

    def lora(self) -> dict[str, Tensor]:
        named = {}
        for name, (a, b) in self.pairs.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            named |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return named

    @staticmethod
    def _write(folder: Path, name: str, state: dict[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        state = {n: t.contiguous() for n, t in state.items()}
        torch.save(state, folder / name) if name.endswith("bin") else save_file(state, folder / name)

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        self._write(self.adapter, name, state)

    def say(self, config: dict[str, Any]) -> None:
        (self.adapter / "adapter_config.json").write_text(json.dumps(config))

    def convert(self, out: str = "out", **how: Any) -> dict[str, Tensor]:
        """The converted model's tensors and the policy's."""
        made = convert_checkpoint(self.method, self.adapter, self.tmp / out, **{"base": self.base, **how})
        return self.read(made)

    @staticmethod
    def read(made: Any) -> dict[str, Tensor]:
        tensors = load_file(made.model / "model.safetensors")
        weights = made.policy / "vtr_policy.safetensors"
        return tensors | (load_file(weights) if weights.is_file() else {})

    def wanted(self, scale: Any = ALPHA / RANK, changed: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the same training without LoRA would have saved, converted as ever."""
        state = dict(self.whole)
        for name, (a, b) in self.pairs.items():
            state[name] = state[name] + (scale(name) if callable(scale) else scale) * (b @ a)
        save_file(state | (changed or {}), self.source / "model.safetensors")
        return self.read(convert_checkpoint(self.method, self.source, self.tmp / "wanted"))


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["pmod", "dynamic-llava"])
@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_an_adapter_is_merged_into_its_base(method: str, how: str, tmp_path: Path) -> None:
    """LoRA under p-MoD's layers has their names, its base has a LLaMA's."""
    training = Training(tmp_path, method, how)
    got, want = training.convert(), training.wanted()
    same(got, want)
    first = next(name for name in training.pairs if "layers.0." in name and "q_proj" in name)
    assert torch.equal(of(got, "lm_head.weight")[:-1], training.below["lm_head.weight"])
    assert not torch.allclose(of(got, "layers.0.self_attn.q_proj.weight"), training.below[first], atol=0.01)


def of(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The language model's tensor of this name."""
    return next(t for n, t in tensors.items() if n.endswith(name) and "vision" not in n)


def test_m3_without_weights_of_its_own(tmp_path: Path) -> None:
    """A LLaVA as base, whose projector the training went on with."""
    training = Training(tmp_path)
    training.method = "m3"
    keep = {n: t for n, t in training.whole.items() if "predictor" not in n}
    save_file(keep, training.base / "model.safetensors")
    learnt = {n: t + 1 for n, t in keep.items() if "mm_projector" in n}
    torch.save({f"base_model.model.{n}": t for n, t in learnt.items()}, training.adapter / "non_lora_trainables.bin")
    training.whole = keep
    same(training.convert(), training.wanted(changed=learnt))


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({"use_rslora": True}, lambda name: ALPHA / math.sqrt(RANK)),
        ({"lora_alpha": "3"}, lambda name: 3 / RANK),
        ({"alpha_pattern": {"v_proj": 5}}, lambda name: (5 if "v_proj" in name else ALPHA) / RANK),
        (
            {"alpha_pattern": {r"layers\.[01]\..*q_proj": 8, "q_proj": 1}},
            lambda name: (
                (8 if "s.0.self_attn.q" in name or "s.1.self_attn.q" in name else 1 if "q_proj" in name else 6) / 2
            ),
        ),
        ({"rank_pattern": {"q_proj": RANK}, "r": RANK}, ALPHA / RANK),
    ],
)
def test_scales(said: dict[str, Any], scale: Any, tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.say(lora_config(**said))
    same(training.convert(), training.wanted(scale))


def test_ranks_of_their_own(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for name, (a, b) in training.pairs.items():
        if "down_proj" in name:
            training.pairs[name] = (torch.randn(4, a.shape[1]), torch.randn(len(b), 4))
    training.write("adapter_model.safetensors", training.lora())
    training.say(lora_config(rank_pattern={"mlp.down_proj": 4}))
    same(training.convert(), training.wanted(lambda name: ALPHA / (4 if "down_proj" in name else RANK)))
    training.say(lora_config())
    with pytest.raises(ValueError, match=r"down_proj\.weight: its rank is 4, adapter_config\.json says 2"):
        training.convert("other")


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """fan_in_fan_out: B · A is turned before it is added; embeddings are always turned."""
    training = Training(tmp_path)
    a, b = torch.randn(RANK, 128), torch.randn(64, RANK)
    square = {n: both for n, both in training.pairs.items() if "_proj" in n and "mlp" not in n}
    named = {}
    for name, (one, two) in square.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        named |= {f"{module}.lora_A.default.weight": one, f"{module}.lora_B.default.weight": two}
    named |= {"base_model.model.model.embed_tokens.lora_embedding_A": a,
              "base_model.model.model.embed_tokens.lora_embedding_B": b}  # fmt: skip
    training.write("adapter_model.safetensors", named)
    training.say(lora_config(fan_in_fan_out=True, target_modules=["q_proj", "v_proj", "embed_tokens"]))
    got = training.convert()
    training.pairs = {}
    whole = torch.randn(128, 64)  # peft may save an embedding that has LoRA whole as well
    training.write(
        "adapter_model.safetensors", named | {"base_model.model.model.embed_tokens.base_layer.weight": whole}
    )
    again = training.convert("again")
    assert torch.equal(of(again, "embed_tokens.weight")[:-1], whole + 3 * (b @ a).T)
    changed = {n: training.whole[n] + 3 * (two @ one).T for n, (one, two) in square.items()}
    changed["model.embed_tokens.weight"] = training.whole["model.embed_tokens.weight"] + 3 * (b @ a).T
    same(got, training.wanted(changed=changed))


@pytest.mark.parametrize("form", ["{}", "{}.modules_to_save", "{}.modules_to_save.default"])
def test_modules_that_are_saved_whole(form: str, tmp_path: Path) -> None:
    """modules_to_save stand in for the base's; what learnt beside the adapter stands in for both."""
    training = Training(tmp_path)
    head, norm = torch.randn(128, 64), torch.randn(64)
    saved = {"lm_head": head, "model.norm": torch.zeros(64)}
    whole = {f"base_model.model.{form.format(n)}.weight": t for n, t in saved.items()}
    training.write("adapter_model.safetensors", training.lora() | whole)
    rest = torch.load(training.adapter / "non_lora_trainables.bin", weights_only=True)
    torch.save(rest | {"base_model.model.model.norm.weight": norm}, training.adapter / "non_lora_trainables.bin")
    training.say(lora_config(modules_to_save=["lm_head", "norm"]))
    same(training.convert(), training.wanted(changed={"lm_head.weight": head, "model.norm.weight": norm}))


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    training = Training(tmp_path)
    half = {n.replace(".decoder_layer.", "."): t.half() for n, t in training.below.items()}
    save_file(half, training.base / "model.safetensors")
    got, name = training.convert(), "model.layers.0.self_attn.q_proj.weight"
    a, b = training.pairs[name]
    want = (half[name].float() + ALPHA / RANK * (b @ a)).half()
    assert torch.equal(of(got, "layers.0.self_attn.q_proj.weight"), want)


def test_a_projector_alone(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.method = "m3"
    whole = {n: t for n, t in training.whole.items() if "predictor" not in n}
    projector = {n: t for n, t in whole.items() if "mm_projector" in n}
    save_file({n: t for n, t in whole.items() if n not in projector}, training.base / "model.safetensors")
    for file in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        (training.adapter / file).unlink()
    torch.save(projector, training.adapter / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"holds a projector or other parts, not a whole model: .*--base FOLDER"):
        training.convert(base=None)
    training.whole, training.pairs = whole, {}
    same(training.convert(), training.wanted())


# ---------------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', and only LORA"),
        ({"peft_type": None}, "peft_type=None"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"use_dora": True}, r"use_dora \(DoRA\) cannot be merged"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base itself"),
        ({"r": None}, r"adapter_config\.json lacks r"),
        ({"r": "two"}, "r='two', but a whole number"),
        ({"r": 3}, "its rank is 2, adapter_config.json says 3"),
        ({"lora_alpha": [1, 2]}, r"lora_alpha=\[1, 2\], but a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"fan_in_fan_out": "perhaps"}, "fan_in_fan_out='perhaps'"),
        ({"fan_in_fan_out": True}, r"down_proj\.weight: B · A is"),
        ({"alpha_pattern": [1]}, "alpha_pattern="),
        ({"alpha_pattern": {"(": 1}}, "is no expression"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "too long an expression"),
        ({"target_modules": [*TARGETS, "o_proj"]}, "missing LoRA of o_proj"),
    ],
)
def test_other_adapters_are_refused(said: dict[str, Any], text: str, tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.say(lora_config(**said))
    with pytest.raises(ValueError, match=text):
        training.convert()
    assert not (tmp_path / "out").exists()


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop(FIRST), r"missing lora_A of model\.layers\.0\.self_attn\.q_proj\.weight"),
        (lambda s: s.update({FIRST: torch.zeros(RANK, 63)}), r"B · A is \[64, 63\], the base's weight \[64, 64\]"),
        (lambda s: s.update({FIRST: torch.zeros(3, 64)}), "is no product"),
        (lambda s: s.update({FIRST: torch.zeros(RANK, 64, 1, 1)}), "is no product"),
        (lambda s: s.update({FIRST: torch.full((RANK, 64), torch.nan)}), "hold NaN or infinity"),
        (lambda s: s.update({FIRST: torch.zeros(RANK, 64, dtype=torch.int8)}), r"lora_A|A \(int8\)"),
        (lambda s: s.update({FIRST.replace("lora_A", "lora_magnitude_vector"): torch.zeros(64)}), "_magnitude_vector"),
        (lambda s: [s.pop(n) for n in list(s) if "layers.3.self_attn.v" in n], r"missing LoRA of model\.layers\.3\.s"),
        (
            lambda s: [s.update({n.replace("layers.0", "layers.77"): s.pop(n)}) for n in list(s) if "layers.0" in n],
            r"unknown model\.layers\.77\..*: the base has no such weight",
        ),
        (lambda s: s.update({"base_model.model.lm_head.weight": torch.zeros(3, 3)}), r"lm_head\.weight is \[3, 3\]"),
        (lambda s: s.update({"base_model.model.more": torch.zeros(3)}), r"unknown more \[3\]"),
    ],
)  # fmt: skip
def test_matrices_that_do_not_fit_are_listed(change: Any, text: str, tmp_path: Path) -> None:
    training = Training(tmp_path)
    named = training.lora()
    change(named)
    training.write("adapter_model.safetensors", named)
    with pytest.raises(ValueError, match=text):
        training.convert()
    assert not (tmp_path / "out").exists()


def test_some_layers_alone(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.pairs = {n: both for n, both in training.pairs.items() if ".layers.1." in n}
    training.write("adapter_model.safetensors", training.lora())
    with pytest.raises(ValueError, match=r"missing LoRA of model\.layers\.0"):
        training.convert()
    training.say(lora_config(layers_to_transform=[1]))
    same(training.convert(), training.wanted())


def test_files_that_are_not_there(tmp_path: Path) -> None:
    training = Training(tmp_path)
    out = str(tmp_path / "out")

    def said(*more: str) -> str:
        result = CliRunner().invoke(app, ["convert", training.method, str(training.adapter), out, *more])
        assert result.exit_code == 1 and not (tmp_path / "out").exists()
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.output

    assert "--base FOLDER; it says lmsys/vicuna-7b-v1.5" in said()
    base = ("--base", str(training.base))
    assert "is an adapter itself" in said("--base", str(training.adapter))
    assert "no checkpoint folder" in said("--base", str(tmp_path))
    whole = CliRunner().invoke(app, ["convert", training.method, str(training.source), out, *base])
    assert whole.exit_code == 1 and "is no adapter: leave --base out" in whole.output
    for file, text in [
        ("non_lora_trainables.bin", "copy non_lora_trainables.bin"),
        ("adapter_model.safetensors", "lacks the adapter's weights"),
        ("config.json", "sparse_config"),
    ]:
        kept = (training.adapter / file).read_bytes()
        (training.adapter / file).unlink()
        assert text in said(*base)
        (training.adapter / file).write_bytes(b"")
        assert f"{file} " in (told := said(*base)) and ("read" in told or "no whole safetensors" in told)
        (training.adapter / file).write_bytes(kept)
    for folder in (training.adapter, training.base):
        before = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps({**json.loads(before), "quantization_config": {"bits": 4}}))
        assert "QLoRA" in said(*base)
        (folder / "config.json").write_text(before)
    kept = load_file(training.base / "model.safetensors")
    save_file({f"model.language_model.{n}": t for n, t in kept.items()}, training.base / "model.safetensors")
    assert "name the original one" in said(*base)
    save_file(kept, training.base / "model.safetensors")
    result = CliRunner().invoke(app, ["convert", training.method, str(training.adapter), out, *base])
    assert result.exit_code == 0, result.output
