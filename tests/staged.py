"""The slow reference of policies that reduce before the decoder and in it, and of tokens that go around layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtr
from tests import oracle


def pruned(model: Any, brief: oracle.Row, made_of: list[list[list[int]]], renumber: bool) -> Tensor:
    """Logits of the text of a row that was shortened to ``brief`` before the decoder, and cut in it.

    made_of: of every layer, which slots of the whole row each token that enters was made from.
    """
    at = {tuple(some): slot for some, slot in zip(made_of[0], brief.slots, strict=True)}
    kept = [[at[tuple(some)] for some in here] for here in made_of]
    return oracle.run(model, brief, oracle.Given(kept, renumber)).logits[~brief.vision]


@torch.no_grad()
def rerouted(model: Any, row: oracle.Row, policy: vtr.Reroute, hint: list[list[int]]) -> Tensor:
    """Logits of a row under a policy that ranks by the layer about to run; all tokens are there in every layer.

    hint: who passed each layer, believed in near ties only.
    """
    config, text = model.config.text_config, model.get_decoder()
    x, n, here = row.embeds, len(row.vision), row.slots
    positions = torch.arange(n) if row.positions is None else row.positions
    stages = dict(zip(policy.cuts(len(text.layers)), policy.keeps, strict=True))
    for depth, layer in enumerate(text.layers):
        window = oracle.window(config, depth)
        if (keep := stages.get(depth)) is not None:
            mask = oracle.hidden_keys(torch.ones(n).bool(), positions, window)
            y = oracle.norm(layer.input_layernorm, x)
            probs = oracle.attention(layer.self_attn, y, mask, positions, config)[1]
            count = max(int(len(row.slots) * keep), int(keep > 0))
            here = oracle.best(oracle.scores(probs, mask, row.vision, "last"), row.slots, count, hint[depth])
        assert here == hint[depth]
        alive = ~row.vision
        alive[here] = True
        after, _ = oracle.block(layer, x, oracle.hidden_keys(alive, positions, window), positions, config)
        x = torch.where(alive[:, None], after, x)
        if depth < len(row.behind):
            x = x.index_add(0, row.vision.nonzero().squeeze(1), row.behind[depth])
    logits: Tensor = model.lm_head(oracle.norm(text.norm, x))
    return logits
