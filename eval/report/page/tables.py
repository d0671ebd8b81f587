"""Result files as tables: the same cells become HTML, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from vtr.eval.report import counted, decoded, ratios
from vtr.eval.report.page import plots
from vtr.eval.report.page.data import Result

MIB = 2**20
NOTHING = Markup()


@dataclass(frozen=True)
class Column:
    """A column's heading. ``down``: the largest value is the best one, so sorting starts with it."""

    label: str
    numeric: bool = True
    down: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, a smaller second part, a small drawing (HTML only)."""

    text: str
    value: float | str | None = None
    detail: str = ""
    art: Markup = NOTHING
    code: bool = False


@dataclass(frozen=True)
class Row:
    """``name`` is the policy's (for its colour); a reference row is set apart."""

    cells: list[Cell]
    name: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """``sort``: the column that the rows are ordered by."""

    name: str
    title: str
    columns: list[Column]
    rows: list[Row]
    caption: str = ""
    sort: int | None = None


# -- cells -------------------------------------------------------------------------------------------------------------
def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never as 1e+03."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def plain(value: float | None, scale: float = 1.0) -> Cell:
    return Cell("–") if value is None else Cell(number(value / scale), value / scale)


def count(value: int | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:,}", value)


def share(value: float | None) -> Cell:
    """A ratio as a percentage."""
    return Cell("–") if value is None else Cell(f"{100 * value:.1f}%", value)


def interval(value: float, low: float, high: float) -> Cell:
    return Cell(f"{100 * value:.1f}%", value, f"{100 * low:.1f}–{100 * high:.1f}")


def spread(ms: dict[str, float] | None) -> Cell:
    """A median with its smallest and largest run."""
    if ms is None:
        return Cell("–")
    return Cell(number(ms["median"]), ms["median"], f"{number(ms['low'])}–{number(ms['high'])}")


def kept(row: dict[str, Any], full: float) -> Cell:
    """The mean keep, with the tokens that enter each layer drawn."""
    return Cell(f"{100 * row['mean_keep']:.1f}%", row["mean_keep"], art=plots.spark(row["vision_tokens"], full))


def most_tokens(rows: list[dict[str, Any]]) -> float:
    return max([1.0, *(n for row in rows for n in row["vision_tokens"])])


def policy(spec: str) -> Cell:
    return Cell(spec, spec, code=True)


def chance(p: float | None) -> Cell:
    if p is None:
        return Cell("–")
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}", p)


