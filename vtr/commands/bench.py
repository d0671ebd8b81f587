"""``vtr bench``: measure vtr itself and what every policy costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.commands._bench import Device, Dtype, Json, Out, check_targets, say, show, write
from vtr.commands._options import shared
from vtr.commands.bench_decode import bench_decode
from vtr.commands.bench_fork import bench_fork
from vtr.commands.bench_serve import bench_serve

bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Bench:
    """What the benches of random models are told."""

    small: Annotated[bool, typer.Option("--small", help="small sizes: done in minutes on two cores")] = False
    json_file: Json = None
    out: Out = None
    device: Device = "cpu"
    dtype: Dtype = None
    repeats: Annotated[int | None, typer.Option(help="timed runs of each; default: the model's own")] = None
    seed: Annotated[int, typer.Option(help="of weights and prompts")] = 0


@bench.callback()
def bench_main() -> None:
    """Measure vtr itself, and what every policy costs.

    * `vtr bench policies --small` — prefill, first token, decoding, memory of each policy at equal budgets

    * `vtr bench engine --small` — what vtr costs beside the model's own layers

    * `vtr bench scale --small` — how cost grows

    * `vtr bench decode --small` — a decoded token beside transformers' own, with growing and static caches

    * `vtr bench fork` — many questions on one picture: forks of one prefill beside a prefill each

    * `vtr bench launches` — what a GPU would be asked for, counted without one
    """


bench.command("decode")(bench_decode)
bench.command("fork")(bench_fork)
bench.command("serve")(bench_serve)


@bench.command("engine")
def bench_engine(
    small: Annotated[bool, typer.Option("--small", help="a small model: done in three minutes on two cores")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the ratios here, a flat result file")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    repeats: Annotated[int | None, typer.Option(help="timed runs of each prefill; default: the model's own")] = None,
    count: Annotated[
        str | None,
        typer.Option(
            help="instead of times, count the work of a prefill: auto, instructions, callgrind (valgrind) or cpu (CPU "
            "time); --repeats: turns at least"
        ),
    ] = None,
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

    On a machine that others use, wall-clock times differ by tenths. `--count` compares prefills with their limit by
    what one thread executes (`counted_…`): policy and limit take turns until the 95 % interval of the median ratio is
    within ±0.5 %, or 600 turns. `auto` takes the processor's count of instructions where there is one, else CPU time.
    `callgrind` counts instructions of a narrow model under valgrind: a quarter of an hour, the same whatever else runs,
    to be compared with other commits.

    Examples:

    * `vtr bench engine --small --json engine.json`

    * `vtr bench engine --small --count auto`

    * `vtr bench engine --device cuda --repeats 20`
    """

    from vtr.commands._console import check_file, console, fail
    from vtr.eval.cost import engine
    from vtr.eval.report import ratios, results

    try:
        check_file(json_file, "--json", made=True)
        size, precision, times = engine.choose(small, device, dtype, repeats)
        if count is None:
            result = engine.measure(size, device, precision, times)
        else:
            result = counted_work(size, count, device, dtype, repeats)
        if json_file is not None:
            results.save(json_file, "engine", result, seed=result["seed"], device=device)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    show(["ratio", "median", "95 %" if count else "min–max"], ["what ÷ what"], ratios.rows(result))
    for line in ratios.footer(result):
        console.print(line, highlight=False)


def counted_work(size: Any, kind: str, device: str, dtype: str | None, repeats: int | None) -> dict[str, Any]:
    """The work of prefills over their limits, each ratio printed as it comes.

    Raises:
        ValueError: another device or precision than the CPU's float32, or an unknown kind.
        RuntimeError: it cannot be counted here.
    """
    from tqdm import tqdm

    from vtr.eval.cost import callgrind, work
    from vtr.eval.report import ratios

    if device != "cpu" or dtype not in (None, "float32"):
        raise ValueError("--count compares the work of a CPU, in float32: leave out --device and --dtype")
    if kind == "callgrind":
        return callgrind.measure(callgrind.NARROW)

    def found(one: dict[str, Any]) -> None:
        [(key, ratio, interval, _)] = ratios.rows(one)
        say([f"{key} {ratio} ({interval}, {one[key + '_turns']} turns)"])
        bar.update()

    with tqdm(total=len(work.policies(size.layers)) + 1, unit="ratio", desc="vtr bench engine") as bar:
        return work.measure(size, kind, repeats or work.FEWEST, done=found)


