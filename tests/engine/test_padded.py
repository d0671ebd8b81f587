"""Decoders that cannot run packed rows: policies before the decoder on shortened, padded ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import vtr
from tests.families import FAMILIES
from tests.models import paint, tiny
from tests.tiny import IMAGE
from vtr.base import UnsupportedError
from vtr.engine.adapters import find_adapter
from vtr.engine.compat import NAMES, cache_in, put_cache
from vtr.engine.hooks import Patch
from vtr.engine.short_cache import ShortCache
from vtr.image import Image, Pooled

TOLERANCE = 2e-5
slow = pytest.mark.slow
CLASSES = ["Qwen3_5", "Lfm2Vl", "MiniCPMV4_6", "Gemma3n", "Inkling2", "MistralLarge4", "Molmo2", "Llava"]
CLASSES += [pytest.param("Glm5Next", marks=slow)]  # transformers' reference kernel takes a minute
"""Recurrent layers over positions of three axes, convolutions, the same once more, arguments for each layer and token,
relative bias, an indexer, images that look both ways, one that is packed as a rule, and indexed and linear layers
without positions."""
SOME = [
    "Qwen3_5",
    "Lfm2Vl",
    "Llava",
    *(pytest.param(one, marks=slow) for one in ("Gemma3n", "Inkling2", "MistralLarge4")),
]
RECURRENT = ["Qwen3_5", "Lfm2Vl"]


@dataclass
class Halves(vtr.Policy):
    """Every two neighbours become one token: their mean."""

    name = "halves"

    def compress(self, image: Image) -> Pooled:
        pairs = [[i, i + 1] if i + 1 < len(image) else [i] for i in range(0, len(image), 2)]
        return Pooled(torch.stack([image.features[some].mean(0) for some in pairs]), pairs)


@dataclass
class Odd(vtr.Policy):
    """Every other token of an image, from its second on."""

    name = "odd"

    def compress(self, image: Image) -> Tensor:
        return torch.arange(1, len(image), 2)


@dataclass
class Pair:
    """A model as it came, and the same one patched."""

    stock: Any
    patched: Any
    mark: int

    @property
    def rows(self) -> list[list[int]]:
        return paint.prompts(self.mark)


@pytest.fixture(autouse=True)
def five_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token out of the prompt, and five behind it."""
    monkeypatch.setattr(paint, "STEPS", 6)


def patch(model: Any) -> Any:
    Patch(model, find_adapter(model), path="padded").install()
    paint.by_runs(model)
    return model


@functools.cache
def pair(name: str) -> Pair:
    stock = copy.deepcopy(tiny.stock(f"{name}ForConditionalGeneration"))
    paint.paint(stock)
    return Pair(stock, patch(copy.deepcopy(stock)), paint.marks(stock)[0])


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert paint.apart(one, other) < TOLERANCE


def counted(model: Any, mask: Tensor, new: int | None = None) -> dict[str, Tensor]:
    """Positions of three axes that a call by hand must say where no picture's grid does: those of text. Of ``new``, the
    last so many."""
    if type(model).__name__ != "Qwen3_5ForConditionalGeneration":
        return {}
    counts = (mask.cumsum(1) - 1).clamp(min=0)
    return {"position_ids": (counts if new is None else counts[:, -new:]).expand(3, -1, -1)}


