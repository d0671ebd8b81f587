"""The tables of an evaluation: policies by accuracy, by kind of question, and in short."""

from __future__ import annotations

from typing import Any

from vtr.eval.report.page.cells import (
    Cell,
    Column,
    Row,
    Table,
    chance,
    interval,
    kept,
    most_tokens,
    number,
    plain,
    policy,
    share,
    spread,
    versus,
)
from vtr.eval.report.page.data import Result


def leaderboard(result: Result) -> Table:
    """Policies by accuracy."""
    rows = sorted(result.rows, key=lambda row: -row["accuracy"])
    reach = [row["versus_none"][k] for row in rows if row.get("versus_none") for k in ("low", "high")]
    least, most = min([*reach, -0.01]), max([*reach, 0.01])
    full = most_tokens(rows)
    columns = [
        Column("policy", numeric=False),
        Column("accuracy", down=True, note="95% bootstrap interval"),
        Column("indispensable", down=True, note="accuracy on questions not right without the image; after MMStar"),
        Column("vs. none", down=True, note="difference in points, 95% paired bootstrap interval"),
        Column("McNemar p", note="of the difference to none"),
        Column("mean keep", note="vision tokens entering a layer, mean over layers"),
        Column("GFLOPs"),
        Column("prefill ms", note="median, smallest–largest"),
        Column("KV MiB"),
        Column("selector ms"),
    ]
    out = []
    for row in rows:
        none, against = row["policy"] == "none", row.get("versus_none")
        cells = [
            policy(row["policy"]),
            interval(row["accuracy"], row["low"], row["high"]),
            share(row["indispensable"]),
            Cell("–") if none else versus(against, least, most),
            Cell("–") if none else chance(against and against["p_mcnemar"]),
            kept(row, full),
            plain(row["gflops"]),
            spread(row["prefill_ms"]),
            plain(row["kv_mib"]),
            plain(row["selector_ms"]),
        ]
        out.append(Row(cells, row["name"], none))
    data = result.data["data"]
    bad = f", {data['bad']} more could not be read" if data["bad"] else ""
    part = f", of which these are the {result.shown:,} that need the image" if data.get("only_indispensable") else ""
    caption = f"{data['samples']:,} questions of {data['name']}{part}{bad}; {result.model}; {result.machine}."
    return Table("leaderboard", "Leaderboard", columns, out, caption, sort=1)


def by_kind(result: Result) -> Table:
    """Accuracy by kind of question."""
    kinds = kinds_of(result)
    columns = [Column("policy", numeric=False), *(Column(kind, down=True) for kind in kinds), Column("all", down=True)]
    out = []
    for row in sorted(result.rows, key=lambda row: -row["accuracy"]):
        cells = [share(row["by_kind"].get(kind)) for kind in kinds]
        out.append(Row([policy(row["policy"]), *cells, share(row["accuracy"])], row["name"], row["policy"] == "none"))
    return Table("kinds", "Accuracy by kind of question", columns, out, sort=len(columns) - 1)


def short(result: Result) -> Table:
    """What one asks first: policy, accuracy, tokens, FLOPs, and time, or without times the difference to no reduction.

    No reduction comes first, then the others by accuracy.
    """
    none = next(row for row in result.rows if row["policy"] == "none")
    timed = none["prefill_ms"] is not None
    columns = [
        Column("policy", numeric=False),
        Column("accuracy", down=True, note="95% bootstrap interval"),
        Column("tokens", note="vision tokens entering a layer, mean over layers"),
        Column("GFLOPs", note="prefill and decoding of the decoder"),
        Column("prefill", note="median") if timed else Column("vs. none", down=True, note="points, 95% interval"),
    ]
    out = []
    for row in sorted(result.rows, key=lambda row: (row is not none, -row["accuracy"])):
        tokens, ms = sum(row["vision_tokens"]) / len(row["vision_tokens"]), row["prefill_ms"]
        cells = [
            policy(_brief(row["policy"])),
            interval(row["accuracy"], row["low"], row["high"]),
            Cell(f"{tokens:.0f}", tokens, f"({100 * row['mean_keep']:.0f}%)"),
            Cell(number(row["gflops"]), row["gflops"], f"({100 * row['gflops'] / none['gflops']:.0f}%)"),
            _faster(ms["median"], none["prefill_ms"]["median"]) if timed else _lost(row),
        ]
        out.append(Row(cells, row["name"], row is none))
    caption = f"{result.data['data']['samples']:,} questions of {result.data['data']['name']}; {result.machine}."
    return Table("short", "In short", columns, out, caption, sort=1)


def _brief(spec: str, width: int = 38) -> str:
    """A spec that fits a narrow table: long lists are cut."""
    return spec if len(spec) <= width else spec[: width - 1].rpartition(",")[0] + ",…"


def _lost(row: dict[str, Any]) -> Cell:
    return Cell("–") if row["policy"] == "none" else versus(row["versus_none"], -1, 1)


def _faster(ms: float, none: float) -> Cell:
    return Cell(f"{number(ms)} ms", ms, "" if ms == none else f"({none / ms:.1f}×)")


def kinds_of(result: Result) -> list[str]:
    """Kinds of question, in the data's order."""
    named = result.data["data"].get("kinds") or []
    return list(dict.fromkeys([*named, *(kind for row in result.rows for kind in row["by_kind"])]))
