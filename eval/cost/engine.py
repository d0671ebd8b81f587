"""Is the engine at the limit? ``vtr bench engine``: ratios of times and bytes on a random LLaVA-1.5.

The limit of a reduced prefill is what the stock decoder layers need for exactly the kept lengths, densely: nothing is
chosen, gathered or packed. Both sides start from merged embeddings and fill a key/value cache.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import DynamicCache
from vtr.eval.cost import midsize, peak_memory
from vtr.eval.cost.interleave import (
    Ratio,
    decode_in_turns,
    in_turns,
    keep_freed_memory,
    median_ratio,
    text_times,
    total_ratio,
)
from vtr.eval.cost.midsize import Size
from vtr.eval.cost.peak_memory import cached_bytes, cuda_growth
from vtr.eval.cost.timing import now
from vtr.eval.report.ratios import WHAT

import vtr

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STAIRS = (1.0, 0.6, 0.35, 0.2, 0.1)
"""The keeps of the staircase, spread evenly over the depth: four cuts."""
WINDOWS = (64, 512, 2048)


@dataclass
class Bench:
    """The two models of one attention implementation, and what has been measured on them."""

    size: Size
    stock: Any
    patched: Any
    repeats: int
    seed: int
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.stock.device

    def prompt(self) -> dict[str, torch.Tensor]:
        """One row: an image, then text."""
        return midsize.prompts(self.stock, self.size, [(True, self.size.text_tokens)], self.seed)


# -- policies ----------------------------------------------------------------------------------------------------------
def stairs(layers: int) -> vtr.GSearch:
    """G-Search with four cuts."""
    return vtr.GSearch([STAIRS[layer * len(STAIRS) // layers] for layer in range(layers)])


def every_layer(layers: int) -> vtr.GSearch:
    """G-Search that cuts on entering every layer but the first, down to a tenth."""
    return vtr.GSearch([round(1 - 0.9 * layer / (layers - 1), 4) for layer in range(layers)])


Request = tuple[vtr.Policy | None, bool, int]
"""Policy, whether there is an image, text tokens."""


def mixed(size: Size) -> list[Request]:
    """Eight requests as a server may get them together."""
    text = size.text_tokens
    return [
        (None, True, text),
        (vtr.FastV(0.25, layer=2), True, text // 2),
        (vtr.FastV(0.1, layer=2), True, text),
        (stairs(size.layers), True, text),
        (vtr.Random(0.5), True, text // 4),
        (vtr.UniformGrid(0.25, layer=1), True, text),
        (every_layer(size.layers), True, text // 2),
        (None, False, text),
    ]


# -- prefill -----------------------------------------------------------------------------------------------------------
def prefill(model: Any, inputs: Mapping[str, torch.Tensor], **policy: Any) -> float:
    """Seconds of the text model on the prompt."""
    with text_times(model) as spans:
        model(**inputs, **policy, use_cache=True, logits_to_keep=1)
    return sum(spans)


def merged(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The embeddings that enter the text model, [1, L, D]."""
    seen: list[torch.Tensor] = []
    text = model.get_decoder()
    hook = text.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0]


def limit(text: Any, embeds: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, DynamicCache]:
    """The stock decoder layers on the first ``lengths[l]`` tokens at layer l: causal, no mask, a cache filled."""
    cache = DynamicCache(config=text.config)
    hidden = embeds[:, : lengths[0]]
    rope = text.rotary_emb(hidden, torch.arange(lengths[0], device=embeds.device)[None])
    for layer, n in zip(text.layers, lengths, strict=True):
        here = (rope[0][:, :n], rope[1][:, :n])
        hidden = layer(hidden[:, :n], None, None, cache, position_embeddings=here, use_cache=True)
    return text.norm(hidden), cache


def limit_seconds(text: Any, embeds: torch.Tensor, lengths: list[int]) -> float:
    start = now(embeds.device)
    limit(text, embeds, lengths)
    return now(embeds.device) - start


def kept_lengths(bench: Bench, policy: vtr.Policy) -> list[int]:
    """Tokens of the prompt that enter each layer, text included."""
    inputs = bench.prompt()
    bench.patched(**inputs, policy=policy, logits_to_keep=1)
    row = vtr.report(bench.patched).rows[0]
    return [inputs["input_ids"].shape[1] - row.total + vision for vision in row.vision_tokens]


