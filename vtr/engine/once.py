"""What the layers of one forward would each make alike, made once: masks, index tensors, copies from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Once:
    """Values by what they are made of. Tensors count as the same only if they are the same object, unchanged."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def of(self, what: str, *given: Any, make: Callable[[], Any]) -> Any:
        """The value ``what`` of ``given``; ``make()`` makes it when it is first asked for."""
        key = (what, *[id(g) if isinstance(g, torch.Tensor) else g for g in given])
        found = self._made.get(key)
        if found is None:  # kept with what it is made of, so that no other tensor gets that id
            found = self._made[key] = given, make()
        return found[1]

    def clear(self) -> None:
        self._made.clear()

    def __reduce__(self) -> Any:
        """A copy begins anew: other tensors may get the ids that these are known by."""
        return Once, ()


def from_host(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on the device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=device.type == "cuda")
