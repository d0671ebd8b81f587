"""What a decoded token costs, five ways: ``vtr bench decode``. transformers and vtr, with growing and static caches.

Every way is a ``generate`` on a twin of one random LLaVA-1.5, with the same prompt. On a CPU they run in a thread each
and take turns token by token (a stopping criterion hands over, :func:`~vtr.eval.cost.interleave.decode_in_turns`), and
what is measured is CPU time of the process, torch on one thread: whatever else the machine does, neighbours meet the
same, and only one way runs at a time. On a GPU they run one after another and the clock is read once the device is
done. All of what ``generate`` does for a token is in it. The first tokens (:data:`WARM`), in which torch compiles,
are not. A way that raises is left out of the turns, and what it said is in the result.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig
from vtr.eval.cost import engine, launches, midsize, shapes
from vtr.eval.cost.engine import Request
from vtr.eval.cost.interleave import decode_in_turns, decode_one_by_one, keep_freed_memory, total_ratio
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.timing import milliseconds, now

import vtr

NARROW = Size(4, 256, 704, 4, side=24)
BATCHES, TOKENS, FEW_TOKENS = (1, 8), (64, 512), (64,)
WARM = 4
"""So many decoded tokens come before those that count: the first compiles."""
DRAWN = ("fastv", "gsearch", "pyramid", "m3", "dynamic-llava")
"""Those of :func:`vtr.eval.cost.launches.policies` that are decoded under; Dynamic-LLaVA forgets words."""
MIXED, KEEP_ALL = "mixed", "keep-all"
EVERY = (*DRAWN, MIXED, KEEP_ALL)


@dataclass(frozen=True)
class Way:
    """How to decode. patched: with a policy, by vtr. static: in a cache allocated at full length before it starts."""

    patched: bool
    static: bool = False
    compiled: bool = False

    def told(self, device: torch.device) -> dict[str, Any]:
        """What ``generate`` is given beside prompt and policy."""
        if not self.static:
            return {}
        how = {"compile_config": compiling(device)} if self.compiled else {"disable_compile": True}
        return {"cache_implementation": "static", **how}


WAYS = {
    "hf": Way(patched=False),
    "hf_static_compiled": Way(patched=False, static=True, compiled=True),
    "vtr": Way(patched=True),
    "vtr_static": Way(patched=True, static=True),
    "vtr_static_compiled": Way(patched=True, static=True, compiled=True),
}
"""The first one is what the others are put over."""


def compiling(device: torch.device) -> CompileConfig:
    """One graph or an error; on a GPU in transformers' own mode, which takes CUDA graphs."""
    if device.type == "cuda":
        return CompileConfig(fullgraph=True)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


@dataclass(frozen=True)
class Case:
    """A row of the table. name: of the policies, as asked for. requests: policy, whether there is an image, text."""

    name: str
    requests: list[Request]
    tokens: int

    @property
    def policies(self) -> list[vtr.Policy | None]:
        return [policy for policy, _, _ in self.requests]


# -- what is decoded ---------------------------------------------------------------------------------------------------
def choose(small: bool, device: str, dtype: str | None) -> tuple[Size, torch.dtype]:
    """Shapes and precision for a device; raises as the engine's benchmark does."""
    _, precision, _ = engine.choose(small, device, dtype, None)
    return NARROW if small else midsize.LLAVA_7B if device == "cuda" else midsize.SMALL, precision


def check(batches: Sequence[int], tokens: Sequence[int]) -> None:
    """Raise ValueError for a batch without rows, or fewer tokens than a spread can be told of."""
    if min(batches) < 1:
        raise ValueError(f"batch={list(batches)}: a batch has at least one row")
    if min(tokens) < 8:
        raise ValueError(f"tokens={list(tokens)}: decode at least 8, the spread is that of eighths")


