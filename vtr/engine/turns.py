"""A cache goes on: forks of it, and what a call on one may say of the columns that are cached already."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from vtr.base import UnsupportedError
from vtr.engine.cache import is_ragged
from vtr.engine.cache_state import PADDING, UNKNOWN, CacheState
from vtr.engine.call import PIXELS
from vtr.engine.compat import cache_in
from vtr.engine.refusals import warn_on_continue
from vtr.engine.short_cache import is_short
from vtr.image import CROP_GRIDS

C = TypeVar("C")
SIZES = (
    "image_sizes", "image_sizes_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
    "pixel_attention_mask", "num_local_patches", "batch_num_images", "image_flags", "modalities", CROP_GRIDS,
)  # fmt: skip
"""What processors say about pictures beside their pixels."""


def fork(cache: C, rows: int | Sequence[int] = 1) -> C:
    """A cache that goes on from where ``cache`` is, which stays as it is: many questions on the same pictures.

    The fork reads the storage of ``cache`` until one of the two writes; the writer takes a copy of its own then. After
    a reduced prefill that is short. ``copy.deepcopy(cache)`` does the same for all rows once.

    Args:
        cache: what a call returned (``past_key_values``; with transformers from 5.24 on ``cache``), reduced or not.
        rows: how often each row comes, one copy next to the other; or which row each new one goes on from, counted
            from 0.

    Returns:
        A cache of the same class, for ``generate(…, past_key_values=)`` or a forward. Of policies that ranked by the
        question, the calls that go on with it warn or raise as their ``on_continue`` says.

    Raises:
        ValueError: no rows. IndexError: a row that is not there.
        UnsupportedError: not a cache whose rows can be repeated (a static one of transformers, or of another kind).
    """
    several = not isinstance(rows, int)
    if (several and not len(rows)) or (not several and rows < 1):  # type: ignore[arg-type, operator]
        raise ValueError(f"fork(cache, rows={rows!r}): a fork has at least one row")
    needed = "reorder_cache" if is_short(cache) else "batch_select_indices"
    if not all(hasattr(cache, name) for name in ("batch_repeat_interleave", "batch_select_indices")) or not all(
        hasattr(layer, needed) for layer in getattr(cache, "layers", [])
    ):
        raise UnsupportedError(
            f"the rows of a {type(cache).__name__} cannot be repeated: fork what a call without a cache of your own "
            "returned, out.past_key_values"
        )
    made: Any = copy.deepcopy(cache)
    if several:
        made.batch_select_indices(torch.tensor(list(rows)))  # type: ignore[arg-type]
    elif rows != 1:
        made.batch_repeat_interleave(rows)
    return made  # type: ignore[no-any-return]


def go_on(entry: Any, cache: Any, rows: int | None) -> None:
    """Before a call of ``rows`` on ``cache``: give the model what M-RoPE adds to positions; it has another prompt's."""
    state = state_of(cache)
    if state is not None and state.rope_deltas is not None:
        beams = 1 if rows is None else max(len(state.rope_deltas) // rows, 1)
        entry.rope_deltas = state.rope_deltas[::beams]


def new_turn(cache: Any) -> None:
    """More text for rows that are cached: warn, or raise, where a policy has ranked by the first question."""
    state = state_of(cache)
    if state is not None:
        warn_on_continue([p for p in state.policies if p is not None])


def refuse_new_pictures(cache: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse pictures behind shortened rows that are padded: layers would read the padding of the new ones.

    Raises:
        UnsupportedError: naming the way out.
    """
    if is_short(cache) and any(kwargs.get(name) is not None for name in PIXELS):
        raise UnsupportedError(
            "a later turn of this model takes no new pictures while tokens are reduced (its decoder cannot run packed "
            "rows): run the whole conversation in one call, with a new cache"
        )


def state_of(cache: Any) -> CacheState | None:
    """What is known of a reduced cache that holds something; else None."""
    if is_short(cache):
        return cache.vtr_state  # type: ignore[no-any-return]
    return cache.layers[0].state if is_ragged(cache) and cache.layers[0].place else None


def behind_cache(ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The arguments of a ``generate`` on a ragged cache, such that the first columns are those that are cached.

    Padding in front of a whole prompt moves behind the cached columns, and pictures that are cached are left out.

    Args:
        ids: int64 [rows, L], of the whole conversation, or of its new part if the attention_mask is longer.

    Raises:
        ValueError: they do not go on from what is cached; says what to pass.
    """
    cache = cache_in(kwargs)
    state, past, mask = state_of(cache), cache.get_seq_length(), kwargs.get("attention_mask")
    assert state is not None and state.seen is not None
    beams, left = divmod(len(state.seen), len(ids))
    if left or not beams:
        raise ValueError(
            f"{len(ids)} rows for a cache of {len(state.seen)}: every row goes on from one of its own, so many as "
            "vtr.fork(cache, rows) makes"
        )
    seen = state.seen[::beams]
    whole = mask is None or mask.shape[1] == ids.shape[1]
    columns = ids.shape[1] if mask is None else mask.shape[1]
    if columns <= past:
        raise ValueError(
            f"the cache holds {past} columns, and input_ids with their attention_mask say {columns} in all: pass the "
            f"new tokens with a mask of all columns (ones for those that are cached, {past} + {ids.shape[1]})"
        )
    if whole:
        ids, kwargs = _padding_behind(ids, kwargs, seen, past)
        _check_same(ids, kwargs.get("attention_mask"), seen, past)
    elif mask is not None and bool(((seen != PADDING) != mask[:, : seen.shape[1]].bool().cpu()).any()):
        raise ValueError(
            "attention_mask does not say of the cached columns what the calls that filled them said: pass theirs, and "
            "behind it that of the new tokens"
        )
    return ids, kwargs


def without_cached_pictures(new: torch.Tensor, marks: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out pictures if no new token stands for one. new: int64 [rows, n], on the CPU as marks are."""
    if bool(torch.isin(new, marks).any()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name not in (*PIXELS, *SIZES)}


def _padding_behind(
    ids: torch.Tensor, kwargs: dict[str, Any], seen: torch.Tensor, past: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows padded on the left as whole prompts: their padding moves to where the cached columns end."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return ids, kwargs
    front = (mask.cpu().cumsum(1) == 0).sum(1)
    cached = ((seen != PADDING).cumsum(1) == 0).sum(1)
    if bool((front <= cached).all()):
        return ids, kwargs
    length = ids.shape[1]
    column = torch.arange(length)
    more = (front - cached).clamp(min=0)[:, None]
    moved = torch.where(column < past, column + more, torch.where(column < past + more, column - past, column))
    at = torch.where(column < cached[:, None], column, moved).to(ids.device)
    alike = {
        name: value.gather(1, at.to(value.device))
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor) and value.shape == ids.shape
    }
    return ids.gather(1, at), {**kwargs, **alike}


def _check_same(ids: torch.Tensor, mask: torch.Tensor | None, seen: torch.Tensor, past: int) -> None:
    """Raise ValueError unless the first columns are those that the cache was filled with."""
    given = ids[:, : seen.shape[1]].cpu()
    there = seen != PADDING if mask is None else mask[:, : seen.shape[1]].bool().cpu()
    given = given.masked_fill(~there, PADDING)
    other = (given != seen) & ((seen != UNKNOWN) | (given == PADDING))
    if bool(other.any()):
        row, column = other.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids do not begin with what the cache holds: row {row} differs from column {column} on, of "
            f"{past} cached. A prompt that goes on must begin with the very tokens of the first call (and its "
            "padding); or pass the new tokens only, with an attention_mask of all columns"
        )
