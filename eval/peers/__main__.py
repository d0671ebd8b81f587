"""``python -m vtr.eval.peers``: vtr beside public implementations, on the pocket model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vtr.eval.peers import data, venvs
from vtr.eval.peers.catalogue import ALL_PEERS, HERE, Peer
from vtr.eval.peers.channel import PeerError
from vtr.eval.peers.driver import Plan, Row, Side, budget_of, calls, compare, failed
from vtr.eval.report import results

import vtr
from vtr.settings import policy_class


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


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="the result file (JSON)")] = Path("eval/results/peers.json"),
    environments: Annotated[
        Path | None,
        typer.Option("--venvs", help="folder for the peers' environments; default: in the user's cache folder"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="questions answered by each method")] = 200,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="vision tokens ours keeps from `--layer` on")] = 0.1,
    layer: Annotated[int, typer.Option(min=1, help="the decoder layer ours cuts at")] = 2,
    only: Annotated[str | None, typer.Option(help="only peers whose name starts so, e.g. kvpress")] = None,
    timed: Annotated[int, typer.Option(min=1, help="prompts timed")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each prompt")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded in each timed run")] = 16,
    timeout: Annotated[float, typer.Option(help="seconds a peer has for one answer, and to start")] = 120.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side")] = 1,
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
    selectors: Annotated[
        Path | None,
        typer.Option(help="a checkout of AngelSlim: time its selectors beside ours instead, 64 of 576 tokens"),
    ] = None,
) -> None:
    """Measure vtr beside public implementations: same weights, same questions, same number of cached tokens, same run.

    Each package gets an environment of its own with what it pins (made once, kept in `--venvs`; needs PyPI). Both sides
    run as processes that wait for each other; times are of the text model (no vision tower, no head), ratios are ours ÷
    theirs. A peer that cannot run gets a row with its own error.

    Examples:

    * `python -m vtr.eval.peers --out eval/results/peers.json`

    * `python -m vtr.eval.peers --only kvpress --limit 40 --keep 0.05 --out runs/peers.json`

    * `python -m vtr.eval.peers --selectors AngelSlim --rounds 30 --out docs/results/selectors.json`
    """
    if selectors is not None:
        choose(selectors, out, rounds, threads)
        return
    peers = [peer for peer in ALL_PEERS if only is None or peer.name.startswith(only)]
    if not peers:
        raise typer.BadParameter(f"no peer starts with {only!r}; there are: {', '.join(p.name for p in ALL_PEERS)}")
    how = {"timed": min(timed, limit), "rounds": rounds, "steps": steps, "timeout": timeout, "threads": threads}
    with tempfile.TemporaryDirectory() as scratch:
        folder = environments or venvs.default_folder()
        body = measure(peers, Path(scratch), folder, limit, seed, keep, layer, **how)
    results.save(out, "peers", body, seed=seed)
    console = Console()
    console.print(table([Row(**row) for row in body["rows"]]))
    for row in body["rows"]:
        if row["error"] is not None:
            console.print(f"{row['peer']}, {row['method']}: {row['error']}", markup=False, soft_wrap=True)
    console.print(f"written to {out}")


def choose(checkout: Path, out: Path, rounds: int, threads: int) -> None:
    """Time selectors; writes and prints the table."""
    import torch
    from vtr.eval.cost import midsize
    from vtr.eval.peers import selection

    torch.set_num_threads(threads)
    names = sorted(n for n in vtr.list_policies() if policy_class(n).__module__.startswith(selection.ROOMS))
    names = [n for n in names if n not in selection.LEFT_OUT]
    rows = selection.Contest(midsize.MIDSIZE, checkout, 64, rounds).run(names)
    body = {"keep": 64, "of": 576, "rounds": rounds, "rows": [asdict(row) for row in rows]}
    results.save(out, "selectors", body, seed=0)
    console = Console()
    console.print(selection.table(rows))
    for row in rows:
        if row.error is not None:
            console.print(f"{row.policy}, AngelSlim's: {row.error}", markup=False, soft_wrap=True)
    console.print(f"written to {out}")


def measure(
    peers: Sequence[Peer], scratch: Path, environments: Path, limit: int, seed: int, keep: float, layer: int, **how: Any
) -> dict[str, Any]:
    """The body of the result file."""
    import sys

    from vtr.pocket.model import IDS

    entries = data.export(scratch, limit, seed)
    config = vtr.pocket.load()[0].config
    vision = entries[0]["picture_ends"] - 1  # a start token, then the picture
    budget = budget_of(config.text_config.num_hidden_layers, vision, keep, layer)
    ids = [IDS[entry["answer"]] for entry in entries[:limit]]
    plan = Plan(scratch, vtr.pocket.WEIGHTS, ids, budget, keep, layer, **how)
    ours = Side(plan, Path(sys.executable), HERE / "ours.py")
    with tqdm(total=calls(peers, plan), desc="calls", unit="call") as bar:
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
        "measured": "text model only, batch 1, float32, sdpa; medians with the smallest and the largest",
        "threads": plan.threads,
        "ours_versions": ours.versions,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip


if __name__ == "__main__":
    app()
