"""What policies read of the vision tower: its states and attention by layer, its projector, and the row's question."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtr
from tests import tiny
from tests.families import FAMILIES
from tests.integrations.test_towers import pictures, pixtral
from tests.loads import forward
from tests.support import ROWS, Models
from vtr.engine.adapters import find_adapter
from vtr.engine.tower import attention_of, has_cls, layers_of, leading_tokens
from vtr.image import Image

KINDS = {f.kind: f for f in FAMILIES if f.kind != "internvl_chat"}


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 2e-5 * max(float(want.abs().max()), 1.0)


@vtr.register_policy("tower-for-test")
@dataclass
class Looks(vtr.Policy):
    """Keeps everything, and hands what it sees to a list."""

    question_guided: ClassVar[bool] = True
    wants: ClassVar[tuple[str, ...]] = (
        "hidden_states", "hidden_states[0]", "hidden_states[-1]", "attentions", "attentions[0]", "attentions[-1]",
        "question",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.seen: list[Image] = []
        self.made: list[dict[str, Tensor]] = []

    def compress(self, image: Image) -> None:
        tower = image.tower
        assert tower is not None
        found = {f"states{layer}": tower.hidden_states(layer) for layer in (None, 0, -1)}
        found |= {f"received{layer}": tower.attention_received(layer) for layer in (None, 0, -1)}
        if tower.has_cls:
            found |= {f"from{layer}": tower.attention_from_cls(layer) for layer in (None, 0, -1)}
            found |= {"cls": tower.cls_state(), "keys": tower.keys(-1), "query": tower.cls_query(-1)}
        self.seen.append(image)
        self.made.append(found)


@contextmanager
def recorded(tower: Any) -> Iterator[tuple[dict[int, list[Tensor]], list[Tensor]]]:
    """Attention weights per layer (one for each segment), and all states, of what the tower runs in the block."""
    layers, weights, states = layers_of(tower), {}, []
    index = {id(attention_of(tower, layer)[1]): i for i, layer in enumerate(layers)}
    index |= {id(m): i for i, layer in enumerate(layers) for m in layer.modules() if hasattr(m, "num_heads")}

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        found = (logits if mask is None or mask.dtype == torch.bool else logits + mask).softmax(-1)
        weights.setdefault(index[id(module)], []).append(found)
        return (found @ v).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("spy-for-test", spy)
    own = [(m.config, m.config._attn_implementation) for m in tower.modules() if hasattr(m, "config")]
    for config, _ in own:
        config._attn_implementation = "spy-for-test"
    first = layers[0].register_forward_pre_hook(
        lambda m, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    handles = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in layers]
    try:
        yield weights, states
    finally:
        for config, implementation in own:
            config._attn_implementation = implementation
        for handle in (first, *handles):
            handle.remove()


def on_tokens(model: Any, image: Image, patches: Tensor, part: slice) -> Tensor:
    """Of a run of the tower, [tiles, patches, C] or [patches, C]: what the tokens of one image have."""
    height, width = image.layout.grid
    if patches.dim() == 2:
        tokens = image.layout.tiles * height * width
        each = patches[part].unflatten(0, (tokens, -1)).mean(1)
        if getattr(model.config.vision_config, "window_size", None) is not None:
            from transformers.vision_utils import get_vision_window_index

            vision = model.config.vision_config
            grid = torch.tensor([[image.layout.tiles, height * 2, width * 2]])
            order, _ = get_vision_window_index(grid, 2, vision.window_size, vision.patch_size)
            each = each[order.argsort()]
        return each.unflatten(0, (image.layout.tiles, -1))
    tiles = patches[part]
    tiles = tiles.roll(1, 0) if image.layout.thumbnail_last else tiles
    have, side = tiles.shape[1], round(tiles.shape[1] ** 0.5)
    if have == height * width:
        return tiles
    times = side // height
    cells = tiles.view(len(tiles), height, times, width, times, -1)
    return cells.mean((2, 4)).flatten(1, 2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_tower_does(kind: str) -> None:
    """Of every image of a mixed batch: states, attention received and from the CLS token, keys, queries."""
    models = Models.from_family(KINDS[kind])
    check(
        models.stock,
        models.patched,
        models.inputs(),
        [models.family.single(models.stock, models.inputs(), b) for b in range(len(ROWS))],
    )


def check(stock: Any, patched: Any, inputs: dict[str, Tensor], rows: list[dict[str, Tensor]]) -> None:
    tower = find_adapter(stock).tower(stock)
    lead, depth = leading_tokens(tower), len(layers_of(tower))
    policies = [Looks() for _ in rows]
    forward(patched, inputs, policy=policies)
    at = find_adapter(stock).features_at(stock)
    at = at if at >= 0 else depth + 1 + at
    for policy, row in zip(policies, rows, strict=True):
        with recorded(tower) as (weights, states), torch.no_grad():
            stock(**row)
        first = 0
        for image, made in zip(policy.seen, policy.made, strict=True):
            flat = states[0].dim() == 2 or stock.config.vision_config.model_type == "pixtral"
            runs = [s[0] if flat and s.dim() == 3 else s for s in states]
            height, width = image.layout.grid
            size = image.layout.tiles
            if flat:
                size *= height * width * (1 if runs[0].shape[0] == sum(len(i) for i in policy.seen) else 4)
            part = slice(first, first + size)
            first += size
            for name, layer in (("None", at), ("0", 0), ("-1", depth)):
                want = runs[layer] if flat else runs[layer][:, lead:]
                close(made[f"states{name}"], on_tokens(stock, image, want, part))
            for name, layer in (("None", at - 1), ("0", 0), ("-1", depth - 1)):
                found = weights[layer]
                if flat:
                    want = torch.cat([w.mean((1, 2))[0] for w in found])[:, None]
                    close(made[f"received{name}"], on_tokens(stock, image, want, part)[..., 0])
                    continue
                (found,) = found
                close(
                    made[f"received{name}"], on_tokens(stock, image, found.mean((1, 2))[:, lead:, None], part)[..., 0]
                )
                if has_cls(tower):
                    want = on_tokens(stock, image, found[:, :, 0, lead:].transpose(1, 2), part).transpose(1, 2)
                    close(made[f"from{name}"], want)
            if has_cls(tower):
                tiles = runs[at][part].roll(1, 0) if image.layout.thumbnail_last else runs[at][part]
                close(made["cls"], tiles[:, 0])
                logits = torch.einsum("thd,tnhd->thn", made["query"], made["keys"]) / made["keys"].shape[-1] ** 0.5
                want = weights[depth - 1][0][part]
                close(logits.softmax(-1), (want.roll(1, 0) if image.layout.thumbnail_last else want)[:, :, 0])
        assert first or not policy.seen


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_the_projector_is_the_models(kind: str) -> None:
    """The states of the layer in use, projected, are the tiles; its run inside a policy is not taken for the call's."""

    @dataclass
    class Projects(vtr.Policy):
        wants: ClassVar[tuple[str, ...]] = ("projector", "hidden_states", "tiles")

        def compress(self, image: Image) -> None:
            assert image.tower is not None and image.tiles is not None
            states = image.tower.hidden_states()
            close(image.tower.project(states.flatten(0, 1)).view_as(image.tiles), image.tiles)
            done.append(image)

    done: list[Image] = []
    models = Models.from_family(KINDS[kind])
    forward(models.patched, models.inputs(), policy=Projects())
    assert len(done) == sum(part == tiny.IMAGE for row in ROWS for part in row)


