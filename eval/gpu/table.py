"""A run in plain text: what the file holds, short enough to read in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtr.eval.gpu.models import CELLS, SHAPES
from vtr.eval.report import results

ROWS_OF = {"1": "1 row", "8": "8 equal rows", "mixed": "8 rows of different lengths"}
COLUMNS = (
    "policy", "prefill ms", "÷ none", "÷ bound", "select ms", "launches", "peak +GB", "token ms", "÷ none", "÷ bound",
    "launches", "waits",
)  # fmt: skip

Found = Mapping[str, Any]


def load(path: Path) -> dict[str, Any]:
    """A file that a run has written.

    Raises:
        OSError: it cannot be read. ValueError: it is another kind of file.
    """
    data = results.load(path)
    if data["kind"] != "gpu" or not isinstance(data.get("parts"), dict):
        raise ValueError(f"{path} is of kind {data['kind']!r}: name a file that python -m vtr.eval.gpu has written")
    return data


def lines(data: Found) -> Iterator[str]:
    """All of it. data: what :func:`load` returns."""
    versions = data["versions"]
    yield (
        f"{data['hardware']['name']}; torch {versions['torch']}, transformers {versions['transformers']}, vtr "
        f"{versions['vision-token-reduction']}{'; tiny sizes: no figure here says anything' * data['small']}"
    )
    found = {name: part["found"] for name, part in data["parts"].items()}
    yield from machine(found.get("machine", {}))
    yield from kernels(found.get("kernels", {}))
    yield from oracles(found.get("oracles", {}))
    for shape in SHAPES:
        for cell in CELLS:
            yield from times(shape, cell, found)
    yield from states(data)


def machine(found: Found) -> Iterator[str]:
    if "bandwidth" in found:
        yield (
            f"measured ceilings: {found['gemm_flops'] / 1e12:.3g} TFLOP/s ({found['dtype']}), "
            f"{found['bandwidth'] / 1e9:.4g} GB/s; packed kernel: {found['packed_kernel'] or 'none'}"
        )


def kernels(found: Found) -> Iterator[str]:
    if found:
        one = sum(not case["calls"] for case in found.values())
        worst = max(case["error"] or 0.0 for case in found.values())
        yield f"packed attention: {len(found)} layouts, {one} by one kernel, the others row by row; off by {worst:.1e}"


def oracles(found: Found) -> Iterator[str]:
    for family, cases in found.items():
        ran = [case for case in cases.values() if "unsupported" not in case]
        held = sum(not case["faults"] for case in ran)
        waits = [case[key] for case in ran for key in case if key.startswith("waits")]
        inside, decoding = (sum(sum(one[key].values()) for one in waits) for key in ("inside", "decoding"))
        said = f"{inside} waits between layers, {decoding} in decoded tokens" if waits else "waits: only a GPU tells"
        yield f"oracles, {family}: {held} of {len(ran)} batches agree; {said}"


def times(shape: str, cell: str, found: Mapping[str, Found]) -> Iterator[str]:
    """One table: prefill, decoded token and launches of a shape and a batch."""
    parts = [found.get(f"{kind} {shape} {cell}", {}) for kind in ("prefill", "decode", "launches")]
    prefill, decode, launches = (part.get("rows", {}) for part in parts)
    labels = list(dict.fromkeys([*prefill, *decode, *launches]))
    if labels:
        about = next(part for part in parts if part)
        yield ""
        yield f"{shape}, {ROWS_OF[cell]} of {about['vision_tokens']} vision tokens, {about['layers']} layers"
        body = [row(label, prefill.get(label, {}), decode.get(label, {}), launches.get(label, {})) for label in labels]
        yield from aligned([COLUMNS, *body])


def row(label: str, prefill: Found, decode: Found, launches: Found) -> list[str]:
    whole, token = launches.get("prefill", {}), launches.get("token", {})
    return [
        label, spread(prefill.get("prefill_ms")), ratio(prefill), number(prefill.get("over_bound"), 2),
        number(prefill.get("selector_ms"), 2), number(whole.get("launches"), 0), number(prefill.get("growth_gb"), 2),
        spread(decode.get("decode_ms")), ratio(decode), number(decode.get("over_bound"), 2),
        number(token.get("launches"), 0), number(token.get("waits"), 0),
    ]  # fmt: skip


def spread(ms: Mapping[str, float] | None) -> str:
    return "–" if ms is None else f"{ms['median']:.2f} ({ms['low']:.2f}–{ms['high']:.2f})"


def ratio(part: Found) -> str:
    return number(part.get("over_unpatched", {}).get("value"), 3)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([cells[0].ljust(widths[0]), *padded[1:]])


def states(data: Found) -> Iterator[str]:
    """What failed, does not hold or was left out, each on its line; else that all is done."""
    yield ""
    bad = {name: part for name, part in data["parts"].items() if part["state"] != "done"}
    for name, part in bad.items():
        yield f"{name}: {part['state']}{': ' + part['error'] if 'error' in part else ''}"
    for fault in data["faults"]:
        yield f"does not hold: {fault}"
    peaks = [part["peak_gb"] for part in data["parts"].values() if part.get("peak_gb") is not None]
    peak = f", peak memory {max(peaks):.1f} GB" if peaks else ""
    spent = sum(part["seconds"] for part in data["parts"].values())
    done = len(data["parts"]) - len(bad)
    yield f"{done} of {len(data['parts'])} parts done in {spent:.0f} s, {len(data['faults'])} faults{peak}"
