"""The ``vtr`` command."""

from __future__ import annotations

import typer

from vtr.commands.bench import bench
from vtr.commands.convert import convert_command
from vtr.commands.encode import encode_command
from vtr.commands.eval import eval_command
from vtr.commands.eval_published import published_command
from vtr.commands.list import list_command
from vtr.commands.page import page_command
from vtr.commands.play import play_command
from vtr.commands.run import run_command
from vtr.commands.search import search
from vtr.commands.serve import PASSED_ON, serve_command
from vtr.commands.train import train_command
from vtr.commands.tune import tune

HELP = """Vision-token reduction for multimodal LLMs: fewer image tokens in the decoder, a policy per request.

A policy is written `name:setting=value,…`, and two are joined by `+`: `fastv:keep=0.25,layer=2`,
`m3:tokens=36`, `m3:tokens=144+fastv:keep=0.5`. Without `--model` the embedded pocket model answers, offline.

* `vtr run --sample 0 --policy fastv:keep=0.05 --compare` — a first look

* `vtr play` — the same in a browser, policies side by side

* `vtr list` — which policies and models there are

* `vtr eval --policies all --limit 40` — which policy keeps what

* `python -m vtr.auto --help` — somebody else's script, unedited
"""
TRY, MEASURE, MAKE, SERVE = "Try", "Measure", "Find and train", "Serve"

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=HELP)


@app.callback()
def main() -> None:
    """Its help is HELP."""


app.command("run", rich_help_panel=TRY)(run_command)
app.command("play", rich_help_panel=TRY)(play_command)
app.command("list", rich_help_panel=TRY)(list_command)
app.add_typer(bench, name="bench", rich_help_panel=MEASURE)
app.add_typer(search, name="search", rich_help_panel=MAKE)
evaluate = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")
evaluate.callback()(eval_command)
evaluate.command("published")(published_command)
app.add_typer(evaluate, name="eval", rich_help_panel=MEASURE)
app.command("page", rich_help_panel=MEASURE)(page_command)
app.add_typer(tune, name="tune", rich_help_panel=MAKE)
app.command("train", rich_help_panel=MAKE)(train_command)
app.command("convert", rich_help_panel=MAKE)(convert_command)
app.command("serve", rich_help_panel=SERVE, context_settings=PASSED_ON)(serve_command)
app.command("encode", rich_help_panel=SERVE)(encode_command)


if __name__ == "__main__":
    app()
