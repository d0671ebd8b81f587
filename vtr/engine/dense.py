"""Calls that reduce nothing: what ``vtr.report`` says of them follows from what they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vtr.base import UnsupportedError
from vtr.engine.compat import NAMES, cache_in
from vtr.engine.trace import DenseTrace, held_windows

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


def dense_forward(
    patch: Patch, ids: torch.Tensor, kwargs: dict[str, Any], steps: int = 0, beams: int = 1,
    windows: tuple[int | None, ...] | None = None,
) -> DenseTrace | None:  # fmt: skip
    """None for a call that this model may understand and vtr does not: there is nothing to report of it.

    Args:
        windows: those that the cache is cut to; None: as it says.
    """
    adapter, model, decoder = patch.adapter, patch.model, patch.decoder
    cache, use_cache = cache_in(kwargs), kwargs.get("use_cache")
    try:
        merged = adapter.prompt(model, ids, kwargs.get("attention_mask"), kwargs)
    except (ValueError, UnsupportedError):
        return None
    if merged is not None:
        ids = torch.where(merged.is_vision, adapter.placeholders(model)[0], 0)
    return DenseTrace(
        geometry=decoder.geometry,
        input_ids=ids,
        placeholders=adapter.placeholders(model),
        itemsize=model.dtype.itemsize,
        cached=bool(getattr(decoder.text.config, "use_cache", True) if use_cache is None else use_cache),
        path=patch.path,
        past=0 if cache is None else int(cache.get_seq_length()),
        steps=steps,
        beams=beams,
        windows=held_windows(decoder.windows, cache) if windows is None else windows,
    )


def dense_generation(patch: Patch, ids: torch.Tensor, kwargs: dict[str, Any], out: Any) -> DenseTrace | None:
    """Of a whole ``generate``, which gave ``out``."""
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    config = kwargs.get("generation_config") or patch.inner.generation_config
    several = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    has_prompt = patch.inner is patch.model and not patch.adapter.returns_new_tokens_only
    new = sequences.shape[1] - (ids.shape[1] if has_prompt else 0)
    steps = max(new - 1, 0)  # the first token comes out of the prompt's forward
    full = (kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)) == "dynamic_full"
    windows = () if full else held_windows(patch.decoder.windows, cache_in(kwargs))
    return dense_forward(patch, ids, {**kwargs, **dict.fromkeys(NAMES)}, steps, max(n or 1 for n in several), windows)
