"""Result files as one self-contained HTML page, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup
from vtr.eval.report.page import cells, groups, leaderboards, plots, tables, words
from vtr.eval.report.page import markdown as md
from vtr.eval.report.page.data import Result, files, per_file, read, unreduced
from vtr.eval.report.page.details import Details
from vtr.eval.report.page.first import by_model, screen, timed, weight

COSTS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "prefill, ms": lambda row: row["prefill_ms"] and row["prefill_ms"]["median"],
    "prefill and decode, GFLOPs": lambda row: row["gflops"],
    "keys and values, MiB": lambda row: row["kv_mib"],
}
TITLES = {
    "eval": "Leaderboard",
    "policies": "Cost of every policy",
    "batch": "Mixed requests in one batch",
    "scale": "How cost grows",
    "serve": "Behind a server",
    "engine": "The engine against its limit",
    "launches": "What a GPU is asked for",
    "decode": "A decoded token, five ways",
    "peers": "Against other implementations",
}
"""Kinds of result in the page's order → the heading of their part."""
RADARS = 12
"""At most so many radars; with more policies, one a name."""
FIELDS = (
    "policy", "name", "accuracy", "low", "high", "indispensable", "gain", "gray_gain", "leakage", "mean_keep",
    "gflops", "kv_mib", "selector_ms",
)  # fmt: skip


def write(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    pictures: int = 0,
    policies: Sequence[str] = (),
    markdown: bool = False,
    csv: bool = False,
) -> list[Path]:
    """Write ``out``/index.html from result files, and table.md and table.csv of the leaderboard; returns their paths.

    Raises:
        FileNotFoundError: no such result file.
        ValueError: not a result file, a kind the page does not show, no rows; a leaderboard without an eval.
    """
    found = [read(path) for path in files(paths)]
    evals = [result for result in found if result.kind == "eval"]
    if (markdown or csv) and not evals:
        raise ValueError("there is no leaderboard without a result of kind eval: name one, or leave out the tables")
    made = {"index.html": html(found, title, pictures, policies)}
    if markdown:
        made["table.md"] = "\n".join(per_file(lambda result: md.table(leaderboards.leaderboard(result)), evals))
    if csv:
        made["table.csv"] = leaderboard_csv(evals)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in made]


def html(found: Sequence[Result], title: str | None = None, pictures: int = 0, policies: Sequence[str] = ()) -> str:
    """The page; ``policies`` are those of the gallery (by default, of the results)."""
    import jinja2

    def text(name: str) -> str:
        return resources.files("vtr.eval.report.page").joinpath(name).read_text(encoding="utf-8")

    evals = [result for result in found if result.kind == "eval"]
    per_file(lambda result: (names(result), weight(result)), evals)  # says which file cannot be ordered
    models = by_model(evals)
    placed = zip(per_file(place, found), found, strict=True)
    others = [result for _, result in sorted(placed, key=lambda pair: pair[0]) if result.kind != "eval"]
    evals = [result for of_model in models.values() for result in of_model]
    found = [*evals, *others]
    look = plots.styles([name for named in per_file(names, found) for name in named])
    details = Details()
    sections = per_file(lambda result: section(result, look, details), found)
    for i, one in enumerate(sections):
        one["number"], one["first"] = i + 1, not i or sections[i - 1]["kind"] != one["kind"]
        one["name"] = words.name(one["result"], evals)
    gallery = []
    if pictures:
        from vtr.eval.report.page.gallery import show

        gallery = show(pictures, policies, [row for result in evals for row in result.rows])
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["spec"] = words.breakable
    template = environment.from_string(text("index.html.j2"))
    try:
        return template.render(
            title=title or words.headline(found),
            css=Markup(text("style.css")),
            script=Markup(text("page.js")),
            first=screen(evals),
            sections=sections,
            models=[(model, [one for one in sections if one["model"] == model]) for model in models],
            titles=TITLES,
            keys={name: plots.key(style) for name, style in look.items()},
            pictures=details.pictures,
            gallery=gallery,
            limits=words.limits(found),
            found=found,
        )
    except (LookupError, TypeError, AttributeError, ArithmeticError, jinja2.TemplateError) as error:
        which = ", ".join(str(result.path) for result in found)
        raise ValueError(f"something in {which} cannot be shown ({error}): measure it again") from error


