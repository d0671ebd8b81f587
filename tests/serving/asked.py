"""Requests to a served model and what vtr on transformers says to them: tokens, prompt lengths, vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtr

STEPS = 12
Spec = str | list[str] | None


@dataclass(frozen=True)
class Asked:
    """One request. pictures: (seed, width, height) of each; policy: for all of them, or one each."""

    question: str
    pictures: tuple[tuple[int, int, int], ...]
    policy: Spec

    def images(self) -> list[Image.Image]:
        return [picture(*one) for one in self.pictures]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured rectangles on a gradient: no two alike, the same for the same numbers."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * draw.random(3)
    pixels = np.broadcast_to(ramp, (height, width, 3)).copy()
    for _ in range(8):
        top, left = draw.integers(0, height), draw.integers(0, width)
        pixels[top : top + height // 3, left : left + width // 3] = draw.integers(0, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def mixed(policies: Sequence[Spec], sizes: Sequence[tuple[int, int]], questions: Sequence[str], n: int) -> list[Asked]:
    """``n`` requests: every eighth text only, every fifth two or three pictures with a policy each, else one."""
    made = []
    for i in range(n):
        question = questions[(i + i // 8) % len(questions)]
        if i % 8 == 7:
            made.append(Asked(question, (), None))
        elif i % 5 == 4:
            several = tuple((i % 4 + j, *sizes[(i + j) % len(sizes)]) for j in range(2 + i % 2))
            each: Spec = [str(policies[(i + j) % len(policies)] or "none") for j in range(len(several))]
            made.append(Asked(question, several, each if i % 3 else policies[i % len(policies)]))
        else:
            made.append(Asked(question, ((i % 4, *sizes[i % len(sizes)]),), policies[i % len(policies)]))
    return made


def text_of(processor: Any, asked: Asked) -> str:
    """The prompt with an image mark for each picture."""
    content = [{"type": "image"}] * len(asked.pictures) + [{"type": "text", "text": asked.question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class PerImage(vtr.Policy):
    """Each image of a row under a policy of its own, as a request with a list has it."""

    wants = ("tiles", "cls")

    def __init__(self, policies: Sequence[vtr.Policy | None]) -> None:
        self.policies = policies

    def compress(self, image: vtr.Image) -> Any:
        one = self.policies[image.index]
        return None if one is None else one.compress(image)


@dataclass(frozen=True)
class Said:
    """tokens: greedy. logprobs: of each. length: of the prompt, as it entered the decoder."""

    tokens: list[int]
    logprobs: list[float]
    length: int

    def same(self, out: Any) -> bool:
        """Whether vLLM said the same, with the same probabilities."""
        mine, found = self.logprobs, [at[t].logprob for at, t in zip(out.logprobs, out.token_ids, strict=True)]
        return list(out.token_ids) == self.tokens and max(abs(a - b) for a, b in zip(mine, found, strict=True)) < 1e-3


def reference(model: Any, processor: Any, asked: Asked, never: list[int]) -> Said:
    """What vtr on transformers says."""
    images = asked.images()
    policy: Any = asked.policy
    specs = policy if isinstance(policy, list) else [policy] * len(images)
    parts = [vtr.split(None if spec == "none" else spec) for spec in specs]
    images = [_scaled(image, before, processor) for image, (before, _) in zip(images, parts, strict=True)]
    each = [None if one is None else one.of_image(i, len(parts)) for i, (_, one) in enumerate(parts)]
    policy = each[0] if each else None
    whole = parts[0][1] if parts else None
    if whole is not None and any(map(whole.asks, ("prune", "route", "remember"))):  # sees all images together
        policy = whole
    elif len({None if one is None else one.spec for one in each}) > 1:
        policy = PerImage(
            [one for one, image in zip(each, images, strict=True) for _ in range(tiles_of(processor, image))]
        )
    inputs = processor(text=text_of(processor, asked), images=images or None, return_tensors="pt")
    return said_by(model, inputs, policy if images else None, never)


def said_by(model: Any, inputs: Any, policy: Any, never: list[int]) -> Said:
    """What vtr on transformers says to a processor's ``inputs``."""
    with torch.no_grad():
        out = model.generate(
            **inputs, policy=policy, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            suppress_tokens=never, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    row = vtr.report(model).rows[0]
    marks = int((inputs["input_ids"] == model.config.image_token_id).sum())
    entered = length - marks + (row.vision_tokens[0] if marks else 0)
    tokens = out.sequences[0, length:]
    logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Said(tokens.tolist(), logprobs.tolist(), entered)


def tiles_of(processor: Any, image: Image.Image) -> int:
    """How many images vtr on transformers makes of a picture: Idefics3's tiles are an image each."""
    if not hasattr(processor.image_processor, "do_image_splitting"):
        return 1
    return int(processor(text="<image>", images=[image])["pixel_values"][0].shape[0])


def _scaled(image: Image.Image, before: Any, processor: Any) -> Image.Image:
    return image if before is None else before.scaled(image, processor.image_processor, {})


def references(folder: Path, asked: Sequence[Asked], never: list[int]) -> list[Said]:
    """What vtr on transformers says, request by request."""
    model, processor = vtr.pocket.load(folder=folder)
    vtr.patch(model)
    return [reference(model, processor, one, never) for one in asked]
