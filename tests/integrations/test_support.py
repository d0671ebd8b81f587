"""Families × policies: what the adapters say works passes the oracles, what they refuse is refused, the docs say so.

Of every cell that works: a mixed batch (rows with one image, several, none; rows under other policies and under none)
equals a slow dense run of the untouched weights, each row is what it is alone with padding on either side, generates
what it generates alone, and without a cache what it does with one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vtr.integrations import Qwen3VL

import vtr
from tests import learned, oracle, staged, support
from tests.engine.test_oracles import close, same, snapshot
from tests.families import FAMILIES, Family, Inputs, QwenVL
from tests.support import POLICIES, ROWS, STEPS, Models
from tests.tiny import real
from vtr.engine.adapters import find_adapter
from vtr.engine.static import StaticRaggedCache
from vtr.learned import Learned

EAGER = {"llava_next", "internvl", "qwen2_5_vl", "smolvlm"}


ELSEWHERE = {"llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "qwen2_vl"}
"""What other test files put through every oracle in every run, or is built as another family here."""


def param(family: Family, *more: Any) -> Any:
    name = "-".join([family.kind, *more])
    return pytest.param(family, *more, id=name, marks=[pytest.mark.slow] * (family.kind in ELSEWHERE))


def cells(outcome: str) -> Any:
    """Runs a test on those cells of the table that the adapters promise this ``outcome``."""
    kinds = {family.kind: family for family in FAMILIES}
    found = [param(kinds[kind], policy) for (kind, policy), said in support.declared().items() if said == outcome]
    return pytest.mark.parametrize(("models", "policy"), found, indirect=["models"])


@pytest.fixture(scope="module", params=list(map(param, FAMILIES)))
def models(request: pytest.FixtureRequest) -> Models:
    return Models.from_family(request.param, "eager" if request.param.kind in EAGER else "sdpa")


# ------------------------------------------------------------------------------------------------------ the reference
def test_the_reference_is_the_stock_model(models: Models) -> None:
    family, inputs = models.family, models.inputs()
    logits = family.logits(models.stock, inputs)
    ids, steps, _ = family.generate(models.stock, inputs, max_new_tokens=STEPS)
    for b in range(len(ROWS)):
        row = models.row(inputs, b)
        want = oracle.run(models.twin, row)
        close(logits[b, real(inputs, b)], want.logits)
        tokens, said = oracle.greedy(models.twin, row, want.kept, STEPS, support.NEVER)
        assert ids[b].tolist() == tokens
        close(steps[:, b], said)


# --------------------------------------------------------------------------------------------------------- off is off
def test_off_is_off(models: Models) -> None:
    """Bit for bit: logits, ids and caches of a patched model without a policy; after unpatch nothing is left."""
    family, inputs = models.family, models.inputs()

    def everything(model: Any, **kwargs: Any) -> list[Tensor]:
        ids, logits, cache = family.generate(model, inputs, max_new_tokens=STEPS, **kwargs)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return [family.logits(model, inputs, **kwargs), ids, logits, *held]

    want = everything(models.stock)
    family.generate(models.patched, inputs, policy="fastv:keep=0.3", max_new_tokens=2)
    assert same(everything(models.patched), want)
    assert same(everything(models.patched, policy=None), want)
    assert same(everything(models.patched, policy=[None] * len(ROWS)), want)
    model = copy.deepcopy(models.stock)
    everything(model)  # transformers adds lazy hooks of its own on the first call
    before = snapshot(model)
    vtr.patch(model)
    everything(model, policy="random:keep=0.3")
    vtr.unpatch(model)
    assert snapshot(model) == before
    assert same(everything(model), want)


# --------------------------------------------------------------------------------------------------------- every cell
@pytest.mark.sample(1)
@cells("works")
def test_a_policy_on_a_family(models: Models, policy: str) -> None:
    inputs = models.inputs()
    policies = models.mixed(policy, inputs)
    if policy == "autoscale":
        check_chosen(models, inputs, policies)
        return
    policies = [p if isinstance(p, Learned) else copy.copy(p) for p in policies]
    watched = [None if p is None or isinstance(p, Learned) else oracle.Watched(p) for p in policies]
    with support.answers() as answers:
        logits = models.family.logits(models.patched, inputs, policy=policies)
    report = vtr.report(models.patched)
    said = iter(answers)
    reduced = [b for b, p in enumerate(policies) if p is not None]
    assert policies[0].asks("attend") or any(report.rows[b].vision_tokens[-1] < report.rows[b].total for b in reduced)
    for b in range(len(ROWS)):
        asked = policies[b] is not None and policies[b].asks("compress") and report.rows[b].total
        want = expected(models, inputs, b, policies[b], watched[b], report.rows[b], next(said) if asked else ())
        got = logits[b, real(inputs, b)]
        close(got if len(want) == len(got) else got[text(inputs, b)], want)
    check_alone(models, inputs, policies, logits)
    check_generate(models, inputs, policies)


def text(inputs: Inputs, b: int) -> Tensor:
    """Which of row b's real tokens are text."""
    return inputs["input_ids"][b, real(inputs, b)] != support.IMAGE_ID


