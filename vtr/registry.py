"""Policies by name: registration, spec strings (``"fastv:keep=0.25,layer=2"``) and chains (``a + b``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vtr.base import Policy, Scores, Wanted
from vtr.learned import Learned
from vtr.limits import check_bounds, short
from vtr.pocket import POLICIES as SHIPPED
from vtr.saved import CONFIG_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    import torch

    from vtr.engine.resolve import Tries

FILES = (CONFIG_NAME, WEIGHTS_NAME)
LONGEST = 20_000
"""Characters a spec string may have."""
MOST_PARTS = 16
"""Policies a spec string may join."""
LONGEST_MESSAGE = 1000
"""Characters of what is said about settings that are refused."""

_POLICIES: dict[str, type[Policy]] = {}
_QUESTIONS = ("compress", "prune", "route", "remember", "resolve")

P = TypeVar("P", bound=type[Policy])


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make a :class:`~vtr.Policy` known as ``name`` (for spec strings, saving and ``vtr list``).

    Raises:
        TypeError: the class is no Policy dataclass.
        ValueError: another class already has the name, or the name cannot stand in a spec string.
    """

    def register(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Policy) and "__dataclass_fields__" in cls.__dict__):
            raise TypeError(f"{cls!r} must be a vtr.Policy subclass decorated with @dataclass (below this decorator)")
        if not name or set(name) & set(":,+=[] "):
            raise ValueError(f"{name!r} cannot be a policy's name: use letters, digits, '-' and '_'")
        known = _POLICIES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a policy called {name!r} is already registered: {known.__module__}.{known.__qualname__}")
        cls.name = name
        _POLICIES[name] = cls
        return cls

    return register


def list_policies() -> list[str]:
    """The names of all registered policies, sorted."""
    return sorted(_POLICIES)


def policy_class(name: str) -> type[Policy]:
    """The class registered as ``name``.

    Raises:
        ValueError: no such policy; the message lists the known ones.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown policy {short(str(name))!r}; known: {', '.join(list_policies())} (see `vtr list`)")
    return _POLICIES[name]


def build(name: str, settings: dict[str, Any]) -> Policy:
    """Make the policy ``name`` with ``settings``; unknown settings raise ValueError naming the known ones.

    Settings come from spec strings and files: their sizes are bounded before anything is made of them, and whatever a
    policy class stumbles over in them is a ValueError or a TypeError.

    A policy that owns weights may be given the folder they are in (``weights``, and ``allow_mismatch``): the settings
    saved there hold unless others are named. ``weights=pocket`` and ``weights=pocket-joint`` are
    those shipped for the embedded models.
    """
    cls = policy_class(name)
    check_bounds(settings, f"policy {name!r}")
    if issubclass(cls, Learned) and "weights" in settings:
        given = {k: v for k, v in settings.items() if k not in ("weights", "allow_mismatch")}
        allow = settings.get("allow_mismatch", False)
        if not isinstance(allow, bool):
            raise ValueError(f"allow_mismatch={allow!r}: say true or false")
        found = _loaded(name, str(settings["weights"]), allow)
        if type(found) is not cls:
            raise ValueError(
                f"{settings['weights']} holds a policy {found.name!r}, not {name!r}: name a folder of that one's"
            )
        made = build(name, {**found.config(), **given})
        made.share(found)  # type: ignore[attr-defined]
        return made
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        shown = short(", ".join(map(repr, unknown)))
        raise ValueError(f"policy {name!r} has no setting {shown}; it has: {', '.join(known)}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(settings)):
        raise ValueError(f"policy {name!r} needs {', '.join(missing)}, e.g. {name}:{missing[0]}=…")
    try:
        return cls(**settings)
    except (ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        said = f"policy {name!r} cannot be made of these settings ({type(error).__name__}: {short(str(error))})"
        raise ValueError(said) from error
    except (ValueError, TypeError) as error:
        if len(str(error)) > LONGEST_MESSAGE:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(short(str(error), LONGEST_MESSAGE)) from error
        raise


def _loaded(name: str, folder: str, allow_mismatch: bool) -> Policy:
    """The policy in ``folder``, read again only if its files have changed."""
    if folder in SHIPPED:
        shipped = _loaded(name, str(SHIPPED[folder] / name), allow_mismatch)
        shipped.folder = folder  # type: ignore[attr-defined]
        return shipped
    try:
        there = Path(folder).exists()
    except (OSError, ValueError) as error:  # too long for a path, or no path at all
        raise FileNotFoundError(f"weights={folder[:80]}: there is no such folder ({error})") from error
    if not there and len(Path(folder).parts) == 1:
        raise FileNotFoundError(f"weights={folder}: there is no such folder; shipped are {', '.join(SHIPPED)}")
    stamps = tuple((Path(folder) / file).stat().st_mtime_ns for file in FILES if (Path(folder) / file).is_file())
    return _read(folder, allow_mismatch, stamps)


@lru_cache(maxsize=16)
def _read(folder: str, allow_mismatch: bool, stamps: tuple[int, ...]) -> Policy:
    return Policy.from_pretrained(folder, allow_mismatch)


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


def parse(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each policy that a spec string joins; nothing is made or read.

    Raises:
        ValueError: not written as a spec string, too long, or of too many policies; a value without a key of an unknown
            policy.
    """
    if len(spec) > LONGEST:
        raise ValueError(f"a policy spec has at most {LONGEST} characters, this one {len(spec)}: {short(spec)}")
    parts = _split(spec, "+")
    if len(parts) > MOST_PARTS:
        raise ValueError(f"a policy spec joins at most {MOST_PARTS} policies, this one {len(parts)}: {short(spec)}")
    return [_one(part.strip()) for part in parts]