class Calls:
    """What a text model was called with while the block runs, and what it gave."""

    def __init__(self, model: Any) -> None:
        self.text = find_adapter(model).text_model(model)
        self.given: list[dict[str, Any]] = []
        self.out: list[Tensor] = []

    def __enter__(self) -> Calls:
        def after(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            self.given.append(dict(kwargs))
            self.out.append(out.last_hidden_state[:, -1].clone())

        self.handle = self.text.register_forward_hook(after, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@torch.no_grad()
def shortened(stock: Any, row: Sequence[int], groups: list[list[int]]) -> Tensor:
    """[steps, D]: what the text model as it came says of a row's last token, given a shorter prompt.

    Args:
        groups: per token of the shorter prompt, the slots it is the mean of.
    """
    with Calls(stock) as calls:
        paint.generate(stock, paint.batch([row]))
    lost, out, cache = len(row) - len(groups), [], DynamicCache(config=calls.text.config)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, len(row)):
            means = [value[:, some].float().mean(1) for some in groups]
            return torch.stack(means, 1).to(value.dtype)
        return value

    for step, given in enumerate(calls.given):
        positions = given.pop("position_ids", None)
        kwargs = {name: cut(value) for name, value in given.items() if name not in (*NAMES, "attention_mask")}
        if positions is not None and positions.dim() == 3 and not step:
            positions = torch.stack([positions[..., some].float().mean(-1).floor() for some in groups], -1).long()
        elif positions is not None and positions.dim() == 2:
            positions = positions[:, : len(groups)] if not step else positions - lost
        mask, own = torch.ones(1, len(groups) + step, dtype=torch.long), given["attention_mask"]
        if not step and isinstance(own, Tensor) and own.dim() == 4:
            first = [some[0] for some in groups]
            mask = own[:, :, first][..., first]
        put_cache(calls.text, kwargs, cache)
        made = calls.text(**kwargs, position_ids=positions, attention_mask=mask)
        out.append(made.last_hidden_state[0, -1])
    return torch.stack(out)


def groups_of(row: Sequence[int], mark: int, policy: Any) -> list[list[int]]:
    """Per token of the row that is left under Odd or Halves (or None), the slots it is the mean of."""
    found, at = [], 0
    while at < len(row):
        end = at + 1
        while row[at] == mark and end < len(row) and row[end] == mark:
            end += 1
        run = list(range(at, end))
        if row[at] != mark or policy is None:
            found += [[slot] for slot in run]
        elif isinstance(policy, Odd):
            found += [[slot] for slot in run[1::2]]
        else:
            found += [run[i : i + 2] for i in range(0, len(run), 2)]
        at = end
    return found


# --------------------------------------------------------------------------------------- what a reduced call computes
@pytest.mark.parametrize("name", CLASSES)
def test_rows_are_those_of_the_shorter_prompt(name: str) -> None:
    """A batch of three policies, prefill and five decoded tokens, against the untouched text model, row by row."""
    models = pair(name)
    policies = [Odd(), Halves(), None]
    with Calls(models.patched) as calls:
        paint.generate(models.patched, paint.batch(models.rows), policy=policies)
    got = torch.stack(calls.out)
    for b, (row, policy) in enumerate(zip(models.rows, policies, strict=True)):
        close(got[:, b], shortened(models.stock, row, groups_of(row, models.mark, policy)))
    report = vtr.report(models.patched)
    assert report.path == "padded"
    assert [row.vision_tokens for row in report.rows] == [[8] * tiny.DEPTH, [9] * tiny.DEPTH, [0] * tiny.DEPTH]
    pad = len(models.rows[1]) - len(models.rows[0])
    assert report.rows[0].kept(0) == [pad + slot for slot in range(4, 19, 2)]


@pytest.mark.parametrize("name", SOME)
def test_batch_cache_and_rows_without_a_policy(name: str) -> None:
    models = pair(name)
    full, policies = paint.batch(models.rows), ["divprune:keep=0.4", None, None]
    got, _ = paint.generate(models.patched, full, policy=policies)
    for b, row in enumerate(models.rows):
        alone = models.patched if b == 0 else models.stock
        given = {"policy": policies[0]} if b == 0 else {}
        close(got[:, b], paint.generate(alone, paint.batch([row]), **given)[0][:, 0])
    close(got, paint.generate(models.patched, full, policy=policies, use_cache=False)[0])


@pytest.mark.parametrize("name", SOME)
def test_off_is_off_and_unpatching_leaves_nothing(name: str) -> None:
    models = pair(name)
    full = paint.batch(models.rows)
    with Calls(models.stock) as stock, Calls(models.patched) as patched:
        want, ids = paint.generate(models.stock, full)
        got, same = paint.generate(models.patched, full)
    assert torch.equal(got, want) and torch.equal(ids, same)
    assert all(torch.equal(a, b) for a, b in zip(stock.out, patched.out, strict=True))
    assert vtr.report(models.patched).path == "padded"
    model = vtr.unpatch(patch(copy.deepcopy(models.stock)))
    for mine, its in zip(model.modules(), models.stock.modules(), strict=True):
        assert mine.__dict__.keys() == its.__dict__.keys()
        assert len(mine._forward_hooks) == len(its._forward_hooks)
        assert len(mine._forward_pre_hooks) == len(its._forward_pre_hooks)


@pytest.mark.parametrize("name", SOME)
def test_by_hand_and_padded_on_the_right(name: str) -> None:
    """Forwards by hand say what generate says, whatever side the rows are padded on."""
    models = pair(name)
    full, policies = paint.batch(models.rows), [Halves(), Odd(), None]
    want, _ = paint.generate(models.patched, full, policy=policies)
    lengths = [len(row) for row in models.rows]
    right = {
        name: torch.stack([t.roll(n, 0) for t, n in zip(value, lengths, strict=True)]) for name, value in full.items()
    }
    with torch.no_grad():
        more = {**paint.extras(models.patched, full), **counted(models.patched, full["attention_mask"])}
        out = models.patched(**full, **more, policy=policies, use_cache=True)
        close(out.logits[:, -1], want[0])
        more = {**paint.extras(models.patched, right), **counted(models.patched, right["attention_mask"])}
        other = models.patched(**right, **more, policy=policies, use_cache=True)
        close(torch.stack([other.logits[b, n - 1] for b, n in enumerate(lengths)]), want[0])
        assert out.logits.shape[1] == full["input_ids"].shape[1] == cache_in(out).get_seq_length()
        mask, cache = full["attention_mask"], cache_in(out)
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            new = {"input_ids": torch.full((3, 1), 70 + step)}
            more = {key: torch.zeros_like(value) for key, value in paint.extras(models.patched, new).items()}
            more |= counted(models.patched, mask, 1)
            out = models.patched(**new, **more, past_key_values=cache, attention_mask=mask, use_cache=True)
            close(out.logits[:, -1], want[step + 1])
            assert cache_in(out) is cache and cache.get_seq_length() == mask.shape[1]


@pytest.mark.parametrize("name", [*RECURRENT, pytest.param("Gemma3n", marks=slow)])
def test_beams_and_several_answers(name: str) -> None:
    models = pair(name)
    given: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, num_beams=3)
    given |= dict(num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    policies = [Odd(), Halves(), None]

    def run(rows: list[list[int]], policy: Any, **more: Any) -> Any:
        inputs = paint.batch(rows)
        extras = paint.extras(models.patched, inputs)
        return models.patched.generate(**inputs, **extras, policy=policy, **given, **more)

    got = run(models.rows, policies)
    for b, (row, policy) in enumerate(zip(models.rows, policies, strict=True)):
        alone = run([row], policy)
        assert torch.equal(got.sequences[2 * b : 2 * b + 2, -4:], alone.sequences[:, -4:])
        close(got.sequences_scores[2 * b : 2 * b + 2], alone.sequences_scores)
    without = run(models.rows, policies, use_cache=False)
    assert torch.equal(without.sequences, got.sequences)
    assert len(vtr.report(models.patched).rows) == 3


# -------------------------------------------------------------------------------------------------- a cache goes on
@pytest.mark.parametrize("name", [*RECURRENT, "Gemma3n", "MistralLarge4"])
def test_a_second_turn_of_text(name: str) -> None:
    """It says what one call over the whole conversation says."""
    models = pair(name)
    row, other, policies = models.rows[0], [*models.rows[0][:19], 26, 27, 28, 29], [Odd(), Halves()]
    first, turn = paint.batch([row, other]), [80, 81, 82, 83, 84]
    whole = paint.batch([row + turn, other + turn])
    want, _ = paint.generate(models.patched, whole, policy=policies)
    more = {**paint.extras(models.patched, first), **counted(models.patched, first["attention_mask"])}
    with torch.no_grad():
        out = models.patched(**first, **more, policy=policies, use_cache=True)
    forked = vtr.fork(cache_in(out), [1, 0])
    new = {"input_ids": whole["input_ids"][:, -5:]}
    more = {key: torch.zeros_like(value) for key, value in paint.extras(models.patched, new).items()}
    more |= counted(models.patched, whole["attention_mask"], 5)
    with torch.no_grad():
        by_hand = models.patched(
            **new, **more, past_key_values=cache_in(out), attention_mask=whole["attention_mask"], use_cache=True
        )
    close(by_hand.logits[:, -1], want[0])
    swapped = {key: value.flip(0) for key, value in whole.items()}
    close(paint.generate(models.patched, swapped, past_key_values=forked)[0].flip(1), want)
    assert type(forked) is ShortCache and forked.get_seq_length() == len(row + turn) + paint.STEPS - 1


def test_what_cannot_go_on_is_refused() -> None:
    models = pair("Qwen3_5")
    first = paint.batch(models.rows[:1])
    with torch.no_grad():
        out = models.patched(**first, **paint.extras(models.patched, first), policy=Odd(), use_cache=True)
    new = {"input_ids": torch.tensor([[0, 80]]), "past_key_values": cache_in(out)}
    new["attention_mask"] = torch.ones(1, len(models.rows[0]) + 2, dtype=torch.long)
    new["attention_mask"][0, -2] = 0
    before = [layer.get_seq_length() for layer in cache_in(out).layers if hasattr(layer, "keys")]
    with pytest.raises(UnsupportedError, match="as many new tokens each"):
        models.patched(**new)
    with pytest.raises(UnsupportedError, match="no new pictures"):
        models.patched(**{**new, "pixel_values": torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        cache_in(out).crop(1)
    with pytest.raises(ValueError, match="2 rows for a cache of 1"):
        models.patched(input_ids=torch.tensor([[80], [80]]), past_key_values=cache_in(out))
    assert before == [layer.get_seq_length() for layer in cache_in(out).layers if hasattr(layer, "keys")]
    cache_in(out).reset()
    assert type(cache_in(out)) is DynamicCache


# ------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("spec", "instead"),
    [
        ("fastv:keep=0.25,layer=2", "divprune:keep=0.625"),
        ("random:keep=0.3", "random:keep=0.3,before_decoder=true"),
        ("divprune:keep=0.5+fastv:keep=0.5,layer=1", "Leave out the part"),
        ("zipvl", "divprune:keep=0.25"),
    ],
)
def test_policies_that_act_inside_are_refused_with_another_named(spec: str, instead: str) -> None:
    models = pair("Lfm2Vl")
    full = paint.batch(models.rows)
    with pytest.raises(UnsupportedError, match="acts inside the decoder") as refused:
        models.patched.generate(**full, policy=spec)
    assert instead in str(refused.value)
    with pytest.raises(UnsupportedError, match="acts inside"):
        models.patched(**full, policy=[None, None, spec])
    with pytest.raises(UnsupportedError, match="acts inside"), vtr.use(models.patched, spec):
        pass
    with pytest.raises(UnsupportedError, match="acts inside"):
        vtr.patch(models.patched, spec)


def test_the_reason_is_said() -> None:
    model = vtr.patch(copy.deepcopy(tiny.stock("Lfm2VlForConditionalGeneration")))
    made = model.__dict__["_vtr"]
    assert made.path == "padded" and "Lfm2Model" in made.why
    with pytest.raises(UnsupportedError, match="Lfm2Model"):
        model.generate(**paint.batch(pair("Lfm2Vl").rows), policy="fastv")
    assert pair("Llava").patched.__dict__["_vtr"].why is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache_implementation": "static"}, "static"),
        ({"prompt_lookup_num_tokens": 3}, "takes back"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"past_key_values": transformers.StaticCache.__new__(transformers.StaticCache)}, "DynamicCache"),
    ],
)
def test_ways_of_generating_that_are_refused(given: dict[str, Any], says: str) -> None:
    models = pair("Lfm2Vl")
    with pytest.raises(UnsupportedError, match=says):
        models.patched.generate(**paint.batch(models.rows), policy=Odd(), max_new_tokens=2, **given)


