"""Pictures with the tokens that some policies keep of them, run on the pocket model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import vtr
from vtr.chat import encode
from vtr.models import load
from vtr.picture import image_spans, kept_pixels, seen, views

POLICIES = ("fastv:keep=0.05,layer=2", "random:keep=37,layer=2", "uniform:keep=37,layer=2")
"""Shown where no result names policies that run on the pocket model: equal budgets."""
SHIPPED = 3
MOST = 4
"""Policies side by side."""


@dataclass(frozen=True)
class Kept:
    """What one policy keeps of a picture: what enters the last layer, of the crops and of the thumbnail."""

    policy: str
    answer: str
    right: bool
    count: int
    total: int
    images: list[str]


@dataclass(frozen=True)
class Shown:
    """A picture with its question and what each policy made of it; images are data addresses."""

    picture: str
    question: str
    answer: str
    kept: list[Kept]


def choose(rows: Sequence[dict[str, Any]], layers: int) -> list[str]:
    """Up to four of the policies measured, one a name, that fit a model of so many layers; else three by hand.

    Of each name the one with the fewest tokens, where keeping shows best.
    """
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["policy"] != "none" and fits(row["policy"], layers):
            best[row["name"]] = min(best.get(row["name"], (2.0, "")), (row["mean_keep"], row["policy"]))
    return [spec for _, spec in best.values()][:MOST] or list(POLICIES)


def fits(spec: str, layers: int) -> bool:
    """Whether this installation knows the policy, and it acts in the model and can run on so many layers."""
    try:
        before, rest = vtr.split(spec)
        if before is not None or rest is None:
            return False
        rest.check(layers)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def pictures(n: int) -> Iterator[tuple[Image.Image, str, str]]:
    """The shipped pictures, then held-out ones, each once."""
    for i in range(min(n, SHIPPED)):
        yield vtr.pocket.sample(i)
    if n > SHIPPED:
        for sample in vtr.pocket.samples(n - SHIPPED, split="test", seed=20, per_scene=1):
            yield sample["image"], sample["question"], sample["answer"]


@torch.no_grad()
def show(n: int, policies: Sequence[str] = (), rows: Sequence[dict[str, Any]] = ()) -> list[Shown]:
    """``n`` pictures under ``policies``, by default under those of ``rows`` (an eval's) that fit the pocket model.

    Raises:
        ValueError: a policy that does not run on the pocket model.
    """
    model, processor = load(None, "cpu")
    layers = len(model.get_decoder().layers)
    for policy in policies:
        vtr.policy(policy).check(layers)
    policies = policies or choose(rows, layers)
    out = []
    with tqdm(total=n * len(policies), desc="gallery") as bar:
        for picture, question, answer in pictures(n):
            kept = []
            for policy in policies:
                try:
                    before, rest = vtr.split(policy)
                    inputs = encode(processor, [question], [picture], before)
                    kept.append(keep(model, processor, inputs, picture, answer, policy, rest))
                except (ValueError, TypeError, RuntimeError) as error:
                    raise ValueError(f"{policy} does not run on the pocket model of the gallery: {error}") from error
                bar.update()
            out.append(Shown(embed(picture), question, answer, kept))
    return out


def keep(
    model: Any, processor: Any, inputs: Any, picture: Image.Image, answer: str, policy: str, rest: vtr.Policy | None
) -> Kept:
    """Run one policy and draw what it keeps. inputs: what of it acts before the tower has acted. rest: the others."""
    out = model.generate(**inputs, policy=rest, max_new_tokens=4, do_sample=False)
    said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    row = vtr.report(model).rows[0]
    _, first, layout = image_spans(model, inputs)[0]
    last = len(row.vision_tokens) - 1
    view = seen(picture, layout)
    images = [embed(kept_pixels(view, layout, first, row, last, which)) for which in reversed(views(layout))]
    return Kept(policy, said, said == answer, row.vision_tokens[last], row.total, images)


def embed(picture: Image.Image | np.ndarray, quality: int = 80) -> str:
    """A picture as a data address (WebP)."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray((picture * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
