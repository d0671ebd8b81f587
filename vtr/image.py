"""One image before the decoder: where its tokens lie, what ``compress`` sees of it and may answer.

Also the two ways back from tiles to tokens that policies share: :func:`stitch` (the crops as one map) and
:func:`arrange` (thumbnail, crops and newline tokens as the model lines them up).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.functional import interpolate

P = ParamSpec("P")
T = TypeVar("T")


def remembered(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """``lru_cache`` for what is made of tensors: a first call in inference mode must not spoil a later training."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize)
        @wraps(function)
        def made(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False):
                return function(*args, **kwargs)

        return made  # type: ignore[return-value]

    return wrap


CROP_GRIDS = "crop_grids"
"""The input beside ``pixel_values`` that says how an image's crops are arranged: int64 [images of several tiles, grids,
2], the (rows, columns) of each of its grids in the order of their tiles, the finest first; (0, 0) where there is no
such grid. The thumbnail is not counted."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each token of one image lies. All tensors are int64 [n], on the CPU, in the order of the image's slots.

    Attributes:
        tile: 0 is the thumbnail (or the only tile); crops count from 1, row by row.
        y, x: patch row and column inside the tile. A newline token has the row it ends and x = one past the last.
        newline: 1 for a newline (separator) token, else 0.
        grid: (height, width) of one tile in tokens.
        crops: (rows, columns) of crop tiles; (0, 0) where there are none (one tile, or the frames of a video) and where
            there are several grids of them.
        groups: of an image with several grids of crops: (first tile, rows, columns) of each, the finest first.
        window: (top, left, height, width) of what is left of the crops' canvas after unpadding; None for all of it.
        scaled: (height, width) the window is scaled to where the family does that; None where it is not.
        thumbnail_last: the vision tower gets the thumbnail behind the crops, not in front of them.
        shrunk: ``shrunk(k)`` is the layout of the same picture if every tile had 1/k as many rows and columns.
        first_frame: of a video, the number (from 0) of the frame that its first tile shows; its tiles are frames that
            follow each other. Where every frame is an image, each has the next number, and the next video begins
            with 0 again. None for a picture.
        times: of a video, at which second each of its frames was taken; None where the call does not say.
        known: False where nothing says how the tokens lie, and they are taken for one row.
    """

    tile: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor
    newline: torch.Tensor
    grid: tuple[int, int]
    crops: tuple[int, int] = (0, 0)
    groups: tuple[tuple[int, int, int], ...] = field(default=(), kw_only=True)
    window: tuple[int, int, int, int] | None = None
    scaled: tuple[int, int] | None = None
    thumbnail_last: bool = False
    shrunk: Callable[[int], Layout] | None = None
    first_frame: int | None = None
    times: tuple[float, ...] | None = None
    known: bool = field(default=True, kw_only=True)

    def __len__(self) -> int:
        return int(self.tile.shape[0])

    @property
    def doubt(self) -> str:
        """What an error about the grid has to add: empty, or that it is not known."""
        return "" if self.known else " (nothing in the inputs says how its tokens lie, so they are taken for one row)"

    @property
    def frame(self) -> torch.Tensor:
        """int64 [n]: which frame of its video each token shows, from 0; -1 in a picture."""
        return torch.full_like(self.tile, -1) if self.first_frame is None else self.tile + self.first_frame

    @property
    def tiles(self) -> int:
        """How many tiles the vision tower sees of this image."""
        rows, columns = self.crops
        return 1 + rows * columns if rows else int(self.tile.max()) + 1

    @property
    def group(self) -> torch.Tensor:
        """int64 [n]: 0 for the thumbnail (or the only tile), 1 for the finest grid of crops, 2 for the next, …"""
        return _group(self)

    @property
    def has_all_patches(self) -> bool:
        """Whether every patch of every tile is among the tokens (nothing was cut away or scaled down)."""
        patches = len(self) - int(self.newline.sum())
        return self.scaled is None and patches == self.tiles * self.grid[0] * self.grid[1]

    @property
    def whole(self) -> bool:
        """Deprecated: :attr:`has_all_patches`."""
        warnings.warn("Layout.whole is now Layout.has_all_patches", DeprecationWarning, stacklevel=2)
        return self.has_all_patches


@remembered(4096)
def framed(layout: Layout, first: int, times: tuple[float, ...] | None = None) -> Layout:
    """This layout as a part of a video, whose first tile is frame ``first``; also when its tiles shrink."""
    shrunk = layout.shrunk
    smaller = None if shrunk is None else lambda k: framed(shrunk(k), first, times)
    return replace(layout, shrunk=smaller, first_frame=first, times=times)


