"""A policy that keeps everything, and what compress policies are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import vtr
from vtr.image import Image


@vtr.register_policy("spy-for-test")
@dataclass
class Spy(vtr.Policy):
    """Keeps everything, and what it saw."""

    wants: ClassVar[Any] = ("tiles", "cls")

    def __post_init__(self) -> None:
        self.seen: list[tuple[Image, Tensor]] = []

    def compress(self, image: Image) -> None:
        self.seen.append((image, image.cls_attention()))
