"""What the oracles work with: a tiny model twice, patched and not, and calls whose errors are told in plain words."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtr.accounting import Report, report
from vtr.base import CHOOSING, Policy
from vtr.engine.install import patch
from vtr.testing import tiny
from vtr.testing.state import Kept
from vtr.testing.tiny import IMAGE

ROWS = [["ab", IMAGE, "what"], ["abcdefg"], [IMAGE, "cde"], ["a", IMAGE, "bc", IMAGE, "whichone"]]
"""A batch: one picture, none, one in front, two."""
STEPS = 4
RUN: dict[str, Any] = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
NOISE = 1e-5
"""float32 sums in another order differ by less than this on these models."""


class Fault(Exception):
    """What a policy did wrong, and how to mend it."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}\n      → {mend}")


class Skip(Exception):
    """Why an oracle says nothing about this policy."""


@dataclass
class Said:
    """What a call of ``generate`` gave.

    Attributes:
        kept: per row and decoder layer, what each vision token that entered was made from: slots of the row, counted
            from its first token. tokens: [rows, steps]. logits: [steps, rows, vocab]. report: of the call.
    """

    kept: list[list[list[list[int]]]]
    tokens: Tensor
    logits: Tensor
    report: Report


@dataclass
class Bench:
    """A policy and the models it is tried on."""

    policy: Policy
    family: str
    stock: Any
    model: Any
    must_reduce: bool
    kept: Kept
    """What the policy could keep something in, as it was before it was asked."""

    @classmethod
    def for_policy(cls, policy: Policy, family: str, num_hidden_layers: int, must_reduce: bool) -> Bench:
        stock = getattr(tiny, family)(layers=num_hidden_layers)
        return cls(policy, family, stock, patch(copy.deepcopy(stock)), must_reduce, Kept(policy))

    @cached_property
    def eager(self) -> Any:
        """The model with eager attention, whose products torch can count."""
        return patch(getattr(tiny, self.family)("eager", layers=len(self.stock.get_decoder().layers)))

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """ROWS, padded on the left."""
        return tiny.batch(self.stock, ROWS)

    def generate(self, inputs: dict[str, Tensor], policies: Any, **kwargs: Any) -> Said:
        """Greedy decoding of a few tokens under one policy, or one a row."""
        with self.asked():
            out = tiny.generate(self.model, inputs, policy=policies, **{**RUN, **kwargs})
        done = report(self.model)
        return Said(sources(done, inputs), out.sequences[:, -STEPS:], torch.stack(out.logits), done)

    def forward(self, inputs: dict[str, Tensor], policy: Policy | None = None, **kwargs: Any) -> tuple[Any, Report]:
        """One forward under the policy (or another one, equal to it), without gradients."""
        if any(map(self.policy.asks, CHOOSING)):
            raise Skip("a policy that chooses others has no forward of its own")
        with self.asked(), torch.no_grad():
            out = self.model(**inputs, policy=policy or self.policy, **kwargs)
        return out, report(self.model)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Errors of the policy become faults that say where it failed, and why that may be."""
        try:
            yield
        except Exception as error:
            where = next(
                (f.name for f in reversed(traceback.extract_tb(error.__traceback__)) if f.name in QUESTIONS), None
            )
            asked = f"{type(self.policy).__name__}.{where}" if where else "a call with it"
            raise Fault(f"{asked} raises {type(error).__name__}: {error}", _hint(error, self.family)) from error


QUESTIONS = (
    "compress",
    "needs",
    "prune",
    "prune_all",
    "route",
    "route_all",
    "remember",
    "remember_all",
    "recall",
    "resolve",
    "accept",
    "check",
)


def _hint(error: Exception, family: str) -> str:
    text = str(error)
    for sign, hint in HINTS.items():
        if sign in text:
            return hint
    return (
        f"settings must fit the tiny models (here {family}: tiles of 6 × 6 tokens, 3 × 3 for internvl); name others by "
        "families=, num_hidden_layers= — or the error is the policy's own"
    )


HINTS = {
    "NoneType": "what was not asked for is None: tokens.scores without needs(layer), image.tiles, image.tower, "
    'image.question and CLS scores without wants = ("tiles", …); ask for it, or do not read it',
    "wants =": "ask for it in the class body",
    "distinct indices": "answer with each index at most once, counted within the tokens handed over: 0 … "
    "len(tokens) - 1 (not slots of the prompt, and not indices into the tokens the picture once had)",
    "are no scores": "spell it so, or answer None for layers that rank by something else",
    "layer 0 has none": "write: return None if layer == 0 else …",
    "writes into": "clone() what you compute with",
    "1-D int64": "answer with indices: mask.nonzero().squeeze(1) for a mask, topk(k).indices for scores",
    " keeps ": "an answer names each token once: at most len(tokens) indices",
    "out of range": "k must be at most len(tokens), and fewer may be left than tokens.total: min(k, len(tokens))",
}


@contextmanager
def seeded(seed: int) -> Iterator[Callable[[], bool]]:
    """Global random generators seeded, and put back afterwards. Yields: have they been used (or seeded) since?"""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        start = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

        def touched() -> bool:
            numbers = np.random.get_state()[1].tolist()  # type: ignore[index]
            return not torch.equal(torch.get_rng_state(), start[0]) or (random.getstate(), numbers) != start[1:]

        try:
            yield touched
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def sources(done: Report, inputs: dict[str, Tensor]) -> list[list[list[list[int]]]]:
    """Per row and layer what each token was made from, in slots counted from the row's first that is no padding."""
    out = []
    for b, row in enumerate(done.rows):
        first = int(tiny.real(inputs, b)[0])
        layers = range(len(row.vision_tokens))
        out.append([[[slot - first for slot in made] for made in row.sources(layer)] for layer in layers])
    return out