@bench.command("policies")
@shared(Bench)
def bench_policies(
    given: Bench,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            help="llava-next-mid (AnyRes, 5 tiles of 576 tokens); on cuda or with --small also llava-1.5-7b, "
            "llava-next-7b, internvl2-8b",
        ),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="a mean keep; may be given again")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="measure these specs instead of all policies")] = None,
) -> None:
    """Show what every policy costs at equal budgets, beside no reduction and input downsampling.

    A budget is the mean over decoder layers of the share of an image's tokens that enters. Runs take turns after a
    warm-up; times are medians with the smallest and the largest in the JSON.

    * `prefill` — the text model from merged embeddings to hidden states, choosing included; `speed-up` — the median
      of no reduction ÷ the policy in the same round; `1st token` — the whole first forward; `decode` — all that
      `generate` does for a token; `select` — of the prefill, choosing tokens.

    * `req/s` — prompt and a short answer, batches of equal requests (on a CPU with fewer tokens a picture).

    * `GFLOPs` — of the prefill, counted by torch; the command fails if vtr's closed form is not within 0.1 %.

    * `KV` — keys and values after the prefill; fails if vtr reports other bytes than the tensors have. `peak` — by how
      much the prefill raises memory (a process each on a CPU).

    * `downsample` — no policy, a picture of fewer pixels (a tower for so many patches).

    On a GPU: bfloat16, CUDA events, published shapes with random weights, sdpa and FlashAttention 2 where installed.

    Examples:

    * `vtr bench policies --small --json policies.json`

    * `vtr bench policies --small --policy fastv:keep=0.1 --policy pool:grid=6+fastv:keep=0.5`

    * `vtr bench policies --device cuda --shapes llava-next-7b --out results`
    """
    from vtr.commands._console import console, fail
    from vtr.eval.cost import policies as measure
    from vtr.eval.cost.engine import choose as precision_of

    try:
        check_targets(given.json_file, given.out)
        precision = precision_of(given.small, given.device, given.dtype, given.repeats)[1]
        setup = measure.choose(given.small, given.device, shape)
        body = measure.measure(setup, given.device, precision, given.repeats, given.seed, budget or (), policy or ())
        write(body, "policies", given.json_file, given.out, given.seed, given.device)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    columns, rows = measure.table(body, wide=console.width >= 110)
    show(columns[:1], columns[1:], rows, right=True)
    console.print(measure.footer(body), highlight=False)
    for left in body["left_out"]:
        console.print(f"left out: {left['name']} at {left['budget']}: {left['why']}", highlight=False)


@bench.command("batch")
@shared(Bench)
def bench_batch(given: Bench) -> None:
    """Show what it costs that the requests of one batch have different policies.

    Prefill of eight rows in one batch ÷ the sum of the rows run alone, and ÷ the unpatched model on the padded batch;
    with the smallest and the largest ratio of neighbouring runs. Less is better; 1.00 is as good.

    Examples:

    * `vtr bench batch --small --json batch.json`
    """
    from vtr.commands._console import fail
    from vtr.eval.cost import batch as measure

    try:
        check_targets(given.json_file, given.out)
        size, precision, times = measure.choose(given.small, given.device, given.dtype, given.repeats)
        body = measure.measure(size, given.device, precision, times, given.seed)
        write(body, "batch", given.json_file, given.out, given.seed, given.device)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    show(["eight rows"], ["ms", "÷ its rows alone", "÷ unpatched, padded"], measure.table(body), right=True)


