"""What the commands of ``vtr bench`` share: where results go, and tables and lines on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[Path | None, typer.Option("--json", help="write the result here, and its plot beside it")]
Out = Annotated[Path | None, typer.Option("--out", help="write result and plot into this folder")]
Device = Annotated[str, typer.Option(help="cpu, or cuda for the shapes of LLaVA-1.5-7B")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default on cpu) or bfloat16 (default on cuda)")]
WIDE = 100


def say(lines: Sequence[str]) -> None:
    """Print lines at once, above a progress bar where there is one, also where nothing is a terminal."""
    from tqdm import tqdm

    from vtr.commands._console import console

    with tqdm.external_write_mode():
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.file.flush()


def check_targets(json_file: Path | None, out: Path | None) -> None:
    """Raise ValueError unless results can be written there: asked before anything is measured."""
    from vtr.commands._console import check_file, check_folder

    check_file(json_file, "--json", made=True)
    check_folder(out)
    if json_file is not None and json_file.suffix != ".json":
        raise ValueError(f"--json {json_file}: a result file's name ends in .json (its plot is a .png beside it)")


def write(body: Mapping[str, Any], kind: Any, json_file: Path | None, out: Path | None, seed: int, device: str) -> None:
    """The result file and its plot, where they were asked for."""
    from vtr.eval.report import plots, results

    for path in {json_file, None if out is None else out / f"{kind}.json"} - {None}:
        assert path is not None
        data = results.save(path, kind, body, seed=seed, device=device)
        draw: Callable[[Any], Any] = getattr(plots, kind)
        draw(data).savefig(path.with_suffix(".png"), dpi=130)


def medians(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """On a narrow terminal, medians without their ranges in brackets; the files have everything."""
    from vtr.commands._console import console

    return [[cell if console.width >= WIDE else cell.split(" (")[0] for cell in row] for row in rows]


def show(fixed: Sequence[str], others: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> None:
    """Print a table; ``fixed`` columns are never folded."""
    from rich import box
    from rich.table import Table

    from vtr.commands._console import console

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in fixed:
        table.add_column(name, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if right else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
