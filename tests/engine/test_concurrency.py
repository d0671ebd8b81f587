"""One patched model under many hands: threads, tasks, calls inside calls. Each sees its own policy and report."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import tiny
from tests.engine.test_seams import EveryOther, Forgetful, Mod, Pairs
from tests.loads import FAMILIES, ROWS, close, forward, kept, snapshot, token_by_token

F = vtr.FastV(0.25, 2)
PASS: dict[str, Any] = {"max_new_tokens": 6}
POLICIES: list[Any] = [
    None,
    F,
    vtr.Random(0.5, 1),
    [vtr.UniformGrid(0.3), None, F, Pairs()],
    vtr.GSearch([1.0, 0.5, 0.5, 0.5, 0.1]),
    [Mod(), Forgetful(), None, EveryOther(3)],
    Pairs() + F,
    [Mod(), F, Mod(), Forgetful(on_device=False)],
]


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    """Of the family a test asks for; who sees what is the same in all of them."""
    return vtr.patch(getattr(tiny, getattr(request, "param", FAMILIES[0]))())


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    return tiny.batch(model, ROWS)


Said = tuple[Tensor, list[str | None], list[list[list[int]]]]


def said(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Said:
    """What a generate returns, and what its report says: the policy of each row and what it kept."""
    sequences = tiny.generate(model, inputs, **{**PASS, **kwargs})
    rows = vtr.report(model).rows
    return sequences, [row.policy for row in rows], [kept(model, b) for b in range(len(rows))]


def same(a: Said, b: Said) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """The results of ``calls``, each in a thread of its own, all started together. Their exceptions are raised here."""
    results: list[Any] = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# ---------------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_eight_threads_eight_policies(model: Any, inputs: dict[str, Tensor]) -> None:
    alone = [said(model, inputs, policy=policy) for policy in POLICIES]

    def call(policy: Any) -> list[Said]:
        with vtr.use(model, policy):
            by_use = said(model, inputs)
        return [by_use, said(model, inputs, policy=policy)]

    results = in_threads(*(lambda policy=policy: call(policy) for policy in POLICIES))  # type: ignore[misc]
    for both, want in zip(results, alone, strict=True):
        assert all(same(got, want) for got in both)


def test_threads_that_do_different_things(model: Any, inputs: dict[str, Tensor]) -> None:
    """Beams, sampling-free decoding without a cache, plain forwards and a training step, side by side."""
    train = copy.deepcopy(model)

    def step() -> Tensor:
        return train(**inputs, labels=inputs["input_ids"], policy=POLICIES[5]).loss.detach()

    calls: list[Callable[[], Any]] = [
        lambda: tiny.generate(model, inputs, policy=POLICIES[3], num_beams=3, **PASS),
        lambda: tiny.generate(model, inputs, policy=F, use_cache=False, **PASS),
        lambda: forward(model, inputs, policy=POLICIES[7]).logits,
        lambda: forward(model, inputs).logits,
        step,
    ]
    want = [call() for call in calls]
    for got, expected in zip(in_threads(*calls, *calls), want * 2, strict=True):
        close(got, expected)


def test_a_new_thread_starts_without_context(model: Any, inputs: dict[str, Tensor]) -> None:
    vtr.patch(model, policy="uniform:keep=0.5")
    with vtr.use(model, F):
        here = said(model, inputs)
        (bare,) = in_threads(lambda: said(model, inputs))
        context = contextvars.copy_context()
        (inherited,) = in_threads(lambda: context.run(said, model, inputs))
    assert bare[1] == ["uniform:keep=0.5"] * 4
    assert here[1] == [F.spec] * 4 and same(inherited, here)
    assert [row.policy for row in vtr.report(model).rows] == [F.spec] * 4, "the report is this thread's last call"


def test_use_ends_in_the_thread_that_began_it(model: Any, inputs: dict[str, Tensor]) -> None:
    other = vtr.patch(tiny.llava(seed=1))
    with vtr.use(model, F), vtr.use(other, "random:keep=0.5"):
        with pytest.raises(KeyError), vtr.use(model, None):
            assert said(model, inputs)[1] == [None] * 4
            raise KeyError
        assert said(model, inputs)[1] == [F.spec] * 4
        assert said(other, tiny.batch(other, ROWS))[1] == ["random:keep=0.5"] * 4
    assert said(model, inputs)[1] == [None] * 4


def test_tasks_keep_their_policies(model: Any, inputs: dict[str, Tensor]) -> None:
    """asyncio interleaves tasks at every await, and ``to_thread`` takes the task's context along."""
    alone = [said(model, inputs, policy=policy) for policy in POLICIES[:4]]

    async def task(policy: Any) -> list[Said]:
        with vtr.use(model, policy):
            await asyncio.sleep(0)
            here = said(model, inputs)
            await asyncio.sleep(0)
            report = kept(model)
            return [here, (here[0], here[1], [report, *here[2][1:]]), await asyncio.to_thread(said, model, inputs)]

    async def together() -> list[list[Said]]:
        return await asyncio.gather(*(task(policy) for policy in POLICIES[:4]))

    for results, want in zip(asyncio.run(together()), alone, strict=True):
        assert all(same(got, want) for got in results)
    assert said(model, inputs)[1] == [None] * 4