def frames_of(layout: Layout) -> list[torch.Tensor]:
    """int64 [n] for each frame: its patches, as indices into the image's tokens. A picture is one frame."""
    patches = (layout.newline == 0).nonzero()[:, 0]
    if layout.first_frame is None or layout.tiles == 1:
        return [patches]
    return [patches[layout.tile[patches] == tile] for tile in range(layout.tiles)]


Layer = int | float | None
"""Which layer of a vision tower: see :class:`Tower`."""


class Tower(ABC):
    """What the vision tower has of one image. Tiles are in the layout's order (0 the thumbnail), tokens row by row.

    Layers are counted as transformers counts ``hidden_states`` (0 enters the first layer, −1 leaves the last) and
    ``attentions`` (0 the first layer, −1 the last). None is the layer whose output the model uses: with LLaVA's
    ``vision_feature_layer=-2``, ``hidden_states[-2]``, and the attention of the layer that made it, ``attentions[-2]``.
    A float in (0, 1] is a share of the depth: 0.375 of 24 layers is the ninth, ``attentions[8]``, and what leaves it.
    Where a token is made of several patches (pixel shuffle, mergers), it has their mean.

    All of it is there only for policies whose ``wants`` name it.
    """

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether the tower puts a CLS token in front of the patches (CLIP, InternViT)."""

    @abstractmethod
    def hidden_states(self, layer: Layer = None) -> torch.Tensor:
        """[tiles, h * w, width]: the states of the patches, before the projector. Gradients flow."""

    @abstractmethod
    def cls_state(self, layer: Layer = None) -> torch.Tensor:
        """[tiles, width]: the state of the CLS token.

        Raises:
            UnsupportedError: the tower has none.
        """

    @abstractmethod
    def attention_from_cls(self, layer: Layer = None) -> torch.Tensor:
        """float32 [tiles, heads, h * w]: the CLS query's attention after the softmax over all tokens, CLS included.

        Raises:
            UnsupportedError: the tower has no CLS token.
        """

    @abstractmethod
    def attention_received(self, layer: Layer = None) -> torch.Tensor:
        """float32 [tiles, h * w]: attention that each patch gets, mean over heads and all queries (CLS included)."""

    @abstractmethod
    def keys(self, layer: Layer = None) -> torch.Tensor:
        """[tiles, leading + patches, heads, head_dim]: the keys of all tokens, CLS in front, bias included."""

    @abstractmethod
    def cls_query(self, layer: Layer = None) -> torch.Tensor:
        """[tiles, heads, head_dim]: the query of the CLS token, bias included, not scaled.

        Raises:
            UnsupportedError: the tower has none.
        """

    @abstractmethod
    def project(self, states: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, hidden_size]: the model's projector. Gradients flow. Families whose projector takes several
        patches at once refuse policies that want it."""

    @abstractmethod
    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """The tower's ``post_layernorm`` of states [..., width]."""


@dataclass(eq=False)
class Image:
    """What ``compress`` sees of one image, before the decoder.

    Attributes:
        features: [n, hidden_size], the image's tokens as they would enter the text model (newline tokens included).
        layout: tile, (y, x) and newline-ness of each of the n tokens.
        index: which image of its row this is, from 0.
        count: how many images the row has.
        tiles: [tiles, h * w, hidden_size], the projector's output for every tile, 0 the thumbnail, before anything is
            cut away or newline tokens come in; None unless the policy ``wants`` "tiles". Gradients flow through it.
        newline: [hidden_size], the embedding of a newline token; None where the family has none or nothing is wanted.
        scorer: what :meth:`cls_attention` calls; None unless the policy ``wants`` "cls".
        tower: the vision tower's states and attention; None unless the policy ``wants`` some of it.
        question: [t, hidden_size], the row's text behind its last image as the text model embeds it (chat template
            included, no answer); None unless the policy ``wants`` "question".
        question_ids: int64 [t] on the CPU, its tokens; None where the call gave embeddings.
        flops: what a policy adds here of its own matrix products is reported among ``selector_flops``.
        memo: a dict of the policy's own, one for all images of the row: what it puts there is in ``Tokens.memo`` when
            it is asked inside the decoder.
    """

    features: torch.Tensor
    layout: Layout
    index: int
    count: int
    tiles: torch.Tensor | None = None
    newline: torch.Tensor | None = None
    scorer: Callable[[], torch.Tensor] | None = None
    tower: Tower | None = None
    question: torch.Tensor | None = None
    question_ids: torch.Tensor | None = None
    flops: int = 0
    memo: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layout)

    def cls_attention(self) -> torch.Tensor:
        """float32 [tiles, h * w]: how much the vision tower's CLS token looks at each token, computed when called.

        The CLS row of the tower's last layer before the softmax, mean over heads, as GlobalCom² scores tokens. Towers
        without a CLS token (SigLIP): minus the cosine of a tile's token and the mean token of its tile.

        Raises:
            ValueError: the policy does not say that it wants "cls".
        """
        if self.scorer is None:
            raise ValueError('CLS scores are only there for policies that say so: wants = ("cls",)')
        return self.scorer()


