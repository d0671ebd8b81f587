"""``vtr list``: the policies, models and model families there are; one policy's settings."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import vtr
from vtr.about import about, default_of, meanings_of
from vtr.commands._console import console, fail
from vtr.engine.adapters import families
from vtr.groups import grouped
from vtr.learned import Learned
from vtr.models import skeleton
from vtr.pocket.pretrained import COMMAND
from vtr.settings import policy_class

ELSEWHERE = {"msac": "pocket-internvl"}
"""Policies that the default model cannot have, and a model that can."""
HOW = """[b]How to write a policy[/]  name:setting=value,…  e.g. [b]fastv:keep=0.25,layer=2[/]
A setting left out has its default; a keep is a ratio (0.25) or a count (64).
Two policies are joined by +: [b]m3:tokens=144+fastv:keep=0.5[/], [b]fewer_crops+globalcom2:0.25[/]
One for each image of a prompt: [b]by_image:default="m3:9",last="none"[/]
No reduction is called [b]none[/].

  vtr list NAME                                  its settings, what they mean
  vtr run --sample 0 --policy NAME --budget 0.25   try it at a budget
"""
MODELS = {
    "pocket": "a tiny LLaVA-NeXT, the default",
    "pocket-joint": "the same, trained along with the policies",
    "pocket-internvl": "a tiny InternVL",
    "pocket-video": "the same, trained to watch films",
    "pocket-shots": "reads demonstrations (vtr eval --shots)",
    "pocket-pretrained": "pretrained tower and decoder, joined by weights that ship with vtr; to be built: " + COMMAND,
}


def list_command(
    policy: Annotated[str | None, typer.Argument(help="show the settings of this one", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder, a hub name or a pocket model: what is possible with it")
    ] = None,
) -> None:
    """Show the policies and model families there are, one policy's settings, or what is possible with a model.

    Of every policy its settings with their defaults, and whether it looks at the question; with a NAME what the
    settings mean. With --model what was found of it: decoder, layers, vision tower, image token, and which policies
    cannot work on it. Only its config is read, no weights.

    * `vtr list`

    * `vtr list fastv`

    * `vtr list --model llava-hf/llava-1.5-7b-hf`
    """
    if policy is None and model is None:
        _show_all()
        return
    try:
        if policy is not None:
            _show_one(policy.partition(":")[0].strip())
        if model is not None:
            console.print(escape(str(vtr.describe(skeleton(model)))), highlight=False, soft_wrap=True)
    except (ValueError, RuntimeError) as error:
        raise fail(error) from error


def _show_all() -> None:
    console.print(HOW, highlight=False)
    for title, names in grouped().items():
        table = _table("policy", "settings and defaults", "what it does", title=title)
        for name in names:
            settings = "\n".join(f"{key}={default_of(field)}" for key, field in _settings(name).items()) or "–"
            table.add_row(name, escape(settings), escape(about(policy_class(name))[0]))
        console.print(table)
    console.print(
        "pmod and dynamic-llava need trained weights: [b]weights=FOLDER[/]; of the pocket model: weights=pocket"
    )
    known = _table("--model", "", title="Models: these, a folder, or a name of the hub")
    for name in vtr.pocket.NAMES:
        known.add_row(name, MODELS.get(name, ""))
    console.print(known)
    known = _table("family", "transformers classes", title="Model families")
    for family, classes in families().items():
        known.add_row(family, ", ".join(classes))
    console.print(known)
    console.print(
        "Any other image-text model of transformers that merges images at placeholder tokens is known by its parts, "
        "and tested when it is patched: [b]vtr list --model FOLDER[/] says what is possible with it."
    )


def _show_one(name: str) -> None:
    cls = policy_class(name)
    what, more = about(cls)
    console.print(f"[b]{name}[/]  {escape(what)}\n", highlight=False)
    if more:
        console.print(escape(more) + "\n", highlight=False)
    console.print(f"[b]looks at the question[/]  {'yes' if cls.question_guided else 'no'}", highlight=False)
    meanings = meanings_of(cls)
    table = _table("setting", "default", "meaning")
    for key, field in _settings(name).items():
        table.add_row(key, escape(default_of(field)), escape(meanings.get(key, "")))
    if issubclass(cls, Learned):
        table.add_row("weights", "", f"a folder with trained weights, or {' or '.join(vtr.pocket.POLICIES)}")
    if table.row_count:
        console.print(table)
    example = escape(policy_class(name).example()) + (f" --model {ELSEWHERE[name]}" if name in ELSEWHERE else "")
    console.print(f"[b]e.g.[/]  vtr run --sample 0 --compare --policy {example}", soft_wrap=True)


def _settings(name: str) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(policy_class(name)) if field.init}  # type: ignore[arg-type]


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title=title, title_justify="left")
    for n, name in enumerate(columns):
        table.add_column(name, no_wrap=n == 0, overflow="fold")
    return table
