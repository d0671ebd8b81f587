"""Policies by what they look at, as ``vtr list`` and the result page show them."""

from __future__ import annotations

import re
import sys

from vtr.settings import list_policies, policy_class

ROOMS = ("input", "blind", "picture", "question", "decoder", "trained")
"""The order in which the packages of :mod:`vtr.policies` are shown; others follow."""
OTHERS = "Policies from elsewhere."
TOGETHER = "Several policies in one."


def grouped() -> dict[str, list[str]]:
    """Title of a group (what its package says of itself) → the names of its policies."""
    found: dict[str, list[str]] = {f"vtr.policies.{room}": [] for room in ROOMS}
    for name in list_policies():
        if name != "chain":
            found.setdefault(policy_class(name).__module__.rpartition(".")[0], []).append(name)
    titled: dict[str, list[str]] = {}
    for room, names in found.items():
        doc = sys.modules[room].__doc__ if room.startswith("vtr.policies.") and room in sys.modules else None
        titled.setdefault(doc or (TOGETHER if room == "vtr" else OTHERS), []).extend(names)
    return {title: names for title, names in titled.items() if names}


def brief(title: str) -> str:
    """A group's title without what explains it: “Policies that look at nothing: …” is “Look at nothing”."""
    words = re.split(r"[:.]|, (?:through|before|where)", title)[0].removeprefix("Policies ").removeprefix("that ")
    return words[:1].upper() + words[1:]
