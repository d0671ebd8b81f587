"""Policies that break their promise, as a vLLM plugin of their own would register them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import vtr
from vtr.image import Layout


@dataclass
class Short(vtr.Policy):
    """One token too few, of pictures only (a rehearsal on nothing does not show it)."""

    keep: int = 8

    def kept_of(self, layout: Layout) -> int:
        return self.keep

    def compress(self, image: vtr.Image) -> torch.Tensor:
        return torch.arange(self.keep - int(bool(image.features.any())))


@dataclass
class Raising(Short):
    """Raises, on pictures only."""

    def compress(self, image: vtr.Image) -> torch.Tensor:
        assert not image.features.any(), "no such luck"
        return torch.arange(self.keep)


@dataclass
class Liar(Short):
    """One token too many, always."""

    def compress(self, image: vtr.Image) -> torch.Tensor:
        return torch.arange(self.keep + 1)


REHEARSED = 8
"""Channels at most that rehearsals have; models have more."""


@dataclass
class Late(Short):
    """One token too few of pictures that a model has seen: no rehearsal shows it."""

    def compress(self, image: vtr.Image) -> torch.Tensor:
        return torch.arange(self.keep - int(image.features.shape[1] > REHEARSED))


@dataclass
class Elsewhere(Short):
    """As many as promised, but other ones than in rehearsals."""

    def compress(self, image: vtr.Image) -> torch.Tensor:
        return torch.arange(self.keep) + int(image.features.shape[1] > REHEARSED)


SAYS = {
    "test-short": "vtr: test-short:keep=8 promised 8 embeddings of an image and gave 7",
    "test-raising": "vtr: test-raising:keep=8 failed on an image (AssertionError): the server's log says more",
}
"""What is said of those that a rehearsal does not find."""


def register() -> None:
    """Make them known in this process; may run several times."""
    named = {"short": Short, "raising": Raising, "liar": Liar, "late": Late, "elsewhere": Elsewhere}
    for name, cls in named.items():
        vtr.register_policy(f"test-{name}")(cls)
