"""``vtr list``: the policies, models and model families there are; one policy's settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

import vtr
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
    "pocket-pretrained": "pretrained tower and decoder, joined untrained; to be built: " + COMMAND,
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
            settings = "\n".join(f"{key}={_default(field)}" for key, field in _settings(name).items()) or "–"
            table.add_row(name, escape(settings), escape(_about(policy_class(name))[0]))
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
    what, more = _about(cls)
    console.print(f"[b]{name}[/]  {escape(what)}\n", highlight=False)
    if more:
        console.print(escape(more) + "\n", highlight=False)
    console.print(f"[b]looks at the question[/]  {'yes' if cls.question_guided else 'no'}", highlight=False)
    meanings = meanings_of(cls)
    table = _table("setting", "default", "meaning")
    for key, field in _settings(name).items():
        table.add_row(key, escape(_default(field)), escape(meanings.get(key, "")))
    if issubclass(cls, Learned):
        table.add_row("weights", "", f"a folder with trained weights, or {' or '.join(vtr.pocket.POLICIES)}")
    if table.row_count:
        console.print(table)
    example = escape(example_of(name)) + (f" --model {ELSEWHERE[name]}" if name in ELSEWHERE else "")
    console.print(f"[b]e.g.[/]  vtr run --sample 0 --compare --policy {example}", soft_wrap=True)


def example_of(name: str) -> str:
    """A spec string that works on the pocket model: the defaults, written out as far as the first setting."""
    cls = policy_class(name)
    if issubclass(cls, Learned) and name != "autoscale":
        return f"{name}:weights=pocket"
    if cls is vtr.Chain:
        return "m3:tokens=36+fastv:keep=0.5"
    if cls is vtr.ByImage:
        return vtr.ByImage("m3:9", last="none").spec
    try:
        return cls().spec if name != "gsearch" else "gsearch:schedule=pocket"
    except (TypeError, ValueError):  # a setting without a default
        return f"{name}:{cls.first_setting()}=…"


def meanings_of(cls: type[vtr.Policy]) -> dict[str, str]:
    """What a policy's docstring says under ``Args`` of each of its settings; several may stand in one line."""
    text = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.S | re.M)
    name = "|".join(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
    if text is None or not name:
        return {}
    said = " ".join(text[1].split())
    parts = re.split(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", said)[1:]
    found: dict[str, str] = {}
    for names, meaning in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(names.split(", "), _plain(meaning.strip()))
    return found


def _settings(name: str) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(policy_class(name)) if field.init}  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> str:
    """As a spec string has it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "(needed)"
    return (
        value
        if isinstance(value, str)
        else json.dumps(value.to_json() if hasattr(value, "to_json") else value, separators=(",", ":"))
    )


def _about(cls: type[vtr.Policy]) -> tuple[str, str]:
    """The first paragraph of a policy's docstring, and those up to its Args."""
    first, _, rest = (inspect.getdoc(cls) or "").partition("\n\n")
    rest = re.split(r"^(?:Args|Raises|Attributes):", rest, maxsplit=1, flags=re.M)[0]
    return _plain(first), "\n\n".join(_plain(part) for part in rest.split("\n\n") if part.strip())


def _plain(text: str) -> str:
    """Without the marks of a docstring, in one line."""
    return re.sub(r":\w+:`[~.]*([^`]+)`", r"\1", " ".join(text.split())).replace("``", "")


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title=title, title_justify="left")
    for n, name in enumerate(columns):
        table.add_column(name, no_wrap=n == 0, overflow="fold")
    return table