def test_the_question_is_what_stands_behind_the_last_image() -> None:
    models = Models.from_family(KINDS["llava_next"])
    table = models.stock.get_input_embeddings().weight.detach()
    for padding in ("left", "right"):
        inputs, policies = models.inputs(padding), [Looks() for _ in ROWS]
        forward(models.patched, inputs, policy=policies)
        for row, policy in zip(ROWS, policies, strict=True):
            for image in policy.seen:
                want = torch.tensor([8 + (ord(c) - 97) % 50 for c in row[-1]])
                assert torch.equal(image.question_ids, want) and torch.equal(image.question, table[want])
    given = {**inputs, "inputs_embeds": models.patched.get_input_embeddings()(inputs["input_ids"])}
    looks = Looks()
    forward(models.patched, {k: v for k, v in given.items() if k != "input_ids"}, policy=[looks] + [None] * 4)
    assert looks.seen[0].question_ids is None and torch.equal(
        looks.seen[0].question, table[[8 + (ord(c) - 97) % 50 for c in "what"]]
    )


def test_the_answer_is_no_question() -> None:
    """Without a cache every step compresses again, and asks about the same words."""
    models, looks = Models.from_family(KINDS["llava"]), Looks()
    tiny.generate(
        models.patched,
        models.family.single(models.stock, models.inputs(), 0),
        policy=looks,
        max_new_tokens=3,
        use_cache=False,
    )
    assert len(looks.seen) == 3 and {len(image.question) for image in looks.seen} == {4}


def test_pixtrals_pictures() -> None:
    stock = pixtral()
    rows = [["ab", (16, 24), "what"], ["c", (24, 16), "which"]]
    inputs = pictures(rows)
    check(stock, vtr.patch(pixtral()), inputs, [pictures(rows[:1]), _second(inputs)])


