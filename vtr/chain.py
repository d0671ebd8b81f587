"""Policies from spec strings, and several that act together (``a + b``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtr.base import CHOOSING, QUESTIONS, Policy, Request, Tries
from vtr.parts import Parts
from vtr.settings import MOST_PARTS, build, check_names_no_file, parse, register_policy


def policy(spec: str | Policy) -> Policy:
    """Make a policy from a spec string; a policy passes through.

    ``name`` or ``name:key=value,key=value``, joined by ``+`` to let several act. Values are JSON (``0.5`` is a ratio,
    ``64`` a count, ``[1.0,0.5]`` a list) or plain text. The first may stand without a key: it is the policy's first
    setting (``m3:36``, ``gsearch:llava-1.5-7b``), or the folder of its weights (``pmod:FOLDER``).

    Raises:
        TypeError: neither a string nor a policy.
        ValueError: unknown name or setting, or a value the policy refuses.
        FileNotFoundError: it names a folder of weights or a schedule that is not there.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a policy is a vtr.Policy, a spec string like 'fastv:keep=0.25,layer=2' or None, got {spec!r}")
    parts = [build(name, settings) for name, settings in parse(spec)]
    return parts[0] if len(parts) == 1 else Chain(parts)


@register_policy("chain")
@dataclass
class Chain(Parts):
    """Several policies acting together, e.g. a compressor before the decoder and a pruner in it. Written ``a + b``."""

    policies: Sequence[Policy | dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        flat: list[Policy] = []
        if not isinstance(self.policies, Sequence) or len(self.policies) > MOST_PARTS:
            raise ValueError(f"a chain is a list of at most {MOST_PARTS} policies")
        for item in self.policies:
            if not isinstance(item, (Policy, dict)):
                raise TypeError(f"a chain joins policies, got {item!r}")
            made = build(item["policy"], item["settings"]) if isinstance(item, dict) else item
            flat += made.policies if isinstance(made, Chain) else [made]  # type: ignore[arg-type]
        if not flat:
            raise ValueError("a chain without policies reduces nothing: name one or more, or use policy=None")
        self.policies = flat
        self._answers: dict[str, Policy] = {}
        for question in QUESTIONS:
            askable = [p for p in flat if p.asks(question)]
            if len(askable) > 1:
                both = " and ".join(type(p).__name__ for p in askable)
                raise ValueError(f"{both} both {question}: only one policy of a chain may, drop one of them")
            if askable:
                self._answers[question] = askable[0]
                for name in (question, f"{question}_all", f"{question}_row"):
                    if question not in CHOOSING and hasattr(askable[0], name):
                        setattr(self, name, getattr(askable[0], name))
        if "remember" in self._answers:
            self.recall = self._answers["remember"].recall  # type: ignore[method-assign]
        pruner = self._answers.get("prune")
        if "accept" in self._answers:
            raise ValueError(
                "auto reads the prompt under each of its choices, so what acts together with one is part of it: write "
                'auto:choices=["m3:9+fastv:keep=0.5,layer=2","none"]'
            )
        if "resolve" in self._answers and "compress" in self._answers:
            raise ValueError(
                "a policy that chooses the scale of pictures cannot act together with one that compresses: drop one"
            )
        router = self._answers.get("route")
        if router is not None and pruner is not None and pruner is not router and pruner.question_guided:
            raise ValueError("a policy that ranks by attention cannot act together with one that routes: drop one")
        if "attend" in self._answers and ("route" in self._answers or (pruner is not None and pruner.question_guided)):
            raise ValueError(
                "a policy that says who takes part in attention cannot act together with one that routes, or ranks by "
                "attention: drop one"
            )

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._answers["compress"].wants if "compress" in self._answers else ()

    @property
    def renumbers(self) -> bool:
        return any(p.renumbers for p in self.policies)  # type: ignore[union-attr]

    def asks(self, question: str) -> bool:
        return question in self._answers

    def needs(self, layer: int) -> Request | tuple[Request, ...] | None:
        pruner = self._answers.get("prune")
        return pruner.needs(layer) if pruner else None

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """As the one who prunes says, or else the one who routes."""
        says = self._answers.get("prune") or self._answers.get("route")
        return super().entering(num_hidden_layers, total) if says is None else says.entering(num_hidden_layers, total)

    def resolve(self, tries: Tries) -> list[Policy | None]:
        """What the choosing member chooses (its tries are made without the others), together with the others."""
        chooser = self._answers["resolve"]
        rest: list[Policy] = [p for p in self.policies if p is not chooser]  # type: ignore[misc]
        together = [rest if one is None else [one, *rest] for one in chooser.resolve(tries)]
        return [Chain(parts) if parts else None for parts in together]

    def parts(self) -> list[Policy]:
        return list(self.policies)  # type: ignore[arg-type]

    def of_image(self, index: int, count: int) -> Policy | None:
        """As the one who compresses says."""
        compressor = self._answers.get("compress")
        return self if compressor is None else compressor.of_image(index, count)

    @classmethod
    def first_setting(cls) -> None:
        return None

    @classmethod
    def example(cls) -> str:
        return "m3:tokens=36+fastv:keep=0.5"

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        for part in settings.get("policies", []):
            check_names_no_file(part["policy"], part["settings"])
        return False

    def config(self) -> dict[str, Any]:
        return {"policies": [{"policy": p.name, "settings": p.config()} for p in self.policies]}  # type: ignore[union-attr]

    def _repr_html_(self) -> str:
        return "".join(p._repr_html_() for p in self.policies)  # type: ignore[union-attr]

    @property
    def spec(self) -> str:
        return "+".join(p.spec for p in self.policies)  # type: ignore[union-attr]
