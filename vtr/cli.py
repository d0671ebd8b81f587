"""The ``vtr`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtr.commands.eval import eval_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Vision-token reduction for multimodal LLMs. Try: `vtr run --sample 2 --policy fastv:keep=0.05 --compare`",
)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(bench, name="bench")
app.command("eval")(eval_command)
console = Console()


@app.callback()
def main() -> None:
    """Vision-token reduction for multimodal LLMs."""


def fail(error: Exception) -> typer.Exit:
    """Say what went wrong in one line, without a traceback."""
    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", soft_wrap=True, highlight=False)
    return typer.Exit(1)


@app.command("list")
def list_command() -> None:
    """Show the policies and model families there are."""
    import dataclasses

    import vtr
    from vtr.engine.adapters import families
    from vtr.registry import policy_class

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
    known = Table("family", "transformers classes", title="Model families")
    for family, classes in families().items():
        known.add_row(family, ", ".join(classes))
    console.print(known)


@app.command()
def run(
    image: Annotated[Path | None, typer.Argument(help="a picture file; leave out with --sample")] = None,
    question: Annotated[str | None, typer.Argument(help="what to ask about it")] = None,
    policy: Annotated[str, typer.Option(help="how to reduce, e.g. `fastv:keep=0.25,layer=2` or `none`")] = "none",
    compare: Annotated[bool, typer.Option("--compare", help="also run: no reduction, random, uniform grid")] = False,
    show: Annotated[Path | None, typer.Option(help="write the picture with the kept tokens here (PNG, PDF, …)")] = None,
    model: Annotated[str | None, typer.Option(help="a folder or hub name; default: the pocket model")] = None,
    sample: Annotated[int | None, typer.Option(help="use shipped sample picture 0, 1 or 2")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs; the median is shown")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
) -> None:
    """Ask a question about a picture, with fewer vision tokens.

    Prints the answer, the vision tokens entering each decoder layer, prefill and decode time, FLOPs and KV bytes.

    * `vtr run --sample 0 --policy fastv:keep=0.1 --compare --show kept.png`

    * `vtr run cat.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --policy fastv:keep=0.25`
    """
    from vtr import demo

    try:
        asked = demo.prepare(image, question, sample, model, device)
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
            demo.draw(asked, chosen).savefig(show, dpi=150)
        except (ValueError, OSError) as error:
            raise fail(error) from error
        console.print(f"kept tokens drawn to [bold]{show}[/]")


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


@bench.callback()
def bench_main() -> None:
    """Measure vtr itself: is it as fast and as small as what it keeps allows? Try: `vtr bench engine --small`"""


@bench.command("engine")
def bench_engine(
    small: Annotated[bool, typer.Option("--small", help="a small model: done in three minutes on two cores")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the ratios here, as flat JSON")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the shapes of LLaVA-1.5-7B")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 (default on cpu) or bfloat16 (default on cuda)")] = None,
    repeats: Annotated[int | None, typer.Option(help="timed runs of each prefill; default: the model's own")] = None,
) -> None:
    """Show how near the engine comes to its limit, on a LLaVA-1.5 with random weights.

    Every line is a ratio of two things measured in turns in this run, with the smallest and the largest ratio of
    neighbouring runs: 1.00 is as good as what stands behind the ÷, less is better. Prefill is the text model from
    merged embeddings to hidden states; a decoded token is all that `generate` does for it.

    * `no_policy_…` — patched, no policy ÷ unpatched: what the patch costs those who do not use it.

    * `pruned_over_limit_…` — a pruned prefill ÷ the stock layers run on exactly the kept lengths: what choosing,
      gathering and packing cost. One cut (FastV), four cuts, a cut at every layer (G-Search).

    * `mixed_over_rows`, `mixed_over_padded` — eight requests with different policies in one batch ÷ the sum of them
      alone, and ÷ the unpatched padded batch.

    * `decode_over_unpatched_64`, `_512`, `_2048` — so many tokens decoded after FastV keep=0.25 ÷ unpatched;
      `decode_equal_lengths` — on a cache that lacks nothing; `decode_keep_50`, `_25`, `_10` — what is kept decides.

    * `kv_ratio`, `kv_allocated_ratio`, `peak_memory_ratio` — bytes of the cache, of its storage, and peak growth.

    Examples:

    * `vtr bench engine --small --json engine.json`

    * `vtr bench engine --device cuda --repeats 20`
    """
    import json

    from vtr.eval import bench_engine as engine

    try:
        size, precision, times = engine.choose(small, device, dtype, repeats)
        result = engine.measure(size, device, precision, times)
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in ("ratio", "median", "min–max"):
        table.add_column(name, no_wrap=True)
    table.add_column("what ÷ what")
    for row in engine.rows(result):
        table.add_row(*row)
    console.print(table)
    for line in engine.footer(result):
        console.print(line, highlight=False)


if __name__ == "__main__":
    app()
