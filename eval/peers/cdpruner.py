"""CDPruner of OpenVINO GenAI beside ours.

On a small random Qwen2-VL, since OpenVINO GenAI prunes no picture of a LLaVA. Weights, pictures and questions are the
same on both sides, as both decode the same without pruning. OpenVINO GenAI does not say which tokens it keeps: what
can be compared is how many, what is decoded, and CPU time. That both keep the same is seen by their answers, if ours
ranks by their kernel.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vtr.eval.peers import venvs
from vtr.eval.peers.catalogue import HERE, OPENVINO
from vtr.eval.peers.channel import PeerError, Worker
from vtr.eval.peers.driver import ratio, spread

import vtr

SIDE = 336
"""Pixels: 12 × 12 vision tokens, and neither side's processor resizes the picture."""
PRUNED = ("50", "75", "90")
"""Percentages."""
NONE = "none"
SIDES = ("theirs", "ours")
OURS = HERE / "openvino_ours.py"
STARTS, ANSWERS = 1800.0, 120.0
"""Seconds for making and exporting the model, and for an answer."""


@dataclass
class Row:
    """A percentage of theirs beside a policy of ours; CPU milliseconds of a whole call, a decoded token's beside.

    Ratios are ours ÷ theirs.

    Attributes:
        same_answers: share of questions that both answer alike, as each is shipped.
        same_kernel_same_answers: where ours ranks by their kernel (``openvino_ours.AsTheirs``).
    """

    pruned: str
    ours: str
    tokens: float | None = None
    ours_tokens: float | None = None
    same_answers: float | None = None
    same_kernel_same_answers: float | None = None
    prefill_ms: dict[str, float] | None = None
    ours_prefill_ms: dict[str, float] | None = None
    decode_ms: dict[str, float] | None = None
    ours_decode_ms: dict[str, float] | None = None
    prefill_ratio: dict[str, float] | None = None
    decode_ratio: dict[str, float] | None = None
    error: str | None = None


def questions(folder: Path, n: int, seed: int) -> None:
    """Write ``n`` held-out questions of the pocket tasks with pictures of SIDE × SIDE pixels."""
    entries = []
    for i, sample in enumerate(vtr.pocket.samples(n, split="test", seed=seed, per_scene=1)):
        sample["image"].resize((SIDE, SIDE)).save(folder / f"{i}.png")
        entries.append({"picture": f"{i}.png", "question": sample["question"]})
    (folder / "questions.json").write_text(json.dumps(entries))