def measure_prefill(bench: Bench, done: Callable[[], Any]) -> None:
    """Without a policy, and three ways of pruning, each beside its limit."""
    inputs, layers = bench.prompt(), bench.size.layers
    policies = {"cut": vtr.FastV(0.25, layer=2), "stairs": stairs(layers), "every_layer": every_layer(layers)}
    embeds, text = merged(bench.stock, inputs), bench.stock.get_decoder()
    runs: dict[str, Callable[[], float]] = {
        "unpatched": partial(prefill, bench.stock, inputs),
        "no_policy": partial(prefill, bench.patched, inputs),
    }
    for name, policy in policies.items():
        runs[name] = partial(prefill, bench.patched, inputs, policy=policy)
        runs["limit_" + name] = partial(limit_seconds, text, embeds, kept_lengths(bench, policy))
    times = in_turns(runs, bench.repeats, done)
    bench.ratios["no_policy_prefill"] = median_ratio(times["no_policy"], times["unpatched"])
    for name in policies:
        bench.ratios["pruned_over_limit_" + name] = median_ratio(times[name], times["limit_" + name])


def batch_runs(
    stock: Any, patched: Any, size: Size, requests: Sequence[Request], seed: int
) -> tuple[dict[str, Callable[[], float]], dict[str, torch.Tensor]]:
    """Prefills of requests in one "batch", of their "rows" alone one after the other, and unpatched and "padded".

    Returns:
        The three runs, and the batch.
    """
    inputs = midsize.prompts(stock, size, [(image, text) for _, image, text in requests], seed)
    policies = [policy for policy, _, _ in requests]
    alone = [(midsize.row_of(inputs, b), policy) for b, policy in enumerate(policies)]
    runs: dict[str, Callable[[], float]] = {
        "padded": partial(prefill, stock, inputs),
        "batch": partial(prefill, patched, inputs, policy=policies),
        "rows": lambda: sum(prefill(patched, row, policy=policy) for row, policy in alone),
    }
    return runs, inputs


def measure_mixed(bench: Bench, done: Callable[[], Any]) -> None:
    """Eight rows of different policies in one batch."""
    runs = batch_runs(bench.stock, bench.patched, bench.size, mixed(bench.size), bench.seed)[0]
    times = in_turns(runs, bench.repeats, done)
    bench.ratios["mixed_over_rows"] = median_ratio(times["batch"], times["rows"])
    bench.ratios["mixed_over_padded"] = median_ratio(times["batch"], times["padded"])


