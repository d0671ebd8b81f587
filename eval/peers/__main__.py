"""``python -m vtr.eval.peers``: vtr beside public implementations."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vtr.eval.cost import midsize
from vtr.eval.peers import cdpruner, data, selection, venvs, wrapped
from vtr.eval.peers.catalogue import ALL_PEERS, HERE, OPENVINO, Peer
from vtr.eval.peers.channel import PeerError
from vtr.eval.peers.driver import Plan, Row, Side, budget_of, calls, compare, failed
from vtr.eval.report import results

import vtr


def run(peers: Sequence[Peer], plan: Plan, environments: Path, ours: Side) -> list[Row]:
    """All rows of all peers, one peer after the other."""
    rows: list[Row] = []
    for peer in peers:
        try:
            python = venvs.python_of(peer, environments)
        except PeerError as error:
            rows += failed(peer, error, plan)
            continue
        theirs = Side(plan, python, peer.worker)
        try:
            rows += [compare(peer, method, theirs, ours, plan) for method in peer.methods]
        finally:
            theirs.close()
    return rows


def table(rows: Sequence[Row]) -> Table:
    """What the terminal shows: accuracies, cached tokens, and times of ours ÷ theirs."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    made.add_column("peer", overflow="fold", min_width=18)
    made.add_column("ours", overflow="fold", min_width=12)
    for name in ("right:\ntheirs", "\nours", "cached\ntokens", "prefill\n÷", "decode\n÷"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        method = row.method if row.batch == 1 else f"{row.method}, batch {row.batch}"
        theirs = _percent(row.accuracy) if row.error is None else "[red]fails[/]"
        kept = "–" if row.kv_tokens is None else f"{row.kv_tokens:.0f}"
        ratios = [_number(row.prefill_ratio), _number(row.decode_ratio)]
        made.add_row(f"{row.peer}, {method}", row.ours, theirs, _percent(row.ours_accuracy), kept, *ratios)
    return made


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['median']:.2f}"


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


OUT = {"peers": "eval/results", "wrapped": "docs/results", "cdpruner": "docs/results", "selectors": "docs/results"}
"""Kind of result file → folder where its figures are committed."""
CHECKOUTS = {
    "angelslim": ("Tencent/AngelSlim", "angelslim/compressor/token_compressor"),
    "lightcompress": ("ModelTC/LightCompress", "llmc/compression/token_reduction"),
}
"""Option → repository, and the folder that shows a checkout of it."""


@dataclass
class Run:
    """What all parts are told; each writes its result file and prints its tables.

    Attributes:
        out: folder of the result files; None: where they are committed. how: timed, rounds, steps and threads.
    """

    out: Path | None
    environments: Path
    limit: int
    seed: int
    how: dict[str, Any]
    console: Console = field(default_factory=Console)

    def save(self, kind: results.Kind, body: dict[str, Any]) -> None:
        path = (self.out or Path(OUT[kind])) / f"{kind}.json"
        results.save(path, kind, body, seed=self.seed)
        self.console.print(f"written to {path}")

    def packages(self, peers: Sequence[Peer], keep: float, layer: int, timeout: float) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            how = self.how | {"timed": min(self.how["timed"], self.limit), "timeout": timeout}
            body = measure(peers, Path(scratch), self.environments, self.limit, self.seed, keep, layer, **how)
        self.console.print(table([Row(**row) for row in body["rows"]]))
        for row in body["rows"]:
            self._error(f"{row['peer']}, {row['method']}", row["error"])
        self.save("peers", body)

    def models(self, given: dict[str, Path]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            body = wrapped.measure(given, Path(scratch), self.environments, self.how["rounds"])
        wrapped.show([wrapped.Row(**row) for row in body["rows"]], self.console)
        self.save("wrapped", body)

    def openvino(self) -> None:
        how = {name: self.how[name] for name in ("timed", "rounds", "steps")}
        with tempfile.TemporaryDirectory() as scratch:
            body = cdpruner.measure(Path(scratch), self.environments, self.limit, self.seed, **how)
        cdpruner.show([cdpruner.Row(**row) for row in body["rows"]], self.console)
        self.save("cdpruner", body)

    def selectors(self, checkout: Path) -> None:
        """64 of 576 tokens chosen, as often as a prompt is timed in the other parts."""
        names = selection.names()
        before, rounds = torch.get_num_threads(), self.how["timed"] * self.how["rounds"]
        torch.set_num_threads(self.how["threads"])
        try:
            with tqdm(total=len(names), desc="selectors", unit="policy") as bar:
                rows = selection.Contest(midsize.MIDSIZE, checkout, 64, rounds, bar.update).run(names)
        finally:
            torch.set_num_threads(before)
        self.console.print(selection.table(rows))
        for row in rows:
            self._error(f"{row.policy}, AngelSlim's", row.error)
        self.save("selectors", {"keep": 64, "of": 576, "rounds": rounds, "rows": [asdict(row) for row in rows]})

    def _error(self, what: str, error: str | None) -> None:
        if error is not None:
            self.console.print(f"{what}: {error}", markup=False, soft_wrap=True)


@app.command()
def main(
    angelslim: Annotated[Path | None, typer.Option(help="a checkout of Tencent/AngelSlim")] = None,
    lightcompress: Annotated[Path | None, typer.Option(help="a checkout of ModelTC/LightCompress (LLMC+)")] = None,
    only: Annotated[
        str | None, typer.Option(help="packages, models, openvino, selectors, or how a package's name begins")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the result files; default: where they are committed")
    ] = None,
    environments: Annotated[
        Path | None,
        typer.Option("--venvs", help="folder for the peers' environments; default: in the user's cache folder"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="questions answered by each method of packages and openvino")] = 200,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="vision tokens ours keeps from `--layer` on")] = 0.1,
    layer: Annotated[int, typer.Option(min=1, help="the decoder layer ours cuts at")] = 2,
    timed: Annotated[int, typer.Option(min=1, help="prompts timed (of models always eight)")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each prompt")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded in each timed run")] = 16,
    timeout: Annotated[float, typer.Option(help="seconds a package has for one answer, and to start")] = 300.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of packages and selectors, both sides")] = 1,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
) -> None:
    """Measure vtr beside public implementations: same weights, same inputs, in turns, in CPU time. Four parts:

    * **packages** of PyPI (kvpress, sparsevlm, …) on the pocket model: answers and times at equal cached tokens

    * **models** as AngelSlim and LightCompress reduce them: kept tokens, logits beside dense masked runs, costs

    * **openvino**: CDPruner of OpenVINO GenAI

    * **selectors**: what choosing alone costs, beside AngelSlim's

    Each package gets an environment of its own with what it pins (made once, kept in `--venvs`; needs PyPI). AngelSlim
    and LightCompress do not ship their token reduction on PyPI: clone them; without, their parts are left out. Ratios
    are ours ÷ theirs. What cannot run gets a row with its own error.

    Examples:

    * `python -m vtr.eval.peers --limit 40 --angelslim AngelSlim --lightcompress LightCompress`

    * `python -m vtr.eval.peers --only kvpress --limit 40 --keep 0.05 --out runs`

    * `python -m vtr.eval.peers --only selectors --angelslim AngelSlim`
    """
    given = {name: path for name, path in (("angelslim", angelslim), ("lightcompress", lightcompress)) if path}
    for name, path in given.items():
        repository, shows = CHECKOUTS[name]
        if not (path / shows).is_dir():
            raise typer.BadParameter(
                f"{path} is no checkout of {repository}: it has no {shows}", param_hint=f"--{name}"
            )
    how = {"timed": timed, "rounds": rounds, "steps": steps, "threads": threads}
    one = Run(out, environments or venvs.default_folder(), limit, seed, how)
    parts, missing = chosen(only, given, one, (keep, layer, timeout))
    for what in missing:
        one.console.print(f"[yellow]left out:[/] {what}", soft_wrap=True)
    if not parts:
        raise typer.BadParameter("nothing is left to run: give what is left out")
    for part in parts:
        part()


