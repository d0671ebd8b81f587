"""On which device a module is going to run."""

from __future__ import annotations

from typing import Any

import torch


def execution_device(module: Any) -> torch.device | None:
    """Where the module's forward will have its arguments: a hook of accelerate's says so, else its own weights do.

    A pre-hook is called before accelerate moves anything, so what it makes beside the module's weights has to be moved
    by itself. Weights that are offloaded lie on the meta device until the module runs.

    Returns:
        The device; None if nothing says.
    """
    said = _of_hook(module)
    if said is None:
        weight = next(module.parameters(), None)
        if weight is not None and weight.device.type != "meta":
            return weight.device
        said = next((found for part in module.modules() if (found := _of_hook(part)) is not None), None)
    return None if said is None else _device(said)


def _of_hook(module: Any) -> Any:
    """What accelerate's hook on the module, or the first of several, names as its device."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    found = (getattr(each, "execution_device", None) for each in hooks)
    return next((device for device in found if device is not None), None)


def _device(said: Any) -> torch.device:
    """A device as accelerate takes it: a number is an accelerator's."""
    if not isinstance(said, int):
        made = torch.device(said)
        return torch.device(made.type, 0) if made.type == "cuda" and made.index is None else made
    known = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return torch.device("cuda" if known is None else known.type, said)
