"""The counts of ``vtr bench launches`` as rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = {
    "prefill": ("prefill, launches", "prefill", ("launches",)),
    "prefill-waits": ("prefill, waits / copies", "prefill", ("waits", "copies")),
    "token": ("one decoded token, launches", "token", ("launches",)),
    "token-waits": ("one decoded token, waits / copies", "token", ("waits", "copies")),
}
"""Table → its heading, which part of a row it shows, and which counts."""


def columns(result: Mapping[str, Any]) -> dict[tuple[int, bool], str]:
    """(batch, ragged) → how it is called."""
    found = dict.fromkeys((row["batch"], row["ragged"]) for row in result["rows"])
    mixed = {batch for batch, ragged in found if ragged}
    return {
        (batch, ragged): f"B {batch}" + ((" ragged" if ragged else " equal") if batch in mixed else "")
        for batch, ragged in found
    }


def rows(result: Mapping[str, Any], part: str) -> list[list[str]]:
    """A table of :data:`PARTS`: a policy, then its cell of each column. An earlier count stands before an arrow."""
    _, where, counts = PARTS[part]
    now, before = (_by_case(result.get(key, ())) for key in ("rows", "before"))
    return [
        [policy, *(_cell(now.get((policy, *at)), before.get((policy, *at)), where, counts) for at in columns(result))]
        for policy in dict.fromkeys(row["policy"] for row in result["rows"])
    ]


def _by_case(found: Any) -> dict[tuple[str, int, bool], dict[str, Any]]:
    return {(row["policy"], row["batch"], row["ragged"]): row for row in found}


def _cell(row: Any, before: Any, where: str, counts: tuple[str, ...]) -> str:
    if row is None:
        return "–"
    said = [" / ".join(f"{one[where][name]:,}" for name in counts) for one in (before, row) if one is not None]
    return " → ".join(said)


def footer(result: Mapping[str, Any]) -> str:
    """What was counted, in words."""
    arrow = "; before → after" if "before" in result else ""
    return (
        f"Counts, not times{arrow}: {result['layers']} layers, {result['vision_tokens']} vision + "
        f"{result['text_tokens']} text tokens a row, {result['dtype']}; the text model alone. Ragged rows have "
        "texts of different lengths, every eighth no image."
    )
