"""Bounds of what comes from outside (spec strings, policy files, requests), and messages that echo little of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

MOST_LAYERS = 1024
"""Decoder layers a setting may speak of."""
MOST_ENTRIES = 4096
"""Entries of a list, characters of a text, among a policy's settings."""
MOST_NODES = 16384
"""Values in all of a policy's settings."""
DEEPEST = 16
"""Lists and objects within each other."""
LARGEST = 2**63 - 1
"""Integers lie within ±LARGEST: what a tensor takes."""


def short(text: str, most: int = 200) -> str:
    """``text``, its middle left out where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    side = most // 2 - 15
    return f"{text[:side]}… ({len(text)} characters) …{text[-side:]}"


def folded(spec: str, width: int) -> str:
    """A spec string in lines of at most ``width`` characters, broken behind commas and before a plus alone.

    A setting that is longer has a line of its own.
    """
    lines = [""]
    for part in re.split(r"(?<=,)|(?=\+)", spec):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def similar(name: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" where one of ``known`` is spelt much like ``name``, else nothing."""
    found = get_close_matches(name[:80].lower(), list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def check_bounds(value: Any, name: str) -> None:
    """Raise unless a setting given as data is of a size that anybody may need. Other objects are left alone.

    Raises:
        ValueError: too many entries or characters, too deep, NaN, or an integer that no tensor takes; names ``name``.
    """
    here, nodes = [value], 0
    for _ in range(DEEPEST):
        nodes += len(here)
        if nodes > MOST_NODES:
            raise ValueError(f"{short(name)} holds more than {MOST_NODES} values")
        for one in here:
            _check_one(one, short(name))
        here = [part for one in here for part in _parts(one)]
        if not here:
            return
    raise ValueError(f"{short(name)} has lists in lists, more than {DEEPEST} deep")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []


def _check_one(value: Any, name: str) -> None:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MOST_ENTRIES:
        what = "characters" if isinstance(value, str) else "entries"
        raise ValueError(f"{name} has {len(value)} {what}: at most {MOST_ENTRIES}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} holds an integer of {value.bit_length()} bits: at most 63")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} holds NaN, which is no number")