def points(difference: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def versus(versus: dict[str, Any] | None, least: float, most: float) -> Cell:
    """A paired difference in points, drawn on a scale from ``least`` to ``most``."""
    if versus is None:
        return Cell("–")
    difference, low, high = versus["difference"], versus["low"], versus["high"]
    art = plots.whisker(difference, low, high, least, most, zero=0.0)
    return Cell(points(difference), difference, f"[{points(low)}, {points(high)}]", art)


# -- one table a kind --------------------------------------------------------------------------------------------------
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
    """The five things one asks first: policy, accuracy, tokens, FLOPs, time. No reduction first, then by accuracy."""
    none = next(row for row in result.rows if row["policy"] == "none")
    columns = [
        Column("policy", numeric=False),
        Column("accuracy", down=True, note="95% bootstrap interval"),
        Column("tokens", note="vision tokens entering a layer, mean over layers"),
        Column("GFLOPs", note="prefill and decoding of the decoder"),
        Column("prefill", note="median"),
    ]
    out = []
    for row in sorted(result.rows, key=lambda row: (row is not none, -row["accuracy"])):
        tokens, ms = sum(row["vision_tokens"]) / len(row["vision_tokens"]), row["prefill_ms"]
        cells = [
            policy(_brief(row["policy"])),
            interval(row["accuracy"], row["low"], row["high"]),
            Cell(f"{tokens:.0f}", tokens, f"({100 * row['mean_keep']:.0f}%)"),
            Cell(number(row["gflops"]), row["gflops"], f"({100 * row['gflops'] / none['gflops']:.0f}%)"),
            Cell("–") if ms is None else _faster(ms["median"], none["prefill_ms"]["median"]),
        ]
        out.append(Row(cells, row["name"], row is none))
    caption = f"{result.data['data']['samples']:,} questions of {result.data['data']['name']}; {result.machine}."
    return Table("short", "In short", columns, out, caption, sort=1)


def _brief(spec: str, width: int = 38) -> str:
    """A spec that fits a narrow table: long lists are cut."""
    return spec if len(spec) <= width else spec[: width - 1].rpartition(",")[0] + ",…"


def _faster(ms: float, none: float) -> Cell:
    return Cell(f"{number(ms)} ms", ms, "" if ms == none else f"({none / ms:.1f}×)")


def kinds_of(result: Result) -> list[str]:
    """Kinds of question, in the data's order."""
    named = result.data["data"].get("kinds") or []
    return list(dict.fromkeys([*named, *(kind for row in result.rows for kind in row["by_kind"])]))


def bench_policies(result: Result) -> Table:
    """What every policy costs at every budget."""
    sizes = list(dict.fromkeys(n for row in result.rows for n in row["throughput"]))
    kernels = list(dict.fromkeys(row.get("attention") for row in result.rows))
    columns = [
        Column("policy", numeric=False),
        *([Column("attention", numeric=False)] if len(kernels) > 1 else []),
        Column("mean keep"),
        Column("prefill ms"),
        Column("first token ms"),
        Column("decode ms/token"),
        *(Column(f"requests/s at {n}", down=True, note=f"throughput at batch {n}") for n in sizes),
        Column("selector ms"),
        Column("GFLOPs", note="counted by torch; closed form beneath where it differs"),
        Column("KV MiB"),
        Column("peak MiB"),
    ]
    full, out = most_tokens(result.rows), []
    for row in result.rows:
        counted, closed = row["flops_counted"], row["flops_closed"]
        same = counted and abs(counted - closed) <= 1e-3 * counted
        flops = Cell(number(counted / 1e9), counted, "" if same else f"closed form {number(closed / 1e9)}")
        cells = [
            policy(row["policy"]),
            *([Cell(str(row.get("attention")), str(row.get("attention")))] if len(kernels) > 1 else []),
            kept(row, full),
            *(spread(row[key]) for key in ("prefill_ms", "first_token_ms", "decode_ms")),
            *(plain(row["throughput"].get(n)) for n in sizes),
            plain(row["selector_ms"]),
            flops,
            plain(row["kv_bytes"], MIB),
            plain(row["peak_bytes"], MIB),
        ]
        out.append(Row(cells, row["name"], row["policy"] == "none"))
    return Table("policies", "Cost of every policy", columns, out, f"{result.model}; {result.machine}.")


def batch(result: Result) -> Table:
    """Requests of different policies in one batch."""
    columns = [
        Column("batch", numeric=False),
        Column("prefill ms"),
        Column("÷ rows alone", note="one batch ÷ the sum of its rows run alone; less is better"),
        Column("÷ padded", note="÷ the unpatched padded batch; less is better"),
        Column("policies", numeric=False),
    ]
    out = []
    for row in result.rows:
        listed = dict.fromkeys(row["policies"])
        policies = ", ".join(f"{row['policies'].count(spec)} × {spec}" for spec in listed)
        ratios = [Cell(f"{row[key]:.2f}", row[key]) for key in ("over_rows", "over_padded")]
        out.append(Row([Cell(row["name"], row["name"]), spread(row["ms"]), *ratios, Cell(policies, policies)]))
    return Table("batch", "Mixed requests in one batch", columns, out, f"{result.model}; {result.machine}.")


def scale(result: Result) -> Table:
    """How cost grows, as numbers."""
    columns = [
        Column("axis", numeric=False),
        Column("policy", numeric=False),
        Column("slope", note="of log time over log x: 1 is proportional, 2 is quadratic"),
        Column("from – to", numeric=False),
        Column("ms", numeric=False),
    ]
    out = []
    for row in result.rows:
        axis = plots.AXES.get(row["axis"], row["axis"])
        ends = [f"{row['x'][0]:,} – {row['x'][-1]:,}", " – ".join(number(row["ms"][i]["median"]) for i in (0, -1))]
        slope = Cell("–") if row["slope"] is None else Cell(f"{row['slope']:.2f}", row["slope"])
        out.append(Row([Cell(axis, axis), policy(row["policy"]), slope, *(Cell(e, e) for e in ends)], ""))
    return Table("scale", "How cost grows", columns, out, f"{result.model}; {result.machine}.")


def serve(result: Result) -> Table:
    """A server under load, policies in turns."""
    columns = [
        Column("at a time"),
        Column("answer", note="tokens of each answer"),
        Column("policy", numeric=False),
        Column("requests/s", down=True),
        Column("÷ none", down=True, note="requests/s over those without reduction in the same round; smallest–largest"),
        Column("first token ms", note="median; 90th percentile"),
        Column("ms/token", note="each further token: median; 90th percentile"),
        Column("prompt tokens", note="mean"),
        Column("cache blocks", note="most in use at a time"),
    ]
    gains = [row["gain"][k] for row in result.rows for k in ("low", "high")]
    least, most = min([0.9, *gains]), max([1.1, *gains])
    out = []
    for row in result.rows:
        gain = row["gain"]
        art = plots.whisker(gain["median"], gain["low"], gain["high"], least, most, zero=1.0)
        waits = [
            Cell(number(row[k]["median"]), row[k]["median"], number(row[k]["p90"])) for k in ("ttft_ms", "tpot_ms")
        ]
        cells = [
            count(row["concurrency"]),
            count(row["tokens"]),
            policy(row["contender"]),
            plain(row["per_second"]),
            Cell(f"{gain['median']:.2f}", gain["median"], f"{gain['low']:.2f}–{gain['high']:.2f}", art),
            *waits,
            plain(row["prompt_tokens"]),
            count(row["kv_blocks"]),
        ]
        out.append(Row(cells, "", row["contender"] == "none"))
    named = "; ".join(f"{name}: {', '.join(specs)}" for name, specs in result.data["contenders"].items())
    server = result.data["server"]
    about = f"vLLM {server['vllm']}, {server['blocks']} blocks of {server['block_size']} tokens"
    return Table("serve", "Behind a server", columns, out, f"{named}. {result.model}; {about}; {result.machine}.")


def engine(result: Result) -> Table:
    """How near the engine comes to its limit."""
    columns = [
        Column("ratio", numeric=False),
        Column("median"),
        Column("min–max", numeric=False),
        Column("what ÷ what", numeric=False),
    ]
    found = ratios.rows(result.data)
    least = min([0.9, *(result.data[f"{key}_min"] for key, *_ in found)])
    most = max([1.1, *(result.data[f"{key}_max"] for key, *_ in found)])
    out = []
    for key, median, between, what in found:
        value, low, high = (result.data[k] for k in (key, f"{key}_min", f"{key}_max"))
        art = plots.whisker(value, low, high, least, most, zero=1.0)
        out.append(Row([policy(key), Cell(median, value, art=art), Cell(between, between), Cell(what, what)]))
    caption = ". ".join(line.rstrip(".") for line in ratios.footer(result.data)) + "."
    return Table("engine", "The engine against its limit", columns, out, caption)


def peers(result: Result) -> Table:
    """Other implementations in the same run."""
    columns = [
        Column("peer", numeric=False),
        Column("method", numeric=False),
        Column("ours", numeric=False),
        Column("accuracy", down=True),
        Column("ours, accuracy", down=True),
        Column("prefill ms"),
        Column("ours, prefill ms"),
        Column("peer ÷ ours", down=True, note="prefill: above 1, ours is faster"),
        Column("error", numeric=False),
    ]
    out = []
    for row in result.rows:
        theirs, mine = row["prefill_ms"], row["ours_prefill_ms"]
        ratio = theirs["median"] / mine["median"] if theirs and mine else None
        cells = [
            Cell(row["peer"], row["peer"]),
            Cell(row["method"], row["method"], f"batch {row['batch']}" if row.get("batch", 1) > 1 else ""),
            policy(row["ours"]),
            share(row["accuracy"]),
            share(row["ours_accuracy"]),
            spread(theirs),
            spread(mine),
            Cell("–") if ratio is None else Cell(f"{ratio:.2f}×", ratio),
            Cell(row["error"] or "", row["error"] or ""),
        ]
        out.append(Row(cells))
    return Table("peers", "Against other implementations", columns, out, f"{result.machine}.")


def launches(result: Result) -> Table:
    """What each policy asks of a GPU, a row a case."""
    what = [f"{part}, {name}" for part in ("prefill", "token") for name in ("launches", "waits", "copies")]
    columns = [Column("policy", numeric=False), Column("rows", numeric=False), *map(Column, what)]
    named, out = counted.columns(result.data), []
    for row in result.rows:
        counts = [count(row[part][name]) for part in ("prefill", "token") for name in ("launches", "waits", "copies")]
        at = named[row["batch"], row["ragged"]]
        out.append(Row([policy(row["policy"]), Cell(at, at), *counts], "", row["policy"] == "unpatched"))
    return Table("launches", "What a GPU is asked for", columns, out, counted.footer(result.data))


def counts_of(part: str) -> Callable[[Result], Table]:
    """One part of a result of kind "launches", a column a batch."""

    def make(result: Result) -> Table:
        heads = [Column(counted.PARTS[part][0], numeric=False), *map(Column, counted.columns(result.data).values())]
        rows = [Row([policy(name), *(Cell(c, c) for c in cells)]) for name, *cells in counted.rows(result.data, part)]
        return Table(part, counted.PARTS[part][0], heads, rows, counted.footer(result.data))

    return make


def decode(result: Result) -> Table:
    """A decoded token, a row a case: every way over transformers' dynamic cache."""
    heads, found = decoded.rows(result.data)
    rows = [Row([policy(name), *map(_beside, cells)]) for name, *cells in found]
    return _decode("decode", heads, rows, f"{decoded.footer(result.data)} {result.data['hardware']['name']}.")


def decode_short(result: Result) -> Table:
    """The same of the largest batch and the fewest tokens, without spreads."""
    heads, found = decoded.rows({"rows": decoded.short(result.data)})
    rows = [Row([policy(name), *(_beside(one.split(" (")[0]) for one in ratios)]) for name, _, _, _, *ratios in found]
    few = decoded.short(result.data)[0]
    caption = f"{few['batch']} rows, {few['tokens']} tokens. {decoded.footer(result.data)}"
    return _decode("short", [heads[0], *heads[4:]], rows, caption)


def decode_ways(result: Result) -> Table:
    """All that was measured, a row a case and way."""
    heads, found = decoded.details(result.data)
    rows = [Row([policy(name), *map(_beside, cells)]) for name, *cells in found]
    return _decode("ways", heads, rows, " ".join(decoded.refusals(result.data)))


def _decode(name: str, heads: list[str], rows: list[Row], caption: str) -> Table:
    columns = [Column(heads[0], numeric=False), *map(Column, heads[1:])]
    return Table(name, "A decoded token, five ways", columns, rows, caption)


def _beside(text: str) -> Cell:
    """A number is sorted as one; a spread in brackets is the smaller part."""
    first, _, spread = text.partition(" (")
    try:
        return Cell(first, float(first), spread.removesuffix(")"))
    except ValueError:
        return Cell(text, text)


MAKERS = {
    "eval": (leaderboard, by_kind),
    "policies": (bench_policies,),
    "batch": (batch,),
    "scale": (scale,),
    "serve": (serve,),
    "engine": (engine,),
    "launches": (launches,),
    "decode": (decode,),
    "peers": (peers,),
}

MORE = {
    "eval": (short,),
    "launches": tuple(map(counts_of, counted.PARTS)),
    "decode": (decode_short, decode_ways),
}
"""Tables that Markdown files can have, and the page has not."""


def tables_of(result: Result) -> list[Table]:
    """The page's tables of a result file, the main one first."""
    return [make(result) for make in MAKERS[result.kind]]


def all_of(result: Result) -> list[Table]:
    """All tables of a result file, the main one first."""
    return tables_of(result) + [make(result) for make in MORE.get(result.kind, ())]
