"""``vtr eval --shots``: prompts with demonstrations; written as it goes, resumable, over several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vtr.eval.accuracy.answers import costs
from vtr.eval.accuracy.contenders import ALL, Contender
from vtr.eval.accuracy.journal import ROWS, Journal
from vtr.eval.accuracy.metrics import exact
from vtr.eval.accuracy.processes import Rank, cores, device_of, run_on, shared_cores
from vtr.eval.accuracy.run import conditions
from vtr.eval.report import results
from vtr.eval.shots import summary
from vtr.eval.shots.contenders import FEWER, Room, as_many, by_default, contenders, encode, fewer

import vtr
from vtr import chat
from vtr.models import check_name, find_device, load
from vtr.pocket.shots.prompts import Prompt, prompts

RESULTS, MARKDOWN, CSV, PLOT = "results.json", "table.md", "table.csv", "shots.png"
MODEL = "pocket-shots"
QUERIES, ANSWER = 200, 2
MOST = 256
"""Demonstrations of a prompt."""


@dataclass(frozen=True)
class Settings:
    """What is evaluated. Two runs with equal settings give equal numbers.

    Attributes:
        shots: how many demonstrations; 0 is always among them, to compare with. policies: spec strings, "all" or
            "fewer". limit: queries. seed: which ones, and their demonstrations.
        model: a folder, a hub name or a name of ``vtr.pocket.NAMES``.
    """

    shots: tuple[int, ...]
    policies: tuple[str, ...] = (ALL,)
    model: str = MODEL
    limit: int = QUERIES
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch_size < 1:
            raise ValueError(f"limit={self.limit}, batch_size={self.batch_size}: both must be at least 1")
        if not self.shots or not all(0 <= k <= MOST for k in self.shots):
            raise ValueError(f"shots={list(self.shots)}: name numbers of demonstrations from 0 to {MOST}, like 0,4,8")
        object.__setattr__(self, "shots", tuple(sorted({0, *self.shots})))


def shots_of(text: str) -> tuple[int, ...]:
    """``"0,4,8"`` as numbers.

    Raises:
        ValueError: it is none of that.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shots {text!r}: numbers of demonstrations, joined by commas, like 0,1,2,4,8,16") from None


