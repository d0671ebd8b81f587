"""What each policy asks of a GPU, counted without one: ``vtr bench launches``. Counts, not times.

A random LLaVA-1.5 on a pretended device (:mod:`vtr.eval.cost.pretend`): kernels launched, waits of the host and copies
from the host, in the text model's prefill and in its forward of one decoded token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vtr.eval.cost import midsize
from vtr.eval.cost.counts import Counts
from vtr.eval.cost.engine import DTYPES, every_layer
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.pretend import move, pretended
from vtr.eval.report import results

import vtr

LAYERS, BATCHES = 8, (1, 8, 32)
SEVEN = ("fastv", "random", "gsearch", "pyramid", "m3", "pmod", "dynamic-llava")
"""Of seven rows of a batch, what reduces each; the eighth is not reduced."""
TOKENS = 2
"""The last of so many decoded tokens is counted."""


@dataclass(frozen=True)
class Case:
    """What is counted.

    Attributes:
        policy: a key of :func:`policies`, "unpatched", "no policy" or "seven policies".
        batch: rows. ragged: of different text lengths, every eighth without an image; else all alike.
    """

    policy: str
    batch: int
    ragged: bool

    def requests(self, text_tokens: int) -> list[tuple[int, int]]:
        """Of each row how many images, and how many text tokens."""
        if not self.ragged:
            return [(1, text_tokens)] * self.batch
        return [(int(b % 8 != 7), text_tokens - text_tokens // 10 * (b % 8)) for b in range(self.batch)]


@dataclass(frozen=True)
class Counted:
    """A case, and what its ``prefill`` and one decoded ``token`` asked for."""

    case: Case
    prefill: Counts
    token: Counts

    def row(self) -> dict[str, Any]:
        """For the result file."""
        case = self.case
        parts = {"prefill": self.prefill.totals(), "token": self.token.totals()}
        return {"policy": case.policy, "batch": case.batch, "ragged": case.ragged, **parts}


# -- who is counted ----------------------------------------------------------------------------------------------------
def size_of(layers: int) -> Size:
    """Counts do not depend on widths, so the model is a narrow one."""
    return Size(layers, 16, 32, 1, side=24, text_tokens=64, vocab_size=64)


def policies(stock: Any, layers: int) -> dict[str, vtr.Policy]:
    """What is measured, by name; weights of those that have some are drawn so that they say now yes, now no."""
    pmod, dynamic = vtr.PMoD(), vtr.DynamicLLaVA(keep=0.2, width=64, heads=4, inner=128)
    for policy, std in ((pmod, 0.5), (dynamic, 0.3)):
        module = policy.init_weights(stock).module
        assert module is not None
        for parameter in module.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
    return {
        "fastv": vtr.FastV(0.25, layer=2),
        "random": vtr.Random(0.25, layer=2),
        "gsearch": every_layer(layers),
        "pyramid": vtr.Pyramid(),
        "m3": vtr.Matryoshka(36),
        "globalcom2": vtr.policy("globalcom2:retention=0.25"),
        "pmod": pmod,
        "dynamic-llava": dynamic,
    }


class Field:
    """An unpatched and a patched model on a pretended device, and the policies that run on the latter."""

    def __init__(self, size: Size, dtype: torch.dtype, seed: int = 0, specs: Sequence[str] = ()) -> None:
        self.size, self.seed = size, seed
        self.stock = midsize.build(size, "cpu", dtype, seed=seed)
        self.unpatched = move(copy.deepcopy(self.stock))
        self.patched = vtr.patch(move(copy.deepcopy(self.stock)))
        self.policies = {spec: vtr.policy(spec) for spec in specs} or policies(self.stock, size.layers)
        for policy in self.policies.values():
            policy.check(size.layers)
        for name, policy in self.policies.items():
            if getattr(policy, "module", None) is not None:
                self.count(Case(name, 1, False))  # weights come to the device once

    def policy(self, case: Case) -> Any:
        """What ``generate`` is given."""
        if case.policy == "no policy":
            return None
        if case.policy == "seven policies":
            return [self.policies[SEVEN[b % 8]] if b % 8 < 7 else None for b in range(case.batch)]
        return self.policies[case.policy]

    def count(self, case: Case) -> Counted:
        """Run it."""
        asked = {} if case.policy == "unpatched" else {"policy": self.policy(case)}
        model = self.patched if asked else self.unpatched
        inputs = midsize.prompts(self.stock, self.size, case.requests(self.size.text_tokens), self.seed)
        with pretended() as counts:
            there = {name: t.to("cuda") for name, t in inputs.items()}
            with forwards(model.get_decoder(), counts) as found:
                model.generate(
                    **there, **asked, max_new_tokens=TOKENS + 1, do_sample=False, suppress_tokens=[midsize.IMAGE_ID]
                )
        return Counted(case, found[0], found[-1])


@contextmanager
def forwards(module: Any, counts: Counts) -> Iterator[list[Counts]]:
    """What each forward of ``module`` in this block asks for, its hooks included."""
    found: list[Counts] = []

    def enter(*_: Any) -> None:
        counts.reset()

    def leave(*_: Any) -> None:
        found.append(counts.snapshot())

    hooks = [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# -- all of it ---------------------------------------------------------------------------------------------------------
def cases(batches: Sequence[int], names: Sequence[str]) -> list[Case]:
    """Every policy at every batch, equal and ragged; one row alone is neither ragged nor of several policies."""
    every = ["unpatched", "no policy", *names, *["seven policies"] * (set(SEVEN) <= set(names))]
    return [
        Case(name, batch, ragged)
        for name in every
        for batch in batches
        for ragged in (False, True)
        if batch > 1 or not (ragged or name == "seven policies")
    ]


def check(layers: int, batches: Sequence[int], dtype: str) -> torch.dtype:
    """The precision that is asked for.

    Raises:
        ValueError: an unknown precision, too few layers for the policies' cuts, or a batch without rows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if layers < 4:
        raise ValueError(f"layers={layers}: the policies cut at several layers, give at least 4")
    if min(batches, default=0) < 1:
        raise ValueError(f"batch={list(batches)}: a batch has at least one row")
    return DTYPES[dtype]


