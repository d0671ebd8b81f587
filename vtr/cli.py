"""The ``vtr`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtr.commands.bench import bench
from vtr.commands.convert import convert_command
from vtr.commands.encode import encode_command
from vtr.commands.eval import eval_command
from vtr.commands.page import page_command
from vtr.commands.search import search
from vtr.commands.serve import PASSED_ON, serve_command
from vtr.commands.train import train_command

HELP = """Vision-token reduction for multimodal LLMs: fewer image tokens in the decoder, a policy per request.

A policy is written `name:setting=value,…`, and two are joined by `+`: `fastv:keep=0.25,layer=2`,
`m3:tokens=36`, `m3:tokens=144+fastv:keep=0.5`. Without `--model` the embedded pocket model answers, offline.

* `vtr run --sample 2 --policy fastv:keep=0.05 --compare` — a first look

* `vtr list` — which policies and models there are

* `vtr eval --policies all --limit 40` — which policy keeps what

* `python -m vtr.auto --help` — somebody else's script, unedited
"""
TRY, MEASURE, MAKE, SERVE = "Try", "Measure", "Find and train", "Serve"

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=HELP)
console = Console()


@app.callback()
def main() -> None:
    """Its help is HELP."""


def fail(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, without a traceback."""
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


@app.command(rich_help_panel=TRY)
def run(
    image: Annotated[Path | None, typer.Argument(help="a picture file; leave out with --sample")] = None,
    question: Annotated[str | None, typer.Argument(help="what to ask about it")] = None,
    policy: Annotated[str, typer.Option(help="how to reduce, e.g. `fastv:keep=0.25,layer=2` or `none`")] = "none",
    budget: Annotated[
        str | None,
        typer.Option(help="set the policy to a mean of so many vision tokens a layer (192), or a share (0.25)"),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="also run: no reduction, random, uniform grid")] = False,
    show: Annotated[
        Path | None,
        typer.Option(help="write the picture with the kept tokens here (PNG, PDF, …; .gif: layer by layer)"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="the pocket model"),
    ] = None,
    sample: Annotated[int | None, typer.Option(help="use shipped sample picture 0, 1 or 2")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs; the median is shown")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
) -> None:
    """Ask a question about a picture, with fewer vision tokens.

    Prints the answer, the vision tokens entering each decoder layer, prefill and decode time, FLOPs and KV bytes.

    * `vtr run --sample 0 --policy fastv:keep=0.1 --compare --show kept.png`

    * `vtr run --sample 0 --policy fastv --budget 192` — of this prompt's vision tokens, in the mean over layers

    * `vtr run cat.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --policy fastv:keep=0.25`
    """
    from vtr.commands import run as demo

    try:
        asked = demo.prepare(image, question, sample, model, device)
        policy = demo.at_budget(asked, policy, budget)
        rows = demo.compare(asked, policy, compare, max_new_tokens, repeats)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(f"[bold]{asked.question}[/]" + (f"   (expected: {asked.answer})" if asked.answer else ""))
    console.print(_table(rows))
    chosen = next(row for row in rows if row.spec == policy)
    counts = chosen.report.rows[0].vision_tokens
    per_layer = " ".join(map(str, counts))
    console.print(f"vision tokens into each decoder layer with [bold]{policy}[/]: {per_layer}", highlight=False)
    if chosen.report.selector_ms:
        console.print(f"choosing them took {chosen.report.selector_ms:.1f} ms of the prefill", highlight=False)
    if show is not None:
        try:
            demo.save_picture(asked, chosen, show)
        except (ValueError, OSError) as error:
            raise fail(error) from error
        console.print(f"kept tokens drawn to [bold]{show}[/]")


@app.command("list", rich_help_panel=TRY)
def list_command() -> None:
    """Show the policies and model families there are.

    Of every policy its settings with their defaults, and whether it looks at the question.

    * `vtr list`
    """
    import dataclasses

    import vtr
    from vtr.engine.adapters import families
    from vtr.settings import policy_class

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


def _table(rows: list[Any]) -> Table:
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("policy", overflow="fold")
    table.add_column("answer", overflow="fold")
    wide = console.width >= 100
    names = ["kept", "prefill\nms", "speed-\nup", *["1st token\nms"] * wide, "decode\nms/token", "GFLOPs", "KV\nKiB"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    base = rows[0]
    for row in rows:
        r, t = row.report, row.timing
        table.add_row(
            row.spec,
            row.answer,
            f"{r.rows[0].mean_keep:.0%}",
            f"{t.prefill_ms:.1f}",
            f"{base.timing.prefill_ms / t.prefill_ms:.2f}×",
            *[f"{t.first_token_ms:.1f}"] * wide,
            "–" if t.decode_ms is None else f"{t.decode_ms:.1f}",
            f"{r.flops / 1e9:.3g}",
            f"{r.kv_bytes / 1024:.0f}",
        )
    return table


app.add_typer(bench, name="bench", rich_help_panel=MEASURE)
app.add_typer(search, name="search", rich_help_panel=MAKE)
app.command("eval", rich_help_panel=MEASURE)(eval_command)
app.command("page", rich_help_panel=MEASURE)(page_command)
app.command("train", rich_help_panel=MAKE)(train_command)
app.command("convert", rich_help_panel=MAKE)(convert_command)
app.command("serve", rich_help_panel=SERVE, context_settings=PASSED_ON)(serve_command)
app.command("encode", rich_help_panel=SERVE)(encode_command)


if __name__ == "__main__":
    app()
