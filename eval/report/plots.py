"""Plots of result files: policies, batch, scale, decode and serve; each takes the file's data and returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vtr.eval.report import decoded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"vision_tokens": "vision tokens of a row", "batch": "rows of a batch", "answer": "tokens of the answer"}


def figure(columns: int, rows: int = 1, width: float = 4.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many panels."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(made.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
    return made, panels


def _spread(axis: Axes, x: Sequence[float] | np.ndarray, ms: Sequence[Mapping[str, float]], **how: Any) -> None:
    """Medians with bars from the smallest to the largest."""
    median = np.array([point["median"] for point in ms])
    low, high = (np.array([point[name] for point in ms]) for name in ("low", "high"))
    axis.errorbar(x, median, [median - low, high - median], capsize=2, ms=4, **how)


def policies(result: Mapping[str, Any]) -> Figure:
    """Prefill, decoding, throughput and memory against the mean share of tokens kept, a line per policy."""
    made, (prefill, decode, rate, memory) = figure(2, 2)
    rows = [row for row in result["rows"] if row.get("attention", "sdpa") == "sdpa"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    batches = list(rows[0]["throughput"])
    batch = "8" if "8" in batches else batches[-1]
    for number, name in enumerate(names):
        mine = sorted((row for row in rows if row["name"] == name), key=lambda row: row["mean_keep"])
        keep = [row["mean_keep"] for row in mine]
        how = {"color": f"C{number}", "fmt": "*" if name == "none" else "o-", "label": name}
        _spread(prefill, keep, [row["prefill_ms"] for row in mine], **how)
        _spread(decode, keep, [row["decode_ms"] for row in mine], **how)
        line = {"color": how["color"], "ms": 4}
        rate.plot(keep, [row["throughput"][batch] or np.nan for row in mine], how["fmt"], **line)
        grown = [(k, row["peak_bytes"] / 2**20) for k, row in zip(keep, mine, strict=True) if row["peak_bytes"]]
        memory.plot(*zip(*grown, strict=True), how["fmt"], **line) if grown else None
        memory.plot(keep, [row["kv_bytes"] / 2**20 for row in mine], "x", **line)
    prefill.set(title="prefill", ylabel="ms")
    decode.set(title="one decoded token", ylabel="ms")
    rate.set(title=f"throughput at batch {batch}", ylabel="requests per second")
    memory.set(title="memory: peak (●), keys and values (×)", ylabel="MiB")
    for panel in (prefill, decode, rate, memory):
        panel.set_xlabel("mean share of vision tokens kept")
        panel.set_ylim(bottom=0)
    for panel, key in ((prefill, "prefill_ms"), (decode, "decode_ms")):  # bars of a busy machine may run out of it
        panel.set_ylim(top=1.6 * max(row[key]["median"] for row in rows))
    prefill.legend(fontsize=7, ncols=2)
    return made


def batch(result: Mapping[str, Any]) -> Figure:
    """Each mix over its rows alone and over the unpatched padded batch."""
    made, (panel,) = figure(1, width=8)
    rows, at = result["rows"], np.arange(len(result["rows"]))
    for number, (key, what) in enumerate((("over_rows", "its rows alone"), ("over_padded", "unpatched, padded"))):
        value, low, high = (np.array([row[key + end] for row in rows]) for end in ("", "_low", "_high"))
        where = at + (number - 0.5) * 0.38
        panel.bar(where, value, 0.36, yerr=[value - low, high - value], capsize=2, label=f"÷ {what}")
    panel.axhline(1.0, color="k", lw=0.8)
    panel.set_xticks(at, [row["name"] for row in rows], rotation=20, ha="right", fontsize=8)
    panel.set(title="prefill of eight requests in one batch", ylabel="ratio of times, less is better")
    panel.legend(fontsize=8)
    return made


def scale(result: Mapping[str, Any]) -> Figure:
    """Cost against size on log-log axes, with the fitted power of growth."""
    axes = list(dict.fromkeys(line["axis"] for line in result["series"]))
    made, panels = figure(len(axes))
    for panel, axis in zip(panels, axes, strict=True):
        for number, line in enumerate(line for line in result["series"] if line["axis"] == axis):
            x, name = np.array(line["x"]), line["policy"]
            _spread(panel, x, line["ms"], fmt="o", color=f"C{number}", label=f"{name}   ∝ n^{line['slope']:.2f}")
            middle = np.mean(np.log([point["median"] for point in line["ms"]]))
            panel.plot(x, np.exp(middle + line["slope"] * (np.log(x) - np.log(x).mean())), color=f"C{number}", lw=1)
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="ms")
        panel.legend(fontsize=7)
    return made


def decode(result: Mapping[str, Any]) -> Figure:
    """Each way of decoding over HF's dynamic cache, a panel for each batch and number of tokens."""
    at = list(dict.fromkeys((row["batch"], row["tokens"]) for row in result["rows"]))
    made, panels = figure(1, len(at), width=8)
    names = list(decoded.WORDS)[1:]
    for panel, (batch, tokens) in zip(panels, at, strict=True):
        rows = [row for row in result["rows"] if (row["batch"], row["tokens"]) == (batch, tokens)]
        for number, name in enumerate(names):
            found = [(i, row["ways"][name]) for i, row in enumerate(rows) if row["ways"][name]["refused"] is None]
            label = decoded.WORDS[name] + ("" if len(found) == len(rows) else " (refused)" if not found else "*")
            ratios = [way["ratio"] for _, way in found]
            value, low, high = (np.array([one[key] for one in ratios]) for key in ("value", "low", "high"))
            where = np.array([i + (number - (len(names) - 1) / 2) * 0.2 for i, _ in found])
            spread = np.maximum([value - low, high - value], 0)  # a few tokens may be in no eighth
            panel.bar(where, value, 0.19, yerr=spread if found else None, capsize=2, color=f"C{number}", label=label)
        panel.axhline(1.0, color="k", lw=0.8)
        panel.set_xticks(range(len(rows)), [row["policy"] for row in rows], rotation=15, ha="right", fontsize=8)
        words = f"{batch} row{'s' * (batch > 1)}, {tokens} tokens"
        panel.set(title=f"a decoded token ÷ HF dynamic: {words}", ylabel="ratio, less is better")
    panels[0].legend(fontsize=8, ncols=2)
    return made