def cases(
    stock: Any, size: Size, names: Sequence[str], batches: Sequence[int], tokens: Sequence[int]
) -> list[Case]:  # fmt: skip
    """Every policy at every batch and length; one row alone is not mixed.

    Args:
        names: of :data:`EVERY`, or specs.

    Raises:
        ValueError: no policy of this model, or nothing but a mixed batch of one row.
    """
    drawn = launches.policies(stock, size.layers)
    every: dict[str, vtr.Policy] = {name: drawn[name] for name in DRAWN} | {KEEP_ALL: vtr.FastV(1.0, layer=2)}
    found = []
    for length in tokens:
        for name in names:
            if name not in (*every, MIXED):
                every[name] = vtr.policy(name)
                every[name].check(size.layers)
            for rows in batches:
                if name != MIXED:
                    found.append(Case(name, [(every[name], True, size.text_tokens)] * rows, length))
                elif rows > 1:
                    mixed = engine.mixed(size)
                    found.append(Case(name, [mixed[row % len(mixed)] for row in range(rows)], length))
    if not found:
        raise ValueError("a mixed batch has at least two rows: give another --batch or --policy")
    return found


# -- one way -----------------------------------------------------------------------------------------------------------
def reading(device: torch.device) -> np.ndarray:
    """[seconds that are measured, seconds on a clock, graphs that torch has compiled], all of them growing."""
    clock = now(device)
    spent = clock if device.type == "cuda" else time.process_time()
    return np.array([spent, clock, counters["stats"]["unique_graphs"]])


@dataclass
class Run:
    """One way of decoding a case: called by the turns, and what came of it.

    Attributes:
        said: ids of the decoded tokens. live, allocated: bytes of the cache at the end. refused: the error, in words.
    """

    way: Way
    model: Any
    inputs: Mapping[str, Any]
    case: Case
    said: torch.Tensor | None = None
    live: int | None = None
    allocated: int | None = None
    refused: str | None = None
    spent: list[np.ndarray] = field(default_factory=list)

    def __call__(self, criteria: Any) -> None:
        try:
            self.decode(criteria)
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [""]
            self.refused = f"{type(error).__name__}: {lines[0]}"

    def decode(self, criteria: Any) -> None:
        policy = {"policy": self.case.policies} if self.way.patched else {}
        out = self.model.generate(
            **self.inputs, **policy, **self.way.told(self.model.device), max_new_tokens=self.case.tokens + WARM + 1,
            do_sample=False, suppress_tokens=[midsize.IMAGE_ID], stopping_criteria=criteria,
            return_dict_in_generate=True,
        )  # fmt: skip
        self.said = out.sequences[:, self.inputs["input_ids"].shape[1] :]
        if self.way.patched:
            report = vtr.report(self.model)
            self.live, self.allocated = report.kv_bytes, report.kv_bytes_allocated
        else:
            self.live, self.allocated = cache_bytes(out["cache" if "cache" in out else "past_key_values"], self.inputs)

    def close(self, spent: Sequence[np.ndarray]) -> None:
        """Take what each decoded token took. A way that was to be compiled and was not has failed."""
        self.spent = list(spent)
        if self.refused is None and self.way.compiled and not self.graphs:
            self.refused = "RuntimeError: transformers compiled nothing"

    @property
    def seconds(self) -> list[float]:
        """Of the tokens that count."""
        return [float(token[0]) for token in self.spent[WARM:]]

    @property
    def graphs(self) -> int:
        return int(sum(token[2] for token in self.spent))

    @property
    def compile_seconds(self) -> float | None:
        """On the clock: of the tokens that compiled, above the others."""
        if not self.way.compiled:
            return None
        usual = statistics.median(token[1] for token in self.spent)
        return float(sum(token[1] - usual for token in self.spent if token[2]))

    def facts(self, runs: Mapping[str, Run]) -> dict[str, Any]:
        """For the result file, beside the others that were measured."""
        if self.refused is not None:
            return {"refused": self.refused}
        over = {key: runs[name] for key, name in (("ratio", "hf"), ("over_hf_static", "hf_static_compiled"))}
        ratios = {
            key: None if other.refused else asdict(total_ratio(self.seconds, other.seconds))
            for key, other in over.items()
        }
        said = runs["vtr"].said if runs["vtr"].refused is None else None
        return {
            "refused": None, "ms": milliseconds(self.seconds), **ratios,
            "same_tokens": None if said is None or self.said is None else torch.equal(self.said, said),
            "kv_live": self.live, "kv_allocated": self.allocated, "compile_s": self.compile_seconds,
            "graphs": self.graphs, "graphs_while_timed": int(sum(token[2] for token in self.spent[WARM:])),
        }  # fmt: skip


