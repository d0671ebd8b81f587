"""The comparison as tables of text: one a column of the paper, for the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

HEADS = ("method", "ours", "95 %", "paper", "− paper", "level", "% ours", "% paper", "share")
"""The last three: percent of the unreduced row, ours and the paper's, and the word for these."""
EXPLAINED = "level: ours and the paper's number; share: the same in percent of the unreduced row (% ours, % paper)"


def number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "–"
    digits = 1 if abs(value) < 1000 else 0
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def lines(body: dict[str, Any], column: str) -> list[list[str]]:
    """The rows of one column's table, by HEADS."""
    out = []
    for row in body["rows"]:
        one = row["columns"][column]
        if one["ours"] is None and one["paper"] is None:
            continue
        part = one["share"] or {}
        inside = "–" if one.get("low") is None else f"{number(one['low'])}–{number(one['high'])}"
        mark = "" if row["certain"] else " (?)"
        out.append([
            row["label"] + mark, number(one["ours"]), inside, number(one["paper"]),
            number(one.get("difference"), sign=True), one["verdict"], number(part.get("ours")),
            number(part.get("paper")), part.get("verdict", "–"),
        ])  # fmt: skip
    return out


def caption(body: dict[str, Any], said: dict[str, dict[str, int]]) -> list[str]:
    """What stands below the tables."""
    out = [f"table {body['table']}: {body['source']}; read {body['read']}"]
    if body["limit"]:
        out.append(f"a trial: {body['limit']} questions of each task, the paper has all of them")
    out.append(EXPLAINED)
    for kind in ("levels", "shares"):
        if said[kind]:
            out.append(f"{kind}: " + ", ".join(f"{n} {word}" for word, n in sorted(said[kind].items())))
    out += [f"{column}: {one['note']}" for column, one in body["columns"].items() if one["note"]]
    out += [f"{row['label']}: {row['note']}" for row in body["rows"] if row["note"]]
    out += body["notes"]
    if not all(row["certain"] for row in body["rows"]):
        out.append("(?): the paper's numbers were not read off the paper or a copy of it")
    return out


def markdown(body: dict[str, Any], said: dict[str, dict[str, int]]) -> str:
    """All tables and the caption."""
    out = []
    for column, one in body["columns"].items():
        out += [f"## {column}", "", f"{one['title']} ({one['task']})", "", "| " + " | ".join(HEADS) + " |"]
        out += ["|---" * len(HEADS) + "|", *("| " + " | ".join(line) + " |" for line in lines(body, column)), ""]
    return "\n".join([*out, *(f"* {line}" for line in caption(body, said)), ""])
