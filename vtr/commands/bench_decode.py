"""``vtr bench decode``: what a decoded token costs, with transformers and with vtr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.commands._bench import Device, Dtype, check_targets, say, show, write


def bench_decode(
    small: Annotated[
        bool, typer.Option("--small", help="a narrow model, 64 tokens: minutes, most of them spent compiling")
    ] = False,
    tokens: Annotated[
        list[int] | None, typer.Option(help="decoded; may be given again; default: 64 and 512, with --small 64")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="rows; may be given again; default: 1 and 8")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="fastv, gsearch, pyramid, m3, dynamic-llava, mixed, keep-all, or a spec; may be given again; "
            "default: all that have a name"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--json", help="write the result into this .json file or folder, its plot beside it"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write the plot here (.png, .pdf or .svg)")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="of weights and prompts")] = 0,
) -> None:
    """Show what a decoded token costs five ways, over transformers' own way: a growing cache, nothing compiled.

    * `HF dynamic` — the unpatched model on the unreduced prompt: 1.00.

    * `HF static, compiled` — the same with `cache_implementation="static"`, compiled as transformers does it.

    * `vtr` — under a policy, with the cache that grows.

    * `vtr static`; `vtr static, compiled` — under a policy with `cache_implementation="static"`, without and with
      `compile_config`.

    All five take turns, a token each, and what is compared is CPU time of one thread: it hardly changes with what else
    runs. The first tokens do not count. A ratio is one of sums, with those of eighths of the run in brackets; less is
    better. With `--device cuda` they run one after another, and time is that of the clock.

    * `ms` — of a token, median; `same` — says the tokens that `vtr` says; `KV` — bytes of the cache at the end, live /
      allocated; `compiled in` — seconds on the clock (kernels that an earlier case needed are there already).

    * `fastv` keeps a quarter from layer 2 on; `mixed` — eight rows, six policies, a row without a picture;
      `dynamic-llava` forgets words; `keep-all` drops nothing: equal lengths with transformers.

    What cannot run is listed as refused, with what it said.

    Examples:

    * `vtr bench decode --small`

    * `vtr bench decode --small --policy fastv --batch 8` — one case

    * `vtr bench decode --out decode.json` — 64 and 512 tokens, every policy: hours on two cores
    """
    from vtr.commands._console import check_file, console, fail
    from vtr.eval.cost import decode as measure
    from vtr.eval.report import decoded, plots

    json_file, folder = (out, None) if out is not None and out.suffix == ".json" else (None, out)
    try:
        check_targets(json_file, folder)
        check_file(plot, "--plot", made=True)
        if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--plot {plot}: name a .png, .pdf or .svg file")
        size, precision = measure.choose(small, device, dtype)
        lengths = tokens or (measure.FEW_TOKENS if small else measure.TOKENS)
        given = (policy or measure.EVERY, batch or measure.BATCHES, lengths)
        body = progress(measure, size, device, precision, seed, *given)
        write(body, "decode", json_file, folder, seed, device)
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            plots.decode(body).savefig(plot, dpi=130)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    heads, rows = table(body)
    show(heads[:1], heads[1:], rows, right=True)
    console.print(decoded.footer(body), highlight=False)
    for line in decoded.refusals(body) + decoded.goals(body):
        console.print(line, highlight=False, markup=False)


def table(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows. On a narrow terminal without spreads, which the lines above it had."""
    from vtr.commands._console import console
    from vtr.eval.report import decoded

    heads, rows = decoded.rows(body)
    if console.width >= 120:
        return heads, rows
    return [head.replace(", ", ",\n") for head in heads], [[cell.split(" (")[0] for cell in row] for row in rows]


def progress(measure: Any, *given: Any) -> dict[str, Any]:
    """Measure with a bar; each case is printed as it is there."""
    from contextlib import ExitStack

    from tqdm import tqdm

    from vtr.eval.report import decoded

    bars: list[Any] = []
    with ExitStack() as stack:

        def done(count: int, total: int) -> None:
            if not bars:  # what is wrong with the options has been said before
                bars.append(stack.enter_context(tqdm(total=total, unit="token", desc="vtr bench decode")))
            bars[0].update(count - bars[0].n)

        found: dict[str, Any] = measure.measure(*given, done=done, found=lambda row: say(decoded.lines(row)))
    return found