def ours_of(pruned: str) -> str:
    """The policy that keeps what is not pruned of SIDE × SIDE pixels, as OpenVINO GenAI ranks."""
    if pruned == NONE:
        return NONE
    kept = round((SIDE // 28) ** 2 * (1 - int(pruned) / 100))
    return f'cdpruner:keep={kept},relevance="embeddings"'


def compare(
    theirs: Worker, ours: Worker, n: int, done: Callable[[], Any], timed: int, rounds: int, steps: int
) -> list[Row]:
    """A row for no pruning and for each of PRUNED; where a side fails, its error and what was measured before.

    Args:
        n: questions. timed: of these, ``rounds`` times each. steps: words decoded. done: called after every call.
    """
    rows = []
    for pruned in (NONE, *PRUNED):
        row = Row(pruned, ours_of(pruned))
        sides = {"theirs": (theirs, row.pruned), "ours": (ours, row.ours)}

        def ask(name: str, index: int, count: int, sides: Any = sides, **more: Any) -> Any:
            worker, method = sides[name]
            try:
                return worker.ask("run", ANSWERS, index=index, method=method, steps=count, **more)
            finally:
                done()

        try:
            _answers(row, ask, n, steps)
            _times(row, ask, min(timed, n), rounds, steps)
        except PeerError as error:
            row.error = str(error)
        rows.append(row)
    return rows


def _answers(row: Row, ask: Callable[..., Any], n: int, steps: int) -> None:
    said = {name: [ask(name, i, steps) for i in range(n)] for name in SIDES}  # warms up, too
    row.tokens, row.ours_tokens = (statistics.fmean(one["tokens"] for one in said[name]) for name in SIDES)
    row.same_answers = statistics.fmean(a["ids"] == b["ids"] for a, b in zip(said["theirs"], said["ours"], strict=True))
    alike = [ask("ours", i, steps, as_theirs=True)["ids"] for i in range(n)]
    row.same_kernel_same_answers = statistics.fmean(a["ids"] == b for a, b in zip(said["theirs"], alike, strict=True))


def _times(row: Row, ask: Callable[..., Any], timed: int, rounds: int, steps: int) -> None:
    prefill: dict[str, list[float]] = {name: [] for name in SIDES}
    decode: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(rounds * timed):
        for name in SIDES if turn % 2 else SIDES[::-1]:
            first, all_of = (ask(name, turn % timed, count)["cpu_ms"] for count in (1, 1 + steps))
            prefill[name].append(first)
            decode[name].append((all_of - first) / steps)
    row.prefill_ms, row.ours_prefill_ms = (spread(prefill[name]) for name in SIDES)
    row.decode_ms, row.ours_decode_ms = (spread(decode[name]) for name in SIDES)
    row.prefill_ratio, row.decode_ratio = ratio(prefill), ratio(decode)


def table(rows: Sequence[Row]) -> Table:
    """What the terminal shows."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    heads = (
        "pruned",
        "tokens:\ntheirs",
        "\nours",
        "same\nanswers",
        "with their\nkernel",
        "first word:\ntheirs",
        "\nours",
        "÷",
        "further:\ntheirs",
        "\nours",
        "÷",
    )
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            made.add_row(row.pruned, "[red]fails[/]")
            continue
        times = (
            row.prefill_ms, row.ours_prefill_ms, row.prefill_ratio, row.decode_ms, row.ours_decode_ms, row.decode_ratio
        )  # fmt: skip
        same = ["–" if one is None else f"{one:.0%}" for one in (row.same_answers, row.same_kernel_same_answers)]
        shown = [f"{one['median']:.{2 if i % 3 == 2 else 1}f}" for i, one in enumerate(times) if one is not None]
        made.add_row(row.pruned, f"{row.tokens:.0f}", f"{row.ours_tokens:.0f}", *same, *shown)
    return made


def measure(folder: Path, environments: Path, limit: int, seed: int, **how: int) -> dict[str, Any]:
    """The body of the result file. how: as ``compare`` takes it. The model is made and exported in every run."""
    workers: list[Worker] = []
    questions(folder, limit, seed)
    versions: dict[str, str] = {}
    with tqdm(total=12 * limit + 16 * how["rounds"] * min(how["timed"], limit), desc="OpenVINO", unit="call") as bar:
        try:
            pythons = venvs.python_of(OPENVINO, environments), Path(sys.executable)
            for python, script in zip(pythons, (OPENVINO.worker, OURS), strict=True):
                workers.append(Worker(python, script, folder / f"{len(workers)}.log"))
                versions = workers[-1].ask("start", STARTS, folder=str(folder)) | versions
            rows = compare(workers[0], workers[1], limit, bar.update, **how)
        except PeerError as error:
            rows = [Row(pruned, ours_of(pruned), error=str(error)) for pruned in (NONE, *PRUNED)]
        finally:
            for worker in workers:
                worker.close()
    return {"model": "random Qwen2-VL of 8 layers × 256", "peer": OPENVINO.name, "samples": limit, **how,
            "clock": "CPU time of a whole call", "versions_there": versions,
            "rows": [asdict(row) for row in rows]}  # fmt: skip


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, then what failed."""
    console.print(f"[bold]{OPENVINO.name}[/]: CDPruner, CPU ms of a whole call")
    console.print(table(rows))
    for row in rows:
        if row.error is not None:
            console.print(f"{row.pruned} pruned: {row.error}", markup=False, soft_wrap=True)