@dataclass(frozen=True, eq=False)
class Pooled:
    """An answer of ``compress`` that makes new tokens out of old ones.

    Attributes:
        features: [m, hidden_size], m at most the image's token count.
        sources: m lists: the indices (into the image's tokens) each new token was made from.
        layout: where the new tokens lie; None for the tile, (y, x) and newline-ness of each one's first source.
    """

    features: torch.Tensor
    sources: Sequence[Sequence[int]]
    layout: Layout | None = None


def stitch(layout: Layout, crops: torch.Tensor) -> torch.Tensor:
    """Something of every crop, laid out as the model lays out their features: unpadded, scaled where the family does.

    Args:
        crops: [crops, h * w, channels], row by row; (h, w) is the layout's grid.

    Returns:
        [channels, height, width].
    """
    (rows, columns), (h, w) = layout.crops, layout.grid
    canvas = crops.view(rows, columns, h, w, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    top, left, height, width = layout.window or (0, 0, rows * h, columns * w)
    body = canvas[:, top : top + height, left : left + width]
    return body if layout.scaled is None else interpolate(body[None], layout.scaled, mode="bilinear")[0]


def arrange(layout: Layout, tiles: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """An image's tokens made of its tiles, as the model lines them up.

    Args:
        tiles: [tiles, h * w, hidden_size], (h, w) the layout's grid. newline: [hidden_size], if there are such tokens.

    Returns:
        [len(layout), hidden_size]; differentiable.

    Raises:
        ValueError: the layout has newline tokens, but there is no embedding of one.
    """
    parts = [tiles.flatten(0, 1)]
    if layout.scaled is not None:
        parts = [tiles[0], stitch(layout, tiles[1:]).flatten(1).T]
    if newline is not None:
        parts.append(newline.to(parts[0])[None])
    elif bool(layout.newline.any()):
        raise ValueError("this layout has newline tokens: give the embedding of one")
    return torch.cat(parts).index_select(0, _sources(layout).to(tiles.device, non_blocking=True))


@remembered(1024)
def _group(layout: Layout) -> torch.Tensor:
    """See :attr:`Layout.group`."""
    if not layout.groups:
        return layout.tile.clamp(max=1)
    return torch.bucketize(layout.tile, torch.tensor([first for first, _, _ in layout.groups]), right=True)


@remembered(1024)
def _sources(layout: Layout) -> torch.Tensor:
    """int64 [n]: which row of what :func:`arrange` joins each token is."""
    n = layout.grid[0] * layout.grid[1]
    source, patches = cell(layout), int((layout.newline == 0).sum())
    end = layout.tiles * n
    if layout.scaled is not None:
        source, end = torch.arange(len(layout)) - layout.newline.cumsum(0), patches
    return torch.where(layout.newline.bool(), end, source)


def cell(layout: Layout) -> torch.Tensor:
    """int64 [n]: the patch each token stands at, counted tile by tile from the thumbnail's first."""
    h, w = layout.grid
    return (layout.tile * h + layout.y) * w + layout.x


@remembered(1024)
def tokens_at(layout: Layout) -> torch.Tensor:
    """int64 [tiles * h * w]: which token stands at each patch, counted as :func:`cell` does; -1 where none is left."""
    patches = (layout.newline == 0).nonzero().squeeze(1)
    table = torch.full((layout.tiles * layout.grid[0] * layout.grid[1],), -1)
    return table.index_copy(0, cell(layout)[patches], patches)


def scales(grid: tuple[int, int]) -> dict[int, int]:
    """The nested scales of tiles of ``grid`` (height, width) tokens: tokens per tile → side of a pooled cell.

    The side is divided by its smallest prime factor again and again, so that every scale's cells are made of whole
    cells of the scale before: 24 × 24 gives the paper's 576, 144, 36, 9, 1; 16 × 16 gives 256, 64, 16, 4, 1; 27 × 27
    gives 729, 81, 9, 1. Of a grid that is not square, the greatest common divisor of the two is divided.
    """
    height, width = grid
    k, side = 1, math.gcd(height, width)
    found = {height * width: 1}
    while side > 1:
        factor = next(n for n in range(2, side + 1) if side % n == 0)
        k, side = k * factor, side // factor
        found[(height // k) * (width // k)] = k
    return found
