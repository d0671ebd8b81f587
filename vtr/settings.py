"""Policies' settings as data: names, spec strings (``"fastv:keep=0.25,layer=2"``), JSON, and folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vtr.about import about, meanings_of
from vtr.files import WRONG, echo, read_header, read_json, read_tensors, told
from vtr.limits import check_bounds, short, similar
from vtr.markup import table

if TYPE_CHECKING:
    import torch

    from vtr.base import Policy

CONFIG_NAME = "vtr_policy.json"
WEIGHTS_NAME = "vtr_policy.safetensors"
LONGEST = 20_000
"""Characters a spec string may have."""
MOST_PARTS = 16
"""Policies a spec string may join."""
LONGEST_MESSAGE = 1000
"""Characters of what is said about settings that are refused."""

_POLICIES: dict[str, type[Policy]] = {}

P = TypeVar("P", bound="type[Policy]")


class Settings:
    """What :class:`vtr.Policy` is as data. A subclass is a dataclass whose fields are its settings."""

    name: ClassVar[str] = ""

    # -- from data -------------------------------------------------------------------------------------------------
    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Policy:
        """Make one of settings that are data; :func:`build` has bounded their sizes.

        Raises:
            ValueError: a setting that it does not have, or one that it needs is missing.
        """
        given = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - set(given)):
            shown = short(", ".join(map(repr, unknown)))
            hint = similar(unknown[0], given)
            raise ValueError(f"policy {cls.name!r} has no setting {shown}{hint}; it has: {', '.join(given)}")
        missing = dataclasses.MISSING
        required = {n for n, f in given.items() if f.default is missing and f.default_factory is missing}
        if lacking := sorted(required - set(settings)):
            raise ValueError(f"policy {cls.name!r} needs {', '.join(lacking)}, e.g. {cls.name}:{lacking[0]}=…")
        return cls(**settings)  # type: ignore[return-value]

    @classmethod
    def first_setting(cls) -> str | None:
        """The setting that a value without a key is, in a spec string; None: there is none."""
        return next((f.name for f in dataclasses.fields(cls) if f.init), None)  # type: ignore[arg-type]

    @classmethod
    def example(cls) -> str:
        """A spec string that works on the pocket model: the defaults, written out as far as the first setting."""
        try:
            return cls().spec
        except (TypeError, ValueError):  # a setting without a default
            return f"{cls.name}:{cls.first_setting()}=…"

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        """Whether these settings name a file: a spec string may do so, a policy file that was sent may not."""
        return "weights" in settings

    # -- to data ---------------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        """The settings as plain JSON data."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @property
    def spec(self) -> str:
        """The spec string of an equal policy: ``vtr.policy(p.spec) == p``. Defaults (but the first) are left out."""
        defaults = {f.name: _plain(f.default) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        items = self.config().items()
        shown = [f"{k}={_compact(v)}" for i, (k, v) in enumerate(items) if i == 0 or repr(v) != repr(defaults[k])]
        return self.name + (":" + ",".join(shown) if shown else "")

    def _repr_html_(self) -> str:
        """Its spec string, what it does, and its settings with what they mean, for notebooks."""
        meanings = meanings_of(type(self))
        rows = [(key, short(_compact(value)), meanings.get(key, "")) for key, value in self.config().items()]
        return table(("setting", "value", "meaning") if rows else (), rows, short(self.spec), about(type(self))[0])

    # -- weights ---------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, torch.Tensor]:
        """Learned weights to save beside the settings; none for a training-free policy."""
        return {}

    def about(self) -> dict[str, Any] | None:
        """What has to be known of :meth:`tensors` to load them again, as JSON data; None without weights."""
        return None

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Take the weights that :meth:`tensors` and :meth:`about` gave.

        Raises:
            ValueError: this policy has no weights.
        """
        if tensors or about is not None:
            raise ValueError(f"{type(self).__name__} has no weights, but the folder holds {sorted(tensors)}")

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Raise ValueError if :meth:`load_tensors` cannot take tensors like these, which have no values yet (they are
        on the meta device): asked before a file is read."""
        if type(self).load_tensors is Settings.load_tensors:
            self.load_tensors(tensors, about)

    def loaded_from(self, folder: str | None, allow_mismatch: bool) -> None:
        """Told after loading: where from, and whether its weights may act on another model than their own."""

    # -- folders ---------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``vtr_policy.json`` (and ``vtr_policy.safetensors``, if there are weights) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = {"policy": self.name, "settings": self.config()}
        tensors, about = self.tensors(), self.about()
        if about is not None:
            data["weights"] = about
        if tensors:
            from safetensors.torch import save_file

            save_file(tensors, str(folder / WEIGHTS_NAME))
        else:
            (folder / WEIGHTS_NAME).unlink(missing_ok=True)  # of a policy that was there before
        (folder / CONFIG_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained(folder: str | Path, allow_mismatch: bool = False) -> Policy:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            allow_mismatch: let learned weights act on another model than the one they were trained with.

        Raises:
            FileNotFoundError: no ``vtr_policy.json`` in ``folder``, or not the weights it speaks of.
            ValueError: a file is not a policy's, is cut off, names an unknown policy, other files or settings that
                cannot be, or its tensors are not those of the policy (all that are missing, unknown or of another shape
                are listed) or not finite. Sizes are compared before anything of that size is made.
        """
        path, weights = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; policy.save_pretrained(folder) writes one")
        data = read_json(path, "a policy file")
        if not isinstance(data, dict) or not isinstance(data.get("policy"), str):
            raise ValueError(f'{path} is not a policy file: it needs {{"policy": …, "settings": {{…}}}}')
        name, about = data["policy"], data.get("weights")
        loaded = _built(name, data.get("settings"), path)
        if about is not None and not weights.is_file():
            raise FileNotFoundError(f"{folder} lacks {WEIGHTS_NAME}, the weights of {name!r}: copy it there as well")
        if weights.is_file():
            said = [] if about is None else [about]
            try:
                loaded.expect(read_header(weights), *said)
                loaded.load_tensors(read_tensors(weights), *said)
            except (*WRONG, RuntimeError) as error:
                raise ValueError(f"{folder} does not hold the weights of {name!r}: {told(error)}") from error
        loaded.loaded_from(str(folder), allow_mismatch)
        return loaded


# -- policies by name --------------------------------------------------------------------------------------------------
def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make a :class:`~vtr.Policy` known as ``name`` (for spec strings, saving and ``vtr list``).

    Raises:
        TypeError: the class is no Policy dataclass.
        ValueError: another class already has the name, or the name cannot stand in a spec string.
    """

    def register(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Settings) and "__dataclass_fields__" in cls.__dict__):
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
        ValueError: no such policy; the message names similar ones and lists all.
    """
    if name not in _POLICIES:
        said = f"unknown policy {short(str(name))!r}{similar(str(name), _POLICIES)}"
        raise ValueError(f"{said}; known: {', '.join(list_policies())} (see `vtr list`)")
    return _POLICIES[name]


def build(name: str, settings: dict[str, Any]) -> Policy:
    """Make the policy ``name`` with ``settings``; unknown settings raise ValueError naming the known ones.

    Settings come from spec strings and files: their sizes are bounded before anything is made of them, and whatever a
    policy class stumbles over in them is a ValueError or a TypeError.
    """
    cls = policy_class(name)
    check_bounds(settings, f"policy {name!r}")
    try:
        return cls.from_settings(settings)
    except (ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        said = f"policy {name!r} cannot be made of these settings ({type(error).__name__}: {short(str(error))})"
        raise ValueError(said) from error
    except (ValueError, TypeError) as error:
        if len(str(error)) > LONGEST_MESSAGE:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(short(str(error), LONGEST_MESSAGE)) from error
        raise


def _built(name: str, settings: Any, path: Path) -> Policy:
    """The policy that a file's settings make, without its weights."""
    try:
        check_names_no_file(name, settings)
        return build(name, settings)
    except WRONG as error:
        raise ValueError(f"{path}: settings that {echo(name)} cannot have: {told(error)}") from error


def check_names_no_file(name: Any, settings: Any) -> None:
    """Raise ValueError for the settings of a policy file that name other files."""
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError(f'a policy is {{"policy": name, "settings": {{…}}}}, not {echo(name)}, {echo(settings)}')
    if "weights" in settings or policy_class(name).names_file(settings):
        raise ValueError(f"the settings of {name!r} name another file, which a policy file may not: write it in full")


# -- spec strings ------------------------------------------------------------------------------------------------------
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
    _check_colon(name.strip(), spec)
    settings: dict[str, Any] = {}
    for i, item in enumerate(_split(rest, ",") if colon else []):
        key, equals, value = item.partition("=")
        if i == 0 and not equals and item.strip() and (first := policy_class(name.strip()).first_setting()):
            key, equals, value = first, "=", item
        if not equals or not key.strip():
            raise ValueError(
                f"cannot read {short(item)!r} in policy spec {short(spec)!r}: write name:key=value,key=value"
            )
        settings[key.strip()] = _value(value)
    return name.strip(), settings


def _check_colon(name: str, spec: str) -> None:
    """Raise ValueError for ``fastv keep=0.25`` or ``fastv(keep=0.25)``: a known name, and settings without a colon."""
    for i, char in enumerate(name):
        if not (char.isalnum() or char in "-_") and name[:i] in _POLICIES:
            rest = spec[i + 1 :].strip(" )")
            if rest.partition(":")[0] in _POLICIES:
                raise ValueError(f"two policies are joined by +: write {name[:i]}+{short(rest)}")
            raise ValueError(f"a colon stands between a policy and its settings: write {name[:i]}:{short(rest)}")


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


def _split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` outside of brackets and quotes."""
    if separator not in text:
        return [text]
    parts, depth, quoted, start = [], 0, False, 0
    escaped = False
    for i, char in enumerate(text):
        quoted ^= char == '"' and not escaped
        escaped = quoted and char == "\\" and not escaped  # of a spec string in a spec string
        depth += (char in "[{") - (char in "]}")
        if char == separator and depth == 0 and not quoted:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """A setting as JSON data (schedules and nested policies know how to say themselves)."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
