"""What a policy's class says of itself: its docstring, and what that says of each setting."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any


def about(cls: type[Any]) -> tuple[str, str]:
    """The first paragraph of a policy's docstring, and those up to its Args."""
    first, _, rest = (inspect.getdoc(cls) or "").partition("\n\n")
    rest = re.split(r"^(?:Args|Raises|Attributes):", rest, maxsplit=1, flags=re.M)[0]
    return _plain(first), "\n\n".join(_plain(part) for part in rest.split("\n\n") if part.strip())


def _plain(text: str) -> str:
    """Without the marks of a docstring, in one line."""
    return re.sub(r":\w+:`[~.]*([^`]+)`", r"\1", " ".join(text.split())).replace("``", "")


def meanings_of(cls: type[Any]) -> dict[str, str]:
    """What a policy's docstring says under ``Args`` of each of its settings; several may stand in one line."""
    text = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.S | re.M)
    name = "|".join(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
    if text is None or not name:
        return {}
    said = " ".join(text[1].split())
    parts = re.split(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", said)[1:]
    found: dict[str, str] = {}
    for names, meaning in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(names.split(", "), _plain(meaning.strip()))
    return found


def default_of(field: dataclasses.Field[Any]) -> str:
    """As a spec string has it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "(needed)"
    return (
        value
        if isinstance(value, str)
        else json.dumps(value.to_json() if hasattr(value, "to_json") else value, separators=(",", ":"))
    )
