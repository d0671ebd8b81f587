"""The 7B shapes and what is run on them: weights are drawn once, on the device, and all models share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from vtr.eval.cost import midsize, shapes
from vtr.eval.cost.shapes import Shape
from vtr.eval.gpu.policies import mix, timed_policies
from vtr.eval.gpu.record import Setup

import vtr

SHAPES = ("llava-1.5-7b", "llava-next-7b")
CELLS = ("1", "8", "mixed")
"""One row; eight equal rows; eight rows of different lengths and policies."""
UNPATCHED = "unpatched"


@dataclass(frozen=True)
class Contender:
    """A model and what it is run under. ``policy`` is left out for the unpatched model."""

    model: Any
    policy: Mapping[str, Any]

    def forward(self, inputs: Mapping[str, torch.Tensor], **more: Any) -> Any:
        """The prompt, with a cache."""
        return self.model(**inputs, **self.policy, use_cache=True, logits_to_keep=1, **more)

    def report(self) -> Any:
        """Of the last call; None for the unpatched model."""
        return vtr.report(self.model) if self.policy else None


@dataclass(frozen=True)
class Cell:
    """One batch, and who runs it.

    Attributes:
        left_out: label → why a policy cannot be set to this mean.
    """

    inputs: dict[str, torch.Tensor]
    contenders: dict[str, Contender]
    left_out: dict[str, str]

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass
class Pair:
    """One shape: the model of transformers and a patched one on its weights."""

    shape: Shape
    stock: Any
    patched: Any
    small: bool = False

    @property
    def layers(self) -> int:
        return int(self.shape.text["num_hidden_layers"])

    @cached_property
    def weight_bytes(self) -> int:
        """Of what every decoded token reads: the decoder's layers and the head."""
        return self.layer_bytes + sum(map(size_of, self.stock.get_output_embeddings().parameters()))

    @cached_property
    def layer_bytes(self) -> int:
        return sum(map(size_of, self.stock.get_decoder().layers.parameters()))

    @cached_property
    def token_bytes(self) -> int:
        """Of one token's keys and values in one layer."""
        text = self.shape.text
        width = text["hidden_size"] // text["num_attention_heads"]
        return int(2 * text["num_key_value_heads"] * width * self.stock.dtype.itemsize)

    @cached_property
    def policies(self) -> tuple[dict[str, Any], dict[str, str]]:
        return timed_policies(self.shape.text["hidden_size"], self.layers, self.shape.side, self.small)

    def cell(self, name: str, setup: Setup) -> Cell:
        """One of ``CELLS``."""
        words, chosen = self.shape.text_tokens, self.policies[0]
        lengths = [words] if name == "1" else [words] * 8 if name == "8" else [words * (16 - b) // 16 for b in range(8)]
        under = {"fastv 33 %": chosen["fastv 33 %"], "a mix": mix(chosen)} if name == "mixed" else chosen
        if self.small:
            lengths, under = lengths[:3], {label: p for label, p in under.items() if not label.endswith("11 %")}
            under |= {"a mix": under["a mix"][:3]} if name == "mixed" else {}
        inputs = shapes.prompts(self.stock, self.shape, [(1, n) for n in lengths], setup.seed)
        out = {UNPATCHED: Contender(self.stock, {}), "no policy": Contender(self.patched, {"policy": None})}
        out |= {label: Contender(self.patched, {"policy": policy}) for label, policy in under.items()}
        return Cell(inputs, out, self.policies[1] if name != "mixed" else {})


def size_of(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


class Models:
    """Makes the pairs when they are first asked for."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pairs: dict[str, Pair] = {}

    def __getitem__(self, name: str) -> Pair:
        if name not in self.pairs:
            shape = shapes.SHAPES[name]
            shape = shapes.scaled_down(shape) if self.setup.small else shape
            first = next(iter(self.pairs.values()), None)
            if first is None:
                stock = shapes.build(shape, str(self.setup.device), self.setup.dtype, self.setup.seed)
            else:
                stock = shapes.sharing(first.stock, shape, self.setup.seed)
            self.pairs[name] = Pair(shape, stock, vtr.patch(midsize.twin(stock)), self.setup.small)
        return self.pairs[name]
