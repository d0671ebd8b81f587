"""``vtr convert``: checkpoints in the official layouts, their weights the golden fixtures', give the golden logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from typer.testing import CliRunner

import vtr
from tests import official, test_golden_dynamic_llava, test_golden_m3, test_golden_pmod
from tests.official import close
from vtr.cli import app
from vtr.convert import convert_checkpoint

TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
)
STORED = ["safetensors", "sharded safetensors", "bin", "sharded bin"]
LLAVA = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def tower_state(model: Any) -> dict[str, Tensor]:
    named = {name.rpartition("vision_model.")[2]: t for name, t in model.state_dict().items()}
    return {f"model.vision_tower.vision_tower.vision_model.{name}": t.clone() for name, t in named.items()}


def checkpoint(folder: Path, method: str, how: str, change: Any = None, extra: dict[str, Any] | None = None) -> Path:
    """A text model's fixtures with a random tower and projector, as the official code saves a LLaVA-1.5."""
    torch.manual_seed(0)
    state = official.tensors(method, "weights")
    width = official.meta(method)["config"]["hidden_size"]
    for name, shape in (("0", (width, TOWER.hidden_size)), ("2", (width, width))):
        state[f"model.mm_projector.{name}.weight"] = torch.randn(shape) * 0.1
        state[f"model.mm_projector.{name}.bias"] = torch.randn(shape[0])
    state |= tower_state(CLIPVisionModel(TOWER))
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    config = official.meta(method)["config"] | LLAVA | {"mm_vision_tower": "tower", "image_aspect_ratio": "pad"}
    if change is not None:
        change(state)
    return write(folder, state, config | (extra or {}), TOWER, how)


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any], tower: CLIPVisionConfig, how: str) -> Path:
    (folder / "tower").mkdir(parents=True)
    (folder / "tower" / "config.json").write_text(json.dumps(tower.to_dict()))
    (folder / "config.json").write_text(json.dumps(config))
    name, ending = ("model", "safetensors") if how.endswith("safetensors") else ("pytorch_model", "bin")
    names = sorted(state)
    parts = [names[0::2], names[1::2]] if how.startswith("sharded") else [names]
    files = [f"{name}-0000{i}-of-00002.{ending}" for i in (1, 2)] if len(parts) > 1 else [f"{name}.{ending}"]
    for file, part in zip(files, parts, strict=True):
        tensors = {n: state[n].contiguous() for n in part}
        if ending == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
    if len(parts) > 1:
        where = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        (folder / f"{name}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def loaded(folder: Path) -> Any:
    """The converted model, its pictures given as features as the fixtures have them."""
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    model.__class__ = official.Given
    return vtr.patch(official.features_given(model))


# --------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("how", STORED)
def test_pmod(how: str, tmp_path: Path) -> None:
    made = convert_checkpoint("pmod", checkpoint(tmp_path / "in", "pmod", how), tmp_path / "out")
    assert made.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    model, policy, data = loaded(tmp_path / "out"), vtr.policy(made.spec), test_golden_pmod.DATA
    assert policy == test_golden_pmod.policy()
    case = f"{test_golden_pmod.ATTENTIONS[-1]}.A"
    inputs = official.given_prompt(model, data[f"{case}.inputs_embeds"], data[f"{case}.mod_target_mask"])
    words = official.meta("pmod")["config"]["vocab_size"]
    with torch.no_grad():
        close(model(**inputs, policy=policy).logits[..., :words], data[f"{case}.prefill_logits"])
    out = official.dictate(model, inputs, policy, data[f"{case}.decode_ids"][None])
    close(torch.stack(out.logits[1:], 1)[..., :words], data[f"{case}.decode_logits"])


@pytest.mark.parametrize("how", STORED[1:3])
def test_dynamic_llava(how: str, tmp_path: Path) -> None:
    made = convert_checkpoint("dynamic-llava", checkpoint(tmp_path / "in", "dynamic_llava", how), tmp_path / "out")
    model, policy, data = loaded(tmp_path / "out"), vtr.policy(made.spec), test_golden_dynamic_llava.DATA
    assert policy == test_golden_dynamic_llava.policy()
    vision = torch.zeros(data["A.inputs_embeds"].shape[:2]).bool()
    first, n = test_golden_dynamic_llava.PICTURE
    vision[:, first : first + n] = True
    inputs = official.given_prompt(model, data["A.inputs_embeds"], vision)
    out = official.dictate(model, inputs, policy, data["A.decode_ids"][None])
    words = official.meta("dynamic_llava")["config"]["vocab_size"]
    close(torch.stack(out.logits[1:], 1)[..., :words], data["A.decode_logits"])
    assert out.logits[0].argmax() < words


@pytest.mark.parametrize("how", STORED[:1])
def test_m3(how: str, tmp_path: Path) -> None:
    """A whole LLaVA-NeXT, from pixels to logits at every scale."""
    config, data = test_golden_m3.CONFIG, test_golden_m3.MODEL
    twin, inputs = test_golden_m3.anyres_model()
    settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "mm_vision_tower": "tower"}
    state = official.tensors("m3", "tiny_state")
    folder = write(tmp_path / "in", state, config | LLAVA | settings, twin.config.vision_config, how)
    made = convert_checkpoint("m3", folder, tmp_path / "out")
    assert made.spec == "m3:tokens=36" and made.kind == "LlavaNextForConditionalGeneration"
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out" / "model").eval()
    model.set_attn_implementation("eager")
    vtr.patch(model)
    assert model.config.image_token_id == config["vocab_size"] == twin.config.image_token_id
    for scale in test_golden_m3.suffixes(data, "any.logits_"):
        want = official.run(twin, inputs, f"m3:tokens={scale}")[1]
        close(official.run(model, inputs, f"m3:tokens={scale}")[1], want, 1e-6)


