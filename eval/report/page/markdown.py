"""Tables as Markdown."""

from __future__ import annotations

from vtr.eval.report.page.cells import Cell, Table


def table(made: Table) -> str:
    """A table with its caption, in GitHub's Markdown."""
    lines = [
        "| " + " | ".join(escape(column.label) for column in made.columns) + " |",
        "|" + "|".join("--:" if column.numeric else "---" for column in made.columns) + "|",
    ]
    lines += ["| " + " | ".join(map(cell, row.cells)) + " |" for row in made.rows]
    return "\n".join(lines) + "\n" + (f"\n{escape(made.caption)}\n" if made.caption else "")


def cell(shown: Cell) -> str:
    """Text, and what is smaller on the page beside it; a policy's spec as code."""
    text = "".join(shown.text.splitlines())
    if shown.code:
        return "`" + text.replace("`", "").replace("|", "\\|") + "`"
    return escape(f"{text} {shown.detail}".strip())


def escape(text: str) -> str:
    """No mark of ``text`` means anything to Markdown or HTML."""
    for mark in "\\`*_|<":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.replace("](", "]\\(").split())
