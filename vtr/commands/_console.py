"""What every command shares: where it writes, and how it says that something is wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

console = Console()


def fail(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, without a traceback."""
    said = f"[bold red]{type(error).__name__}[/]: {escape(in_words(error))}"
    Console(stderr=True).print(said, soft_wrap=True, highlight=False)
    return typer.Exit(1)


def in_words(error: Exception) -> str:
    """An error's message; where the system refuses a file, which one and why, without a number."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    why = {
        FileNotFoundError: "there is no such file or folder",
        PermissionError: "this user may not read or write it",
        IsADirectoryError: "it is a folder, not a file",
        NotADirectoryError: "a file stands where a folder should be",
        FileExistsError: "it is there already, as a file",
    }
    return f"{error.filename}: {why.get(type(error), error.strerror)}"


# -- what is to be written, asked before the work begins ---------------------------------------------------------------
def check_folder(folder: Path | None, option: str = "--out") -> None:
    """Raise unless files can be written into ``folder``, which need not be there yet. None is no folder.

    Raises:
        ValueError: it is a file, lies below one, or this user may not write there. Names the ``option``.
    """
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder}: this is a file, but a folder is written: give another name")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: {there} is a file, so there can be no folder in it")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot write to {there} ({error.strerror})") from error


def check_file(file: Path | None, option: str, made: bool = False) -> None:
    """Raise unless ``file`` can be written. None is no file.

    Args:
        made: its folder is made where it is not there.

    Raises:
        ValueError: it is a folder, its folder is not there, or this user may not write there. Names the ``option``.
    """
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{option} {file}: this is a folder, but a file is written: name one in it")
    if not made and not file.parent.exists():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}: make it first")
    check_folder(file.parent, option)
