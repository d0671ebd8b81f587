"""``check_policy``: a policy is put on tiny random models and has to pass the oracles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vtr.base import Policy
from vtr.inputs import InputPolicy
from vtr.testing import oracles, tiny
from vtr.testing.bench import Bench, Fault, Skip


class PolicyError(AssertionError):
    """A policy fails oracles; the message says which, what the policy did, and how to mend it."""


@dataclass
class Checked:
    """What :func:`check_policy` found.

    Attributes:
        spec: of the policy.
        passed: names of the oracles that hold on every family.
        skipped: (oracle, why it does not apply to this policy).
        failed: (oracle, family, what the policy did and how to mend it).
    """

    spec: str
    passed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.spec}: {len(self.passed)} oracles hold" + f", {len(self.failed)} fail" * bool(self.failed)]
        lines += [f"  ✗ {name} (on {family}): {what}" for name, family, what in self.failed]
        lines += [f"  ✓ {name}" for name in self.passed]
        lines += [f"  – {name}: not run, {why}" for name, why in self.skipped]
        return "\n".join(lines)

    __repr__ = __str__


def check_policy(
    policy: Policy | type[Policy],
    *,
    families: tuple[str, ...] = ("llava", "llava_next"),
    num_hidden_layers: int = 5,
    must_reduce: bool = True,
) -> Checked:
    """Run the oracles on a policy, on tiny random models (no download, a few seconds).

    ========================  ==========================================================================================
    settings                  it is registered; spec string and ``save_pretrained`` give an equal policy back
    answers                   what it answers can be used, and it reduces something
    memory                    it answers as an equal policy that was never asked; nothing of it changes but caches
                              (names that begin with an underscore)
    in place                  what is handed over comes back as it was
    counts                    ``kept_of`` and ``entering``, where they say something, say what then stays
    keep                      a setting of this name may be a count, a ratio, none, all, more than there are
    determinism               asked twice, it says the same; torch's global random state plays no part and is left alone
    row invariance            a row is in any batch what it is alone: left padding, other policies, a row without image
    question                  if another question keeps other tokens, the class says ``question_guided = True``
    dense mask                pruned tokens are equal to tokens that nobody sees (in place edits show here)
    shorter prompt            before the decoder: equal to a prompt that never had the dropped tokens
    cache                     decoding without a cache says the same
    accounting                the report, the cache and the FLOPs that torch counts agree
    off is off                after it, the model without a policy gives the bits it gave before
    ========================  ==========================================================================================

    Args:
        policy: an instance, or a class that can be made without arguments.
        families: the models of :mod:`vtr.testing.tiny`: "llava" (one tile of 6 × 6 tokens), "llava_next" (thumbnail, up
            to four crops of 6 × 6, newline tokens), "llava_onevision" (the same without CLS token), "internvl"
            (tiles of 3 × 3, thumbnail last).
        num_hidden_layers: of the models' decoders; a schedule needs as many entries.
        must_reduce: False if these settings are meant to keep everything.

    Returns:
        What was run; print it.

    Raises:
        PolicyError: with all that failed, in words.
        TypeError: not a policy. ValueError: an unknown family.
    """
    made = _made(policy)
    if unknown := sorted(set(families) - set(tiny.FAMILIES)) or (not families and ["(none)"]):
        raise ValueError(f"unknown families {', '.join(unknown)}: choose among {', '.join(tiny.FAMILIES)}")
    outcomes: dict[str, list[tuple[str, str]]] = {}
    for family in families:
        stopped = ""
        bench = Bench.for_policy(made, family, num_hidden_layers, must_reduce)
        for name, oracle in oracles.ALL.items():
            try:
                if stopped:
                    raise Skip(f"“{stopped}” fails")
                oracle(bench)
                outcome = ("", "")
            except Skip as skip:
                outcome = ("skipped", str(skip))
            except Fault as fault:
                outcome = ("failed", str(fault))
                stopped = name if name in ("settings", "answers") else stopped
            outcomes.setdefault(name, []).append(outcome)
    nameless = any(kind == "failed" for kind, _ in outcomes.get("settings", []))
    found = Checked(type(made).__name__ if nameless else made.spec)
    for name, per_family in outcomes.items():
        failed = [(name, family, text) for family, (kind, text) in zip(families, per_family, strict=True)
                  if kind == "failed"]  # fmt: skip
        skipped = [text for kind, text in per_family if kind == "skipped"]
        found.failed += failed[:1]  # the same words on another family would not help
        if not failed and len(skipped) == len(families):
            found.skipped.append((name, skipped[0]))
        elif not failed:
            found.passed.append(name)
    if found.failed:
        raise PolicyError(str(found))
    return found


def _made(policy: Any) -> Policy:
    """An instance of what was given."""
    if isinstance(policy, InputPolicy) or (isinstance(policy, type) and issubclass(policy, InputPolicy)):
        raise TypeError(f"{policy.name!r} acts on pictures, before the processor; check_policy runs models")
    if isinstance(policy, type) and issubclass(policy, Policy):
        try:
            return policy()
        except TypeError as error:
            raise TypeError(f"{policy.__name__}() cannot be made ({error}): give check_policy an instance") from error
    if not isinstance(policy, Policy):
        raise TypeError(f"check_policy takes a vtr.Policy (an instance, or its class), got {policy!r}")
    return policy
