"""A decoder that cannot run packed rows: what reports need to know of it, and which policies it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vtr.base import Policy, UnsupportedError
from vtr.engine.decoder import Decoder
from vtr.engine.trace import Geometry, linear_flops
from vtr.shares import ratio

NO_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
"""Kinds of layers that keep no keys and values."""
INSIDE = ("prune", "route", "attend", "remember")
USUAL = 576
"""Vision tokens of a prompt, where only shares matter."""
INSTEAD = "divprune"
"""What is named in place of a policy that acts inside: it needs nothing of the model but the tokens."""


def decoder_of(text: Any) -> Decoder:
    """What is read off a text model whatever its layers are; 0 for sizes that its config does not have.

    Raises:
        UnsupportedError: no layer has a ``torch.nn.Linear``, by which FLOPs are counted.
    """
    config, depth = text.config, len(text.layers)
    flops = linear_flops(text, any)
    kinds = getattr(config, "layer_types", None) or [""] * depth
    window = _number(config, "sliding_window")
    heads = _number(config, "num_attention_heads")
    geometry = Geometry(
        num_hidden_layers=depth,
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        head_dim=_number(config, "head_dim") or (_number(config, "hidden_size") // heads if heads else 0),
        linear_flops=flops,
        attends=tuple(kind not in NO_ATTENTION for kind in kinds),
    )
    return Decoder(text, geometry, tuple((window or None) if "sliding" in kind else None for kind in kinds))


def _number(config: Any, name: str) -> int:
    """A config's field, 0 where it has none, or one for each layer."""
    try:
        found = getattr(config, name, None)
    except Exception:  # transformers raises its own error for what differs by layer
        return 0
    return found if isinstance(found, int) else 0


def refuse_inside(depth: int, why: str | None, policies: Sequence[Policy | None]) -> None:
    """Refuse policies that act inside the decoder, and name one that acts before it and keeps as many tokens.

    Args:
        depth: decoder layers. why: what is wrong with the decoder.

    Raises:
        UnsupportedError: naming the way out.
    """
    for policy in policies:
        asked = [question for question in INSIDE if policy is not None and policy.asks(question)]
        if policy is not None and asked:
            raise UnsupportedError(
                f"{policy.spec!r} acts inside the decoder ({', '.join(asked)}), and this model's takes only policies "
                f"that act before it{f' ({why})' if why else ''}. {_instead(policy, depth)}"
            )


def _instead(policy: Policy, depth: int) -> str:
    """What to use in place of a policy that acts inside."""
    if policy.asks("compress"):
        return "Leave out the part of it that acts inside"
    try:
        share = sum(policy.entering(depth, USUAL)) / (depth * USUAL)
        if not 0 < share < 1:
            raise ValueError
    except (ValueError, TypeError, AttributeError, NotImplementedError, IndexError):
        return f"Use one such as {INSTEAD}:keep=0.25, which keeps the tokens that are least alike"
    if "before_decoder" in policy.config():
        keep: Any = policy.keep if policy.layer == 0 else ratio(share)  # type: ignore[attr-defined]
        made = dataclasses.replace(policy, keep=keep, layer=0, before_decoder=True, share="row")  # type: ignore[call-arg]
        return f"Use {made.spec}, which keeps as many before it"
    return (
        f"Use one such as {INSTEAD}:keep={ratio(share)}, which has the same mean over layers ({share:.0%} of the "
        "vision tokens) and keeps those that are least alike"
    )
