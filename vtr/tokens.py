"""What policies see inside the decoder: a row's tokens on entering a layer, and one that was decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STATES = ("hidden", "text", "cos", "sin", "text_cos", "text_sin")
"""Fields of :class:`Tokens` that are floats, [n or t, size] each."""


@dataclass(eq=False)
class Tokens:
    """A row's vision tokens on entering a decoder layer, as ``prune``, ``route`` and ``attend`` see them.

    Attributes:
        layer: the 0-based decoder layer about to run; num_hidden_layers: how many there are.
        total: how many vision tokens the row had when it entered the text model.
        image, tile, y, x, newline, frame: int64 [n] each, n = len(tokens): the tokens still there. A picture's frame is
            -1; where every frame of a video is an image, ``image`` counts these.
        group: int64 [n]: 0 in the thumbnail (or only tile), 1 in the crops; where an image has several grids of crops,
            1 in the finest, 2 in the next, …
        place: int64 [n], where they stand among the row's ``row_length`` tokens (text too) that enter the layer.
        hidden: [n, hidden_size], their hidden states. rope: ([n, d], [n, d]), cosine and sine of their positions.
        text: [t, hidden_size], the states of the prompt's text. text_place, text_rope: of the text.
        behind: bool [t], which of the text stands behind the last vision token.
        scores: float32, what ``needs(layer)`` asked for, [n] unless it says otherwise (a tuple, if it asked for
            several things); or None. text_scores: float32 [t], of the text, where it asked for norms of keys.
        per_image: how many of them each image of the row had on entering the text model, in order.
        memo: a dict of the policy's own, one per row and forward, shared by all its questions and layers
            (``Image.memo`` is the same).
        flops: what a policy adds here of its own matrix products is reported among ``selector_flops``.
    """

    layer: int
    num_hidden_layers: int
    total: int
    _count: int
    _field: Callable[[str], Any]
    scores: Any
    ahead: Callable[[], torch.Tensor]
    """float32 [n]: attention the last text query is about to pay in this layer, from the layer's own projections
    (PyramidDrop's ranking). Computed when called."""
    per_image: tuple[int, ...] = ()
    row_length: int = 0
    memo: dict[str, Any] = field(default_factory=dict)
    norm: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    """The norm behind the text model's last layer, of states [k, hidden_size]."""
    text_scores: torch.Tensor | None = None
    flops: int = 0

    def __len__(self) -> int:
        return self._count

    @property
    def image(self) -> torch.Tensor:
        return self._field("image")

    @property
    def tile(self) -> torch.Tensor:
        return self._field("tile")

    @property
    def group(self) -> torch.Tensor:
        return self._field("group")

    @property
    def y(self) -> torch.Tensor:
        return self._field("y")

    @property
    def x(self) -> torch.Tensor:
        return self._field("x")

    @property
    def newline(self) -> torch.Tensor:
        return self._field("newline")

    @property
    def frame(self) -> torch.Tensor:
        return self._field("frame")

    @property
    def place(self) -> torch.Tensor:
        return self._field("place")

    @property
    def hidden(self) -> torch.Tensor:
        return self._field("hidden")

    @property
    def text(self) -> torch.Tensor:
        return self._field("text")

    @property
    def text_place(self) -> torch.Tensor:
        return self._field("text_place")

    @property
    def behind(self) -> torch.Tensor:
        return self._field("behind")

    @property
    def rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._field("cos"), self._field("sin")

    @property
    def text_rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._field("text_cos"), self._field("text_sin")

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the CPU that depend on ``seed`` and the layer alone: the same in every batch."""
        import torch

        return torch.Generator().manual_seed(seed * 1009 + self.layer)


@dataclass(eq=False)
class Token:
    """One decoded token of one row on entering a decoder layer, as ``remember`` sees it.

    Attributes:
        hidden: [hidden_size].
        memo: a dict of the policy's own, shared by all layers of this step (a decision made once can be kept in it).
        flops: what a policy adds here of its own matrix products is reported among ``selector_flops``.
    """

    hidden: torch.Tensor
    memo: dict[str, Any]
    flops: int = 0
