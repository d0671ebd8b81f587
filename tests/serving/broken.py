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


SAYS = {
    "test-short": "vtr: test-short:keep=8 promised 8 embeddings of an image and gave 7",
    "test-raising": "vtr: test-raising:keep=8 failed on an image (AssertionError): the server's log says more",
}
"""What is said of those that a rehearsal does not find."""


def register() -> None:
    """Make them known in this process; may run several times."""
    for name, cls in (("test-short", Short), ("test-raising", Raising), ("test-liar", Liar)):
        vtr.register_policy(name)(cls)
