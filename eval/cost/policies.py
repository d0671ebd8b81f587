"""What every policy costs at equal budgets: ``vtr bench policies``. Times, FLOPs, KV bytes, memory, on random weights.

Runs take turns. FLOPs are counted by torch and by vtr's closed form, KV bytes by vtr and as the tensors have them;
where the two differ nothing is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from vtr.eval.cost import midsize, peak_memory, shapes
from vtr.eval.cost.contenders import Contender, contenders
from vtr.eval.cost.engine import implementations
from vtr.eval.cost.interleave import decode_in_turns, in_turns, keep_freed_memory, median_ratio, text_times
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.peak_memory import cached_bytes, cuda_growth
from vtr.eval.cost.shapes import Shape
from vtr.eval.cost.timing import between, mark, milliseconds, now

import vtr

TOLERANCE = 1e-3
"""How far counted FLOPs may be from the closed form, as a share."""
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Setup:
    """What is run.

    Attributes:
        shape: of the model and the prompt of all single requests. size: the same as a mid-size model, or None.
        served: the shape of the requests that throughput is measured with: the model's, with fewer tokens a picture
            where a CPU would take hours.
        budgets: mean keeps. answer: tokens decoded for throughput. decode_tokens: for the time of a decoded token.
        repeats: timed runs of each prefill.
    """

    shape: Shape
    served: Shape
    budgets: tuple[float, ...]
    repeats: int
    size: Size | None = None
    answer: int = 8
    decode_tokens: int = 32


def choose(small: bool, device: str, shape: str | None = None) -> Setup:
    """The models of a device.

    Raises:
        ValueError: an unknown shape, or one too large for a CPU there.
    """
    if shape is not None and shape not in shapes.SHAPES:
        raise ValueError(f"shapes={shape!r}: choose one of {', '.join(shapes.SHAPES)}")
    if device == "cuda" or shape is not None:
        full = shapes.SHAPES[shape or "llava-1.5-7b"]
        if device == "cpu" and not small and shape not in shapes.FITS_CPU:
            raise ValueError(f"{shape} at full size needs a GPU: use --device cuda, or --small for a narrow one")
        chosen = shapes.scaled_down(full) if small else full
        if device == "cpu" and not small:
            return Setup(chosen, chosen.downsampled(8), (0.5, 0.25, 0.1), 3)
        return (
            Setup(chosen, chosen, (0.25,), 3, decode_tokens=16)
            if small
            else Setup(chosen, chosen, (0.5, 0.25, 0.1), 10)
        )
    size = midsize.SMALL if small else midsize.MIDSIZE
    whole = shapes.of_size(size)
    served = replace(whole.downsampled(12 if small else 16), text_tokens=size.text_tokens // 4)
    if small:
        return Setup(whole, served, (0.25,), size.repeats, size, decode_tokens=16)
    return Setup(whole, served, (0.5, 0.25, 0.1), size.repeats, size)


# -- one prompt --------------------------------------------------------------------------------------------------------
def count_flops(contender: Contender, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(FLOPs torch counts in the text model during a prefill, those of vtr's closed form, selectors' products in both).

    Counted on eager attention: of the fused kernels of a CPU torch counts none.

    Raises:
        RuntimeError: they differ.
    """
    eager = midsize.twin(contender.model)
    eager.set_attn_implementation({"text_config": "eager"})
    with FlopCounterMode(display=False) as counter:
        eager(**inputs, policy=contender.policy, use_cache=True, logits_to_keep=1)
    modules = counter.get_flop_counts().items()
    counted = sum(sum(flops.values()) for name, flops in modules if name.endswith(".language_model"))
    report = vtr.report(eager)
    closed = report.flops + report.selector_flops
    if abs(counted - closed) > TOLERANCE * counted:
        raise RuntimeError(
            f"{contender.spec}: torch counts {counted} FLOPs, vtr's closed form says {closed}: the accounting in "
            "vtr/accounting.py does not follow the decoder, repair it before trusting any report"
        )
    return counted, closed