def serve(result: Mapping[str, Any]) -> Figure:
    """A server under each load: its rate over that without reduction, waiting times and cache blocks, by contender."""
    made, panels = figure(2, 2, width=5.0)
    rows = result["rows"]
    loads = list(dict.fromkeys((row["concurrency"], row["tokens"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    by = {(row["concurrency"], row["tokens"], row["contender"]): row for row in rows}
    at, wide = np.arange(len(loads)), 0.8 / len(names)
    what = ("gain", "ttft_ms", "tpot_ms", "kv_blocks")
    titles = (
        "requests per second ÷ without reduction",
        "first token",
        "each further token",
        "cache blocks in use, most",
    )
    for panel, key, title, unit in zip(panels, what, titles, ("ratio, more is better", "ms", "ms", ""), strict=True):
        for number, name in enumerate(names):
            mine = [by[*load, name] for load in loads]
            where = at + (number - (len(names) - 1) / 2) * wide
            how = {"color": f"C{number}", "label": name}
            if key == "kv_blocks":
                panel.bar(where, [row[key] or 0 for row in mine], wide, **how)
                continue
            value = np.array([row[key]["median"] for row in mine])
            panel.bar(where, value, wide, **how)
            high = np.array([row[key]["high" if key == "gain" else "p90"] for row in mine])
            low = np.array([row[key]["low"] for row in mine]) if key == "gain" else value
            panel.errorbar(where, value, [value - low, high - value], fmt="none", color="k", capsize=2, lw=0.8)
        panel.set_xticks(at, [f"{n} at a time\n{tokens} tokens" for n, tokens in loads], fontsize=8)
        panel.set(title=title, ylabel=unit)
    panels[0].axhline(1.0, color="k", lw=0.8)
    panels[0].legend(fontsize=8)
    return made
