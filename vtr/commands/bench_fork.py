"""``vtr bench fork``: many questions on one picture, from forks of one prefill and with a prefill each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.commands._bench import medians, show


def bench_fork(
    questions: Annotated[int, typer.Option(help="asked about one picture")] = 16,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="a spec, or none; may be given again; default: none, m3:tokens=36, globalcom2:retention=0.25"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="timed rounds, after one that warms up")] = 7,
    tokens: Annotated[int, typer.Option(help="decoded for each answer, at most")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Show what many questions on one picture cost the pocket model, four ways that take turns.

    * `prefills` — each question with its picture, one after another: CPU seconds of one thread for all of them.

    * `forks` — the picture once, then each question on a `vtr.fork` of the cache.

    * `batch of prefills`, `batch of forks` — all questions at once.

    Behind the seconds, the other ways over `prefills`: the median of rounds, with the smallest and the largest; less
    is better. `same` says how many answers are those of `prefills`, in the order of the other ways.

    Examples:

    * `vtr bench fork` — minutes on one core

    * `vtr bench fork --policy none --policy pool:grid=6 --questions 8 --rounds 3`
    """
    from tqdm import tqdm

    from vtr.commands._console import check_file, console, fail
    from vtr.eval.cost import forks
    from vtr.eval.report import results

    specs = tuple(policy or forks.POLICIES)
    try:
        check_file(json_file, "--json", made=True)
        total = len(specs) * len(forks.WAYS) * (rounds + 1)
        with tqdm(total=total, unit="run", desc="vtr bench fork") as bar:
            body = forks.measure(questions, specs, rounds, tokens, done=bar.update)
        if json_file is not None:
            results.save(json_file, "fork", body, seed=0)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    heads = ["policy", "prefills, s", *forks.WAYS[1:], "same"]
    show(heads[:1], heads[1:], medians([line(row, body["questions"]) for row in body["rows"]]), right=True)
    console.print(
        f"{body['questions']} questions on one picture, {body['shared']} tokens shared, {body['tokens']} decoded; CPU "
        "time of one thread",
        highlight=False,
    )


def line(row: Mapping[str, Any], questions: int) -> list[str]:
    """A policy's cells."""
    ratios = [f"{mid:.2f} ({low:.2f}–{high:.2f})" for name, (mid, low, high) in row["ratios"].items()][1:]
    same = "/".join(str(count) for name, count in row["same"].items() if name != "prefills")
    seconds = statistics.median(row["seconds"]["prefills"])
    return [row["policy"], f"{seconds:.2f}", *ratios, f"{same} of {questions}"]
