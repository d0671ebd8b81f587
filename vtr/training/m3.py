"""The objective of M3: the mean of the cross-entropies at all nested scales (arXiv 2405.17430, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def backward_nested(
    features: torch.Tensor, scales: Sequence[int], loss_at: Callable[[torch.Tensor, int], torch.Tensor]
) -> dict[int, float]:
    """Gradients of the mean over ``scales`` of ``loss_at(features, scale)``; returns every scale's loss.

    Vision tower and projector run once for all scales, forward and backward: each scale's loss runs backward to
    ``features`` as soon as it is made (so that one scale's graph is held at a time), and what made the features runs
    backward once, with the sum. The official code runs them once per scale; the gradients are the same.

    Args:
        features: float [...], what all scales share, e.g. projected tiles; with a graph behind it if that is to learn.
        loss_at: the scalar loss of a batch whose pictures have so many tokens per tile.

    Raises:
        ValueError: no scale, or the same one twice.
    """
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"scales={list(scales)}: name each scale once, and at least one")
    leaf = features.detach().requires_grad_(features.requires_grad)
    losses = {}
    for scale in scales:
        loss = loss_at(leaf, scale)
        (loss / len(scales)).backward()
        losses[scale] = loss.item()
    if features.requires_grad:
        features.backward(leaf.grad)
    return losses
