"""Tables of ``vtr bench serve``: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Requests/s without reduction and what each policy makes of it, a line for each load, results side by side."""
    several = [list(result["contenders"])[1:] for result in results]
    heads = [
        f"{result['model']}: req/s | {' | '.join(f'{name} ÷ none' for name in names)}"
        for result, names in zip(results, several, strict=True)
    ]
    lines = [
        f"| at a time × tokens | {' | '.join(heads)} |",
        "|---|" + "--:|" * sum(len(names) + 1 for names in several),
    ]
    loads = dict.fromkeys((row["concurrency"], row["tokens"]) for row in results[0]["rows"])
    for load in loads:
        cells = []
        for result in results:
            for row in result["rows"]:
                if (row["concurrency"], row["tokens"]) == load:
                    cells.append(f"{row['per_second']:.1f}" if row["contender"] == "none" else spread(row["gain"]))
        lines.append(f"| {load[0]} × {load[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> list[list[str]]:
    """A line for each load and contender: rates and waits."""
    return [
        [
            _load(row), row["contender"], f"{row['per_second']:.2f}", spread(row["gain"]),
            f"{row['ttft_ms']['median']:.0f}", f"{row['ttft_ms']['p90']:.0f}", f"{row['tpot_ms']['median']:.1f}",
            f"{row['prompt_tokens']:.0f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip


def taken(result: dict[str, Any]) -> list[list[str]]:
    """A line for each load and contender: cache blocks, requests running, time of the processor."""
    return [
        [
            _load(row), row["contender"], number(row["kv_blocks"]), number(row.get("blocks_each")),
            number(row.get("running")), number(row.get("preemptions")), number(row.get("cpu_ms")),
            spread(row["cpu_gain"]) if "cpu_gain" in row else "—",
        ]
        for row in result["rows"]
    ]  # fmt: skip


def _load(row: dict[str, Any]) -> str:
    return f"{row['concurrency']} × {row['tokens']}"


def spread(found: dict[str, float]) -> str:
    """A median with the smallest and the largest."""
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def number(value: float | None) -> str:
    """A count, or a dash where nobody knows."""
    return "—" if value is None else f"{value:.0f}"
