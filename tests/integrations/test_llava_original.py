"""LLaVA's own package (``llava-torch``), patched: equal to transformers' own LLaVA with the same weights."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests import learned, tiny
from tests import llava_package as package
from tests.loads import snapshot
from vtr.image import arrange

pytestmark = [
    pytest.mark.skipif(not package.INSTALLED, reason=package.WHY),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS = [["ab", tiny.IMAGE, "cde"], ["a", tiny.IMAGE, "b", tiny.IMAGE, "cd"], ["abcdef"], ["b", tiny.IMAGE, "x"]]
POLICIES = [
    None, vtr.FastV(0.25, 2), vtr.GSearch(schedule=[1.0, 0.5, 0.25, 0.1, 0.1]), vtr.Matryoshka(9),
    vtr.GlobalCom2(retention=0.25), learned.pmod(), learned.dynamic(),
]  # fmt: skip
MIXED = [vtr.FastV(0.25, 2), vtr.GlobalCom2(retention=0.25), None, learned.dynamic()]
RUN = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=list(package.MERGES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.checkpoint(tmp_path_factory.mktemp(request.param) / "own", request.param)


@pytest.fixture(scope="module")
def twin(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vtr.patch(package.twin(folder, tmp_path_factory.mktemp("twin")))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return package.load(folder)


@pytest.fixture(scope="module")
def model(stock: Any) -> Any:
    return vtr.patch(copy.deepcopy(stock))


@pytest.fixture
def inputs(model: Any) -> dict[str, Any]:
    return package.batch(ROWS, kind_of(model))


def kind_of(model: Any) -> str:
    return "anyres" if model.config.image_aspect_ratio == "anyres" else "square"


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """As the package's own scripts call it."""
    given = {name: inputs[name] for name in ("images", "image_sizes", "attention_mask")}
    return model.generate(inputs["input_ids"], **given, **{**RUN, **kwargs})


def counts(model: Any) -> list[list[int]]:
    return [row.vision_tokens for row in vtr.report(model).rows]


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_transformers_own_llava(model: Any, twin: Any, inputs: dict[str, Any], policy: Any) -> None:
    theirs = package.for_twin(twin, inputs)
    with torch.no_grad():
        got, want = model(**inputs, policy=policy).logits, twin(**theirs, policy=policy).logits
    real = theirs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real][:, : package.WORDS], atol=2e-6, rtol=0)
    assert counts(model) == counts(twin)
    said = generate(model, inputs, policy=policy)
    never = {"suppress_tokens": [package.WORDS]}  # the placeholder, which the package's vocabulary does not have
    answer = twin.generate(**theirs, **RUN, **never, policy=policy)[:, theirs["input_ids"].shape[1] :]
    assert torch.equal(said, answer)
    ours, other = vtr.report(model), vtr.report(twin)
    assert (counts(model), ours.flops, ours.kv_bytes) == (counts(twin), other.flops, other.kv_bytes)
    assert policy is None or ours.rows[1].mean_keep < 0.8


