"""The pictures with answers on them that README and docs show: ``python -m vtr.eval.report.figures`` draws them anew.

Each is of a real run of the pocket model on its shipped samples. What the model said is written into the PNG's
metadata (``vtr``), so that a test can ask again and notice a picture that is older than the weights.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import vtr
from vtr import visualize
from vtr.picture import crop_lines
from vtr.visualize.look import COLORS, frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path("docs/pictures")
BATCH: list[tuple[int, str | None]] = [(1, None), (0, "fastv:keep=0.05,layer=2"), (2, "m3:tokens=36")]
"""The rows of the batch that explains the idea: which sample, under which policy."""
WORDS = ["all tokens enter all layers", "cut once, to what the question looks at", "pooled before the decoder"]
FIRST = (0, "fastv:keep=0.05,layer=2")
"""Sample and policy of the first command that the docs show."""
SIX = (2, [None, "m3:tokens=36", "uniform:keep=0.25", "fastv:keep=0.0625", "globalcom2:retention=0.25",
           "pyramid:keeps=[0.48,0.23,0.11],layers=[1,2,3]"])  # fmt: skip


@cache
def _pocket() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


def batch() -> list[visualize.Shot]:
    """Three requests in one batch, each with its own picture, question and policy."""
    model, processor = _pocket()
    samples = [vtr.pocket.sample(number) for number, _ in BATCH]
    inputs = vtr.chat.encode(processor, [question for _, question, _ in samples], [picture for picture, *_ in samples])
    with torch.inference_mode():
        out = model.generate(**inputs, policy=[policy for _, policy in BATCH], max_new_tokens=4, do_sample=False)
    said = vtr.chat.decode(processor, out, inputs["input_ids"].shape[1])
    shots = []
    for row, ((picture, question, expected), answer) in enumerate(zip(samples, said, strict=True)):
        one = visualize.last(model, inputs, picture, row=row)
        shots.append(visualize.Shot(picture, one.layout, one.first_slot, one.row, answer, 0, question, expected))
    return shots


def ask(number: int, policies: list[str | None]) -> list[visualize.Shot]:
    """A shipped sample under several policies."""
    picture, question, expected = vtr.pocket.sample(number)
    return visualize.ask(*_pocket(), picture, question, policies, max_new_tokens=4, expected=expected)


def idea(shots: list[visualize.Shot]) -> Figure:
    """A row a request: the picture, what enters the first and the last layer, tokens by layer, the answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 1.95 * len(shots) + 0.75), layout="constrained", dpi=150, facecolor="white")
    axes = figure.subplots(len(shots), 4, squeeze=False, width_ratios=[1, 1, 1, 1.75])
    heads = ["request", "into layer 0", "into layer 9", "vision tokens into each layer"]
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=11, weight="bold")
    for n, (shot, words) in enumerate(zip(shots, WORDS, strict=True)):
        _request(axes[n], shot, words, COLORS[n], last=n == len(shots) - 1)
    figure.suptitle("One batch, one call of generate: every request has its own policy", fontsize=13)
    return figure


def _request(axes: Any, shot: visualize.Shot, words: str, color: str, last: bool) -> None:
    counts = shot.row.vision_tokens
    axes[0].imshow(shot.picture)
    axes[0].set_xlabel(f"{shot.question}?", fontsize=9.2)
    frame(axes[0], "0.4")
    for axis, layer in ((axes[1], 0), (axes[2], -1)):
        axis.imshow(shot.pixels(layer, "crops"))
        crop_lines(axis, shot.layout, shot.picture)
        axis.set_xlabel(f"{counts[layer]} of {shot.row.total} tokens", fontsize=10.5)
        frame(axis, color)
    said, shade = shot.verdict
    stairs = axes[3]
    stairs.bar(range(len(counts)), counts, width=0.86, color=color)
    stairs.set_ylim(0, shot.row.total * 1.72)
    stairs.set_yticks([0, shot.row.total])
    stairs.set_xticks(range(len(counts)))
    stairs.tick_params(labelsize=10)
    stairs.spines[["top", "right"]].set_visible(False)
    place = {"transform": stairs.transAxes, "va": "top"}
    stairs.text(0.01, 1, f"policy={shot.row.policy!r}", **place, fontsize=10.5, color=color)
    stairs.text(0.01, 0.84, words, **place, fontsize=10.5, color=color)
    stairs.text(1, 1.02, said, **place, ha="right", fontsize=13, color=shade, weight="bold")
    if last:
        stairs.set_xlabel("decoder layer", fontsize=10.5)


PICTURES: dict[str, tuple[Callable[[], list[visualize.Shot]], Callable[[list[visualize.Shot]], Figure]]] = {
    "idea.png": (batch, idea),
    "kept.png": (lambda: ask(FIRST[0], [FIRST[1]]), lambda shots: visualize.kept(shots[0])),
    "side-by-side.png": (lambda: ask(SIX[0], SIX[1]), visualize.side_by_side),
}
"""File → how its answers are asked for, and how they are drawn."""


def facts(shots: list[visualize.Shot]) -> list[dict[str, Any]]:
    """What a picture says, as plain data."""
    return [
        {
            "question": shot.question, "expected": shot.expected, "policy": shot.label, "answer": shot.answer,
            "vision_tokens": shot.row.vision_tokens,
        }
        for shot in shots
    ]  # fmt: skip


def written(path: Path) -> Any:
    """The facts that a picture was drawn from.

    Raises:
        ValueError: the picture has none.
    """
    with Image.open(path) as picture:
        if "vtr" not in picture.info:
            raise ValueError(f"{path} does not say what it was drawn from: python -m vtr.eval.report.figures makes it")
        return json.loads(picture.info["vtr"])


def _save(figure: Figure, said: list[dict[str, Any]], path: Path) -> None:
    """A PNG of few colors, half as large as one of all, with the facts in its metadata."""
    drawn, info = io.BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=120, facecolor="white")
    info.add_text("vtr", json.dumps(said))
    picture = Image.open(drawn).convert("RGB").quantize(192, dither=Image.Dither.NONE)
    picture.save(path, pnginfo=info, optimize=True)


def main(out: Annotated[Path, typer.Option(help="folder of the pictures")] = FOLDER) -> None:
    """Draw the pictures of README and docs from runs of the pocket model."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (make, draw) in PICTURES.items():
        shots = make()
        _save(draw(shots), facts(shots), out / name)
        print(out / name, *[shot.answer for shot in shots])


if __name__ == "__main__":
    typer.run(main)