def chosen(only: str | None, given: dict[str, Path], one: Run, how: Any) -> tuple[list[Callable[[], None]], list[str]]:
    """The parts that run, and what is left out, with what is to be given.

    Raises:
        typer.BadParameter: nothing is named ``only``.
    """

    def named(*names: str) -> bool:
        return only is None or any(name.lower().startswith(only.lower()) for name in names)

    peers = [peer for peer in ALL_PEERS if named("packages", peer.name)]
    models = [name for name in CHECKOUTS if named("models", name)]
    parts: list[Callable[[], None]] = [partial(one.packages, peers, *how)] if peers else []
    if found := {name: given[name] for name in models if name in given}:
        parts.append(partial(one.models, found))
    if named("openvino", OPENVINO.name):
        parts.append(one.openvino)
    if (choosing := named("selectors")) and "angelslim" in given:
        parts.append(partial(one.selectors, given["angelslim"]))
    missing = [(f"models of {name}", name) for name in models if name not in given]
    missing += [("selectors", "angelslim")] if choosing and "angelslim" not in given else []
    if not parts and not missing:
        names = ["packages", "models", "openvino", "selectors", *CHECKOUTS, *(peer.name for peer in ALL_PEERS)]
        raise typer.BadParameter(f"nothing begins with {only!r}; there are: {', '.join(names)}", param_hint="--only")
    return parts, [f"{what}: give --{name}, a clone of github.com/{CHECKOUTS[name][0]}" for what, name in missing]


def measure(
    peers: Sequence[Peer], scratch: Path, environments: Path, limit: int, seed: int, keep: float, layer: int, **how: Any
) -> dict[str, Any]:
    """The body of the result file."""
    from vtr.pocket.model import IDS

    entries = data.export(scratch, limit, seed)
    config = vtr.pocket.load()[0].config
    vision = entries[0]["picture_ends"] - 1  # a start token, then the picture
    budget = budget_of(config.text_config.num_hidden_layers, vision, keep, layer)
    ids = [IDS[entry["answer"]] for entry in entries[:limit]]
    plan = Plan(scratch, vtr.pocket.WEIGHTS, ids, budget, keep, layer, **how)
    ours = Side(plan, Path(sys.executable), HERE / "ours.py")
    with tqdm(total=calls(peers, plan), desc="packages", unit="call") as bar:
        plan.done = bar.update
        try:
            rows = run(peers, plan, environments, ours)
        finally:
            ours.close()
    return {
        "model": {"name": "pocket", "hidden_size": config.text_config.hidden_size,
                  "num_hidden_layers": config.text_config.num_hidden_layers},
        "data": {"name": "pocket", "samples": limit},
        "budget": asdict(budget),
        "measured": "CPU time, text model only, batch 1, float32, sdpa; medians with the smallest and the largest",
        "threads": plan.threads,
        "ours_versions": ours.versions,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


if __name__ == "__main__":
    app()
