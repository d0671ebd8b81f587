"""CDPruner of OpenVINO GenAI beside ours: ``python -m vtr.eval.peers.cdpruner``.

On a small random Qwen2-VL, since OpenVINO GenAI prunes no picture of a LLaVA. Weights, pictures and questions are the
same on both sides, as both decode the same without pruning. OpenVINO GenAI does not say which tokens it keeps: what
can be compared is how many, what is decoded, and CPU time. That both keep the same is seen by their answers, if ours
ranks by their kernel.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from vtr.eval.peers import venvs
from vtr.eval.peers.catalogue import HERE, OPENVINO
from vtr.eval.peers.channel import PeerError, Worker
from vtr.eval.peers.driver import spread
from vtr.eval.report import results

import vtr

SIDE = 336
"""Pixels: 12 × 12 vision tokens, and neither side's processor resizes the picture."""
PRUNED = ("50", "75", "90")
"""Percentages."""
NONE = "none"
OURS = HERE / "openvino_ours.py"
STARTS, ANSWERS = 1800.0, 120.0
"""Seconds for making and exporting the model, and for an answer."""


@dataclass
class Row:
    """A percentage of theirs beside a policy of ours; CPU milliseconds of a whole call, a decoded token's beside.

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
    versions: dict[str, str] = field(default_factory=dict)
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


def compare(theirs: Worker, ours: Worker, n: int, rounds: int, steps: int) -> list[Row]:
    """A row for no pruning and for each of PRUNED; where a side fails, its error and what was measured before."""
    rows = []
    for pruned in (NONE, *PRUNED):
        row = Row(pruned, ours_of(pruned))
        try:
            _measure(row, theirs, ours, n, rounds, steps)
        except PeerError as error:
            row.error = str(error)
        rows.append(row)
    return rows


def _measure(row: Row, theirs: Worker, ours: Worker, n: int, rounds: int, steps: int) -> None:
    sides = {"theirs": (theirs, row.pruned), "ours": (ours, row.ours)}

    def ask(name: str, index: int, count: int, **more: Any) -> Any:
        worker, method = sides[name]
        return worker.ask("run", ANSWERS, index=index, method=method, steps=count, **more)

    said = {name: [ask(name, i, steps) for i in range(n)] for name in sides}  # warms up, too
    row.tokens, row.ours_tokens = (statistics.fmean(one["tokens"] for one in said[name]) for name in sides)
    row.same_answers = statistics.fmean(a["ids"] == b["ids"] for a, b in zip(said["theirs"], said["ours"], strict=True))
    alike = [ask("ours", i, steps, as_theirs=True)["ids"] for i in range(n)]
    row.same_kernel_same_answers = statistics.fmean(a["ids"] == b for a, b in zip(said["theirs"], alike, strict=True))
    if not rounds:
        return
    prefill: dict[str, list[float]] = {name: [] for name in sides}
    decode: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds * n):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            first, all_of = (ask(name, turn % n, count)["cpu_ms"] for count in (1, 1 + steps))
            prefill[name].append(first)
            decode[name].append((all_of - first) / steps)
    row.prefill_ms, row.ours_prefill_ms = (spread(prefill[name]) for name in sides)
    row.decode_ms, row.ours_decode_ms = (spread(decode[name]) for name in sides)


def table(rows: Sequence[Row]) -> Table:
    """What the terminal shows."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    heads = (
        "pruned",
        "tokens:\ntheirs",
        "\nours",
        "same\nanswers",
        "with their\nkernel",
        "prefill:\ntheirs",
        "\nours",
        "token:\ntheirs",
        "\nours",
    )
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.error is not None:
            made.add_row(row.pruned, "[red]fails[/]")
            continue
        times = (row.prefill_ms, row.ours_prefill_ms, row.decode_ms, row.ours_decode_ms)
        same = ["–" if one is None else f"{one:.0%}" for one in (row.same_answers, row.same_kernel_same_answers)]
        shown = [f"{one['median']:.1f}" for one in times if one is not None]
        made.add_row(row.pruned, f"{row.tokens:.0f}", f"{row.ours_tokens:.0f}", *same, *shown)
    return made


def main(
    out: Annotated[Path, typer.Option(help="the result file (JSON)")] = Path("docs/results/cdpruner.json"),
    environments: Annotated[
        Path | None, typer.Option("--venvs", help="folder for the environment; default: in the user's cache folder")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="questions")] = 6,
    rounds: Annotated[int, typer.Option(min=0, help="timed runs of each question; 0: no times")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded")] = 12,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
) -> None:
    """Measure OpenVINO GenAI's CDPruner beside ours: same weights, same pictures, in turns, in CPU time.

    The environment is made once (PyPI), the model in every run. What cannot run is shown with its error.
    """
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        questions(folder, limit, seed)
        try:
            pythons = (venvs.python_of(OPENVINO, environments or venvs.default_folder()), Path(sys.executable))
            versions: dict[str, str] = {}
            for python, script in zip(pythons, (OPENVINO.worker, OURS), strict=True):
                workers.append(Worker(python, script, folder / f"{len(workers)}.log"))
                versions = workers[-1].ask("start", STARTS, folder=scratch) | versions
            rows = compare(workers[0], workers[1], limit, rounds, steps)
        except PeerError as error:
            rows, versions = [Row(pruned, ours_of(pruned), error=str(error)) for pruned in (NONE, *PRUNED)], {}
        finally:
            for worker in workers:
                worker.close()
    for row in rows:
        row.versions = versions
    body = {"model": "random Qwen2-VL of 8 layers × 256", "peer": OPENVINO.name, "samples": limit, "rounds": rounds,
            "steps": steps, "clock": "CPU time of a whole call", "rows": [asdict(row) for row in rows]}  # fmt: skip
    results.save(out, "cdpruner", body, seed=seed)
    console = Console()
    console.print(table(rows))
    for row in rows:
        if row.error is not None:
            console.print(f"{row.pruned} pruned: {row.error}", markup=False, soft_wrap=True)
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