def cache_bytes(cache: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """(Bytes of the keys and values of tokens that are no padding, bytes of all) in a cache of transformers."""
    live = allocated = 0
    cached = int(cache.get_seq_length()) * len(inputs["input_ids"]) - int((inputs["attention_mask"] == 0).sum())
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            live += cached * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            allocated += tensor.numel() * tensor.element_size()
    return live, allocated


# -- all of them -------------------------------------------------------------------------------------------------------
def measure_case(stock: Any, size: Size, case: Case, seed: int, done: Callable[[], Any]) -> dict[str, Any]:
    """A row of the result.

    Raises:
        RuntimeError: transformers' own decoding failed, so there is nothing to put the others over.
    """
    torch.compiler.reset()  # else a later case finds graphs of earlier ones, or torch's limit of recompilations
    rows = [(int(image), text) for _, image, text in case.requests]
    inputs = midsize.prompts(stock, size, rows, seed)
    runs = {}
    for name, way in WAYS.items():
        model = midsize.twin(stock)  # each its own: what torch compiles hangs on the model
        runs[name] = Run(way, vtr.patch(model) if way.patched else model, inputs, case)
    read = partial(reading, stock.device)
    if stock.device.type == "cuda":
        spent = decode_one_by_one(runs, done, read)
    else:
        spent = decode_in_turns(runs, stock.device, done, read)
    for name, run in runs.items():
        run.close(spent[name])
    if runs["hf"].refused is not None:
        raise RuntimeError(f"the unpatched model cannot decode: {runs['hf'].refused}")
    specs = ["none" if policy is None else policy.spec for policy in case.policies]
    return {
        "policy": case.name, "specs": specs if case.name == MIXED else specs[:1], "batch": len(rows),
        "tokens": case.tokens, "prompt_tokens": inputs["attention_mask"].sum(1).tolist(),
        "ways": {name: run.facts(runs) for name, run in runs.items()},
    }  # fmt: skip


def measure(
    size: Size,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    names: Sequence[str] = EVERY,
    batches: Sequence[int] = BATCHES,
    tokens: Sequence[int] = TOKENS,
    done: Callable[[int, int], Any] = lambda count, total: None,
    found: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> dict[str, Any]:
    """The body of a result of kind "decode". On a CPU torch runs on one thread meanwhile.

    Args:
        names: policies, of :data:`EVERY` or specs. done: called after every token with how many there were, and how
            many there will be at most. found: is given each row as it is there.

    Raises:
        ValueError: see :func:`check` and :func:`cases`. RuntimeError: see :func:`measure_case`.
    """
    check(batches, tokens)
    keep_freed_memory()
    threads = torch.get_num_threads()
    stock = midsize.build(size, device, dtype, seed=seed)
    todo = cases(stock, size, names, sorted(set(batches)), sorted(set(tokens)))
    ends = np.cumsum([len(WAYS) * (case.tokens + WARM + 1) for case in todo]).tolist()
    if device == "cpu":
        torch.set_num_threads(1)
    rows = []
    try:
        with compiled_afresh():
            for case, start, end in zip(todo, [0, *ends], ends, strict=False):
                steps = iter(range(start + 1, end + 1))

                def step(steps: Iterator[int] = steps) -> None:
                    done(next(steps), ends[-1])

                rows.append(measure_case(stock, size, case, seed, step))
                found(rows[-1])
                done(end, ends[-1])
        return {
            "model": shapes.of_size(size).facts(),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "clock": "wall clock" if device == "cuda" else "CPU time",
            "rows": rows,
        }
    finally:
        torch.set_num_threads(threads)


@contextmanager
def compiled_afresh() -> Iterator[None]:
    """torch's cache of compiled kernels on disk is a new one: none of an earlier run, those of earlier cases only."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="vtr-bench-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
