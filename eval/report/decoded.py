"""The result of ``vtr bench decode`` as lines, as rows of tables, and against its goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WORDS = {
    "hf": "HF dynamic",
    "hf_static_compiled": "HF static, compiled",
    "vtr": "vtr",
    "vtr_static": "vtr static",
    "vtr_static_compiled": "vtr static, compiled",
}
"""Way of decoding → how it is called. The others are put over the first."""
QUARTER, GOAL = ("fastv", 8), 0.55
"""Policy and rows of the case whose compiled token may cost so much of HF's with a dynamic cache."""
MIB = 2**20


def ratio(one: Mapping[str, float] | None) -> str:
    """With its spread."""
    return "–" if one is None else f"{one['value']:.2f} ({one['low']:.2f}–{one['high']:.2f})"


def case(row: Mapping[str, Any]) -> str:
    """A row of the result, in words."""
    return f"{row['policy']}, {row['batch']} row{'s' * (row['batch'] > 1)}, {row['tokens']} tokens"


def mib(way: Mapping[str, Any]) -> str:
    """Keys and values: live / allocated."""
    return f"{way['kv_live'] / MIB:.3g} / {way['kv_allocated'] / MIB:.3g}"


def same(way: Mapping[str, Any]) -> str:
    """Whether it says what vtr says with a growing cache."""
    return {None: "–", True: "same", False: "other"}[way["same_tokens"]]


def compiling(way: Mapping[str, Any]) -> str:
    """Seconds, and how many graphs if that is not one."""
    if way["compile_s"] is None:
        return "–"
    again = f", {way['graphs_while_timed']} of them while timed" if way["graphs_while_timed"] else ""
    return f"{way['compile_s']:.0f}" + (f" ({way['graphs']} graphs{again})" if way["graphs"] != 1 else "")


def lines(row: Mapping[str, Any]) -> list[str]:
    """A row of the result to be printed as it comes: the case, then a line a way."""
    out = [case(row)]
    for name, way in row["ways"].items():
        if way["refused"] is not None:
            out.append(f"  {WORDS[name]:21}refused: {way['refused']}")
            continue
        found = f"{ratio(way['ratio']):18} {way['ms']['median']:7.2f} ms  {same(way):5}  KV {mib(way)} MiB"
        out.append(
            f"  {WORDS[name]:21}{found}" + ("" if way["compile_s"] is None else f"  compiled in {compiling(way)} s")
        )
    return out


def details(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(Headings, a row for every case and way): all that was measured."""
    heads = ["policy", "rows", "tokens", "way", "÷ HF dynamic", "÷ HF static, compiled", "ms", "says", "KV MiB, live / "
             "allocated", "compile s"]  # fmt: skip
    out = []
    for row in result["rows"]:
        for name, way in row["ways"].items():
            at = [row["policy"], str(row["batch"]), str(row["tokens"]), WORDS[name]]
            if way["refused"] is not None:
                out.append([*at, "refused", *["–"] * 5])
                continue
            ratios = [ratio(way[key]) for key in ("ratio", "over_hf_static")]
            out.append([*at, *ratios, f"{way['ms']['median']:.2f}", same(way), mib(way), compiling(way)])
    return heads, out


def rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(Headings, a row for every case): milliseconds of the first way, then the ratios of the others."""
    heads = ["policy", "rows", "tokens", "HF dynamic, ms", *list(WORDS.values())[1:]]
    out = []
    for row in result["rows"]:
        base, *others = (row["ways"][name] for name in WORDS)
        cells = ["refused" if way["refused"] is not None else ratio(way["ratio"]) for way in others]
        out.append([row["policy"], str(row["batch"]), str(row["tokens"]), f"{base['ms']['median']:.1f}", *cells])
    return heads, out


def refusals(result: Mapping[str, Any]) -> list[str]:
    """What could not run, and why: a line for each way and error."""
    said: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, way in row["ways"].items():
            if way["refused"] is not None:
                said.setdefault(f"{WORDS[name]}: {way['refused']}", []).append(case(row))
    return [f"{what} [{'; '.join(cases)}]" if len(cases) < 4 else f"{what} [{len(cases)} cases]"
            for what, cases in said.items()]  # fmt: skip


def goals(result: Mapping[str, Any]) -> list[str]:
    """What vtr static, compiled, is to reach and has or has not reached; nothing where it was not measured."""
    measured = [row for row in result["rows"] if row["ways"]["vtr_static_compiled"]["refused"] is None]
    out = []
    for row in measured:
        if (row["policy"], row["batch"]) == QUARTER:
            value = row["ways"]["vtr_static_compiled"]["ratio"]["value"]
            out.append(f"{case(row)}: {value:.2f} of HF dynamic, the goal is {GOAL}: {_reached(value <= GOAL)}")
    beside = [row["ways"]["vtr_static_compiled"]["over_hf_static"] for row in measured]
    beside = [one["value"] for one in beside if one is not None]
    if beside:
        below = sum(value < 1 for value in beside)
        out.append(f"below HF static, compiled, in {below} of {len(beside)} cases: {_reached(below == len(beside))}")
    wrong = [f"{WORDS[name]}: {case(row)}" for row in result["rows"] for name in WORDS
             if name.startswith("vtr") and row["ways"][name].get("same_tokens") is False]  # fmt: skip
    return out + [f"says other tokens than vtr with a dynamic cache: {one}" for one in wrong]


def _reached(yes: bool) -> str:
    return "reached" if yes else "not reached"


def footer(result: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    model = result["model"]
    text, one = model["text"], " of one thread" if result["clock"] == "CPU time" else ""
    return (
        f"A decoded token's {result['clock']}{one} over that with transformers' dynamic cache, in turns: ratio of sums "
        f"(smallest–largest of eighths). {text['num_hidden_layers']} layers × {text['hidden_size']}, "
        f"{model['vision_tokens']} vision + {model['text_tokens']} text tokens a row, {result['dtype']}, random "
        "weights."
    )


def short(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows that say it in short: of the largest batch and the fewest tokens."""
    largest = max(row["batch"] for row in result["rows"])
    fewest = min(row["tokens"] for row in result["rows"])
    return [row for row in result["rows"] if (row["batch"], row["tokens"]) == (largest, fewest)]