def count_bytes(contender: Contender, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(Bytes of keys and values after a prefill as vtr reports them, as the tensors have them).

    Raises:
        RuntimeError: they differ.
    """
    tensors = cached_bytes(contender.model, inputs, policy=contender.policy)
    reported = vtr.report(contender.model).kv_bytes
    if reported != tensors:
        raise RuntimeError(
            f"{contender.spec}: vtr reports {reported} bytes of keys and values, the tensors have {tensors}: the "
            "accounting in vtr/accounting.py does not follow the cache, repair it before trusting any report"
        )
    return reported, tensors


def first_token(contender: Contender, inputs: Mapping[str, Any], parts: list[tuple[float, float]]) -> float:
    """Seconds of a whole first forward; adds (seconds of the text model, milliseconds of choosing) to ``parts``."""
    model, device = contender.model, contender.model.device
    now(device)
    with text_times(model) as spans:
        start = mark(device)
        model(**inputs, policy=contender.policy, use_cache=True, logits_to_keep=1)
        seconds = between(start, mark(device))
    parts.append((sum(spans), vtr.report(model).selector_ms))
    return seconds


def generate(contender: Contender, inputs: Mapping[str, Any], tokens: int, criteria: Any = None) -> None:
    """Decode exactly so many tokens behind the prompt's own."""
    contender.model.generate(
        **inputs, policy=contender.policy, max_new_tokens=tokens + 1, do_sample=False,
        suppress_tokens=[midsize.IMAGE_ID], stopping_criteria=criteria,
    )  # fmt: skip


def peaks(field: Sequence[Contender], setup: Setup, seed: int) -> list[int | None]:
    """Bytes by which each one's prefill raises memory; None where nothing can tell."""
    if field[0].model.device.type == "cuda":
        row = [(1, setup.shape.text_tokens)]
        return [cuda_growth(partial(c.model, policy=c.policy), c.prompts(row, seed)) for c in field]
    if setup.size is None or not peak_memory.available():
        return [None] * len(field)

    def ask(contender: Contender) -> int:
        assert setup.size is not None
        size = replace(setup.size, side=contender.shape.side)
        return peak_memory.measure(size, contender.model.dtype, contender.policy, seed)

    with ThreadPoolExecutor(2) as pool:  # a process each, of which no time is taken
        return list(tqdm(pool.map(ask, field), desc="peak memory", total=len(field), unit="policy"))


# -- all of them -------------------------------------------------------------------------------------------------------
def measure_singles(
    field: Sequence[Contender], setup: Setup, repeats: int, seed: int, bar: Any
) -> list[dict[str, Any]]:
    """Times, counts and bytes of one request under every contender."""
    row, total = [(1, setup.shape.text_tokens)], setup.shape.vision_tokens
    inputs = [contender.prompts(row, seed) for contender in field]
    parts: list[list[tuple[float, float]]] = [[] for _ in field]
    runs = {str(i): partial(first_token, c, inputs[i], parts[i]) for i, c in enumerate(field)}
    times = in_turns(runs, repeats, bar.update)
    starts = {str(i): partial(generate, c, inputs[i], setup.decode_tokens) for i, c in enumerate(field)}
    decoded = decode_in_turns(starts, field[0].model.device, bar.update)
    texts = [[text for text, _ in part[1:]] for part in parts]  # the first one is the warm-up
    rows = []
    for i, contender in enumerate(field):
        counted, closed = count_flops(contender, inputs[i])
        reported, tensors = count_bytes(contender, inputs[i])
        tokens = vtr.report(contender.model).rows[0].vision_tokens
        bar.update(2)
        rows.append(
            {
                "policy": contender.spec,
                "name": contender.name,
                "budget": contender.budget,
                "mean_keep": sum(tokens) / (len(tokens) * total),
                "vision_tokens": tokens,
                "prefill_ms": milliseconds(texts[i]),
                "speed_up": asdict(median_ratio(texts[0], texts[i])),
                "first_token_ms": milliseconds(times[str(i)]),
                "decode_ms": milliseconds(decoded[str(i)]),
                "selector_ms": statistics.median(ms for _, ms in parts[i][1:]),
                "flops_counted": counted,
                "flops_closed": closed,
                "kv_bytes": reported,
                "kv_bytes_tensors": tensors,
            }
        )
    return rows


def like(field: Sequence[Contender], found: Sequence[Contender]) -> list[Contender | None]:
    """For each of ``field`` the one of ``found`` with its name and budget (or spec, without a budget), or None.

    What a budget can be met with depends on the grid (nested scales): a policy may be there on one of two grids only.
    """

    def key(one: Contender) -> tuple[str, float | None, str]:
        return one.name, one.budget, one.spec if one.budget is None else ""

    known = {key(one): one for one in found}
    return [known.get(key(one)) for one in field]


def served_repeats(batch: int) -> int:
    """How often a batch is timed: large ones take long and vary little."""
    return 3 if batch <= 8 else 1


def measure_throughput(
    field: Sequence[Contender | None], setup: Setup, batches: Sequence[int], seed: int, bar: Any
) -> list[dict[str, float | None]]:
    """Requests per second of every contender at every batch size: prompt and answer, all requests of equal length.

    None where a batch does not fit into the GPU's memory, and for who is not there.
    """
    found: list[dict[str, float | None]] = [{} for _ in field]
    for batch in batches:
        rows = [(1, setup.served.text_tokens)] * batch

        def serve(contender: Contender, rows: Sequence[tuple[int, int]] = rows) -> float:
            inputs = contender.prompts(rows, seed)
            start = now(contender.model.device)
            try:
                generate(contender, inputs, setup.answer - 1)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return math.inf
            return now(contender.model.device) - start

        runs: dict[str, Callable[[], float]] = {str(i): partial(serve, c) for i, c in enumerate(field) if c}
        times = in_turns(runs, served_repeats(batch), bar.update, warmup=batch == batches[0])
        for i, served in enumerate(found):
            seconds = statistics.median(times[str(i)]) if str(i) in times else math.inf
            served[str(batch)] = None if seconds == math.inf else batch / seconds
    return found


@torch.no_grad()
def measure(
    setup: Setup,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int | None = None,
    seed: int = 0,
    budgets: Sequence[float] = (),
    specs: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
) -> dict[str, Any]:
    """The body of a result of kind "policies".

    Args:
        budgets: mean keeps, instead of the setup's. specs: these policies instead of all shipped ones at budgets.

    Raises:
        RuntimeError: FLOPs or bytes as vtr reports them are not what torch and the tensors say.
    """
    keep_freed_memory()
    budgets, times = tuple(budgets) or setup.budgets, repeats or setup.repeats
    attentions = implementations(device, dtype)
    stock = shapes.build(setup.shape, device, dtype, seed)
    other = stock if setup.served == setup.shape else shapes.with_side(stock, setup.shape, setup.served.side, seed)
    out: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for attention in attentions:
        for model in (stock, other):
            model.set_attn_implementation({"text_config": attention})
        field, left_out = contenders(stock, setup.shape, budgets, specs)
        served: Sequence[Contender | None] = field
        if other is not stock:
            served = like(field, contenders(other, setup.served, budgets, specs)[0])
        each = times + 1 + setup.decode_tokens + 1 + 2 + 1 + sum(map(served_repeats, batches))
        with tqdm(total=each * len(field), unit="run", desc=f"vtr bench policies ({attention})") as bar:
            rows = measure_singles(field, setup, times, seed, bar)
            rates = measure_throughput(served, setup, batches, seed, bar)
        grown = peaks(field, setup, seed)
        for row, rate, bytes_, one in zip(rows, rates, grown, served, strict=True):
            policy = one and one.spec
            more = {"throughput": rate, "throughput_policy": policy, "peak_bytes": bytes_, "attention": attention}
            out.append(row | more)
    return {
        "model": setup.shape.facts(),
        "served": {**setup.served.facts(), "answer_tokens": setup.answer},
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": times,
        "decode_tokens": setup.decode_tokens,
        "rows": out,
        "left_out": left_out,
    }


def table(result: Mapping[str, Any], wide: bool = True) -> tuple[list[str], list[list[str]]]:
    """A measured result as (column names, table rows); fewer columns if not wide."""
    batches = " ".join(result["rows"][0]["throughput"])
    columns = {
        "policy": True, "budget": wide, "kept": True, "prefill\nms": True, "speed-\nup": True, "1st token\nms": wide,
        "decode\nms": True, f"req/s at\n{batches}": True, "select\nms": wide, "GFLOPs": True, "KV\nMiB": True,
        "peak\nMiB": wide,
    }  # fmt: skip
    rows = []
    for row in result["rows"]:
        attention, peak = row["attention"], row["peak_bytes"]
        cells = [
            row["name"] + ("" if attention == "sdpa" else f" ({attention})"),
            "" if row["budget"] is None else f"{row['budget']:.0%}",
            f"{row['mean_keep']:.1%}",
            f"{row['prefill_ms']['median']:.1f}",
            f"{row['speed_up']['value']:.2f}×",
            f"{row['first_token_ms']['median']:.1f}",
            f"{row['decode_ms']['median']:.2f}",
            " ".join("–" if rate is None else f"{rate:.3g}" for rate in row["throughput"].values()),
            f"{row['selector_ms']:.2f}",
            f"{row['flops_counted'] / 1e9:.3g}",
            f"{row['kv_bytes'] / 2**20:.3g}",
            "–" if peak is None else f"{peak / 2**20:.0f}",
        ]
        rows.append([cell for cell, shown in zip(cells, columns.values(), strict=True) if shown])
    return [name for name, shown in columns.items() if shown], rows


def footer(result: Mapping[str, Any]) -> str:
    """What the table was measured on, in words."""
    model, served = result["model"], result["served"]
    return (
        f"Llama {model['text']['num_hidden_layers']} × {model['text']['hidden_size']}, {result['dtype']}, "
        f"{model['vision_tokens']} vision + {model['text_tokens']} text tokens. Requests per second (–: no room): of "
        f"{served['vision_tokens']} + {served['text_tokens']} tokens, {served['answer_tokens']} answered. For "
        "every line counted FLOPs are those of the closed form and reported KV bytes those of the tensors."
    )