# -- decode ------------------------------------------------------------------------------------------------------------
def decode(
    bench: Bench, policies: Mapping[str, vtr.Policy | None], tokens: int, done: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of each decoded token: unpatched beside the patched model under each of ``policies``."""
    inputs = bench.prompt()

    def generate(model: Any, steps: int, criteria: Any = None, **policy: Any) -> Any:
        return model.generate(
            **inputs, **policy, max_new_tokens=steps + 1, do_sample=False, suppress_tokens=[midsize.IMAGE_ID],
            stopping_criteria=criteria,
        )  # fmt: skip

    def contender(model: Any, **policy: Any) -> Callable[[Any], Any]:
        generate(model, 2, **policy)  # to warm up
        return lambda criteria: generate(model, tokens, criteria, **policy)

    running = {"unpatched": contender(bench.stock)}
    running |= {name: contender(bench.patched, policy=policy) for name, policy in policies.items()}
    return decode_in_turns(running, bench.device, done)


def measure_decode(bench: Bench, done: Callable[[], Any]) -> None:
    """Several policies for a few tokens, one for many."""
    short, _, long = bench.size.decode_tokens
    policies: dict[str, vtr.Policy | None] = {
        "no_policy_decode": None,
        "decode_equal_lengths": vtr.FastV(1.0, layer=2),
        "decode_keep_50": vtr.FastV(0.5, layer=2),
        "decode_keep_25": vtr.FastV(0.25, layer=2),
        "decode_keep_10": vtr.FastV(0.1, layer=2),
    }
    times = decode(bench, policies, short, done)
    for name in policies:
        bench.ratios[name] = total_ratio(times[name], times["unpatched"])
    times = decode(bench, {"pruned": vtr.FastV(0.25, layer=2)}, long, done)
    for window, tokens in zip(WINDOWS, bench.size.decode_tokens, strict=True):
        ratio = total_ratio(times["pruned"][:tokens], times["unpatched"][:tokens])
        bench.ratios[f"decode_over_unpatched_{window}"] = ratio


# -- memory ------------------------------------------------------------------------------------------------------------
def measure_kv(bench: Bench) -> None:
    """Keys and values held after the prompt.

    Raises:
        RuntimeError: ``vtr.report`` counts other bytes than the tensors have.
    """
    inputs = bench.prompt()
    under = cached_bytes(bench.stock, inputs)
    over = cached_bytes(bench.patched, inputs, policy=vtr.FastV(0.25, layer=2))
    report = vtr.report(bench.patched)
    if report.kv_bytes != over:
        raise RuntimeError(
            f"vtr.report counts {report.kv_bytes} bytes of keys and values, the tensors have {over}: the accounting in "
            "vtr/accounting.py does not follow the cache, repair it before trusting any report"
        )
    for key, value in (("kv_ratio", over / under), ("kv_allocated_ratio", report.kv_bytes_allocated / under)):
        bench.ratios[key] = Ratio(value, value, value)


def measure_peak(bench: Bench) -> str | None:
    """Peak memory above what was there before the forward. Returns why there is no such figure, or None."""
    policy = vtr.FastV(0.25, layer=2)
    if bench.device.type == "cuda":
        over = cuda_growth(partial(bench.patched, policy=policy), bench.prompt())
        under = cuda_growth(bench.stock, bench.prompt())
    elif peak_memory.available():
        over, under = (peak_memory.measure(bench.size, bench.stock.dtype, p, bench.seed) for p in (policy, None))
    else:
        return "peak_memory_ratio is left out: only Linux lets a process ask for its peak anew"
    bench.ratios["peak_memory_ratio"] = Ratio(over / under, over / under, over / under)
    return None


# -- all of it ---------------------------------------------------------------------------------------------------------
def implementations(device: str, dtype: torch.dtype) -> list[str]:
    """The attention implementations to measure: sdpa, and FlashAttention 2 where it is installed and can run."""
    flash = device == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn") is not None
    return ["sdpa", "flash_attention_2"] if flash else ["sdpa"]


def choose(small: bool, device: str, dtype: str | None, repeats: int | None) -> tuple[Size, torch.dtype, int]:
    """Shapes, precision and repeats for a device.

    Raises:
        ValueError: an unknown device or precision, or repeats below 1.
        RuntimeError: no GPU.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this torch sees no CUDA GPU: use --device cpu")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats={repeats}: a measurement needs at least 1")
    size = midsize.SMALL if small else midsize.LLAVA_7B if device == "cuda" else midsize.MIDSIZE
    default = "bfloat16" if device == "cuda" else "float32"
    return size, DTYPES[dtype or default], repeats or size.repeats


def steps(size: Size, repeats: int) -> int:
    """Runs and decoded tokens of one attention implementation, for the progress bar."""
    short, _, long = size.decode_tokens
    return (repeats + 1) * (8 + 3) + 6 * (short + 1) + 2 * (long + 1)


@torch.no_grad()
def measure(
    size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Every ratio, with what it was measured on, as flat data: key, ``key_min``, ``key_max``.

    Keys of a second attention implementation end in its name.
    """
    keep_freed_memory()
    attentions = implementations(device, dtype)
    out = facts(size, device, dtype, repeats, seed)
    stock = midsize.build(size, device, dtype, seed=seed)
    with tqdm(total=len(attentions) * steps(size, repeats), unit="run", desc="vtr bench engine") as bar:
        for attention in attentions:
            stock.set_attn_implementation({"text_config": attention})
            bench = Bench(size, stock, vtr.patch(midsize.twin(stock)), repeats, seed)
            measure_kv(bench)
            note = measure_peak(bench)
            for part in (measure_prefill, measure_mixed, measure_decode):
                part(bench, bar.update)
            suffix = "" if attention == "sdpa" else "_" + attention
            for key in (key for key in WHAT if key in bench.ratios):
                ratio = bench.ratios[key]
                out |= {key + suffix: ratio.value, f"{key + suffix}_min": ratio.low, f"{key + suffix}_max": ratio.high}
            if note:
                out["note"] = note
    return out


def facts(size: Size, device: str, dtype: torch.dtype, repeats: int, seed: int) -> dict[str, Any]:
    """What the ratios were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtr": vtr.__version__,
        "seed": seed,
        "repeats": repeats,
        "layers": size.layers,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "heads": size.heads,
        "vision_tokens": size.vision_tokens,
        "text_tokens": size.text_tokens,
        "decode_tokens": {str(w): n for w, n in zip(WINDOWS, size.decode_tokens, strict=True)},
    }