def expected(models: Models, inputs: Inputs, b: int, policy: Any, watched: Any, reported: Any, said: Any) -> Tensor:
    """Logits of row b by the slow reference: of all its tokens, or of its text where an image really got shorter.

    watched: what the row's policy answered in the decoder. said: of the row's images before it.
    """
    row, start = models.row(inputs, b), int(real(inputs, b)[0])
    kept = [[slot - start for slot in reported.kept(layer)] for layer in range(len(reported.vision_tokens))]
    if policy is None or not row.slots:
        return oracle.run(models.twin, row).logits
    if isinstance(policy, (vtr.PMoD, vtr.DynamicLLaVA)):
        images = support.image_lengths(models, inputs, b)
        said = learned.reference(models.twin, row, policy, images, len(row.vision))
        assert kept == said.kept
        return said.logits
    if isinstance(policy, vtr.Reroute):
        return staged.rerouted(models.twin, row, policy, kept)
    if policy.asks("compress"):
        made_of = [[slot - start for slot in some] for some in reported.sources(0)]
        brief = support.compressed(models, inputs, b, policy, row, made_of, said)
        if policy.asks("prune"):
            layers = range(len(reported.vision_tokens))
            every = [[[slot - start for slot in some] for some in reported.sources(layer)] for layer in layers]
            return staged.pruned(models.twin, brief, every, policy.renumbers)
        assert reported.vision_tokens == [int(brief.vision.sum())] * 5
        return oracle.run(models.twin, brief).logits[~brief.vision]
    how: Any = watched.given(row, len(kept))
    merged = bool(how.merged)
    if not merged and not how.attend:
        how = oracle.rule(policy, kept)
    want = oracle.run(models.twin, row, how, kept)
    assert kept == [[slot for slot in here if slot >= 0] for here in want.kept]
    return want.logits[~row.vision] if merged else want.logits  # (slots that are gone may show new tokens)


def check_alone(models: Models, inputs: Inputs, policies: list[Any], logits: Tensor) -> None:
    """Every row is what it is alone, with padding on either side."""
    family, right = models.family, models.inputs("right")
    other = family.logits(models.patched, right, policy=policies)
    for b, policy in enumerate(policies):
        alone = family.logits(models.patched, family.single(models.stock, inputs, b), policy=policy)[0]
        close(logits[b, real(inputs, b)], alone)
        close(other[b, real(right, b)], alone)


def check_generate(models: Models, inputs: Inputs, policies: list[Any]) -> None:
    """Ids and logits of each row are those it has alone, those with constant shapes, and those without a cache."""
    family, run = models.family, {"max_new_tokens": STEPS}
    ids, logits, _ = family.generate(models.patched, inputs, policy=policies, **run)
    static, said, cache = family.generate(models.patched, inputs, policy=policies, cache_implementation="static", **run)
    assert isinstance(cache, StaticRaggedCache) and cache.constant is not None
    assert cache.constant.room == STEPS
    assert torch.equal(ids, static)
    close(logits, said)
    for b, policy in enumerate(policies):
        single = family.single(models.stock, inputs, b)
        alone, said, _ = family.generate(models.patched, single, policy=policy, **run)
        assert torch.equal(ids[b], alone[0])
        close(logits[:, b], said[:, 0])
    # the remote code always has a cache: there, the same weights in transformers' class say what comes without
    model = models.native or models.patched
    plain, said, _ = family.generate(model, inputs, policy=policies, use_cache=False, **run)
    assert torch.equal(ids, plain)
    close(logits, said)


