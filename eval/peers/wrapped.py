"""Whole models as other packages reduce them, beside ours.

Small random models with the same weights, the same prompts, and the same given words decoded behind them. What a
package kept is seen by the rows that enter each layer. Its logits are compared with those of a dense run of the
untouched model in which the dropped tokens are hidden from the same layers on (``vtr.testing.dense``): a reduction that
is computed rightly says the same, at the prompt's end and in every decoded word, to rounding. What
it costs is measured on larger models (``costs``).
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from vtr.eval.peers import costs, random_models, venvs
from vtr.eval.peers.cases import CASES, Case
from vtr.eval.peers.catalogue import HERE, Peer
from vtr.eval.peers.channel import PeerError, Worker
from vtr.eval.peers.forced import Recorder
from vtr.eval.peers.masked import Reference

import vtr

OURS = HERE / "wrapped_ours.py"
STARTS, ANSWERS = 600.0, 300.0
"""Seconds."""
PROMPTS, WORDS = 3, 8
"""Prompts of each method, and words decoded behind each."""
NONE = "none"
PATH = r" \(/[^)]*\)"
"""Of a module, in an error."""
SAME = 1e-3
"""Unreduced logits that differ by less come from the same weights; their standard deviation is about 1."""


@dataclass
class Row:
    """One reduction of one model; differences of logits are the largest over prompts, words and vocabulary.

    Attributes:
        kept, ours_kept: vision tokens that enter the last layer. same: share of theirs that ours keeps too.
        first, ours_first: of the prompt's end. decoded, ours_decoded: of the decoded words.
        early: by how many positions decoded words stand too far in front; None where this is not one number.
        decoded_there: ``decoded`` if the dense run puts its words at their positions, too.
        agree: share of decoded words behind which they would choose the dense run's word.
        note: what else was seen. mended: what of their settings had to be changed.
        error, ours_error: what either side raised.
        costs: as ``costs.measure`` has them, where both sides run; cost_error: why there are none.
    """

    peer: str
    model: str
    method: str
    ours: str
    kept: float | None = None
    ours_kept: float | None = None
    same: float | None = None
    first: float | None = None
    decoded: float | None = None
    early: int | None = None
    decoded_there: float | None = None
    agree: float | None = None
    ours_first: float | None = None
    ours_decoded: float | None = None
    mended: str = ""
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    ours_error: str | None = None
    costs: dict[str, Any] | None = None
    cost_error: str | None = None


class Ours:
    """The models of ours, and their references."""

    def __init__(self, folder: Path, words: int) -> None:
        self.models = {kind: random_models.load(folder, kind) for kind in random_models.TOWERS}
        self.patched = {kind: vtr.patch(random_models.load(folder, kind)) for kind in random_models.TOWERS}
        self.words, self.references = words, {}  # type: tuple[int, dict[tuple[str, int], Reference]]

    def reference(self, kind: str, seed: int) -> Reference:
        if (kind, seed) not in self.references:
            made = Reference.of(
                self.models[kind], random_models.inputs(kind, seed), random_models.answer(seed, self.words),
                random_models.IMAGE,
            )  # fmt: skip
            self.references[kind, seed] = made
        return self.references[kind, seed]

    @torch.inference_mode()
    def run(self, kind: str, policy: str, seed: int) -> tuple[Tensor, list[list[int]], Tensor]:
        """Logits [1 + words, vocabulary]; slots of the vision tokens that entered each layer (none at all where tokens
        are made of several); positions of what entered the decoder."""
        model = self.patched[kind]
        how = None if policy == NONE else policy
        done = Recorder(model, model.get_decoder()).run(
            random_models.inputs(kind, seed), random_models.answer(seed, self.words), policy=how
        )
        row, layers = vtr.report(model).rows[0], range(random_models.DEPTH)
        merged = any(len(one) > 1 for layer in layers for one in row.sources(layer))
        return done["logits"], [] if merged else [row.kept(layer) for layer in layers], done["positions"][0]


def compare(peer: Peer, case: Case, theirs: Worker, ours: Ours, seeds: Sequence[int]) -> Row:
    """A row; where a side fails, it holds the error and what the other side gave."""
    row = Row(peer.name, case.kind, case.method, case.ours)
    found: dict[str, list[Any]] = {}
    mine: dict[int, list[list[int]]] = {}
    try:
        for seed in seeds:
            _ours(found, mine, case, ours, seed)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:  # it refuses this model
        row.ours_error = f"{type(error).__name__}: {error}"
    try:
        for seed in seeds:
            _theirs(found, mine, case, theirs, ours.reference(case.kind, seed), seed, row)
    except PeerError as error:
        row.error = re.sub(PATH, "", str(error))
    for name in ("first", "decoded", "decoded_there", "ours_first", "ours_decoded"):
        setattr(row, name, max(found[name]) if found.get(name) else None)
    for name in ("kept", "ours_kept", "same", "agree"):
        setattr(row, name, statistics.fmean(found[name]) if found.get(name) else None)
    early = set(found.get("early", []))
    row.early = early.pop() if len(early) == 1 else None
    return row


def _ours(found: dict[str, list[Any]], mine: dict[int, list[list[int]]], case: Case, ours: Ours, seed: int) -> None:
    logits, kept, at = ours.run(case.kind, case.ours, seed)
    if not kept:  # no mask shows tokens made of several
        return
    mine[seed], reference = kept, ours.reference(case.kind, seed)
    entered = reference.entered(kept[0])
    positions = reference.positions(entered, at)
    off = (logits - reference.logits(kept, positions)).abs()
    note(found, ours_kept=len(kept[-1]), ours_first=float(off[0].max()), ours_decoded=float(off[1:].max()))


def _theirs(
    found: dict[str, list[Any]], mine: dict[int, list[list[int]]], case: Case, theirs: Worker, reference: Reference,
    seed: int, row: Row,
) -> None:  # fmt: skip
    asked = {"kind": case.kind, "seed": seed, "words": list(reference.words)}
    plain = torch.tensor(theirs.ask("run", ANSWERS, method=NONE, **asked)["logits"])
    everything = reference.logits([reference.row.slots] * random_models.DEPTH)
    if (off := float((plain - everything).abs().max())) > SAME:
        raise PeerError(f"without reduction its logits differ from ours by {off:.3g}: these are not the same weights")
    done = theirs.ask("run", ANSWERS, method=case.method, **asked, **_settings(case))
    row.mended, row.note = done.get("mended", ""), cached_twice(done, len(reference.words))
    first, decoded = torch.tensor(done["positions"][0]), placed(done["positions"])
    if done["made"] == 0:
        row.note = "merges before the decoder: the dense run is of the rows that entered it"
        right = torch.cat([first, first[..., -1:] + 1 + torch.arange(len(reference.words))], -1)
        dense, there = (
            reference.logits_of(torch.tensor(done["rows"]), at) for at in (right, torch.cat([first, decoded], -1))
        )
        note(found, kept=len(done["rows"]) - len(reference.row.embeds) + len(reference.row.slots))
    elif why := _no_reference(done, reference):
        row.note = why
        return
    else:
        vision = set(reference.row.slots)
        kept = [[slot for slot in layer if slot in vision] for layer in done["kept"]]
        right = reference.positions(done["kept"][0], first)
        prompt = right[..., : len(reference.row.embeds)]
        dense, there = (reference.logits(kept, at) for at in (right, torch.cat([prompt, decoded], -1)))
        if len(kept[-1]) == len(vision) and case.ours != NONE:
            row.note = "it ran and reduced nothing"
        note(found, kept=len(kept[-1]))
        if seed in mine and not case.drawn:
            note(found, same=len(set(kept[-1]) & set(mine[seed][-1])) / max(len(kept[-1]), 1))
    logits = torch.tensor(done["logits"])
    off_dense, off_there = (logits - dense).abs(), (logits - there).abs()
    note(found, early=evenly(right[..., -len(reference.words) :] - decoded), first=float(off_dense[0].max()),
         decoded=float(off_dense[1:].max()), decoded_there=float(off_there[1:].max()),
         agree=float((logits.argmax(-1) == dense.argmax(-1))[1:].float().mean()))  # fmt: skip


def _no_reference(done: dict[str, Any], reference: Reference) -> str:
    """Why no mask shows what was done; empty if one does."""
    if done["made"] is not None:
        return f"new tokens enter layer {done['made']}: no mask shows them"
    words = set(range(len(reference.row.embeds))) - set(reference.row.slots)
    missing = words - set(done["kept"][-1])
    return f"{len(missing)} words of the prompt are dropped, too: not compared" if missing else ""


def cached_twice(done: dict[str, Any], words: int) -> str:
    """Which layers cache other than the tokens that entered them."""
    layers = enumerate(zip(done["entered"], done["cached"], strict=False))
    wrong = [(i, entered + words, keys) for i, (entered, keys) in layers if keys != entered + words]
    return "; ".join(f"layer {i} caches {keys} keys, {count} tokens entered it" for i, count, keys in wrong)


def _settings(case: Case) -> dict[str, Any]:
    return {"settings": dict(case.settings)} if case.settings else {}


def note(found: dict[str, list[Any]], **values: Any) -> None:
    for name, value in values.items():
        found.setdefault(name, []).append(value)


def placed(positions: list[Any]) -> Tensor:
    """Where the decoded words stood: the last position of each forward behind the prompt's; [words] or [3, words]."""
    return torch.stack([torch.tensor(one)[..., -1] for one in positions[1:]], -1)


