"""What is compared with many shots, and how many demonstrations each of them has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from vtr.eval.accuracy.contenders import ALL, NONE, Contender, contender, specs_of

import vtr
from vtr.base import Policy
from vtr.engine.adapters import find_adapter
from vtr.engine.prompt import read_prompt
from vtr.image import Layout, scales
from vtr.limits import short
from vtr.pocket.scenes import SIZES
from vtr.pocket.shots.prompts import Example, Prompt, pictures, turns

FEWER = "fewer"
"""Not reduced, with as many of the demonstrations as cost no more than coarse ones and a whole query."""


def encode(model: Any, processor: Any, prompts: Sequence[Prompt]) -> Any:
    """A left-padded batch of conversations, on the model's device; pixels in its dtype.

    Raises:
        ValueError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so how answers of earlier turns are put is not known: "
            "--shots needs a model with one"
        )
    texts = [processor.apply_chat_template(turns(one), add_generation_prompt=True) for one in prompts]
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor(images=[pictures(one) for one in prompts], text=texts, **how).to(model.device, model.dtype)


@dataclass(frozen=True)
class Room:
    """How long a prompt of the largest pictures is under a policy.

    Attributes:
        layout: of such a picture. text: tokens of a demonstration that are no picture's. positions: the model's; None:
            no bound is known. answer: tokens that are left for the answer.
    """

    layout: Layout
    text: int
    positions: int | None
    answer: int

    @classmethod
    def from_model(cls, model: Any, processor: Any, answer: int) -> Room:
        """By encoding one demonstration and one query."""
        one = Example(Image.new("RGB", SIZES[0]), "which letter is on the triangle", "triangle", "triangle")
        inputs = encode(model, processor, [Prompt("shape", (one,), one)])
        layouts = read_prompt(find_adapter(model), model, inputs["input_ids"].cpu(), None, inputs).layouts[0]
        text = inputs["input_ids"].shape[1] - sum(map(len, layouts))
        config = find_adapter(model).text_model(model).config
        return cls(layouts[0], (text + 1) // 2, getattr(config, "max_position_embeddings", None), answer)

    def needed(self, policy: Policy | None, shots: int) -> int:
        """The positions that a prompt may take up: of pictures that are pruned in the decoder, all of theirs."""
        count = shots + 1
        mine = [None if policy is None else policy.of_image(i, count) for i in range(count)]
        return sum(map(self._left, mine)) + count * self.text + self.answer

    def _left(self, policy: Policy | None) -> int:
        if policy is None or not policy.asks("compress"):
            return len(self.layout)
        try:
            return policy.kept_of(self.layout)
        except ValueError:  # what the picture shows decides
            return len(self.layout)

    def longest(self, policy: Policy | None) -> int | None:
        """The most demonstrations that fit, -1 if not even the query does; None: no bound is known."""
        if self.positions is None:
            return None
        none, one = self.needed(policy, 1), self.needed(policy, 2)
        each = one - none
        return max(-1, (self.positions - none) // each + 1)

    def refusal(self, policy: Policy | None, shots: int) -> str | None:
        """Why so many demonstrations do not fit; None: they do."""
        if self.positions is None or (needed := self.needed(policy, shots)) <= self.positions:
            return None
        return (
            f"{shots} demonstrations take up to {needed:,} positions, the model has {self.positions:,}: at most "
            f"{self.longest(policy)} fit"
        )


def coarse(layout: Layout) -> int:
    """The coarsest of M3's scales with more than one token a tile."""
    return sorted(scales(layout.grid))[:2][-1]


def by_default(layout: Layout) -> list[str]:
    """No reduction, all coarse, demonstrations coarse, fewer demonstrations."""
    few = f"m3:tokens={coarse(layout)}"
    return [NONE, few, vtr.ByImage(few, last=NONE).spec, FEWER]


def contenders(specs: Sequence[str], layout: Layout, num_hidden_layers: int) -> list[Contender]:
    """Those that are named, no reduction in front; of ``all`` those of :func:`by_default`.

    Raises:
        TypeError, ValueError: no such policy, one that cannot work on this model, one of the input's, one twice.
    """
    named = [one for spec in specs_of(specs) for one in (by_default(layout) if spec == ALL else [spec])]
    found: list[Contender] = []
    for spec in [NONE, *(one for one in named if one != NONE)]:
        one = Contender(FEWER, FEWER) if spec == FEWER else contender(spec)
        if one.before is not None:
            raise ValueError(f"{short(spec)}: with --shots pictures are not made smaller before the processor")
        if one.policy is not None:
            one.policy.check(num_hidden_layers)
        if one in found:
            raise ValueError(f"{one.spec} is there twice: name each policy once")
        found.append(one)
    return found


@torch.inference_mode()
def as_many(model: Any, processor: Any, prompt: Prompt, policy: Policy) -> int:
    """How many of a prompt's demonstrations cost no more FLOPs unreduced than all of them under ``policy``."""
    model(**encode(model, processor, [prompt]), policy=policy, use_cache=True, logits_to_keep=1)
    most = vtr.report(model).prefill_flops
    for count in range(len(prompt.demonstrations) + 1):
        model(**encode(model, processor, [fewer(prompt, count)]), policy=None, use_cache=True, logits_to_keep=1)
        if vtr.report(model).prefill_flops > most:
            return max(count - 1, 0)
    return len(prompt.demonstrations)


def fewer(prompt: Prompt, count: int) -> Prompt:
    """The prompt with its last ``count`` demonstrations."""
    shown = prompt.demonstrations[len(prompt.demonstrations) - count :]
    return Prompt(prompt.type, shown, prompt.query)
