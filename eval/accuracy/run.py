"""``vtr eval``: policies on the same samples, side by side; written as it goes, resumable, over several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vtr.eval.accuracy import summary
from vtr.eval.accuracy.answers import TOKENS, Bench, bad_row, refused
from vtr.eval.accuracy.contenders import ALL, BUDGET, Contender, Shapes, contender, contenders, specs_of
from vtr.eval.accuracy.data import POCKET, Bad, Sample, Source, open_data, pocket_questions, settings_of
from vtr.eval.accuracy.journal import ROWS, Journal
from vtr.eval.accuracy.metrics import metric
from vtr.eval.accuracy.processes import Rank, cores, device_of, run_on, shared_cores
from vtr.eval.cost.interleave import in_turns, text_times
from vtr.eval.cost.timing import milliseconds
from vtr.eval.report import results

import vtr
from vtr.models import check_name, find_device, load

RESULTS, MARKDOWN, CSV = "results.json", "table.md", "table.csv"
WORTH_A_PROCESS = 8
"""Fewer batches than that are done sooner than another process has started."""
MOST_PROCESSES = 8
REPEATS = 5


@dataclass(frozen=True)
class Settings:
    """What is evaluated. Two runs with equal settings give equal numbers (but for times).

    Attributes:
        policies: spec strings, or "all". budget: the mean keep of "all".
        model: a folder, a hub name or a name of ``vtr.pocket.NAMES``; None is ``pocket``.
        base_lm: the language model before it saw pictures, for leakage.
        data, limit, seed, columns, images: see :func:`vtr.eval.accuracy.data.open_data`. instruction: has
            ``{question}`` in it.
        max_new_tokens: None is what the model's generation config says, or 32.
    """

    policies: tuple[str, ...] = ("all",)
    budget: float = BUDGET
    model: str | None = None
    base_lm: str | None = None
    data: str = POCKET
    images: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    metric: str = "auto"
    instruction: str = "{question}"
    batch_size: int = 8
    max_new_tokens: int | None = None
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        metric(self.metric)
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"batch_size={self.batch_size}, limit={self.limit}: both must be at least 1")
        if "{question}" not in self.instruction:
            raise ValueError(f"instruction={self.instruction!r}: it must say where the {{question}} goes")

    def check(self) -> None:
        """Raise for what can be known to be wrong before a model is loaded: data, device, names of models, policies."""
        self.open()
        find_device(self.device)
        check_name(self.model)
        check_name(self.base_lm, "language model", owner=False)
        for spec in specs_of(self.policies):
            if spec != ALL and (one := contender(spec)).frames is not None and self.task != "video":
                raise ValueError(f"{one.spec}: pictures have no frames; it is for videos (--task video)")
            if spec != ALL and one.before is not None and self.task == "video":
                raise ValueError(f"{one.before.spec} acts on pictures; for videos there is frames:keep=0.5")

    @property
    def task(self) -> str | None:
        """The pocket task, or None for other data."""
        head, _, rest = self.data.partition(":")
        return settings_of(rest).get("task", "questions") if head == POCKET else None

    @property
    def samples(self) -> int | None:
        """How many there are at most, where it is known beforehand."""
        return self.limit or (None if self.task is None else pocket_questions(self.task))

    @property
    def name(self) -> str:
        """The model's name in results."""
        return self.model or POCKET

    def open(self) -> Source:
        """The data."""
        images = None if self.images is None else Path(self.images)
        return open_data(self.data, limit=self.limit, seed=self.seed, columns=self.columns, images=images, videos=True)


def evaluate(
    settings: Settings, out: Path, *, resume: bool = False, indispensable: bool = False, processes: int | None = None,
    latency: int = 0,
) -> dict[str, Any] | None:  # fmt: skip
    """Run the evaluation, or go on with it, and write rows, results and tables to ``out``.

    Under torchrun or ``accelerate launch`` every process does its share and the first one writes the table.

    Args:
        indispensable: restrict the table to samples that need their picture.
        processes: of this machine; None is one per core for a pocket model on the CPU, else one.
        latency: so many prompts are timed at batch 1, policies in turns.

    Returns:
        What was saved; None in processes that are not the first.

    Raises:
        ValueError, TypeError, FileExistsError, RuntimeError: settings that cannot work; see the message.
    """
    settings.check()
    work = partial(_work, settings=settings, out=out, resume=resume, indispensable=indispensable, latency=latency)
    first = run_on(work, processes, _sensible_processes(settings))
    return results.load(out / RESULTS) if first else None