def evenly(off: Tensor) -> int | None:
    """The one number in ``off``; None if there are several."""
    return int(off.flatten()[0]) if bool((off == off.flatten()[0]).all()) else None


class Runs:
    """Everything that the workers of one run share.

    Args:
        folder: for weights and logs. rounds: of costs; none are measured at 0.
    """

    def __init__(self, folder: Path, environments: Path, rounds: int) -> None:
        self.folder, self.environments, self.rounds = folder, environments, rounds
        random_models.save(folder, random_models.SMALL, *([random_models.MIDDLE] if rounds else []))
        self.ours = Ours(folder, WORDS)
        self._worker: Worker | None = None

    def of(self, peer: Peer, cases: Sequence[Case], checkout: Path, bar: Any) -> list[Row]:
        """All rows of one package; a worker that has died is started again."""
        rows, worker, versions = [], None, {}  # type: list[Row], Worker | None, dict[str, str]
        try:
            python = venvs.python_of(peer, self.environments)
            for case in cases:
                if worker is None or not worker.alive:
                    worker = Worker(python, peer.worker, self.folder / f"{peer.worker.stem}.log")
                    versions = worker.ask("start", STARTS, folder=str(self.folder), checkout=str(checkout))
                rows.append(compare(peer, case, worker, self.ours, range(PROMPTS)))
                rows[-1].versions = versions
                self._cost(rows[-1], case, worker)
                bar.update()
        except PeerError as error:
            rows += [Row(peer.name, c.kind, c.method, c.ours, error=str(error)) for c in cases[len(rows) :]]
        finally:
            if worker is not None:
                worker.close()
        return rows

    def _cost(self, row: Row, case: Case, theirs: Worker) -> None:
        if not self.rounds or row.error is not None or row.ours_error is not None:
            return
        try:
            if self._worker is None or not self._worker.alive:
                self._worker = Worker(Path(sys.executable), OURS, self.folder / f"{OURS.stem}.log")
                self._worker.ask("start", STARTS, folder=str(self.folder))
            row.costs = costs.measure(case, theirs, self._worker, self.rounds)
        except PeerError as error:
            row.cost_error = re.sub(PATH, "", str(error))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def measure(given: Mapping[str, Path], folder: Path, environments: Path, rounds: int) -> dict[str, Any]:
    """The body of the result file, of these checkouts (by their names in CASES)."""
    rows: list[Row] = []
    pairs = [(path, peer, cases) for name, path in given.items() for peer, cases in CASES[name]]
    with tqdm(total=sum(len(cases) for _, _, cases in pairs), desc="models", unit="method") as bar:
        runs = Runs(folder, environments, rounds)
        try:
            for path, peer, cases in pairs:
                rows += runs.of(peer, cases, path.absolute(), bar)
        finally:
            runs.close()
    return {"models": "random LLaVA-1.5 and Qwen2.5-VL, 64 vision tokens, 6 layers × 64, float32", "prompts": PROMPTS,
            "words": WORDS, "costs": costs.WHAT, "rounds": rounds,
            "versions_there": {row.peer: row.versions for row in rows if row.versions},
            "rows": [_short(row) for row in rows]}  # fmt: skip


