"""What some families add to vision tokens behind their first decoder layers (Qwen3-VL's DeepStack, arXiv 2406.04334).

The text model would add them at the slots of the prompt; in a packed forward every row has its own tokens' part, which
shrinks with them and is added on entering the next layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vtr.base import UnsupportedError
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
        mine = number[row.index, row.slots[row.vision]]
        row.layer_features = [one.index_select(0, mine.to(one.device, non_blocking=True)) for one in features]


def compress_features(row: Row, vision: torch.Tensor) -> None:
    """Of a row that has been compressed: those of the tokens that are left. vision: where its vision tokens were."""
    for i, features in enumerate(row.layer_features):
        every = features.new_zeros(len(row.asked_slots), features.shape[1])
        every = row.carried(every.index_copy(0, vision.to(features.device), features))
        row.layer_features[i] = every.index_select(0, row.vision.to(features.device))


def add_features(rows: Sequence[Row], layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """[1, T, D] behind ``layer``, with what is added there to the vision tokens that are still there."""
    at, parts, start = [], [], 0
    for row in rows:
        if row.count:
            features = row.layer_features[layer].to(hidden)
            at.append(row.vision + start)
            parts.append(features if row.alive is None else features.index_select(0, row.alive))
        start += row.length
    return hidden.index_add(1, torch.cat(at), torch.cat(parts)[None]) if at else hidden