def _second(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    real = inputs["attention_mask"][1].bool()
    out = {name: inputs[name][1:, real] for name in ("input_ids", "attention_mask")}
    height, width = inputs["image_sizes"][1].tolist()
    return out | {
        "pixel_values": inputs["pixel_values"][1:, :, :height, :width],
        "image_sizes": inputs["image_sizes"][1:],
    }


# ------------------------------------------------------------------------------------------------- what is not there
def looking(*wants: str, read: Any = None) -> vtr.Policy:
    @dataclass
    class Some(vtr.Policy):
        def compress(self, image: Image) -> None:
            if read is not None:
                read(image.tower)

    Some.wants = wants
    return Some()


@pytest.mark.parametrize(
    ("kind", "policy", "says"),
    [
        ("llava", looking("attentions[7]"), r"attentions\[7\] is asked for, .*has 3 layers: choose -3…2"),
        ("llava", looking("hidden_states[-5]"), r"has 3 layers: choose -4…3"),
        ("llava", looking("states"), r"write a tuple of what there is"),
        ("llava", looking("question"), "question_guided: ClassVar"),
        ("llava", looking("attentions", read=lambda t: t.attention_from_cls(0)), r'wants = \("attentions\[0\]",\)'),
        ("llava", looking("attentions", read=lambda t: t.project(t)), r'wants = \("projector",\)'),
        ("llava_onevision", looking("attentions", read=lambda t: t.attention_from_cls()), "attention_received"),
        ("llava_onevision", looking("cls_token"), "on LLaVA-OneVision: it is about the vision tower's CLS"),
        ("internvl", looking("projector"), "does not work on InternVL: it merges states in front of the projector"),
        ("qwen2_5_vl", looking("projector"), "the tower's merger"),
        ("qwen2_5_vl", looking("attentions", read=lambda t: t.keys()), "rope"),
        ("smolvlm", looking("projector"), "pixel shuffle"),
    ],
)  # fmt: skip
def test_what_is_not_there_says_so(kind: str, policy: vtr.Policy, says: str) -> None:
    models = Models.from_family(KINDS[kind])
    with pytest.raises((ValueError, vtr.UnsupportedError), match=says):
        forward(models.patched, models.inputs(), policy=policy)


def test_a_layer_may_be_named_by_its_share_of_the_depth() -> None:
    """0.5 of three layers is the second, and what leaves it; 1.0 the last."""
    seen: list[tuple[Tensor, Tensor]] = []

    def read(tower: Any) -> None:
        seen.append((tower.hidden_states(0.5), tower.hidden_states(2)))
        seen.append((tower.attention_received(0.5), tower.attention_received(1)))
        seen.append((tower.attention_from_cls(1.0), tower.attention_from_cls(-1)))

    wants = ("hidden_states[0.5]", "hidden_states[2]", "attentions[0.5]", "attentions[1]", "attentions[1.0]")
    models = Models.from_family(KINDS["llava"])
    forward(models.patched, models.inputs(), policy=looking(*wants, "attentions[-1]", read=read))
    assert seen and all(torch.equal(share, number) for share, number in seen)


def test_nothing_is_kept_that_no_row_wants() -> None:
    """No hook before a policy asks; afterwards none that outlives unpatch, and no state that outlives the call."""
    models = Models.from_family(KINDS["llava"])
    layers = models.patched.model.vision_tower.encoder.layers
    forward(models.patched, models.inputs(), policy="fastv:keep=0.5")
    assert not any(layer._forward_pre_hooks for layer in layers)
    looks = Looks()
    tiny.generate(models.patched, models.inputs(), policy=[looks, *[None] * 4], max_new_tokens=2)
    assert [bool(layer._forward_pre_hooks) for layer in layers] == [True, True, True]
    image = looks.seen[0]
    with pytest.raises((vtr.UnsupportedError, IndexError, AssertionError)):
        image.tower.hidden_states()  # type: ignore[union-attr]
    vtr.unpatch(models.patched)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_one_budget_for_all_images_of_a_row() -> None:
    """``compress_row`` sees all images of a row; a class below that answers ``compress`` anew is asked for each."""

    @dataclass
    class Shares(vtr.Policy):
        def compress(self, image: Image) -> Tensor:
            return self.compress_row([image])[0]

        def compress_row(self, images: Any) -> list[Tensor]:
            return [torch.arange(len(image) // (2 * len(images))) for image in images]

    @dataclass
    class Own(Shares):
        def compress(self, image: Image) -> Tensor:
            return torch.arange(3)

    models = Models.from_family(KINDS["llava"])
    forward(models.patched, models.inputs(), policy=[Shares(), None, Own(), Shares(), None])
    rows = vtr.report(models.patched).rows
    n = 36
    assert [row.vision_tokens[0] for row in rows] == [n // 2, 0, 3, 2 * (n // 4), n]


def test_a_copy_of_a_patched_model_reads_its_own_tower() -> None:
    """Also one that is made after a policy has asked for layers of the tower."""
    models = Models.from_family(KINDS["llava"])
    first, second = Looks(), Looks()
    forward(models.patched, models.inputs(), policy=[first, *[None] * 4])
    forward(copy.deepcopy(models.patched), models.inputs(), policy=[second, *[None] * 4])
    for name, want in first.made[0].items():
        close(second.made[0][name], want)