def _short(row: Row) -> dict[str, Any]:
    """As JSON, without what is not known."""
    return rounded(
        {name: value for name, value in asdict(replace(row, versions={})).items() if value not in (None, "", {})}
    )


def rounded(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows: Sequence[Row]) -> Table:
    """What the terminal shows."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    made.add_column("model", no_wrap=True)
    made.add_column("method", no_wrap=True)
    heads = "kept", "same", "first:\ntheirs", "\nours", "decoded:\ntheirs", "\nours", "too\nearly", "as if\nthere"
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown = [
            "–" if row.kept is None else f"{row.kept:.0f}", "–" if row.same is None else f"{row.same:.0%}",
            *map(_small, (row.first, row.ours_first, row.decoded, row.ours_decoded)),
            "–" if row.early is None else str(row.early), _small(row.decoded_there),
        ]  # fmt: skip
        if row.error is not None:
            shown[2] = "[red]fails[/]"
        made.add_row(row.model, row.method.removesuffix("_r0.75"), *shown)
    return made


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


def show(rows: Sequence[Row], console: Console) -> None:
    """Tables by package, then what failed."""
    for peer_name in dict.fromkeys(row.peer for row in rows):
        mine = [row for row in rows if row.peer == peer_name]
        console.print(f"[bold]{peer_name}[/]: what stays, and logits beside a dense run's")
        console.print(table(mine))
        if any(row.costs for row in mine):
            console.print(f"[bold]{peer_name}[/]: costs, ours ÷ theirs; throughput of eight prompts, ours ÷ theirs")
            console.print(costs.table([(row.model, row.method, row.costs) for row in mine if row.costs]))
    for row in rows:
        said = {row.peer: row.error, f"ours ({row.ours})": row.ours_error, "costs": row.cost_error}
        if row.note:
            said[f"{row.peer} "] = row.note
        if row.costs and isinstance(row.costs["together"], str):
            said[f"{row.peer}, eight prompts in a call"] = row.costs["together"]
        for side, error in said.items():
            if error is not None:
                console.print(f"{row.model}, {row.method}, {side.strip()}: {error}", markup=False, soft_wrap=True)
