"""Slow references for policies: the untouched model with dropped tokens masked, or with a shorter prompt.

Nothing here knows how the engine packs rows or keeps its cache; all that is taken from it is which tokens stayed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def masked(stock: Any, inputs: dict[str, Tensor], kept: list[list[int]], vision: list[int], renumber: bool) -> Tensor:
    """Logits [n, vocab] of one row whose dropped vision tokens stay in every layer as keys that nobody sees.

    Args:
        stock: a model that is not patched. inputs: of one row without padding. kept: per decoder layer the slots of the
            vision tokens that enter it. vision: the slots of all of them. renumber: positions close up over what is
            dropped.
    """
    text, handles = stock.get_decoder(), []
    n = inputs["input_ids"].shape[1]
    for depth, layer in enumerate(text.layers):
        alive = torch.ones(n).bool()
        alive[vision] = False
        alive[kept[depth]] = True
        seen = torch.ones(n, n).tril().bool() & alive | torch.eye(n).bool()  # a dropped token's row must stay a number
        changed = {"attention_mask": torch.zeros(1, 1, n, n).masked_fill(~seen, -torch.inf)}
        if renumber:
            changed["position_embeddings"] = text.rotary_emb(torch.zeros(1), alive.cumsum(0)[None] - 1)

        def enter(module: Any, args: Any, kwargs: Any, changed: dict[str, Any] = changed) -> Any:
            return args, {**kwargs, **changed}

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        return stock(**inputs).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shorter(stock: Any, inputs: dict[str, Tensor], slots: list[int]) -> Tensor:
    """Logits [len(slots), vocab] of a prompt that consists of these slots of one row alone."""
    seen: list[Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = stock.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        stock(**inputs)
    finally:
        handle.remove()
    hidden = stock.get_decoder()(inputs_embeds=seen[0][:, slots]).last_hidden_state
    return stock.lm_head(hidden)[0]
