"""Oracles about how a policy answers: it leaves alone what it is shown, keeps nothing, and counts right beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr import settings
from vtr.base import Policy
from vtr.engine.checks import version
from vtr.engine.compression import IMAGE_TENSORS
from vtr.image import Pooled
from vtr.testing import tiny
from vtr.testing.bench import NOISE, ROWS, Bench, Fault, Said, Skip
from vtr.testing.state import Kept
from vtr.testing.tiny import IMAGE
from vtr.tokens import STATES

TOKENS = (*STATES, "image", "tile", "y", "x", "newline", "place", "text_place", "behind")
ORDERS = ((0, 3), (3, 0), (0, 2), (2, 0), (1, 3))
"""Which rows are asked about one after the other: one picture before two, two before one, another picture, none."""


def fresh(policy: Policy) -> Policy:
    """An equal policy that has never been asked."""
    if any(part.tensors() for part in getattr(policy, "policies", [policy])):
        return copy.deepcopy(policy)  # weights are not in the settings
    return settings.build(policy.name, policy.config())


def memory(bench: Bench) -> None:
    """What it answers does not depend on what it was asked before; nothing of it changes but caches."""
    policy = bench.policy
    if public := [place.name for place in bench.kept.changed() if place.flagged]:
        raise Fault(
            f"{', '.join(public)} changed while it was asked",
            "a policy object is shared by rows, calls and threads: compute it anew from what is handed over. A cache "
            "that changes no answer may be held in an attribute whose name begins with an underscore",
        )
    rows = {b: tiny.single(bench.batch, b, bench.stock) for b in {b for pair in ORDERS for b in pair}}
    alone: dict[int, Said] = {}
    for b, inputs in rows.items():
        bench.kept.put_back()
        alone[b] = bench.generate(inputs, fresh(policy))
    for first, then in ORDERS:
        bench.kept.put_back()
        asked = fresh(policy)
        own = Kept(asked)
        bench.generate(rows[first], asked)
        said = bench.generate(rows[then], asked)
        if said.kept != alone[then].kept or float((said.logits - alone[then].logits).abs().max()) > NOISE:
            kept = dict.fromkeys(place.name for place in [*own.changed(), *bench.kept.changed()])
            where = ", ".join(kept) or "something outside of it and of its module"
            raise Fault(
                f"about {_words(then)} it answers otherwise after it was asked about {_words(first)} "
                f"({len(said.kept[0][-1])} tokens kept, {len(alone[then].kept[0][-1])} otherwise): {where} remembers",
                "an answer may depend on the settings and on what is handed over: keep nothing of an earlier call",
            )


def in_place(bench: Bench) -> None:
    """What is handed over comes back as it was."""
    policy, found = fresh(bench.policy), []

    def watch(question: str, shown: Callable[[Any], list[tuple[str, Tensor]]]) -> None:
        ask = getattr(policy, question)

        def asked(*args: Any) -> Any:
            before = [(name, t, t.clone(), version(t)) for name, t in shown(args[-1])]
            answer = ask(*args)
            for name, t, was, written in before:
                if version(t) != written or not torch.equal(t.nan_to_num(), was.nan_to_num()):
                    found.append((question.removesuffix("_all"), name))
            return answer

        setattr(policy, question, asked)

    for question, shown in {
        "compress": _of_image, "prune_all": _of_tokens, "route_all": _of_tokens,
        "remember_all": _of_decoded, "recall": _of_decoded,
    }.items():  # fmt: skip
        if policy.asks("remember" if question == "recall" else question.removesuffix("_all")):
            watch(question, shown)
    bench.generate(bench.batch, policy)
    bench.generate(bench.batch, policy, use_cache=False)
    if found:
        question, name = found[0]
        raise Fault(
            f"{type(bench.policy).__name__}.{question} writes into {name}: the write is lost or reaches others",
            "what is handed over is not changed in place: clone() what you compute with. Hidden states that go on are "
            "not a policy's to change; to merge tokens, answer compress with vtr.Pooled",
        )


def _of_image(image: Any) -> list[tuple[str, Tensor]]:
    shown = []
    for name in IMAGE_TENSORS:
        at = image
        for part in name.split("."):
            at = getattr(at, part)
        if at is not None:
            shown.append((f"image.{name}", at))
    return shown


def _of_tokens(rows: Any) -> list[tuple[str, Tensor]]:
    """Every field, and from now on the same tensor whenever it is read."""
    shown = []
    for tokens in rows:
        made = {name: tokens._field(name) for name in TOKENS}
        tokens._field = _Shown(made, tokens._field.check)
        shown += [(f"tokens.{name}", t) for name, t in made.items()]
        scores = tokens.scores if isinstance(tokens.scores, tuple) else (tokens.scores,)
        shown += [("tokens.scores", t) for t in scores if t is not None]
        if tokens.text_scores is not None:
            shown.append(("tokens.text_scores", tokens.text_scores))
    return shown


class _Shown:
    """Fields that are made already."""

    def __init__(self, made: dict[str, Tensor], check: Callable[..., None]) -> None:
        self.made, self.check = made, check

    def __call__(self, name: str) -> Tensor:
        return self.made[name]


def _of_decoded(tokens: Any) -> list[tuple[str, Tensor]]:
    return [(f"token.hidden of row {row}", token.hidden) for row, token in enumerate(tokens)]


def counts(bench: Bench) -> None:
    """How many stay is what ``kept_of`` and ``entering`` said beforehand, where they say something."""
    policy, asked = fresh(bench.policy), []
    if type(policy).entering is not Policy.entering and not policy.asks("compress"):
        inputs = tiny.single(bench.batch, 0, bench.stock)
        row = bench.generate(inputs, bench.policy).report.rows[0]
        said = _said(lambda: policy.entering(len(row.vision_tokens), row.total))
        if said is not None and list(said) != list(row.vision_tokens):
            raise Fault(
                f"entering says that {list(said)} of {row.total} tokens enter the layers; {list(row.vision_tokens)} do",
                "count as prune (or route) does, or raise ValueError if that depends on more than their number",
            )
        asked.append(said)
    if policy.asks("compress"):
        compress = policy.compress

        def watched(image: Any) -> Any:
            answer = compress(image)
            made = len(image) if answer is None else len(answer.sources if isinstance(answer, Pooled) else answer)
            said = _said(lambda: policy.kept_of(image.layout))
            asked.append(said)
            if said is not None and said != made:
                raise Fault(
                    f"kept_of says that {said} of an image's {len(image)} tokens stay; compress keeps {made}",
                    "count as compress does (newline tokens too), or raise ValueError if it depends on what is shown",
                )
            return answer

        policy.compress = watched  # type: ignore[method-assign]
        bench.generate(bench.batch, policy)
    if all(said is None for said in asked):
        raise Skip("it does not say beforehand how many tokens stay")


def _said(count: Callable[[], Any]) -> Any:
    """What a count says; None where it says that it cannot."""
    try:
        return count()
    except ValueError:
        return None


def _words(b: int) -> str:
    pictures = ROWS[b].count(IMAGE)
    return f"a row with {pictures or 'no'} picture{'s' * (pictures != 1)}"
