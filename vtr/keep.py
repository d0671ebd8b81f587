"""How much stays: a keep, what it makes of a number of tokens, and the best tokens by a score."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Keep = int | float
"""``int``: a count of tokens (at most that many). ``float`` in [0, 1]: a ratio of what it is taken of (the row's vision
tokens, an image, a tile). A ratio above 0 leaves at least one of them; an int or 0.0 means what it says."""


def check_keep(keep: Keep, name: str = "keep") -> Keep:
    """Validate a keep: an int count >= 0 or a float ratio in [0, 1] (``1`` is one token, ``1.0`` is all of them).

    Raises:
        TypeError: not an int or float (a bool is neither).
        ValueError: out of range.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{name} must be an int (a count) or a float (a ratio in [0, 1]), got {keep!r}")
    if isinstance(keep, float) and not 0.0 <= keep <= 1.0:
        raise ValueError(
            f"{name}={keep!r}: a float is the ratio of tokens that stay and lies in [0, 1]; "
            f"for a count of tokens pass an int, e.g. {name}=64"
        )
    if isinstance(keep, int) and keep < 0:
        raise ValueError(f"{name}={keep!r}: a count of tokens that stay cannot be negative")
    return keep


def keep_count(keep: Keep, total: int, slack: float = 1e-9) -> int:
    """How many of ``total`` tokens a keep leaves: a ratio ``floor(total * keep + slack)``, a count itself at most.

    A ratio above 0 leaves at least one token, however few there are. Where official code cuts off, ``slack`` is 0.
    """
    if isinstance(keep, float):
        return min(max(int(total * keep + slack), int(keep > 0)), total)
    return min(keep, total)


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest scores along the last axis, best first; of equal ones the lower index wins."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


def top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (int64 [k], ascending) of the ``k`` largest of ``scores`` ([n]); of equal scores the lower index wins."""
    return best(scores, k).sort().values