def place(result: Result) -> int:
    """Where a result stands on the page: by its kind."""
    return list(TITLES).index(result.kind)


def names(result: Result) -> list[str]:
    """The policies of a result, for their colours."""
    if result.kind in ("eval", "policies"):
        return [row["name"] for row in result.rows]
    return [plots.name_of(one["policy"]) for one in result.rows] if result.kind == "scale" else []


def section(result: Result, look: dict[str, plots.Style], details: Details) -> dict[str, Any]:
    """What the template shows of one result file."""
    made: dict[str, Any] = {"kind": result.kind, "tables": tables.tables_of(result), "result": result, "plots": []}
    made["legend"], made["model"] = list(dict.fromkeys(names(result))), None
    if result.kind == "eval":
        made["model"], made["details"] = result.model, details.of(result)
        made["groups"], made["timed"] = groups.of(result), timed(result)
        made["facts"], made["finding"] = words.facts(result), words.finding(result)
        made["plots"] = paretos(result, look)
        made["middle"], made["radars"] = radars(result, look)
    if result.kind == "scale":
        axes = dict.fromkeys(one["axis"] for one in result.rows)
        made["plots"] = [plots.growth([s for s in result.rows if s["axis"] == a], a, look) for a in axes]
    return made


def paretos(result: Result, look: dict[str, plots.Style]) -> list[Markup]:
    """One plot for every cost that at least two policies have."""
    rows, out = result.rows, []
    several = {row["name"] for row in rows if sum(other["name"] == row["name"] for other in rows) > 1}
    for axis, cost in COSTS.items():
        points = []
        for row in rows:
            if (at := cost(row)) is None:
                continue
            label = f"{row['name']} {100 * row['mean_keep']:.0f}%" if row["name"] in several else row["name"]
            title = f"{row['policy']}: {100 * row['accuracy']:.1f}%, {axis} {cells.number(at)}"
            points.append(plots.Point(row["name"], label, at, row["accuracy"], row["low"], row["high"], title))
        if len(points) > 1:
            out.append(plots.pareto(points, axis, look))
    return out


def radars(result: Result, look: dict[str, plots.Style]) -> tuple[str, list[tuple[str, str, Markup]]]:
    """What a radar's middle stands for, and one for every policy or for each name's with the fewest tokens.

    There are none with fewer than 3 kinds.
    """
    kinds = leaderboards.kinds_of(result)
    none = unreduced(result)
    if len(kinds) < 3 or none is None:
        return "", []
    rows = [row for row in result.rows if row is not none]
    if len(rows) > RADARS:
        fewest = {row["name"]: row for row in sorted(rows, key=lambda row: -row["mean_keep"])}
        rows = [row for row in rows if fewest[row["name"]] is row]
    full = [none["by_kind"].get(kind) for kind in kinds]
    lowest = min([1.0, *(share for row in [none, *rows] for share in row["by_kind"].values())])
    middle = max(math.floor(lowest * 10 - 1), 0) / 10
    drawn = []
    for row in rows:
        values = [row["by_kind"].get(kind) for kind in kinds]
        drawn.append((row["policy"], row["name"], plots.radar(kinds, values, full, middle, look[row["name"]].css)))
    return f"{100 * middle:.0f}", drawn


def leaderboard_csv(evals: Sequence[Result]) -> str:
    """Every number of the leaderboards, unrounded."""
    kinds = list(dict.fromkeys(kind for result in evals for kind in leaderboards.kinds_of(result)))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    versus = ("difference", "low", "high", "p_mcnemar", "wins", "losses")
    spread = ("median", "low", "high")
    heads = [f"prefill_ms_{k}" for k in spread] + [f"versus_none_{k}" for k in versus]
    table.writerow(["model", "data", "samples", *FIELDS, *heads, *kinds])

    def lines(result: Result) -> list[list[Any]]:
        data = result.data["data"]
        made = []
        for row in sorted(result.rows, key=lambda row: -row["accuracy"]):
            cells = [result.model, data["name"], data["samples"], *(row.get(field) for field in FIELDS)]
            cells += [(row["prefill_ms"] or {}).get(k) for k in spread]
            cells += [(row.get("versus_none") or {}).get(k) for k in versus]
            made.append(cells + [row["by_kind"].get(kind) for kind in kinds])
        return made

    for made in per_file(lines, evals):
        table.writerows(made)
    return out.getvalue()
