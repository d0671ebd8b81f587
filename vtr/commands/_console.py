"""What every command shares: where it writes, and how it says that something is wrong."""

from __future__ import annotations

import typer
from rich.console import Console

console = Console()


def fail(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, without a traceback."""
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", soft_wrap=True, highlight=False)
    return typer.Exit(1)
