"""Which tokens see which, where attention is not plainly causal: sliding windows, chunks, and a model's own masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtr.base import UnsupportedError


class Chunk(int):
    """Attention within chunks of so many positions, counted from the row's first token; stands where windows stand.

    A token sees no farther than a window of that size would let it, so a cache that drops what is behind such a window
    drops nothing that is needed.
    """


def near(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """bool: which keys a window or chunk leaves to the queries. Both are positions, int64, that broadcast."""
    if isinstance(window, Chunk):
        return queries // int(window) == keys // int(window)
    return queries - keys < window


@dataclass(frozen=True, eq=False)
class WindowMask:
    """A sliding window (or chunks): queries ([n] positions) see keys ([m] positions) that are :func:`near`."""

    queries: torch.Tensor
    keys: torch.Tensor
    window: int

    def seen(self) -> torch.Tensor:
        """bool [n, m]: which keys the queries may see."""
        n, m = len(self.queries), len(self.keys)
        causal = torch.ones(n, m, dtype=torch.bool, device=self.keys.device).tril(m - n)  # made ones share positions
        return causal & near(self.queries[:, None], self.keys[None], self.window)


@dataclass(frozen=True, eq=False)
class OwnMask:
    """What a layer's mask, as the model made it for the whole prompt, says of the tokens that are there now.

    Attributes:
        mask: bool [rows, L, L], who sees whom among the columns of this forward.
        odd: bool [rows, L, L], where that is not what order, window and chunk alone would say.
        slots: int64 [t], of each token the row * L + slot at which it entered; -1 for tokens cached before.
    """

    mask: torch.Tensor
    odd: torch.Tensor
    slots: torch.Tensor

    def over(self, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """``seen`` (bool [..., q, k], by order and positions as they are now) where the mask says nothing else.

        Args:
            queries, keys: int64 [..., q] and [..., k], which of the tokens.
        """
        columns = self.mask.shape[-1]
        q, k = self.slots[queries][..., :, None], self.slots[keys][..., None, :]
        row, mine = q.clamp(min=0) // columns, (k >= 0) & (q // columns == k // columns)
        at = row, q.clamp(min=0) % columns, k.clamp(min=0) % columns
        return torch.where(self.odd[at] & mine, self.mask[at], seen)

    def within(self, here: slice, past: int = 0) -> OwnMask:
        """Of the tokens ``here``, behind so many cached ones."""
        slots = self.slots[here]
        return replace(self, slots=torch.cat([slots.new_full((past,), -1), slots]) if past else slots)

    def among(self, index: torch.Tensor) -> OwnMask:
        """Of the tokens ``index`` (int64)."""
        return replace(self, slots=self.slots.index_select(0, index))


class OwnMasks:
    """The masks that a model made for its whole prompt, one per kind of layer or one for all.

    Args:
        given: kind → mask, bool or numbers to add, [rows or 1, 1, L, past + L]; there may be none of some kind.
        kinds: of every layer, as they are called in ``given``.
        windows: of every layer. valid: bool [rows, L], False for padding. before: bool [rows, past], likewise of what
            is cached; None for nothing cached.

    Raises:
        UnsupportedError: new tokens that see cached ones otherwise than by their order (reads the device).
    """

    def __init__(
        self, given: Mapping[Any, torch.Tensor], kinds: tuple[Any, ...], windows: tuple[int | None, ...],
        valid: torch.Tensor, before: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.kinds = kinds
        self._of: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        there = valid if before is None else torch.cat([before.to(valid.device), valid], 1)
        past = there.shape[1] - valid.shape[1]
        for kind, window in dict(zip(kinds, windows, strict=True)).items():
            mask = given.get(kind)
            if mask is None:
                continue
            allowed = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].expand(len(valid), -1, -1)
            odd = (allowed != _plain(there, past, window)) & there[:, None] & valid[..., None]
            if past and bool(odd[..., :past].any()):
                raise UnsupportedError(
                    "this turn's tokens see cached ones otherwise than by their order, which a reduced cache cannot "
                    "tell them: start with a new cache and the whole conversation, or pass policy=None from the first "
                    "call on"
                )
            self._of[kind] = allowed[..., past:], odd[..., past:]

    def of_layer(self, index: int, slots: torch.Tensor) -> OwnMask | None:
        """That of layer ``index`` over tokens that entered at ``slots``; None where it is plainly causal."""
        found = self._of.get(self.kinds[index])
        if found is None:
            return None
        if found[0].device != slots.device:
            self._of[self.kinds[index]] = found = found[0].to(slots.device), found[1].to(slots.device)
        return OwnMask(*found, slots)


def _plain(there: torch.Tensor, past: int, window: int | None) -> torch.Tensor:
    """bool [rows, L, past + L]: what order, and a window or chunks counted in columns, let the last L columns see."""
    at = torch.arange(there.shape[1], device=there.device)
    seen = at[None, past:, None] >= at[None, None]
    if window is not None:
        at = at[None] - there.long().argmax(1)[:, None]  # chunks begin behind the padding
        seen = seen & near(at[:, past:, None], at[:, None], window)
    return seen


def parted(mask: Any) -> tuple[dict[str, torch.Tensor] | torch.Tensor | None, torch.Tensor | None]:
    """A text model's ``attention_mask`` as (masks that the model made itself, 2-D mask); None for what there is not."""
    if isinstance(mask, dict):
        made = {kind: one for kind, one in mask.items() if one is not None and one.dim() == 4}
        flat = next((one for one in mask.values() if one is not None and one.dim() == 2), None)
        return (made or None), flat
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        return mask, None
    return None, mask


def padding_of(masks: dict[str, torch.Tensor] | torch.Tensor, past: int) -> torch.Tensor:
    """bool [rows, L]: False for padding, which alone does not see itself. past: columns that are cached."""
    one = next(iter(masks.values())) if isinstance(masks, dict) else masks
    seen = one[:, 0].diagonal(past, 1, 2)
    return seen if seen.dtype == torch.bool else seen >= 0