def test_off_is_off(stock: Any, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        want = stock(**inputs).logits  # transformers adds hooks of its own in the first call
        before = snapshot(stock)
        try:
            said = generate(stock, inputs)
        except TypeError:  # transformers 5.24 hands on a cache under a name that the package does not know
            said = None
        vtr.patch(stock)
        assert torch.equal(stock(**inputs).logits, want)
        assert said is None or torch.equal(generate(stock, inputs), said)
        vtr.unpatch(stock)
        assert torch.equal(stock(**inputs).logits, want)
    assert snapshot(stock) == before


def test_rows_do_not_see_each_other(model: Any, inputs: dict[str, Any]) -> None:
    together = generate(model, inputs, policy=MIXED)
    with torch.no_grad():
        logits = model(**inputs, policy=MIXED).logits
    for b, policy in enumerate(MIXED):
        alone = package.single(inputs, b)
        with torch.no_grad():
            torch.testing.assert_close(model(**alone, policy=policy).logits[0, -3:], logits[b, -3:], atol=2e-6, rtol=0)
        said = generate(model, alone, policy=policy)[0]
        assert torch.equal(said, together[b, : len(said)])


def test_beams_and_positional_arguments(model: Any, inputs: dict[str, Any]) -> None:
    one = package.single(inputs, 1)
    want = generate(model, one, policy=MIXED[0], num_beams=3)
    args = one["input_ids"], one["images"], one["image_sizes"]
    assert torch.equal(model.generate(*args, policy=MIXED[0], num_beams=3, **RUN), want)
    with vtr.use(model, MIXED[0]):
        assert torch.equal(generate(model, one, num_beams=3), want)
    assert counts(model)[0][0] > counts(model)[0][-1] > 0


def test_threads_with_policies_of_their_own(model: Any, inputs: dict[str, Any]) -> None:
    ones = [package.single(inputs, b) for b in range(4)]
    want = [generate(model, one, policy=p) for one, p in zip(ones, MIXED, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(generate, model, ones[i % 4], policy=MIXED[i % 4]) for i in range(16)]
    assert all(torch.equal(job.result(), want[i % 4]) for i, job in enumerate(jobs))


def test_a_copy_is_its_own(model: Any, inputs: dict[str, Any]) -> None:
    want = generate(model, inputs, policy=MIXED)
    other = copy.deepcopy(model)
    other.get_vision_tower().vision_tower.embeddings.class_embedding.data.add_(1)
    assert torch.equal(generate(model, inputs, policy=MIXED), want)
    vtr.unpatch(other)
    assert not other._forward_pre_hooks and "generate" not in vars(other)


def test_labels_fit_and_gradients_flow(model: Any, inputs: dict[str, Any]) -> None:
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 0, -100)
    loss = model(**inputs, labels=labels, policy=vtr.Matryoshka(9)).loss
    (slope,) = torch.autograd.grad(loss, model.model.mm_projector[0].weight)
    assert bool(slope.isfinite().all()) and float(slope.abs().sum()) > 0


@dataclass
class Arranged(vtr.Policy):
    """Notes whether an image's tokens are what its tiles make at the places that the layout names."""

    wants = ("tiles",)

    def compress(self, image: vtr.Image) -> Any:
        assert image.tiles is not None
        assert torch.equal(arrange(image.layout, image.tiles, image.newline), image.features)
        SEEN.append(image.layout)
        return None


SEEN: list[Any] = []
CASES = {
    "flat": ({"mm_patch_merge_type": "flat"}, [(40, 40), (44, 20)], (2, 2)),
    "flat, frames": ({"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"}, [(24, 24), (24, 24)], (0, 0)),
    "spatial": ({"mm_patch_merge_type": "spatial"}, [(40, 40), (44, 20)], (2, 2)),
    "unpad": ({}, [(40, 40), (47, 21)], (2, 2)),
    "slivers": ({}, [(2, 900), (900, 2)], (2, 1)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_layouts_are_what_the_package_does(case: str, tmp_path: Path) -> None:
    settings, sizes, crops = CASES[case]
    model = vtr.patch(package.load(package.checkpoint(tmp_path, "anyres", **settings)))
    tiles = [4, 4] if case == "flat, frames" else [package.tiles_of(size) for size in sizes]
    images = [torch.randn(n, 3, package.SIDE, package.SIDE) for n in [*tiles, 1]]
    ids = torch.tensor([[1, package.IMAGE, 9, package.IMAGE, package.IMAGE, 10]])
    SEEN.clear()
    with torch.no_grad():
        want = model(input_ids=ids, images=images, image_sizes=[*sizes, (24, 24)]).logits
        got = model(input_ids=ids, images=images, image_sizes=[*sizes, (24, 24)], policy=Arranged()).logits
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert [layout.crops for layout in SEEN] == [crops, SEEN[1].crops, (0, 0)]
    assert SEEN[0].shrunk(2).grid == (3, 3)


@pytest.mark.parametrize("shape", ["5-d", "list of 3-d"])
def test_ways_to_hand_over_images(shape: str, model: Any) -> None:
    made = torch.Generator().manual_seed(0)
    images: Any = torch.randn(2, 5 if shape == "5-d" else 1, 3, package.SIDE, package.SIDE, generator=made)
    images = images if shape == "5-d" else [image[0] for image in images]
    ids = torch.tensor([[1, package.IMAGE, 9], [1, 9, package.IMAGE]])
    run = {"policy": vtr.Matryoshka(1), "output_logits": True, "return_dict_in_generate": True, **RUN}
    together = model.generate(ids, images=images, image_sizes=[(40, 40)] * 2, **run).logits[0]
    for i in (0, 1):
        alone = model.generate(ids[i : i + 1], images=images[i : i + 1], image_sizes=[(40, 40)], **run).logits[0]
        torch.testing.assert_close(alone[0], together[i], atol=2e-6, rtol=0)


def test_patched_before_its_tower_is_there(folder: Path, model: Any, inputs: dict[str, Any]) -> None:
    """As the package's loader goes about it, if the model is patched in between."""
    from llava.model import LlavaLlamaForCausalLM

    late = vtr.patch(LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval())
    late.get_vision_tower().load_model()
    assert torch.equal(generate(late, inputs, policy=MIXED), generate(model, inputs, policy=MIXED))
    vtr.unpatch(late)
    tower = late.get_vision_tower().vision_tower
    assert not tower._forward_hooks and not tower._forward_pre_hooks


def test_weights_fitted_on_transformers_own_llava_are_known(model: Any, twin: Any, inputs: dict[str, Any]) -> None:
    """Its vocabulary has one word more; the decoder is the same."""
    assert len(twin.get_input_embeddings().weight) == len(model.get_input_embeddings().weight) + 1
    generate(model, inputs, policy=learned.pmod().fit(twin))
    other = copy.deepcopy(twin)
    other.get_decoder().layers[0].self_attn.q_proj.weight.data.add_(1)
    with pytest.raises(ValueError, match="matrices differ"):
        generate(model, inputs, policy=learned.pmod().fit(other))


def test_mistral(tmp_path: Path) -> None:
    model = vtr.patch(package.load(package.checkpoint(tmp_path, "anyres", lm="mistral"), lm="mistral"))
    inputs = package.batch(ROWS, "anyres")
    together = generate(model, inputs, policy=MIXED)
    for b, policy in enumerate(MIXED):
        said = generate(model, package.single(inputs, b), policy=policy)[0]
        assert torch.equal(said, together[b, : len(said)])


def test_what_cannot_be_done_is_refused(model: Any, inputs: dict[str, Any]) -> None:
    one = package.single(inputs, 0)
    none = {**one, "images": None}
    with pytest.raises(ValueError, match="no images were given: pass images="):
        generate(model, none, policy=MIXED[0])
    with pytest.raises(ValueError, match="give one image for every -200"):
        generate(model, {**inputs, "images": inputs["images"][:2], "image_sizes": [(40, 40)] * 2}, policy=MIXED[0])
    with pytest.raises(vtr.UnsupportedError, match="policies that try answers before they choose do not run on"):
        generate(model, one, policy="autoscale")
    with pytest.raises(vtr.UnsupportedError, match="leave out use_cache=False"):
        generate(model, one, policy=MIXED[0], use_cache=False)
    with pytest.raises(vtr.UnsupportedError, match="hold no image placeholder"):
        model(inputs_embeds=torch.zeros(1, 4, 48), policy=MIXED[0])
    model.config.tokenizer_padding_side = "right"
    try:
        with pytest.raises(vtr.UnsupportedError, match="tokenizer_padding_side = 'left'"):
            generate(model, inputs, policy=MIXED)
        with torch.no_grad():
            right = model(**inputs, policy=MIXED).logits
    finally:
        model.config.tokenizer_padding_side = "left"
    with torch.no_grad():
        left = model(**inputs, policy=MIXED).logits
    n = int(inputs["attention_mask"][2].sum())  # a row of words alone
    torch.testing.assert_close(right[2, :n], left[2, -n:], atol=2e-6, rtol=0)
    model.config.tokenizer_model_max_length = 20
    try:
        with pytest.raises(ValueError, match="an image of it is cut off"):
            generate(model, one, policy=MIXED[0])
    finally:
        del model.config.tokenizer_model_max_length
    model.get_vision_tower().select_feature = "cls_patch"
    try:
        with pytest.raises(vtr.UnsupportedError, match="use 'patch'"):
            generate(model, one, policy=MIXED[0])
    finally:
        model.get_vision_tower().select_feature = "patch"
    said = generate(model, one, policy=MIXED[0])[0]
    assert torch.equal(said, generate(model, inputs, policy=MIXED[0])[0, : len(said)])


def test_an_interrupted_forward_leaves_nothing_behind(model: Any, inputs: dict[str, Any]) -> None:
    from vtr.engine.call import pending_request

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.get_vision_tower().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs, policy=MIXED[0])
    hook.remove()
    assert pending_request.get() is None
    with torch.no_grad():
        embeds = model.model.embed_tokens(torch.tensor([[1, 9]]))
        assert model.model(inputs_embeds=embeds).last_hidden_state.shape == (1, 2, 48)


def test_other_code_of_that_name_is_refused() -> None:
    stranger = type("LlavaLlamaForCausalLM", (torch.nn.Module,), {})()
    with pytest.raises(vtr.UnsupportedError, match="vtr knows llava-torch"):
        vtr.patch(stranger)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("how", ["labels", "column"])
def test_an_answer_that_is_given_ranks_nothing(model: Any, row: int, how: str) -> None:
    """Labels and columns are those of input_ids, where an image is one word; the model merges them itself."""
    inputs = package.batch(ROWS[row : row + 1], kind_of(model))
    said = generate(model, inputs, policy=vtr.FastV(0.25, 2))
    want = counts(model), [r.kept(4) for r in vtr.report(model).rows]
    start = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], said[:, -RUN["max_new_tokens"] :]], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids.clone()
    labels[:, :start] = -100
    given: dict[str, Any] = {"labels": labels} if how == "labels" else {"vtr_queries_end": start}
    with torch.no_grad():
        model(**whole, **given, policy=vtr.FastV(0.25, 2))
        assert (counts(model), [r.kept(4) for r in vtr.report(model).rows]) == want
        model(**whole, policy=vtr.FastV(0.25, 2))
        assert [r.kept(4) for r in vtr.report(model).rows] != want[1]