# ----------------------------------------------------------------------------------------------- calls inside calls
class Streaming:
    """Calls something at every token, from inside generate."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.results = call, []  # type: ignore[var-annotated]

    def put(self, value: Any) -> None:
        self.results.append(self.call())

    def end(self) -> None: ...


def inside(kind: str, call: Callable[[], Any], results: list[Any]) -> dict[str, Any]:
    """Arguments of ``generate`` that make it run ``call`` at every step."""

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        results.append(call())
        return scores

    def criterion(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        results.append(call())
        return torch.zeros(len(ids), dtype=torch.bool)

    if kind == "logits_processor":
        return {"logits_processor": [processor]}
    return {"stopping_criteria": [criterion]}


@pytest.mark.parametrize("kind", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("outer", [F, [Pairs(), Forgetful(), None, Mod()], None])
def test_a_generate_inside_another(model: Any, inputs: dict[str, Tensor], kind: str, outer: Any) -> None:
    few = tiny.batch(model, ROWS[1:2], seed=7)
    inners: list[Any] = [Mod(), None, [EveryOther()]]
    alone = said(model, inputs, policy=outer)
    want = [said(model, few, policy=inner) for inner in inners]
    turns = iter(inners * 10)
    results: list[Any] = []
    got = said(model, inputs, policy=outer, **inside(kind, lambda: said(model, few, policy=next(turns)), results))
    assert same(got, alone)
    assert len(results) == PASS["max_new_tokens"]
    assert all(same(result, want[i % 3]) for i, result in enumerate(results))


def test_an_inner_call_is_no_part_of_the_outer(model: Any, inputs: dict[str, Tensor]) -> None:
    """Without a policy it takes what ``use`` or the default say, as anywhere; a forward by hand takes its argument."""
    few = tiny.batch(model, ROWS[:1])
    plain, with_cut = said(model, few), forward(model, few, policy="uniform:keep=0.5").logits
    one = Streaming(lambda: said(model, few))
    want = tiny.generate(model, few, policy=F, **PASS)
    assert torch.equal(tiny.generate(model, few, policy=F, streamer=one, **PASS), want)
    assert all(same(result, plain) for result in one.results)
    two = Streaming(lambda: forward(model, few, policy="uniform:keep=0.5").logits)
    assert torch.equal(tiny.generate(model, few, policy=F, streamer=two, **PASS), want)
    for logits in two.results:
        close(logits, with_cut)
    assert kept(model) == said(model, few, policy=F)[2][0]


def test_an_inner_failure_leaves_the_outer_alone(model: Any, inputs: dict[str, Tensor]) -> None:
    few = tiny.batch(model, ROWS[:1])

    def fail() -> bool:
        with pytest.raises(ValueError, match="unknown policy"):
            tiny.generate(model, few, policy="none-such")
        with pytest.raises(vtr.UnsupportedError, match="output_attentions"):
            forward(model, few, policy=F, output_attentions=True)
        return True

    want, results = said(model, inputs, policy=POLICIES[3]), []  # type: ignore[var-annotated]
    assert same(said(model, inputs, policy=POLICIES[3], **inside("logits_processor", fail, results)), want)
    assert all(results) and len(results) == PASS["max_new_tokens"]


def test_a_generate_that_dies_is_forgotten(model: Any, inputs: dict[str, Tensor]) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    want = said(model, inputs, policy=F)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(model, inputs, policy=Mod(), **inside("stopping_criteria", die, []))
    assert same(said(model, inputs, policy=F), want)
    assert said(model, inputs)[1] == [None] * 4


def test_two_caches_step_in_turns(model: Any) -> None:
    """Forwards by hand, of two conversations and an unreduced one, alternating token by token."""
    prompts = [tiny.batch(model, [row], seed=i) for i, row in enumerate((ROWS[0], ROWS[1], ROWS[3]))]
    policies: list[Any] = [F, Pairs() + vtr.GSearch([1.0, 0.8, 0.5, 0.5, 0.2]), None]
    more = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]])

    def start(i: int) -> Any:
        return forward(model, prompts[i], policy=policies[i], use_cache=True).past_key_values

    want = [token_by_token(model, start(i), more[i : i + 1]) for i in range(3)]
    caches = [start(i) for i in range(3)]
    got: list[list[Tensor]] = [[], [], []]
    for step in range(4):
        for i in (step % 3, (step + 1) % 3, (step + 2) % 3):
            out = forward(model, {"input_ids": more[i : i + 1, step : step + 1]}, past_key_values=caches[i])
            got[i].append(out.logits)
    for steps, expected in zip(got, want, strict=True):
        assert torch.equal(torch.cat(steps, 1), expected)


# ------------------------------------------------------------------------------- patch and unpatch of a busy model
@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Another thread is inside ``generate`` for as long as the block lasts."""
    started, done = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        assert done.wait(60)

    few = tiny.batch(model, ROWS[:1])
    thread = threading.Thread(target=tiny.generate, args=(model, few), kwargs={"streamer": Streaming(wait), **PASS})
    thread.start()
    try:
        assert started.wait(60)
        yield
    finally:
        done.set()
        thread.join()