def measure(
    layers: int, batches: Sequence[int], dtype: torch.dtype, seed: int = 0,
    progress: Callable[[Sequence[Case]], Iterable[Case]] = lambda found: found, specs: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Counted]]:  # fmt: skip
    """The body of a result of kind "launches", and the same with the lines that asked.

    Args:
        progress: is given the cases and gives them back while they are worked off.
        specs: of the policies to count; none for those of :func:`policies`.

    Raises:
        ValueError: no such policy, or one that cannot work on so many layers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of a narrow model nothing is worth a second one
    try:
        field = Field(size_of(layers), dtype, seed, specs)
        found = [field.count(case) for case in progress(cases(sorted(set(batches)), list(field.policies)))]
    finally:
        torch.set_num_threads(threads)
    return {
        "layers": layers,
        "vision_tokens": field.size.vision_tokens,
        "text_tokens": field.size.text_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "policies": {name: policy.spec for name, policy in field.policies.items()},
        "rows": [one.row() for one in found],
    }, found


def earlier(path: str | Path, layers: int, dtype: str) -> list[dict[str, Any]]:
    """The rows of an earlier result, to be put beside those of the same model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no result of this command, or counted on another model.
    """
    before = results.load(path)
    if before["kind"] != "launches":
        raise ValueError(f"--against {path}: it is of kind {before['kind']!r}: give what `vtr bench launches` wrote")
    for name, here in (("layers", layers), ("dtype", dtype)):
        if before.get(name) != here:
            raise ValueError(f"--against {path}: it was counted with --{name} {before.get(name)}: give the same here")
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def where(found: Sequence[Counted], most: int) -> list[tuple[str, ...]]:
    """The lines that ask most, over all cases: line, what is asked for, operation, prefill, token."""
    out: list[tuple[str, ...]] = []
    for name in ("launches", "waits", "copies"):
        sums = [Counts(), Counts()]
        for one in found:
            if one.case.policy != "unpatched":
                for total, part in zip(sums, (one.prefill, one.token), strict=True):
                    getattr(total, name).update(getattr(part, name))
        prefill, token = (getattr(total, name) for total in sums)
        for place, _ in (prefill + token).most_common(most):
            out.append((place.line, name, place.what, str(prefill[place]), str(token[place])))
    return out