def test_a_tower_saved_by_itself(tmp_path: Path) -> None:
    """Checkpoints of LLaVA-1.5 leave it out; transformers saves a tower alone without the name of a whole CLIP's."""
    state = official.tensors("m3", "tiny_state")
    clip = "model.vision_tower.vision_tower.vision_model."
    tower = test_golden_m3.anyres_model()[0].config.vision_config
    folder = write(tmp_path / "in", {n: t for n, t in state.items() if clip not in n},
                   test_golden_m3.CONFIG | LLAVA | {"mm_patch_merge_type": "spatial_unpad", "mm_vision_tower": "tower"},
                   tower, "safetensors")  # fmt: skip
    saved = CLIPVisionModel(tower)
    saved.save_pretrained(folder / "tower")
    made = convert_checkpoint("m3", folder, tmp_path / "out")
    got = LlavaNextForConditionalGeneration.from_pretrained(made.model).model.vision_tower.state_dict()
    want = {name.removeprefix("vision_model."): t for name, t in saved.state_dict().items()}
    assert all(torch.equal(t, want[name.removeprefix("vision_model.")]) for name, t in got.items()) and got


# ---------------------------------------------------------------------------------------------------- what goes wrong
def rename(old: str, new: str) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        state[new] = state.pop(old)

    return change


