"""The tables of benches, servers, launches, decoding and peers."""

from __future__ import annotations

from collections.abc import Callable

from vtr.eval.report import counted, decoded, ratios
from vtr.eval.report.page import plots
from vtr.eval.report.page.cells import (
    Cell,
    Column,
    Row,
    Table,
    count,
    kept,
    most_tokens,
    number,
    plain,
    policy,
    share,
    spread,
)
from vtr.eval.report.page.data import Result

MIB = 2**20


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
