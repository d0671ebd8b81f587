"""``vtr.display``: reports, policies and schedules as notebooks show them, and as text elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from vtr.about import about
from vtr.base import Policy


def display(*things: Any) -> None:
    """Show reports, policies and schedules.

    A notebook (Jupyter, Colab) gets their HTML: tables with a bar a layer. Elsewhere their text is printed: of a report
    and a schedule ``thing.table()``, of a policy its spec string and what it does, of anything else its ``repr``.

    >>> vtr.display(vtr.report(model))
    >>> vtr.display(vtr.policy("fastv:keep=0.25"), vtr.schedule.presets()["llava-1.5-7b"].schedule)
    """
    if in_notebook():
        from IPython.display import display as rich

        rich(*things)
        return
    for thing in things:
        print(in_text(thing))


def in_notebook() -> bool:
    """Whether this runs in a kernel that shows HTML; IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def in_text(thing: Any) -> str:
    """What is printed of it in a terminal."""
    if isinstance(thing, Policy):
        return f"{thing.spec}\n  {about(type(thing))[0]}"
    return str(thing.table()) if hasattr(thing, "table") else repr(thing)
