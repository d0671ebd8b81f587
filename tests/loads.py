"""What the tests of the engine under load share: families, prompts, comparisons, what patching could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtr
from tests import tiny
from tests.tiny import IMAGE

FAMILIES = ["llava", "llava_next"]
ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]
"""One image, several, none, and one again."""
NOISE = 2e-5
"""Of float32 logits computed in another order."""


def close(got: Tensor, want: Tensor, noise: float = NOISE) -> None:
    torch.testing.assert_close(got, want, atol=noise, rtol=0)


def forward(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **kwargs)


def kept(model: Any, b: int = 0) -> list[list[int]]:
    """The reported slots of row b of the last call, layer by layer."""
    row = vtr.report(model).rows[b]
    return [row.kept(layer) for layer in range(len(row.vision_tokens))]


def labels(inputs: dict[str, Tensor]) -> Tensor:
    """Labels at logical length: text and images' last slots count, padding and what nothing predicts do not."""
    ids = inputs["input_ids"]
    counted = inputs["attention_mask"].bool() & (ids != tiny.IMAGE_ID) & (ids != tiny.BOS)
    return ids.masked_fill(~counted, -100)


def snapshot(model: Any) -> dict[str, Any]:
    """What patching could leave behind: classes, attributes, hooks of every module, attention of every config."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks")}
        seen[name] = (type(module), sorted(vars(module)), hooks, type(module).forward)
        if hasattr(module, "config"):
            seen[name] += (module.config._attn_implementation, sorted(vars(module.config)))
    return seen


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradient of every parameter that has one; the model's own are taken away."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def trainable(model: Any) -> Any:
    """As LLaVA is trained: in train mode, the vision tower frozen (its last layer is never used)."""
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def token_by_token(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of a continuation that is fed one token at a time."""
    steps = [forward(model, {"input_ids": ids[:, i : i + 1]}, past_key_values=cache) for i in range(ids.shape[1])]
    return torch.cat([step.logits for step in steps], 1)
