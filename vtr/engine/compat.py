"""Where versions of transformers differ: the name of the key/value cache (``past_key_values``, from 5.24 on ``cache``),
and what gradient checkpointing replays.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from vtr.base import UnsupportedError

HOOKS_ARE_REPLAYED = "__call__" in vars(GradientCheckpointingLayer)
"""Before 5.23 a checkpoint is around a layer's hooks too, which would cut hidden states once more in the backward."""

NAMES = ("cache", "past_key_values")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among ``kwargs``, under either name; None if there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


@lru_cache(maxsize=256)
def cache_name(kind: type) -> str:
    """What the ``forward`` of a module class calls its cache."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"  # type: ignore[attr-defined]


def put_cache(module: Any, kwargs: dict[str, Any], cache: Any) -> None:
    """Hand ``cache`` to ``module`` under the name it knows, and under no other."""
    for name in NAMES:
        kwargs.pop(name, None)
    kwargs[cache_name(type(module))] = cache  # type: ignore[arg-type]


def check_checkpointing(module: Any) -> None:
    """Refuse gradient checkpointing of a decoder whose layers have hooks that must not run twice."""
    if HOOKS_ARE_REPLAYED and module.training and getattr(module, "gradient_checkpointing", False):
        raise UnsupportedError(
            "gradient checkpointing of reduced calls needs transformers 5.23 or newer (older ones run a layer's hooks "
            "again in the backward): upgrade, or call model.gradient_checkpointing_disable()"
        )
