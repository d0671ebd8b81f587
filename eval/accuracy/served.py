"""The answers of ``vtr eval`` once more, from a server: ``python -m vtr.eval.accuracy.served RUN``.

A run's questions are sent to a server under the run's policies, and what it says is compared with what vtr on
transformers said (the run's ``samples.jsonl``), answer by answer. Greedy both times.

    vtr eval -p "fastv:keep=0.25,layer=2;pyramid:positions=keep" --limit 200 --out runs/served
    vtr serve pocket --decoder-policies -- --dtype float32 --enforce-eager
    python -m vtr.eval.accuracy.served runs/served
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm
from vtr.eval.accuracy.answers import question_of
from vtr.eval.accuracy.data import Sample, open_data
from vtr.eval.accuracy.journal import Journal
from vtr.eval.accuracy.metrics import Metric, metric
from vtr.eval.cost.serve import data_url, first_model
from vtr.eval.report import results

AGAIN = 3
"""Answers that differ which are shown, of each policy."""


def body(model: str, sample: Sample, spec: str, instruction: str, tokens: int) -> dict[str, Any]:
    """The request for one answer, as ``vtr eval`` asks: a picture, then the question."""
    url = data_url(sample.picture())
    text = question_of(sample, instruction)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0,
        "add_special_tokens": True, "vtr": spec,  # the pocket model's template leaves BOS to the tokenizer
    }  # fmt: skip


async def said(
    client: Any, model: str, samples: Sequence[Sample], spec: str, instruction: str, tokens: int, at_a_time: int
) -> list[str]:
    """The answers of a server, in order.

    Raises:
        RuntimeError: it refused a request.
    """
    gate, bar = asyncio.Semaphore(at_a_time), tqdm(total=len(samples), desc=spec[:40], mininterval=5)

    async def one(sample: Sample) -> str:
        async with gate:
            request = body(model, sample, spec, instruction, tokens)
            answer = await client.post("/v1/chat/completions", json=request)
        if answer.status_code != 200:
            raise RuntimeError(f"{spec}: the server said {answer.status_code}: {answer.text[:300]}")
        bar.update()
        return str(answer.json()["choices"][0]["message"]["content"]).strip()

    with bar:
        return list(await asyncio.gather(*map(one, samples)))


def compared(
    spec: str, samples: Sequence[Sample], rows: Sequence[dict[str, Any]], answers: Sequence[str], counts: Metric
) -> dict[str, Any]:
    """One policy: how many answers are equal, and how many are right here and there."""
    there = [row["policies"][spec] for row in rows]
    scores = [counts.score(text, sample.answers, sample.choices) for text, sample in zip(answers, samples, strict=True)]
    differ = [
        {"index": row["index"], "question": row["question"], "eval": cell["said"], "server": text}
        for row, cell, text in zip(rows, there, answers, strict=True)
        if cell["said"] != text
    ]
    count = len(rows)
    return {
        "policy": spec, "questions": count, "equal": count - len(differ), "differ": differ[:AGAIN],
        "accuracy": sum(scores) / count, "accuracy_of_eval": sum(cell["score"] for cell in there) / count,
    }  # fmt: skip


def compare(run: Path, url: str, model: str, limit: int | None, at_a_time: int) -> dict[str, Any]:
    """All policies of a run.

    Raises:
        ValueError: no run of ``vtr eval`` on pictures. OSError: the server cannot be reached. RuntimeError: it refused.
    """
    import httpx

    told = results.load(run / "results.json")
    settings = told["settings"]
    journal = Journal(run)
    journal.read()
    source = open_data(settings["data"], limit=settings["limit"], seed=settings["seed"], columns=settings["columns"])
    samples = [one for one in source if isinstance(one, Sample) and "policies" in journal.rows.get(one.index, {})]
    samples = samples[:limit]
    rows = [journal.rows[one.index] for one in samples]
    if not samples or any(row["question"] != one.question for row, one in zip(rows, samples, strict=True)):
        raise ValueError(f"{run}: the questions of this run cannot be had again")
    instruction, tokens, counts = settings["instruction"], settings["max_new_tokens"], metric(settings["metric"])

    async def everything() -> list[dict[str, Any]]:
        found = []
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
            for spec in settings["policies"]:
                answers = await said(client, model, samples, spec, instruction, tokens, at_a_time)
                found.append(compared(spec, samples, rows, answers, counts))
        return found

    try:
        return {"model": told["model"], "data": settings["data"], "rows": asyncio.run(everything())}
    except httpx.TransportError as error:
        raise OSError(f"{url} does not answer: {error}; start it with `vtr serve`") from error


def markdown(body: dict[str, Any]) -> str:
    """A line a policy."""
    lines = ["| policy | answers equal | accuracy, server | accuracy, `vtr eval` |", "|---|--:|--:|--:|"]
    for row in body["rows"]:
        equal, right = f"{row['equal']} of {row['questions']}", (row["accuracy"], row["accuracy_of_eval"])
        lines.append(f"| `{row['policy']}` | {equal} | {100 * right[0]:.1f} % | {100 * right[1]:.1f} % |")
    return "\n".join(lines)


def main(
    run: Annotated[Path, typer.Argument(help="what `vtr eval --out` wrote, with the policies to be asked for")],
    url: Annotated[str, typer.Option(help="the server, started by `vtr serve`")] = "http://127.0.0.1:8000",
    limit: Annotated[int | None, typer.Option(min=1, help="so many questions at most")] = None,
    at_a_time: Annotated[int, typer.Option(min=1, help="requests under way")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Compare a server's answers with those of an evaluation; 1 where some differ."""
    try:
        body = compare(run, url, first_model(url), limit, at_a_time)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    if json_file is not None:
        results.save(json_file, "served", body, seed=0)
    typer.echo(markdown(body))
    for row in body["rows"]:
        for one in row["differ"]:
            typer.echo(f"{row['policy']}: {json.dumps(one)}")
    raise typer.Exit(int(any(row["equal"] < row["questions"] for row in body["rows"])))


if __name__ == "__main__":
    typer.run(main)
