"""What a row of a leaderboard opens to: its costs, the kinds of question it loses, and questions it gets wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtr.eval.report.page.cells import number, points
from vtr.eval.report.page.data import Result, unreduced

from vtr.data import files, sources
from vtr.data.records import Sample
from vtr.data.videos import Video

ROWS = "samples.jsonl"
"""What ``vtr eval`` writes beside its result: every answer."""
FAILURES = 4
"""So many failures are shown of a policy, each of another picture."""
KINDS = 4
DRAWN = ("pocket", "pocket:task=listing", "pocket:task=video")
"""Data whose pictures are drawn again from a seed. No other file is opened or fetched for a result."""
MOST = 5000
"""No more questions are drawn again."""


@dataclass(frozen=True)
class Picture:
    """A picture as a data address, and its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Failure:
    """A question that no reduction answers better. said: the policy's answer, where it is known.

    picture: the name of a picture of :attr:`Details.pictures`; "" where there is none.
    """

    id: str
    question: str
    right: str
    said: str
    picture: str


@dataclass(frozen=True)
class Detail:
    """Of one row. kinds: (kind of question, accuracy, difference to no reduction), the greatest losses first."""

    facts: list[tuple[str, str]]
    kinds: list[tuple[str, str, str]]
    summary: str
    failures: list[Failure]


class Details:
    """Makes details of rows. Pictures are kept once, however many rows show them."""

    def __init__(self) -> None:
        self.pictures: dict[str, Picture] = {}
        """By name, which is an ``id`` of the page."""

    def of(self, result: Result) -> dict[str, Detail]:
        """A detail for every policy of an evaluation."""
        none = unreduced(result)
        wanted = {row["policy"]: few(row) for row in result.rows}
        ids = {one for some in wanted.values() for one in some}
        asked = questions(result, ids)
        said = answers(result, ids)
        out = {}
        for row in result.rows:
            failures = [self.failure(result, one, asked, said, row["policy"]) for one in wanted[row["policy"]]]
            shown = [] if row is none else failures
            out[row["policy"]] = Detail(facts(row, none), worst(row, none), summary(row, result, len(shown)), shown)
        return out

    def failure(
        self, result: Result, name: str, asked: Mapping[str, Sample], said: Mapping[str, dict[str, Any]], policy: str
    ) -> Failure:
        """One question, with as much as is known of it."""
        sample, row = asked.get(name), said.get(name, {})
        cell = (row.get("policies") or {}).get(policy) or {}
        if sample is None:
            right = ", ".join(map(str, row.get("answers", [])))
            return Failure(name, str(row.get("question", "")), right, str(cell.get("said", "")), "")
        key = "picture-" + re.sub(r"\W+", "-", f"{result.data['data']['name']}-{sample.group}")
        if key not in self.pictures:
            self.pictures[key] = embedded(sample)
        return Failure(name, sample.question, sample.answers[0], str(cell.get("said", "")), key)


def few(row: Mapping[str, Any]) -> list[str]:
    """Names of questions on which a policy does worse than no reduction: the first of each picture."""
    lost = (row.get("versus_none") or {}).get("lost") or []
    first: dict[str, str] = {}
    for name in lost:
        first.setdefault(str(name).rpartition("-")[0] or str(name), str(name))
    return list(first.values())[:FAILURES]


def questions(result: Result, ids: set[str]) -> dict[str, Sample]:
    """The questions of these names, drawn again; none where the data are not the pocket tasks."""
    settings = result.data.get("settings") or {}
    spec, limit, seed = (settings.get(key) for key in ("data", "limit", "seed"))
    if not ids or spec not in DRAWN or type(seed) is not int or type(limit) is not int or not 0 < limit <= MOST:
        return {}
    drawn = sources.open_data(spec, limit=limit, seed=seed, videos=True)
    return {one.id: one for one in drawn if isinstance(one, Sample) and one.id in ids}


def answers(result: Result, ids: set[str]) -> dict[str, dict[str, Any]]:
    """What was said to the questions of these names, where the rows of ``vtr eval`` lie beside the result."""
    path = Path(result.path).parent / ROWS
    if not ids or result.path.name != "results.json" or not path.is_file():
        return {}
    found = (row for _, row in files.read(path) if isinstance(row, dict))
    return {str(row["id"]): row for row in found if str(row.get("id")) in ids}


def embedded(sample: Sample) -> Picture:
    """The picture; of a video its frames, four in a row."""
    from PIL import Image
    from vtr.eval.report.page.gallery import embed

    seen = sample.seen()
    if isinstance(seen, Video):
        width, height = seen.frames[0].size
        sheet = Image.new("RGB", (4 * width, -(-len(seen.frames) // 4) * height))
        for place, frame in enumerate(seen.frames):
            sheet.paste(frame, (place % 4 * width, place // 4 * height))
        seen = sheet
    return Picture(embed(seen, 60), *seen.size)


# -- in words ----------------------------------------------------------------------------------------------------------
def facts(row: Mapping[str, Any], none: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Costs, each beside no reduction's."""

    def beside(mine: float | None, theirs: float | None, unit: str) -> str:
        if mine is None:
            return "not measured"
        return f"{number(mine)}{unit}" + ("" if theirs is None or row is none else f" (none {number(theirs)}{unit})")

    def median(one: Mapping[str, Any] | None) -> float | None:
        return one["prefill_ms"]["median"] if one and one["prefill_ms"] else None

    whole: Mapping[str, Any] = none or {}
    tokens = sum(row["vision_tokens"]) / max(len(row["vision_tokens"]), 1)
    all_tokens = sum(whole["vision_tokens"]) / max(len(whole["vision_tokens"]), 1) if whole else None
    return [
        ("vision tokens, mean over layers", beside(tokens, all_tokens, "")),
        ("prefill, median", beside(median(row), median(none), " ms")),
        ("prefill and decode", beside(row["gflops"], whole.get("gflops"), " GFLOPs")),
        ("KV cache", beside(row["kv_mib"], whole.get("kv_mib"), " MiB")),
    ]


def worst(row: Mapping[str, Any], none: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """The kinds of question on which most is lost."""
    if none is None or len(row["by_kind"]) < 2:
        return []
    shared = [
        (row["by_kind"][kind] - none["by_kind"][kind], kind) for kind in row["by_kind"] if kind in none["by_kind"]
    ]
    return [
        (kind, f"{100 * row['by_kind'][kind]:.1f}%", points(lost)) for lost, kind in sorted(shared)[:KINDS] if lost < 0
    ]


def summary(row: Mapping[str, Any], result: Result, shown: int) -> str:
    """How many questions were lost and won against no reduction."""
    versus = row.get("versus_none")
    if row["policy"] == "none" or not versus or "losses" not in versus:
        return ""
    some = f", {shown} of them here" if 0 < shown < versus["losses"] else ""
    return (
        f"Worse than no reduction on {versus['losses']:,} of {result.shown:,} questions{some}; "
        f"better on {versus['wins']:,}."
    )