@pytest.mark.parametrize(
    ("method", "change", "text"),
    [
        (
            "pmod",
            rename("model.norm.weight", "model.norms.weight"),
            r"missing model\.language_model\.norm\.weight \[64\], un",
        ),
        ("pmod", rename("model.layers.9.router.router.bias", "bias"), r"missing routers\.9\.bias"),
        ("pmod", lambda s: s.update({"model.extra": torch.zeros(3)}), r"unknown model\.extra \[3\]"),
        (
            "pmod",
            lambda s: s.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight is \[3\], not \[64\]",
        ),
        (
            "dynamic_llava",
            lambda s: s.pop("model.output_text_score_predictor.output_mlp.7.bias"),
            r"missing output_text",
        ),
        ("dynamic_llava", lambda s: s.pop("model.mm_projector.2.bias"), r"missing .*linear_2\.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(method: str, change: Any, text: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", method, "safetensors", change)
    with pytest.raises(ValueError, match=text):
        convert_checkpoint(method.replace("_", "-"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "extra", "text"),
    [
        ("pmod", {"mod_target_layers": "every_third"}, "mod_target_layers='every_third': vtr knows"),
        ("pmod", {"mod_target_token_type": "all"}, "only .vision_all. \\(all vision tokens"),
        ("pmod", {"mm_projector_type": "linear"}, "no counterpart to mm_projector_type='linear'"),
        ("dynamic_llava", {"sparse_config": None}, "no Dynamic-LLaVA checkpoint"),
        ("pmod", {"mm_vision_tower": "elsewhere"}, "--vision-tower FOLDER"),
    ],
)
def test_settings_without_a_counterpart(method: str, extra: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", method, "bin", extra=extra)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        convert_checkpoint(method.replace("_", "-"), folder, tmp_path / "out")


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", "pmod", "sharded bin")
    shard = folder / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    torch.save({"a": Payload()}, shard)
    with pytest.raises(ValueError, match=r"00002\.bin cannot be read as weights alone"):
        convert_checkpoint("pmod", folder, tmp_path / "out")
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00002\.bin cannot be read"):
        convert_checkpoint("pmod", folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.bin is missing"):
        convert_checkpoint("pmod", folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert_checkpoint("pmod", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown method 'fastv': choose pmod"):
        convert_checkpoint("fastv", folder, tmp_path / "out")


NAME = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def index(change: Any) -> Any:
    def harm(folder: Path) -> None:
        where = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(where) or where))

    return harm


def rewrite(change: Any, name: str = NAME) -> Any:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tensors(change: Any) -> Any:
    def harm(folder: Path) -> None:
        state = load_file(folder / NAME)
        change(state, next(n for n in state if n.endswith("q_proj.weight")))
        save_file(state, folder / NAME)

    return harm


def to(value: Any) -> Any:
    return index(lambda where: where["weight_map"].update({next(iter(where["weight_map"])): value}))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (rewrite(lambda old: b""), f"{NAME} is no whole safetensors file"),
        (rewrite(lambda old: old[:5]), f"{NAME} is no whole"),
        (rewrite(lambda old: old[: len(old) // 2]), f"{NAME} is no whole"),
        (rewrite(lambda old: old[:8] + b"[" * 100 + old[108:]), f"{NAME} is no whole"),
        (rewrite(lambda old: b"\xff" * 8 + old[8:]), f"{NAME} is no whole"),
        (lambda folder: save_file({}, folder / NAME), f"{NAME} holds no tensors"),
        (lambda folder: (folder / NAME).unlink(), f"{NAME} is missing"),
        (rewrite(lambda old: b"", INDEX), f"{INDEX} is no JSON"),
        (rewrite(lambda old: b"\xff\xfe", INDEX), f"{INDEX} is no JSON"),
        (rewrite(lambda old: b"[" * 100000, INDEX), f"{INDEX} is no JSON"),
        (rewrite(lambda old: b"[]", INDEX), f"{INDEX} holds no settings"),
        (rewrite(lambda old: b"{}", INDEX), "needs a weight_map"),
        (rewrite(lambda old: b'{"weight_map": {"a": "b.bin", "a": "c.bin"}}', INDEX), "'a' is there twice"),
        (index(lambda where: {"weight_map": []}), "needs a weight_map"),
        (index(lambda where: {"weight_map": {}}), "needs a weight_map"),
        (to(3), "needs a weight_map"),
        (to(None), "needs a weight_map"),
        (to("../elsewhere.safetensors"), "outside of its folder"),
        (to("/etc/passwd"), "outside of its folder"),
        (to(".."), "outside of its folder"),
        (to("config.json"), r"no \.safetensors or \.bin"),
        (to("other.safetensors"), r"other\.safetensors is missing"),
        (index(lambda where: where["weight_map"].update({"more": NAME})), "do not hold the same tensors: more"),
        (tensors(lambda s, n: s.update({n: s[n].to(torch.int8)})), r"q_proj\.weight (\(int8\)|has torch\.int8)"),
        (tensors(lambda s, n: s.update({n: s[n].double()})), r"q_proj\.weight (\(float64\)|has torch\.float64)"),
        (tensors(lambda s, n: s.update({n: s[n] * torch.inf})), r"NaN or infinity.*: model.*q_proj\.weight"),
        (tensors(lambda s, n: s.update({n: s[n][None]})), r"q_proj\.weight is \[1, 64, 64\]"),
        (rewrite(lambda old: b"\xef\xbb\xbf" + old[1:], "config.json"), r"config\.json is no JSON"),
        (rewrite(lambda old: b"null", "config.json"), r"config\.json holds no settings"),
        (rewrite(lambda old: b'{"a": 1, "a": 1}', "config.json"), "'a' is there twice"),
        (rewrite(lambda old: b"{", "tower/config.json"), r"config\.json is no JSON"),
    ],
)
def test_malformed_folders_are_words(harm: Any, text: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", "dynamic_llava", "sharded safetensors")
    harm(folder)
    result = CliRunner().invoke(app, ["convert", "dynamic-llava", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert re.search(text, result.output) and "Traceback" not in result.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_size": "64", "rms_norm_eps": "1e-5", "num_attention_heads": 4.0, "attention_bias": "false"}, None),
        ({"num_attention_heads": [4, 4], "mm_vision_select_layer": [-2], "eos_token_id": [2]}, None),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4}, "hidden_size": None}, None),
        ({"mm_projector_type": None, "image_aspect_ratio": None, "pad_token_id": -1}, None),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ({"hidden_size": [64, 65]}, r"hidden_size=\[64, 65\], but a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the tensors have 6"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"mm_vision_tower": None}, "mm_vision_tower is not in the config.*--vision-tower FOLDER"),
        ({"mm_vision_tower": {"a": 1}}, "mm_vision_tower={'a': 1}, but a word"),
        ({"mm_vision_select_layer": 9}, "the vision tower has 2 layers"),
        ({"image_aspect_ratio": "anyres_max_9"}, "no counterpart to image_aspect_ratio='anyres_max_9'"),
        ({"model_type": "llava_qwen"}, "no LLaMA"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_scaling": {"factor": 2}}, "an object with its type"),
        ({"sparse_config": {"vision_keep_rate": 0.2}}, "sparse_config of config.json lacks"),
    ],
)
def test_settings_in_other_forms(change: dict[str, Any], text: str | None, tmp_path: Path) -> None:
    """Numbers may be written as words, nested or in a list; what is missing or of another kind is named."""
    folder = checkpoint(tmp_path / "in", "dynamic_llava", "safetensors", extra=change)
    if text is not None:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            convert_checkpoint("dynamic-llava", folder, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
        return
    made = convert_checkpoint("dynamic-llava", folder, tmp_path / "out")
    want = convert_checkpoint("dynamic-llava", checkpoint(tmp_path / "as", "dynamic_llava", "bin"), tmp_path / "want")
    assert (made.model / "model.safetensors").read_bytes() == (want.model / "model.safetensors").read_bytes()
    got, said = (json.loads((one.model / "config.json").read_text()) for one in (made, want))
    for same in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "attention_bias"):
        assert got["text_config"][same] == said["text_config"][same]
    assert got["vision_feature_layer"] == said["vision_feature_layer"]
    assert ("mm_projector_type" in change) == any("mm_projector_type" in note for note in made.notes)


@pytest.mark.parametrize(
    "size", [{"image_size": [12, 12]}, {"patch_size": "4", "image_size": {"height": 12, "width": 12}}]
)
def test_towers_whose_sizes_are_written_otherwise(size: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", "dynamic_llava", "safetensors")
    (folder / "tower" / "config.json").write_text(json.dumps({**TOWER.to_dict(), **size}))
    made = convert_checkpoint("dynamic-llava", folder, tmp_path / "out")
    assert json.loads((made.model / "config.json").read_text())["vision_config"]["image_size"] == 12
    (folder / "tower" / "config.json").write_text(json.dumps({**TOWER.to_dict(), "patch_size": [4, 2]}))
    with pytest.raises(ValueError, match=r"patch_size=\[4, 2\], but a whole number"):
        convert_checkpoint("dynamic-llava", folder, tmp_path / "again")


def test_a_conversion_that_stops_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "in", "pmod", "bin")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(
            "vtr.policies.trained.pmod.PMoD.save_pretrained", lambda *args: (_ for _ in ()).throw(OSError("full"))
        )
        convert_checkpoint("pmod", folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out.part" / "model").mkdir(parents=True)  # of one that was killed
    assert convert_checkpoint("pmod", folder, tmp_path / "out").model.is_dir()
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_other_schedules(tmp_path: Path) -> None:
    from vtr.convert.methods import _schedule

    assert _schedule("deep_all", 0.5, 6) == {"ratios": [None, None, 0.5, 0.5, 0.5, None]}
    assert [r is not None for r in _schedule("deep_all_include_last", 0.5, 5)["ratios"]] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert _schedule("interleave", 0.4, 4) == {"ratios": [None, 0.4, None, 0.4]}
    assert _schedule("shiftedlinear_decay_0.8_0.2", 0.5, 32)["shape"] == "linear"


def test_the_command(tmp_path: Path) -> None:
    """With a tokenizer, the processor is written as well; a folder in use is left alone."""
    folder = checkpoint(tmp_path / "in", "pmod", "safetensors")
    words = {f"w{i}": i for i in range(3, 128)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    save_tokenizer(folder, words)
    result = CliRunner().invoke(app, ["convert", "pmod", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "LlavaForConditionalGeneration" in result.output and f"pmod:weights={tmp_path}/out/policy" in result.output
    processor = AutoProcessor.from_pretrained(tmp_path / "out" / "model")
    picture = torch.zeros(3, 20, 31, dtype=torch.uint8)
    got = processor(text="w5 <image> w6", images=picture, return_tensors="pt")
    assert (got["input_ids"] == 128).sum() == 9 and got["pixel_values"].shape[-2:] == (12, 12)
    again = CliRunner().invoke(app, ["convert", "pmod", str(folder), str(tmp_path / "out")])
    assert again.exit_code == 1 and "is not empty" in again.output


def save_tokenizer(folder: Path, words: dict[str, int]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