def evaluate(settings: Settings, out: Path, *, resume: bool = False, processes: int | None = None) -> Any:
    """Run it, or go on with it, and write rows, results, tables and a picture to ``out``.

    Returns:
        What was saved; None in processes that are not the first.

    Raises:
        ValueError, TypeError, FileExistsError, RuntimeError: settings that cannot work; see the message.
    """
    find_device(settings.device)
    check_name(settings.model)
    work = partial(_work, settings=settings, out=out, resume=resume)
    batches = math.ceil(settings.limit / settings.batch_size)
    on_cpu = settings.model in vtr.pocket.SHIPPED_NAMES and find_device(settings.device) == "cpu"
    first = run_on(work, processes, max(1, min(cores(), batches // 2)) if on_cpu else 1)
    return results.load(out / RESULTS) if first else None


@dataclass
class Bench:
    """A patched model, who is compared on it, and how many demonstrations ``fewer`` has of each number of shots."""

    model: Any
    processor: Any
    contenders: list[Contender]
    room: Room
    settings: Settings
    instead: dict[int, int]

    @classmethod
    def from_settings(cls, settings: Settings, rank: Rank) -> Bench:
        model, processor = load(settings.model, device_of(rank, settings.device), settings.dtype)
        room = Room.from_model(model, processor, ANSWER)
        found = contenders(settings.policies, room.layout, len(model.get_decoder().layers))
        bench = cls(model, processor, found, room, settings, {})
        if any(one.spec == FEWER for one in found):
            few = vtr.policy(by_default(room.layout)[2])
            for shots in filter(None, settings.shots):
                first = next(prompts(1, shots, seed=settings.seed))
                bench.instead[shots] = 0 if room.refusal(few, shots) else as_many(model, processor, first, few)
        return bench

    def refusal(self, one: Contender, shots: int) -> str | None:
        """Why a contender cannot have so many demonstrations; None: it can."""
        return self.room.refusal(one.policy, self.instead[shots] if one.spec == FEWER and shots else shots)

    def cells(self, some: Sequence[Prompt], shots: int) -> dict[str, list[dict[str, Any]]]:
        """Contender → what it said to each of some prompts, whether that is right, and what it cost."""
        found: dict[str, list[dict[str, Any]]] = {}
        how = {"max_new_tokens": ANSWER, "do_sample": False}
        if self.model.generation_config.pad_token_id is None:
            how["pad_token_id"] = self.processor.tokenizer.pad_token_id or self.processor.tokenizer.eos_token_id
        with torch.inference_mode(), vtr.shared_features(self.model):
            whole = encode(self.model, self.processor, some)
            for one in self.contenders:
                if self.refusal(one, shots) or (one.spec == FEWER and not shots):
                    continue
                inputs = whole
                if one.spec == FEWER:
                    short = [fewer(prompt, self.instead[shots]) for prompt in some]
                    inputs = encode(self.model, self.processor, short)
                out = self.model.generate(**inputs, policy=one.policy, **how)
                said = chat.decode(self.processor, out, inputs["input_ids"].shape[1])
                found[one.spec] = [
                    {**cost, "said": text, "score": exact(text, [prompt.query.answer])}
                    for text, prompt, cost in zip(said, some, costs(self.model), strict=True)
                ]
        return found


def _work(rank: Rank, store: str | None, *, settings: Settings, out: Path, resume: bool) -> None:
    """One process's share; the first one also makes table and picture."""
    with shared_cores(rank):
        rank.join(store)
        bench = Bench.from_settings(settings, rank)
        journal = Journal.opened(out, rank, _identity(settings, bench), resume)
        _run(bench, journal, rank)
        rank.wait()
        if rank.index == 0:
            _save(bench, journal.merge(), out)
        rank.leave()


def _run(bench: Bench, journal: Journal, rank: Rank) -> None:
    """Every batch that is this process's and not done yet. A row of the journal is a query."""
    settings = bench.settings
    streams = {k: prompts(settings.limit, k, seed=settings.seed) for k in settings.shots}
    runs = len(settings.shots) * len(bench.contenders)
    with tqdm(total=settings.limit * runs, desc="queries × shots × runs", unit="", disable=rank.index > 0) as bar:
        for number, start in enumerate(range(0, settings.limit, settings.batch_size)):
            drawn = {k: list(islice(stream, settings.batch_size)) for k, stream in streams.items()}
            indices = range(start, start + len(drawn[0]))
            mine = number % rank.world == rank.index
            if mine and not all(i in journal.rows for i in indices):
                rows: list[dict[str, Any]] = [
                    {"index": i, "id": str(i), "kind": one.type, "question": one.query.question,
                     "answer": one.query.answer, "seen": one.query.seen, "shots": {}}
                    for i, one in zip(indices, drawn[0], strict=True)
                ]  # fmt: skip
                for shots, some in drawn.items():
                    found = bench.cells(some, shots)
                    for at, row in enumerate(rows):
                        row["shots"][str(shots)] = {spec: cells[at] for spec, cells in found.items()}
                    bar.update(len(some) * len(bench.contenders) * rank.world)
                journal.append(rows)
            elif mine:
                bar.update(len(indices) * runs * rank.world)


def _identity(settings: Settings, bench: Bench) -> dict[str, Any]:
    """What must be the same for a run to go on: all that numbers depend on."""
    return {
        **asdict(settings),
        "shots": list(settings.shots),
        "policies": [one.spec for one in bench.contenders],
        **conditions(bench.model),
    }


def _save(bench: Bench, rows: Sequence[dict[str, Any]], out: Path) -> None:
    settings = bench.settings
    lines = []
    for shots in settings.shots:
        for one in bench.contenders:
            if one.spec == FEWER and not shots:
                continue
            line: dict[str, Any] = {"policy": one.spec, "shots": shots, "refused": bench.refusal(one, shots)}
            if one.spec == FEWER:
                line["demonstrations"] = bench.instead[shots]
            line["longest"] = None if one.spec == FEWER else bench.room.longest(one.policy)
            lines.append(line)
    body = {
        "model": settings.model, "queries": len(rows), "positions": bench.room.positions,
        "policies": summary.summarize(rows, lines, settings.seed), "rows": ROWS, "settings": _identity(settings, bench),
    }  # fmt: skip
    (out / MARKDOWN).write_text(summary.markdown(body))
    (out / CSV).write_text(summary.table_csv(body))
    summary.plot(body).savefig(out / PLOT, dpi=120)
    results.save(out / RESULTS, "shots", body, seed=settings.seed, device=bench.model.device)