def _one(spec: str) -> tuple[str, dict[str, Any]]:
    name, colon, rest = spec.partition(":")
    settings: dict[str, Any] = {}
    for i, item in enumerate(_split(rest, ",") if colon else []):
        key, equals, value = item.partition("=")
        if i == 0 and not equals and (first := _first(name.strip())) and item.strip():
            key, equals, value = first, "=", item
        if not equals or not key.strip():
            raise ValueError(
                f"cannot read {short(item)!r} in policy spec {short(spec)!r}: write name:key=value,key=value"
            )
        settings[key.strip()] = _value(value)
    return name.strip(), settings


def _value(text: str) -> Any:
    """What stands behind a key: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # more digits, or deeper, than Python reads
        raise ValueError(
            f"cannot read the value {short(text)!r} in a policy spec: too long a number, or too deep"
        ) from error


def _first(name: str) -> str | None:
    """What a value without a key is to policy ``name``."""
    cls = policy_class(name)
    if issubclass(cls, Learned):
        return "weights"
    return None if cls is Chain else next((f.name for f in dataclasses.fields(cls) if f.init), None)


def _split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` outside of brackets and quotes."""
    if separator not in text:
        return [text]
    parts, depth, quoted, start = [], 0, False, 0
    for i, char in enumerate(text):
        quoted ^= char == '"'
        depth += (char in "[{") - (char in "]}")
        if char == separator and depth == 0 and not quoted:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


@register_policy("chain")
@dataclass
class Chain(Policy):
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
        for question in _QUESTIONS:
            askable = [p for p in flat if p.asks(question)]
            if len(askable) > 1:
                both = " and ".join(type(p).__name__ for p in askable)
                raise ValueError(f"{both} both {question}: only one policy of a chain may, drop one of them")
            if askable:
                self._answers[question] = askable[0]
                if question != "resolve":
                    setattr(self, question, getattr(askable[0], question))
        if "remember" in self._answers:
            self.remember_all = self._answers["remember"].remember_all  # type: ignore[method-assign]
            self.recall = self._answers["remember"].recall  # type: ignore[method-assign]
        pruner = self._answers.get("prune")
        if "resolve" in self._answers and "compress" in self._answers:
            raise ValueError(
                "a policy that chooses the scale of pictures cannot act together with one that compresses: drop one"
            )
        if "route" in self._answers and pruner is not None and pruner.question_guided:
            raise ValueError("a policy that ranks by attention cannot act together with one that routes: drop one")

    @property
    def question_guided(self) -> bool:  # type: ignore[override]
        return any(p.question_guided for p in self.policies)  # type: ignore[union-attr]

    @property
    def wants(self) -> tuple[Wanted, ...]:  # type: ignore[override]
        return self._answers["compress"].wants if "compress" in self._answers else ()

    @property
    def renumbers(self) -> bool:
        return any(p.renumbers for p in self.policies)  # type: ignore[union-attr]

    @property
    def on_continue(self) -> str:
        return next((p.on_continue for p in self.policies if hasattr(p, "on_continue")), "warn")

    def asks(self, question: str) -> bool:
        return question in self._answers

    def needs(self, layer: int) -> Scores | None:
        pruner = self._answers.get("prune")
        return pruner.needs(layer) if pruner else None

    def resolve(self, tries: Tries) -> list[Policy | None]:
        """What the choosing member chooses (its tries are made without the others), together with the others."""
        chooser = self._answers["resolve"]
        rest: list[Policy] = [p for p in self.policies if p is not chooser]  # type: ignore[misc]
        together = [rest if one is None else [one, *rest] for one in chooser.resolve(tries)]
        return [Chain(parts) if parts else None for parts in together]

    def check(self, num_hidden_layers: int) -> None:
        for p in self.policies:
            p.check(num_hidden_layers)  # type: ignore[union-attr]

    def check_model(self, model: Any) -> None:
        for p in self.policies:
            p.check_model(model)  # type: ignore[union-attr]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{n}": t for i, p in enumerate(self.policies) for n, t in p.tensors().items()}  # type: ignore[union-attr]

    def about(self) -> dict[str, Any] | None:
        found = {str(i): p.about() for i, p in enumerate(self.policies) if p.about() is not None}  # type: ignore[union-attr]
        return found or None

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        for p, mine, said in self._shared_out(tensors, about):
            p.load_tensors(mine, *said)

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        for p, mine, said in self._shared_out(tensors, about):
            p.expect(mine, *said)

    def _shared_out(
        self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None
    ) -> list[tuple[Any, dict[str, torch.Tensor], list[Any]]]:
        """Each policy of the chain, its tensors, and what is known about them (none or one).

        Raises:
            ValueError: something belongs to none of them.
        """
        known = about if isinstance(about, dict) else {} if about is None else {"weights": about}
        places = [str(i) for i in range(len(self.policies))]
        if foreign := sorted({n for n in tensors if n.partition(".")[0] not in places} | {*known} - {*places}):
            raise ValueError(f"these tensors belong to no policy of the chain: {', '.join(foreign)}")
        out = []
        for i, p in zip(places, self.policies, strict=True):
            mine = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == i}
            said = [known[i]] if known.get(i) is not None else []
            if mine or said:
                out.append((p, mine, said))
        return out

    def config(self) -> dict[str, Any]:
        return {"policies": [{"policy": p.name, "settings": p.config()} for p in self.policies]}  # type: ignore[union-attr]

    @property
    def spec(self) -> str:
        return "+".join(p.spec for p in self.policies)  # type: ignore[union-attr]
