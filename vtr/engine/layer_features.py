"""What some families add to vision tokens behind their first decoder layers (Qwen3-VL's DeepStack, arXiv 2406.04334).

The text model would add them at the slots of the prompt; in a packed forward every row has its own tokens' part, which
shrinks with them and is added on entering the next layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vtr.base import UnsupportedError
from vtr.engine.compression import Compression
from vtr.engine.packed import Packed
from vtr.engine.rows import Row


def take_features(
    rows: Sequence[Row], features: Sequence[torch.Tensor], is_vision: torch.Tensor | None, depth: int
) -> None:
    """Give every row its part, before any of them is compressed.

    Args:
        features: for each of the first layers, [vision tokens of the batch, D], row by row.
        is_vision: bool [rows, L] on the CPU. depth: how many decoder layers there are.

    Raises:
        UnsupportedError: something is added behind the last layer, where tokens are not packed any more.
    """
    assert is_vision is not None  # where there are features there are images
    if len(features) >= depth:
        raise UnsupportedError(
            f"this model adds vision features behind {len(features)} of its {depth} decoder layers; vtr needs at least "
            "one layer behind them: pass policy=None"
        )
    number = is_vision.flatten().cumsum(0).view_as(is_vision) - 1
    for row in rows:
        mine = number[row.index, row.slots[row.vision.index]]
        row.vision.layer_features = [one.index_select(0, mine.to(one.device, non_blocking=True)) for one in features]


def compress_features(row: Row, compression: Compression, before: torch.Tensor) -> None:
    """Of a row that has been compressed: those of the tokens that are left. before: its vision tokens' old indices."""
    compressed = []
    for features in row.vision.layer_features:
        every = features.new_zeros(len(row.given.slots), features.shape[1])
        every = compression.means(every.index_copy(0, before.to(features.device), features))
        compressed.append(every.index_select(0, row.vision.index.to(features.device)))
    row.vision.layer_features = compressed


def add_features(packed: Packed, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """[1, T, D] behind ``layer``, with what is added there to the vision tokens that are still there."""
    features = packed.features[layer].to(hidden).index_select(0, packed.alive)
    return hidden.index_add(1, packed.vision, features[None])