def check_chosen(models: Models, inputs: Inputs, policies: list[Any]) -> None:
    """What a policy that chooses has chosen for each row is what runs."""
    family, run = models.family, {"max_new_tokens": STEPS}
    ids, logits, _ = family.generate(models.patched, inputs, policy=policies, **run)
    chosen = [row.policy for row in vtr.report(models.patched).rows]
    assert any(spec is not None and spec.startswith("m3:") for spec in chosen)
    plain, said, _ = family.generate(models.patched, inputs, policy=chosen, **run)
    assert torch.equal(ids, plain)
    close(logits, said)


@dataclass
class Looks(vtr.Policy):
    """Chooses nothing; notes what it may look at before it chooses."""

    name = "looks"

    def resolve(self, tries: Any) -> list[Any]:
        self.images, self.questions = tries.images(), tries.questions()
        return [None] * len(tries.rows)


def test_what_a_policy_that_chooses_may_look_at(models: Models) -> None:
    """Every row's images as they would enter the text model, and its text."""
    inputs, looks = models.inputs(), Looks()
    models.family.generate(models.patched, inputs, policy=looks, max_new_tokens=1)
    for b, (images, question) in enumerate(zip(looks.images, looks.questions, strict=True)):
        row = models.row(inputs, b)
        close(torch.cat([row.embeds[:0], *(image.features for image in images)]), row.embeds[row.vision])
        close(question, row.embeds[~row.vision])


# ---------------------------------------------------------------------------------------------------------- refusals
@cells("refused")
def test_what_does_not_work_says_so(models: Models, policy: str) -> None:
    """Before anything changes, in a call, in a block, in a chain, and as the model's default."""
    inputs, why = models.inputs(), str(support.why_not(models.family, policy))
    given = POLICIES[policy](models, inputs, 0)
    for attempt in (
        lambda: models.family.logits(models.patched, inputs, policy=given),
        lambda: models.family.generate(models.patched, inputs, policy=[given + vtr.Random(0.5, 2)] * len(ROWS)),
        lambda: vtr.use(models.patched, given).__enter__(),
        lambda: vtr.patch(models.patched, given),
    ):
        with pytest.raises(vtr.UnsupportedError) as refused:
            attempt()
        assert why in str(refused.value) and models.family.name in str(refused.value)
    want = models.family.logits(models.stock, inputs)
    assert torch.equal(models.family.logits(models.patched, inputs), want)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_several_axes_are_not_renumbered(kind: str) -> None:
    models = Models.from_family(next(f for f in FAMILIES if f.kind == kind))
    with pytest.raises(vtr.UnsupportedError, match="positions=keep"):
        models.family.logits(models.patched, models.inputs(), policy="pyramid")


# ---------------------------------------------------------------------------------------------------------- the table
def test_every_family_is_in_the_table(models: Models) -> None:
    found = find_adapter(models.patched)
    assert type(found) is type(models.family.adapter)


def test_the_docs_have_the_table() -> None:
    assert support.in_page() == support.table(support.declared()), "run python -m tests.support --write"


# ----------------------------------------------------------------------------------------------- M-RoPE and DeepStack
def test_an_m_rope_row_keeps_its_positions() -> None:
    """Text behind a compressed image stands where it did: nothing has to be taken off when decoding."""
    models = Models.from_family(next(f for f in FAMILIES if isinstance(f, QwenVL)))
    inputs = models.inputs()
    cache = models.patched(**inputs, policy="pool:grid=2", use_cache=True).past_key_values
    assert cache.layers[0].state.dropped == [0] * len(ROWS)


def test_deepstack_needs_a_layer_behind_it() -> None:
    family = next(f for f in FAMILIES if isinstance(f.adapter, Qwen3VL))
    model = family.make()
    model.model.language_model.layers = model.model.language_model.layers[:2]
    inputs = family.batch(model, ROWS)
    vtr.patch(model)
    with pytest.raises(vtr.UnsupportedError, match="at least one layer behind them"):
        family.logits(model, inputs, policy="random:keep=0.5")
