"""The objective of p-MoD: the answers' cross-entropy alone; routers learn through the weights they give tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtr.engine.install import patch_of
from vtr.policies.trained.pmod import PMoD


class PModTraining(nn.Module):
    """A patched model and the p-MoD policy that is trained into it, as one module, so that DDP sees both's weights.

    The method is the same in training and inference: each layer's router weighs tokens, the best pass, and gradients
    reach the router only through the weights (arXiv 2412.04449). There is no auxiliary loss. Gradient
    checkpointing must be of the non-reentrant kind.

    Args:
        model: patched by :func:`vtr.patch`. policy: with weights; ``policy.init_weights(model)`` begins new ones.

    Raises:
        ValueError: the model is not patched, or the policy has no weights or does not fit.
    """

    def __init__(self, model: Any, policy: PMoD) -> None:
        super().__init__()
        policy.check(patch_of(model).decoder.geometry.num_hidden_layers)
        policy.base = None  # the model is going to change
        assert policy.module is not None
        self.model, self.policy, self.weights = model, policy, policy.module.train().requires_grad_(True)

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """A batch with ``labels`` → {"loss"}, a scalar with gradients."""
        unused = sum(p.sum() for p in self.weights.parameters()) * 0  # so that every rank has gradients for all
        return {"loss": self.model(**inputs, policy=self.policy, use_cache=False).loss + unused}
