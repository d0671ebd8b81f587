"""What was found of a patched model, and what is possible with it: ``vtr.describe(model)``, ``vtr list --model``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtr.base import QUESTIONS, Policy
from vtr.engine.rotary import many_axes
from vtr.engine.tower import has_cls, layers_of
from vtr.settings import list_policies, policy_class

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch

WIDE = 14
"""Letters of a name that stand beside its text."""
INSIDE = tuple(name for name in QUESTIONS if name != "compress")
"""Questions that are asked in the decoder, or that run it."""


@dataclass(frozen=True)
class Description:
    """A patched model's parts and what follows from them; ``print`` shows it.

    Attributes:
        model: its class. family: the adapter that serves it.
        decoder: its class, its layers and their kinds. positions: how tokens are numbered.
        tower, projector: their classes; None where they were not found.
        placeholders: ids of the tokens that stand for vision tokens.
        grids: where the grid of an image's tokens comes from.
        path: "packed" (every kind of policy) or "padded" (policies before the decoder). why: the reason for the latter.
        off: what the self-test found, as a share of the largest logit; None where it was not run.
        proven: whether the family is one that tests have compared with transformers' own, so that it needs none.
        cannot: policies that cannot work on it, by name, and why.
    """

    model: str
    family: str
    decoder: str
    positions: str
    tower: str | None
    projector: str | None
    placeholders: tuple[int, ...]
    grids: str
    path: str
    why: str | None
    off: float | None
    proven: bool
    cannot: dict[str, str]

    def __str__(self) -> str:
        path = "packed: policies before the decoder and inside of it"
        if self.path == "padded":
            path = f"padded: policies before the decoder only, because {self.why}"
        lines = {
            "decoder": self.decoder,
            "positions": self.positions,
            "vision tower": self.tower or "not found",
            "projector": self.projector or "not found",
            "placeholders": ", ".join(map(str, self.placeholders)),
            "grids": self.grids,
            "path": path,
        }
        if self.off is not None:
            lines["self-test"] = f"logits differ by {self.off:.0e} of the largest"
        elif not self.proven:
            lines["self-test"] = "not run (it is when a model is patched with its weights)"
        reasons: dict[str, list[str]] = {}
        for name, why in self.cannot.items():
            reasons.setdefault(why, []).append(name)
        lines |= {f"not {', '.join(names)}": why for why, names in reasons.items()}
        return "\n".join([f"{self.model} ({self.family})", *(_line(name, text) for name, text in lines.items())])


def _line(name: str, text: str) -> str:
    """A name and its text beside each other; below it if the name is long."""
    return f"  {name + ':':14} {text}" if len(name) < WIDE else f"  {name}:\n{'':17}{text}"


def describe(patch: Patch) -> Description:
    """Of a patched model, from its modules and its adapter; runs nothing."""
    model, adapter, text = patch.model, patch.adapter, patch.decoder.text
    tower, projector = adapter.tower(model), adapter.projector(model)
    return Description(
        type(model).__name__,
        adapter.family,
        f"{type(text).__name__}, {_layers(text)}",
        "several axes (M-RoPE)" if many_axes(getattr(text, "rotary_emb", None)) else "one axis",
        None if _absent(tower) else f"{type(tower).__name__}, {_tower(tower)}",
        None if _absent(projector) else type(projector).__name__,
        adapter.placeholders(model),
        adapter.grids,
        patch.path,
        patch.why,
        patch.off,
        adapter.proven,
        cannot(patch),
    )


def cannot(patch: Patch) -> dict[str, str]:
    """The policies that cannot work on a patched model with their default settings, and why."""
    found = {}
    for name in list_policies():
        cls = policy_class(name)
        try:
            policy: Any = cls if isinstance(cls.wants, tuple) else cls()
        except (TypeError, ValueError):  # made of others, and so able to do what they are
            continue
        why = patch.adapter.why_not(policy)
        inside = any(_answers(cls, question) for question in INSIDE) and not hasattr(cls, "before_decoder")
        if why is None and patch.path == "padded" and inside:
            why = "they act inside the decoder"
        if why is not None:
            found[name] = why
    return found


def _answers(cls: type[Policy], question: str) -> bool:
    return getattr(cls, question) is not getattr(Policy, question)


def _absent(part: Any) -> bool:
    return part is None or not any(True for _ in part.parameters())


def _layers(text: Any) -> str:
    kinds = getattr(text.config, "layer_types", None) or []
    counts = Counter(str(kind).removesuffix("_attention") for kind in kinds)
    few = len(text.layers)
    if len(counts) < 2:
        return f"{few} layers" + (f" ({next(iter(counts))})" if counts else "")
    return f"{few} layers: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _tower(tower: Any) -> str:
    depth = len(layers_of(tower))
    return (f"{depth} layers, " if depth else "") + ("a CLS token" if has_cls(tower) else "no CLS token")
