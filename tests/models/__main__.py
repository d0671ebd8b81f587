"""``python -m tests.models``: what vtr does with every image-text class of the installed transformers.

``--write`` puts the outcomes into outcomes.json and the table into docs/models.md; ``--against FILE`` says what differs
from the outcomes of another transformers, and fails if something is worse.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from tests.models import compare, page, tiny
from tests.models.outcome import Outcome, outcome

FILE = Path(__file__).parent / "outcomes.json"
SECONDS = 240
"""Of CPU time that a class may take."""
console = Console()


def work(name: str, pipe: Any) -> None:
    """One class in a process of its own, which may die of it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        pipe.send(outcome(name))


def outcomes(names: Sequence[str], processes: int) -> Iterator[tuple[str, Outcome]]:
    """Of each class, as they come."""
    forks = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name, (here, there) = waiting.pop(0), forks.Pipe(duplex=False)
            process = forks.Process(target=work, args=(name, there))
            process.start()
            there.close()
            running[here] = name, process
        for here in multiprocessing.connection.wait(list(running)):
            name, process = running.pop(here)
            try:
                found = here.recv()
            except EOFError:
                process.join()
                late = process.exitcode == -24  # SIGXCPU
                why = f"it takes more than {SECONDS} s" if late else f"the process ended with {process.exitcode}"
                found = {"path": "not built", "why": why}
            process.join()
            yield name, found


def text(data: dict[str, Any]) -> str:
    """The outcomes as JSON with a line a class, sorted, so that a diff shows classes."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(one, sort_keys=True, ensure_ascii=False)}"
        for name, one in sorted(data["classes"].items())
    ]
    head = f'{{\n "transformers": {json.dumps(data["transformers"])},\n "classes": {{\n'
    return head + ",\n".join(lines) + "\n }\n}\n"


def main(
    classes: Annotated[list[str] | None, typer.Argument(help="only these, by (the beginning of) their names")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="put the outcomes into outcomes.json and docs/models.md")
    ] = False,
    against: Annotated[Path | None, typer.Option(help="say what differs from the outcomes in this file")] = None,
    processes: Annotated[int, typer.Option("--processes", "-p", min=1, help="classes at a time")] = 2,
    only_page: Annotated[bool, typer.Option("--page", help="only make docs/models.md of outcomes.json again")] = False,
    older: Annotated[bool, typer.Option("--older", help="with --against: classes that are not there are fine")] = False,
) -> None:
    """What vtr does with every image-text class of the installed transformers, on tiny random models."""
    if only_page:
        return page.write(json.loads(FILE.read_text(encoding="utf-8")))
    names = [name for name in tiny.CLASSES if not classes or name.startswith(tuple(classes))]
    data: dict[str, Any] = {"transformers": page.version(), "classes": {}}
    if write and classes and FILE.exists():
        data["classes"] = json.loads(FILE.read_text(encoding="utf-8"))["classes"]
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name, one in outcomes(names, processes):
            data["classes"][name] = one
            bar.update(task, advance=1, description=name.removesuffix("ForConditionalGeneration"))
            if classes:
                console.print_json(json.dumps({name: one}))
            elif not console.is_terminal:
                console.print(f"{name}: {one['path']}", highlight=False, soft_wrap=True)
            if write:  # so that what is there is there, if it breaks off
                FILE.write_text(text(data), encoding="utf-8")
    if write:
        page.write(data)
    console.print(page.counts(data))
    if against is not None:
        old = json.loads(against.read_text(encoding="utf-8"))
        if classes:
            old["classes"] = {name: one for name, one in old["classes"].items() if name in names}
        worse = compare.report(old, data, console, gone_is_fine=older)
        raise typer.Exit(1 if worse else 0)


if __name__ == "__main__":
    typer.run(main)