def test_masks_of_ones_own_are_refused() -> None:
    models = pair("Lfm2Vl")
    full = paint.batch(models.rows[:1])
    full["attention_mask"] = torch.ones(1, 1, 23, 23, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="2-D attention_mask"):
        models.patched(**full, policy=Odd())


def test_a_reduced_call_is_not_compiled() -> None:
    models = pair("Lfm2Vl")
    compiled = torch.compile(models.patched, backend="eager")
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        compiled(**paint.batch(models.rows), policy=Odd())
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("name", ["Qwen3_5", "Lfm2Vl", "Llava"])
def test_loss_and_gradients_are_those_of_the_shorter_prompt(name: str) -> None:
    """Labels on text alone: each is predicted from the last token in front of it that is left."""
    models = pair(name)
    row = models.rows[0]
    given, labels = paint.batch([row]), torch.tensor([row])
    labels[0, :19] = -100
    extras = {**paint.extras(models.patched, given), **counted(models.patched, given["attention_mask"])}
    grads = []
    keep = [slot for (slot,) in groups_of(row, models.mark, Odd())]
    with Calls(models.stock) as calls:
        models.stock(**given, **extras)
    short = {"inputs_embeds": calls.given[0]["inputs_embeds"].detach()[:, keep], "labels": labels[:, keep]}
    if "position_ids" in extras:
        short["position_ids"] = extras["position_ids"][..., keep]
    for model, inputs in (
        (models.patched, {**given, **extras, "labels": labels, "policy": Odd()}),
        (models.stock, short),
    ):
        model.train()
        out = model(**inputs, use_cache=False)
        out.loss.backward()
        layers = find_adapter(model).text_model(model).layers
        grads.append((out.loss.detach(), [p.grad.clone() for p in layers.parameters() if p.grad is not None]))
        model.zero_grad()
        model.eval()
    close(grads[0][0], grads[1][0])
    assert len(grads[0][1]) == len(grads[1][1]) > 0
    for one, other in zip(grads[0][1], grads[1][1], strict=True):
        close(one, other)


