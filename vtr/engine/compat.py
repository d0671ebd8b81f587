"""What transformers calls the key/value cache in keyword arguments: ``past_key_values``, from 5.24 on ``cache``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

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