def _sensible_processes(settings: Settings) -> int:
    """Processes of one thread beat threads on a small model; a large one would be in memory several times."""
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    if settings.name not in vtr.pocket.SHIPPED_NAMES or not on_cpu:
        return 1
    if settings.samples is None:
        return min(cores(), MOST_PROCESSES)
    batches = math.ceil(settings.samples / settings.batch_size)
    return max(1, min(cores(), MOST_PROCESSES, batches // WORTH_A_PROCESS))


def _work(
    rank: Rank, store: str | None, *, settings: Settings, out: Path, resume: bool, indispensable: bool, latency: int
) -> None:
    """One process's share; the first one also makes the table."""
    with shared_cores(rank):
        rank.join(store)
        bench, left_out, source = prepare(settings, rank)
        journal = Journal.opened(out, rank, _identity(settings, bench), resume)
        if journal.redone:
            tqdm.write(f"{journal.redone} torn lines are made again")
        _run(bench, source, settings, journal, rank)
        rank.wait()
        if rank.index == 0:
            told = {"left_out": left_out, "processes": rank.world}
            body = summary.summarize(
                journal.merge(), bench.contenders, bench.metric, indispensable=indispensable, seed=settings.seed
            )
            if latency:
                times = prefill_times(bench, source, latency)
                for row in body["policies"]:
                    row["prefill_ms"] = times[row["policy"]]
            _save({**body, **told}, settings, bench, out)
        rank.leave()


def prepare(settings: Settings, rank: Rank) -> tuple[Bench, dict[str, str], Source]:
    """Model, contenders and data. Of ``all``, policies that cannot work on this model are left out, with the reason."""
    device = device_of(rank, settings.device)
    model, processor = load(settings.model, device, settings.dtype)
    weights = settings.name if settings.name in vtr.pocket.POLICIES else None
    shapes = replace(Shapes.from_model(model), films=settings.task in (None, "video"))
    found, only_all, left_out = contenders(settings.policies, shapes, settings.budget, weights)
    for one in found:
        if one not in only_all:
            vtr.processor(processor, one.before)  # refused before anything is asked
    tokens = settings.max_new_tokens or model.generation_config.max_new_tokens or TOKENS
    base = None if settings.base_lm is None else load_language_model(settings.base_lm, device, model.dtype)
    bench = Bench(model, processor, found, metric(settings.metric), settings.instruction, tokens, base)
    source = settings.open()
    first = [record for record in islice(source, settings.batch_size) if isinstance(record, Sample)]
    reasons = refused(bench, first, only_all)
    bench.contenders = [one for one in found if one not in only_all or one.name not in reasons]
    return bench, {**left_out, **reasons}, source


def load_language_model(name: str, device: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load language model {name}: {str(error).splitlines()[0][:200]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _identity(settings: Settings, bench: Bench) -> dict[str, Any]:
    """What must be the same for a run to go on: all that numbers depend on."""
    return {
        **asdict(settings),
        "policies": [one.spec for one in bench.contenders],
        "references": bench.references,
        "max_new_tokens": bench.max_new_tokens,
        **conditions(bench.model),
    }


def conditions(model: Any) -> dict[str, Any]:
    """What numbers depend on beside settings: where and how precisely the model runs, and in which versions."""
    return {
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "versions": results.versions(),
    }


def batches(source: Source, size: int) -> Iterator[tuple[int, list[Sample | Bad]]]:
    """The records in batches, numbered. Which records share a batch depends on nothing but ``size``."""
    records = iter(source)
    number = 0
    while batch := list(islice(records, size)):
        yield number, batch
        number += 1


def _run(bench: Bench, source: Source, settings: Settings, journal: Journal, rank: Rank) -> None:
    """Every batch that is this process's and not done yet."""
    runs = len(bench.contenders) + len(bench.references)
    total = None if settings.samples is None else settings.samples * runs
    with tqdm(total=total, desc="samples × runs", unit="", disable=rank.index > 0) as bar:
        bench.tick = lambda count: bar.update(count * rank.world)
        for number, batch in batches(source, settings.batch_size):
            if number % rank.world != rank.index:
                continue
            known = [journal.rows.get(record.index) for record in batch]
            _check_same(batch, known)
            if all(row is not None for row in known):
                bar.update(len(batch) * runs * rank.world)
                continue
            rows = bench.rows([record for record in batch if isinstance(record, Sample)])
            rows += [bad_row(record) for record in batch if isinstance(record, Bad)]
            journal.append(sorted(rows, key=lambda row: row["index"]))


def _check_same(batch: Sequence[Sample | Bad], known: Sequence[dict[str, Any] | None]) -> None:
    for record, row in zip(batch, known, strict=True):
        if row is None:
            continue
        same = row["id"] == record.id
        if isinstance(record, Sample) and "bad" not in row:
            same = same and (row["question"], row["answers"]) == (record.question, list(record.answers))
        if not same:
            raise ValueError(f"sample {record.index} is not what it was when this run began: give another folder")


def prefill_times(bench: Bench, source: Source, prompts: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the text model's prefill, choosing tokens included, at batch 1: median, smallest and largest.

    The first ``prompts`` samples; each is run under all contenders in turns, so that a slow moment hits all of them.
    """
    seconds: dict[str, list[float]] = {one.spec: [] for one in bench.contenders}
    good = (record for record in source if isinstance(record, Sample))
    bench.tick = lambda count: None
    with torch.inference_mode(), text_times(bench.model) as spans:
        for sample in tqdm(islice(good, prompts), total=prompts, desc="latency"):
            batch = bench.prepare([sample])
            if batch.samples:
                runs = {
                    one.spec: partial(_prefill, bench, bench.inputs_for(one, batch), one, spans)
                    for one in bench.contenders
                }
                for spec, times in in_turns(runs, REPEATS).items():
                    seconds[spec] += times
    if not all(seconds.values()):
        raise ValueError("none of the samples to time can be used: time more of them, or leave out --latency")
    return {spec: milliseconds(times) for spec, times in seconds.items()}


def _prefill(bench: Bench, inputs: Any, one: Contender, spans: list[float]) -> float:
    bench.model(**inputs, policy=one.policy, use_cache=True, logits_to_keep=1)
    return spans.pop()


def _save(body: dict[str, Any], settings: Settings, bench: Bench, out: Path) -> None:
    body["data"] = {"name": settings.data, **body["data"]}
    told = {
        "model": settings.name, **body, "rows": ROWS, "metric": settings.metric, "instruction": settings.instruction,
        "base_lm": settings.base_lm, "settings": _identity(settings, bench),
    }  # fmt: skip
    (out / MARKDOWN).write_text(summary.markdown(told))
    (out / CSV).write_text(summary.table_csv(told))
    results.save(out / RESULTS, "eval", told, seed=settings.seed, device=bench.model.device)