@pytest.mark.parametrize("name", RECURRENT)
def test_dropped_slots_carry_the_state_before_them(name: str) -> None:
    models = pair(name)
    given = paint.batch([models.rows[0]])
    with torch.no_grad():
        logits = models.patched(**given, **paint.extras(models.patched, given), policy=Odd()).logits[0]
    assert all(torch.equal(logits[slot], logits[slot - 1]) for slot in range(3, 19, 2))
    assert not any(torch.equal(logits[slot], logits[slot - 1]) for slot in range(4, 20, 2))


# ------------------------------------------------------------------------------------------------------ accounting
def test_padding_counts_as_computed_and_attention_alone_has_keys() -> None:
    models = pair("Qwen3_5")
    _, _ = paint.generate(models.patched, paint.batch(models.rows), policy=[Odd(), Halves(), None])
    report, text = vtr.report(models.patched), find_adapter(models.patched).text_model(models.patched)
    width = max(15, 18, 20)
    linear = sum(2 * m.in_features * m.out_features for m in text.layers.modules() if isinstance(m, nn.Linear))
    attending = sum(kind == "full_attention" for kind in text.config.layer_types)
    pair_of = 4 * text.config.num_attention_heads * text.config.head_dim
    assert report.prefill_flops == 3 * (width * linear + attending * pair_of * width**2)
    keys = sum(width + step + 1 for step in range(paint.STEPS - 1))
    assert report.decode_flops == 3 * ((paint.STEPS - 1) * linear + attending * pair_of * keys)
    token = attending * 2 * text.config.num_key_value_heads * text.config.head_dim * 4
    more = paint.STEPS - 1
    assert report.kv_bytes == token * (15 + 18 + 20 + 3 * more)
    assert report.kv_bytes_allocated == token * 3 * (width + more)
    assert report.steps == more and "padded" in report.table()