@bench.command("scale")
@shared(Bench)
def bench_scale(given: Bench) -> None:
    """Show how cost grows with vision tokens, batch size and length of the answer.

    One axis grows at a time: pictures of 576 tokens in one row, as a video's frames (576 to 30 thousand tokens;
    prefill), equal rows in a batch (1 to 64; prompt and 16 tokens), tokens of the answer (16 to 2048; prompt included).
    The slope is that of a straight line on log-log axes: 1 is linear, 2 quadratic. On a CPU the model is a narrow one
    and the default takes a quarter of an hour on two cores; `--small` stops at 4608 tokens, 16 rows and 256 tokens.

    Examples:

    * `vtr bench scale --small --out results`
    """
    from vtr.commands._console import fail
    from vtr.eval.cost import scale as measure
    from vtr.eval.cost.engine import choose

    try:
        check_targets(given.json_file, given.out)
        precision = choose(given.small, given.device, given.dtype, given.repeats)[1]
        ladder = measure.SMALL if given.small else measure.CUDA if given.device == "cuda" else measure.CPU
        body = measure.measure(ladder, given.device, precision, given.repeats, given.seed)
        write(body, "scale", given.json_file, given.out, given.seed, given.device)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    show(["what grows", "policy"], ["from", "to", "slope"], measure.table(body), right=True)


@bench.command("launches")
def bench_launches(
    layers: Annotated[int, typer.Option(help="of the text model; counts grow in proportion")] = 8,
    batch: Annotated[list[int] | None, typer.Option(help="rows; may be given again; default: 1, 8, 32")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 (all rows in one kernel) or float32 (row by row)")] = "bfloat16",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="count this one (may be given again), not the usual ones")
    ] = None,
    lines: Annotated[
        int, typer.Option("--where", min=0, help="show so many lines of code that launch, wait and copy most")
    ] = 0,
    against: Annotated[Path | None, typer.Option(help="an earlier result: its counts come before an arrow")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", "--out", help="write the counts into this file")] = None,
    seed: Annotated[int, typer.Option(help="of weights and prompts")] = 0,
) -> None:
    """Count what each policy asks of a GPU: kernels launched, waits of the host, copies from the host. Needs no GPU.

    The model runs on a pretended CUDA device whose tensors are on the CPU, so these are counts, not times: they show
    what grows with batch and policy, and where the host waits. A launch costs the host about 5 µs; a wait, whatever the
    device still has to do. Counted are a prefill and one decoded token of the text model, embeddings and sampling left
    out. An operation counts as one launch, though some are several kernels.

    * equal rows are alike; ragged rows have texts of different lengths, and every eighth has no image.

    * `seven policies` — seven rows of a batch each with another one, the eighth with none.

    Examples:

    * `vtr bench launches --batch 8 --where 10` — a quick look, and the lines that ask most

    * `vtr bench launches --batch 8 --batch 32 -p zipvl -p dart:64` — of policies of your choice

    * `vtr bench launches --out before.json`, then, after a change, `vtr bench launches --against before.json`
    """
    from tqdm import tqdm

    from vtr.commands._console import check_file, console, fail
    from vtr.eval.cost import launches as measure
    from vtr.eval.report import counted, results

    batches = batch or measure.BATCHES
    try:
        check_file(json_file, "--out", made=True)
        precision = measure.check(layers, batches, dtype)
        before = None if against is None else measure.earlier(against, layers, dtype)
        body, found = measure.measure(
            layers, batches, precision, seed, lambda cases: tqdm(cases, "bench launches"), policy or ()
        )
        body |= {} if before is None else {"before": before}
        if json_file is not None:
            results.save(json_file, "launches", body, seed=seed)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from error
    for part, (title, *_) in counted.PARTS.items():
        show([title], list(counted.columns(body).values()), counted.rows(body, part), right=True)
    console.print(counted.footer(body), highlight=False)
    if lines:
        show(["of all policies"], ["what", "operation", "prefill", "token"], measure.where(found, lines))