def refused(model: Any, match: str) -> None:
    """Neither unpatch nor patch touch ``model`` now."""
    before = snapshot(model)
    for change in (vtr.unpatch, vtr.patch, lambda m: vtr.patch(m, policy="random:keep=0.5")):
        with pytest.raises(RuntimeError, match=match):
            change(model)
    assert snapshot(model) == before


def test_a_model_in_use_is_not_patched_or_unpatched(model: Any, inputs: dict[str, Tensor]) -> None:
    with vtr.use(model, F):
        refused(model, "use")
        with vtr.use(model, None):
            refused(model, "use")
        refused(model, "use")
        assert said(model, inputs)[1] == [F.spec] * 4
        vtr.unpatch(vtr.patch(tiny.llava(seed=1)))  # another model is another matter
    with pytest.raises(KeyError), vtr.use(model, F):
        raise KeyError
    vtr.patch(model, policy="random:keep=0.5")
    assert said(model, inputs)[1] == ["random:keep=0.5"] * 4
    vtr.unpatch(model)


def test_a_generating_model_is_not_patched_or_unpatched(model: Any, inputs: dict[str, Tensor]) -> None:
    with generating(model):
        refused(model, "generat")
        with generating(model):
            refused(model, "generat")
        refused(model, "generat")
    vtr.patch(model, policy=F)
    assert said(model, inputs)[1] == [F.spec] * 4
    vtr.unpatch(model)


def test_a_dead_generate_does_not_block_unpatch(model: Any, inputs: dict[str, Tensor]) -> None:
    def die() -> None:
        refused(model, "generat")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(model, inputs, policy=F, **inside("logits_processor", die, []))
    with pytest.raises(ValueError, match="unknown policy"):
        tiny.generate(model, inputs, policy="none-such")
    vtr.patch(model)
    vtr.unpatch(model)
    assert tiny.generate(model, inputs, **PASS).shape[0] == 4


def test_a_copy_is_another_model(model: Any, inputs: dict[str, Tensor]) -> None:
    with vtr.use(model, F), generating(model):
        other = copy.deepcopy(model)
        assert said(other, inputs)[1] == [None] * 4
        vtr.unpatch(vtr.patch(other, policy=F))
        assert said(model, inputs)[1] == [F.spec] * 4