# ------------------------------------------------------------------------------------------------------ both paths
@pytest.mark.parametrize(
    ("kind", "policy"),
    [("llava", "cls:keep=0.3"), ("llava_next", "globalcom2:retention=0.5"), ("llava", "pool"),
     ("qwen3_vl", "divprune:keep=0.4"), ("qwen3_vl", "tome:keep=0.5"),
     ("llava_next", 'by_image:default="divprune:keep=0.5",last="none"')],
)  # fmt: skip
def test_packed_and_padded_say_the_same(kind: str, policy: str) -> None:
    """With real pictures through the model's own tower; Qwen3-VL adds features to vision tokens behind its layers."""
    family = next(family for family in FAMILIES if family.kind == kind)
    stock = family.make()
    packed, padded = vtr.patch(copy.deepcopy(stock)), copy.deepcopy(stock)
    Patch(padded, find_adapter(padded), path="padded").install()
    inputs = family.batch(stock, [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "which"]])
    policies = [policy, None, policy]
    got, want = (family.generate(model, inputs, policy=policies, max_new_tokens=4) for model in (padded, packed))
    assert torch.equal(got[0], want[0])
    close(got[1], want[1])
    one, other = vtr.report(padded), vtr.report(packed)
    assert one.rows == other.rows and (one.path, other.path) == ("padded", "packed")
    close(family.logits(padded, inputs, policy=policies), family.logits(packed, inputs, policy=policies))


