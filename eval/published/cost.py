"""What a run will take: multiplications of this model, divided by what a GPU does in an hour. An estimate.

Counted are matrix products: of the tower, of the decoder while it reads the prompt (each layer on the text and the
vision tokens that enter it), and of each answered token. Not counted: loading the model and the pictures, choosing
tokens, and the memory traffic that decoding waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtr.eval.published.tables import Benchmark, Model, Row

import vtr
from vtr.base import UnsupportedError
from vtr.image import Layout
from vtr.limits import similar

PEAKS = {
    "A100": 312.0, "H100": 989.0, "H200": 989.0, "A6000": 155.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0,
    "4090": 165.0,
}  # fmt: skip
"""TFLOP/s of dense 16-bit matrix products, of the vendor's data sheets."""
SHARE = 0.3
"""Of the peak that is taken for reached, in prefills of one to a few thousand tokens."""
FORMULA = (
    "TFLOPs a question = tower + Σ over decoder layers of 2 · weights · n + 4 · n² · width, n = text + vision tokens "
    "that enter, + 2 · weights for each answered token"
)


@dataclass(frozen=True)
class Rate:
    """TFLOP/s that are taken for reached, and how that was said."""

    tflops: float
    said: str


def rate_of(gpu: str, rate: float | None) -> Rate:
    """``--rate``, else a share of the GPU's peak.

    Raises:
        ValueError: a GPU that is not known here, or a rate that is not positive.
    """
    if rate is not None:
        if not rate > 0:
            raise ValueError(f"--rate {rate:g}: TFLOP/s that your GPU reaches, more than 0")
        return Rate(rate, f"{rate:g} TFLOP/s (--rate)")
    if gpu not in PEAKS:
        raise ValueError(f"--gpu {gpu}{similar(gpu, PEAKS)}: one of {', '.join(PEAKS)}; or --rate, TFLOP/s reached")
    peak = PEAKS[gpu]
    return Rate(SHARE * peak, f"{SHARE * peak:.0f} TFLOP/s ({gpu}: {100 * SHARE:.0f} % of its {peak:.0f}; or --rate)")


def layout_of(model: Model) -> Layout:
    """The vision tokens of a typical picture: a tile, or a thumbnail and a square canvas of crops with newlines."""
    from vtr.integrations.llava import tile_layout
    from vtr.integrations.llava_next import anyres_layout

    side, tiles = model.vision["side"], model.vision["tiles"]
    laid_out: Layout = tile_layout(side, side)
    if tiles > 1:
        across = round((tiles - 1) ** 0.5)
        size = across * 336, across * 336
        laid_out = anyres_layout(size, (size,), 336, side)
    return laid_out


def entering(row: Row, model: Model) -> tuple[list[float], bool]:
    """Vision tokens that enter each decoder layer, and whether that is known from sizes.

    Where it is not, what the table says stays in every layer; if it says nothing, all tokens do.
    """
    layers, layout = model.text["layers"], layout_of(model)
    policy = None if row.policy in (None, "none") else vtr.policy(row.policy)
    if policy is None:
        return [float(len(layout))] * layers, True
    try:
        return [float(n) for n in policy.entering_of(layers, layout)], True
    except (ValueError, NotImplementedError, UnsupportedError):
        tokens = 1.0 if row.tokens is None else float(row.tokens)
        return [tokens if tokens > 1 else tokens * len(layout)] * layers, False


def tower_flops(model: Model) -> float:
    one = model.vision
    per_token = 8 * one["hidden"] ** 2 + 4 * one["hidden"] * one["intermediate"]
    return one["tiles"] * one["layers"] * (per_token * one["tokens"] + 4 * one["tokens"] ** 2 * one["hidden"])


def layer_weights(model: Model) -> float:
    one = model.text
    kv = 2 * one["hidden"] ** 2 * one["kv_heads"] / one["heads"]
    return 2 * one["hidden"] ** 2 + kv + 3 * one["hidden"] * one["intermediate"]


def question_flops(model: Model, vision: Sequence[float], text: int, answer: int) -> float:
    """FLOPs of one question: the tower, the prompt, the answer."""
    weights, width = layer_weights(model), model.text["hidden"]
    tokens = [text + n for n in vision]
    prompt = sum(2 * weights * n + 4 * n * n * width for n in tokens)
    said = answer * sum(2 * weights + 4 * n * width for n in tokens)
    return tower_flops(model) + prompt + said


def hours(model: Model, row: Row, tasks: Mapping[str, Benchmark], rate: Rate, limit: int | None) -> tuple[float, bool]:
    """GPU hours of a row over all tasks, and whether its tokens are known from sizes."""
    vision, known = entering(row, model)
    total = sum(
        min(one.questions, limit or one.questions) * question_flops(model, vision, one.text, one.answer)
        for one in tasks.values()
    )
    return total / (rate.tflops * 1e12 * 3600), known
