"""``vtr list``: the policies and model families there are."""

from __future__ import annotations

import dataclasses

from rich.table import Table

import vtr
from vtr.commands._console import console
from vtr.engine.adapters import families
from vtr.settings import policy_class


def list_command() -> None:
    """Show the policies and model families there are.

    Of every policy its settings with their defaults, and whether it looks at the question.

    * `vtr list`
    """
    table = Table("policy", "settings and defaults", "looks at the question", "what it does", title="Policies")
    for name in vtr.list_policies():
        cls = policy_class(name)
        if cls is vtr.Chain:
            continue
        settings = ", ".join(f"{k}={v}" for k, v in cls().config().items())
        guided = "yes" if cls.question_guided else "no"
        doc = (cls.__doc__ or "").strip().split("\n\n")[0].replace("``", "")
        assert dataclasses.is_dataclass(cls)
        table.add_row(name, settings, guided, " ".join(doc.split()))
    console.print(table)
    console.print("Join policies with +, e.g. a compressor before the decoder and a pruner in it: [b]a:…+b:…[/]")
    console.print(
        "pmod and dynamic-llava need trained weights: [b]weights=FOLDER[/]; of the pocket model: weights=pocket"
    )
    known = Table("family", "transformers classes", title="Model families")
    for family, classes in families().items():
        known.add_row(family, ", ".join(classes))
    console.print(known)