def pictures(model: Any, row: Sequence[int], mark: int) -> dict[str, Tensor]:
    """A row whose first 16 placeholders are a picture of 8 x 8 patches, as a processor gives it."""
    given, vision = paint.batch([row]), model.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    drawn = torch.randn(64, size, generator=torch.Generator().manual_seed(0))
    return {
        **given,
        "mm_token_type_ids": (given["input_ids"] == mark).long(),
        "pixel_values": drawn,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


def test_pictures_of_a_recurrent_model_with_three_axes() -> None:
    """Positions of a grid: generate, forwards by hand, a second turn, and a call in between that moves the model's own
    count of what a picture adds to positions."""
    models, turn = pair("Qwen3_5"), [80, 81, 82]
    row = models.rows[0]
    given = pictures(models.patched, row, models.mark)
    whole = pictures(models.patched, row + turn, models.mark)
    run = functools.partial(models.patched.generate, do_sample=False, return_dict_in_generate=True, output_logits=True)
    said = functools.partial(run, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    want = said(**given, policy=Odd())
    later = torch.stack(said(**whole, policy=Odd()).logits)
    plain = torch.stack(said(**whole).logits)
    assert paint.apart(later, plain) > 1e-3
    with torch.no_grad():
        out = models.patched(**given, policy=Odd(), use_cache=True)
        close(out.logits[:, -1], want.logits[0])
        forked, cache, mask = vtr.fork(cache_in(out)), cache_in(out), given["attention_mask"]
        said(**pictures(models.patched, [10, *row[3:]], models.mark))
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            new = want.sequences[:, len(row) + step, None]
            out = models.patched(input_ids=new, past_key_values=cache, attention_mask=mask, use_cache=True)
            close(out.logits[:, -1], want.logits[step + 1])
        close(torch.stack(said(**whole, past_key_values=forked).logits), later)
