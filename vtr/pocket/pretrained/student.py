"""The pretrained pocket model as it is trained: bfloat16, peft's adapters, a picture's questions in one sequence."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from . import adapter, drawings
from .align import PLACES, Seen, align, joined, owners
from .canvases import Canvas, Question

PLACING = 1200
"""Canvases that say how features tell a place."""


@dataclass
class Recipe:
    """Everything that decides how training runs.

    Attributes:
        aligned: canvases of the first half (``align``). canvases: of the second. batch: canvases a step. rank, alpha:
            of LoRA. lr, lora_lr: peaks of the projector and of LoRA, after ``warmup`` steps, then down to a twentieth
            along a cosine. decay: of weights. smoothing: of the labels. whole: share of canvases that keep all tokens.
            least: the others keep between this share and all of them. photographs: share of canvases.
        every: steps between two looks at the validation style.
    """

    aligned: int = 5200
    canvases: int = 16000
    batch: int = 4
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-4
    lora_lr: float = 6e-4
    warmup: int = 40
    decay: float = 0.05
    smoothing: float = 0.05
    whole: float = 0.5
    least: float = 0.1
    photographs: float = 0.12
    every: int = 100
    seed: int = 0


@dataclass
class Batch:
    """Some canvases with their questions as one batch of sequences.

    Attributes:
        pixels: [canvases, 3, side, side]. asked: of each canvas.
    """

    canvases: list[Canvas]
    asked: list[list[Question]]
    pixels: torch.Tensor = field(repr=False)


@dataclass
class Row:
    """A canvas and its questions as one sequence.

    Attributes:
        embeds: [length, width]. places: position ids. blocks: 0 is seen by all, n by question n alone. before: the
            places whose next token is part of an answer. answers: those tokens. lengths: of the answers.
    """

    embeds: torch.Tensor
    places: torch.Tensor
    blocks: torch.Tensor
    before: torch.Tensor
    answers: torch.Tensor
    lengths: list[int]


class Student:
    """The model in bfloat16 with a projector in float32 and peft's adapters in its decoder."""

    def __init__(self, model: Any, processor: Any, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self.processor, self.recipe = model.eval().requires_grad_(False), processor, recipe
        inner = model.model
        self.words = model.get_input_embeddings().weight.detach().clone()
        self.tower = inner.vision_tower.to(torch.bfloat16)
        self.projector = inner.multi_modal_projector.float()
        for part in (self.projector.layer_norm, self.projector.linear_1):  # behind them lies what spreads noise
            part.requires_grad_(True)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(adapter.TARGETS))
        self.decoder = get_peft_model(inner.language_model.to(torch.bfloat16), config, autocast_adapter_dtype=False)
        for name, weight in self.decoder.named_parameters():
            weight.requires_grad_("lora_" in name)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "§"}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, self.behind = text.split("§")
        head, tail = before.split(processor.image_token)
        self.head, self.tail = self.ids(head + processor.start_image_token), self.ids(processor.end_image_token + tail)
        self.end = "<|im_end|>"

    def ids(self, text: str) -> list[int]:
        """Of a text without anything around it."""
        return list(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    # -- one batch -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def see(self, batches: Iterable[Batch]) -> Seen:
        """Canvases as the tower gives them, for :mod:`align`."""
        parts = []
        for batch in batches:
            features = self.look(batch.pixels).half()
            across = math.isqrt(features.shape[1])
            parts.append(Seen(features, torch.stack([owners(one, across) for one in batch.canvases])))
        return joined(parts)

    def start(self, seen: Seen, held: Seen, say: Callable[[str], None] = print) -> None:
        """Align the projector with the decoder's words."""
        names = torch.stack([self.words[self.ids(" " + one.name)].mean(0) for one in drawings.things()])
        ends = [[self.words[self.ids(" " + word)].mean(0) for word in pair] for pair in PLACES]
        some = Seen(seen.features[:PLACING], seen.owners[:PLACING])
        found = align(seen, held, names, say=say)
        found.put_into(self.projector, some, torch.stack([first - last for first, last in ends]))

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the tower gives the projector, [canvases, tokens, 4 · width] float32."""
        inner = self.model.model
        seen = self.tower(pixel_values=pixels.to(torch.bfloat16)).last_hidden_state[:, 1:].float()
        across = math.isqrt(seen.shape[1])
        seen = inner.pixel_shuffle(seen.reshape(len(seen), across, across, -1), scale_factor=0.5)
        return seen.reshape(len(seen), -1, seen.shape[-1])

    def forward(
        self, features: torch.Tensor, asked: list[list[Question]], draw: random.Random | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[slice]]]:
        """Logits of the answers' tokens [answer tokens, words], those tokens, and where each answer lies among them.

        Args:
            features: as :meth:`look`. draw: leaves out tokens of the picture; None keeps all.
        """
        seen = self.projector(features)
        rows = [self._row(one, questions, draw) for one, questions in zip(seen, asked, strict=True)]
        longest = max(len(row.embeds) for row in rows)
        embeds = torch.stack([F.pad(row.embeds, (0, 0, 0, longest - len(row.embeds))) for row in rows])
        places = torch.stack([F.pad(row.places, (0, longest - len(row.places))) for row in rows])
        blocks = torch.stack([F.pad(row.blocks, (0, longest - len(row.blocks)), value=-1) for row in rows])
        ours = (blocks[:, :, None] == blocks[:, None]) | (blocks[:, None] == 0)
        mask = ours & torch.ones(longest, longest, dtype=torch.bool).tril()
        hidden = self.decoder(
            inputs_embeds=embeds.to(torch.bfloat16), attention_mask=mask[:, None], position_ids=places, use_cache=False
        ).last_hidden_state
        taken = torch.cat([hidden[n, row.before] for n, row in enumerate(rows)])
        logits = (taken @ self.words.to(taken.dtype).T).float()
        where, at = [], 0
        for row in rows:
            where.append([slice(at := at, at := at + length) for length in row.lengths])
        return logits, torch.cat([row.answers for row in rows]), where

    def _row(self, seen: torch.Tensor, questions: list[Question], draw: random.Random | None) -> Row:
        kept = torch.arange(len(seen))
        if draw is not None and draw.random() > self.recipe.whole:
            share = draw.uniform(self.recipe.least, 1.0)
            kept = torch.tensor(sorted(draw.sample(range(len(seen)), max(1, round(share * len(seen))))))
        head, count = len(self.head), len(self.head) + len(seen)
        ids, places, blocks = list(self.tail), list(range(count, count + len(self.tail))), [0] * len(self.tail)
        before: list[int] = []
        answers: list[int] = []
        lengths: list[int] = []
        shared = head + len(kept)
        for n, one in enumerate(questions):
            said = self.ids(one.answer + self.end)
            block = self.ids(one.text + self.behind)
            first = shared + len(ids) + len(block) - 1
            before += range(first, first + len(said))
            answers += said
            lengths.append(len(said))
            block = block + said
            places += range(count + len(self.tail), count + len(self.tail) + len(block))
            blocks += [n + 1] * len(block)
            ids += block
        embeds = torch.cat([self.words[self.head], seen[kept], self.words[ids]])
        where = torch.cat([torch.arange(head), head + kept, torch.tensor(places)])
        whose = torch.tensor([0] * shared + blocks)
        return Row(embeds, where, whose, torch.tensor(before), torch.tensor(answers), lengths)

    @torch.no_grad()
    def go_on(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Start from what an earlier training gave (:meth:`weights`) instead of :meth:`start`."""
        self.projector.load_state_dict(
            {name: weights[adapter.PROJECTOR + name] for name in self.projector.state_dict()}
        )
        for name, value in self.lora():  # a slimmed change has a smaller rank
            given = weights[self._shipped(name)] / self._scale(name)
            if "lora_B" in name:
                value.zero_()
            value[: given.shape[0], : given.shape[1]] = given

    def lora(self) -> Iterator[tuple[str, torch.Tensor]]:
        """peft's own names and weights."""
        return ((name, value) for name, value in self.decoder.named_parameters() if "lora_" in name)

    def _shipped(self, name: str) -> str:
        layer = adapter.LORA + name.split("base_model.model.")[1].split(".lora_")[0]
        return layer + (adapter.DOWN if "lora_A" in name else adapter.UP)

    def _scale(self, name: str) -> float:
        return 1.0 if "lora_A" in name else self.recipe.alpha / self.recipe.rank

    def weights(self) -> dict[str, torch.Tensor]:
        """What is shipped, as :func:`adapter.save` takes it."""
        found = {adapter.PROJECTOR + name: value for name, value in self.projector.state_dict().items()}
        found |= {self._shipped(name): value.detach().float() * self._scale(name) for name, value in self.lora()}
        return {name: value.detach().clone() for name, value in found.items()}
