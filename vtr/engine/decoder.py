"""The module that runs the decoder layers, and what is read off it once, when the model is patched."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from vtr.base import UnsupportedError
from vtr.engine.rotary import Rotary
from vtr.engine.sight import Chunk
from vtr.engine.trace import Geometry

MLPS = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")
"""What decoder layers call the part behind their attention."""
KINDS = ("full_attention", "sliding_attention", "chunked_attention")
ALIKE = ("layer_idx", "is_sliding", "sliding_window", "layer_type", "attention_type", "training")
"""In what attention modules may differ and yet take the same arguments."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """The text model of a patched model.

    Attributes:
        text: the module; it has ``.layers``, ``.rotary_emb`` and ``.config``.
        geometry: its sizes.
        windows: the sliding window (or chunk) of every layer, in positions; None where attention is causal over
            everything.
        kinds: of every layer, as its config calls them. rope: what makes it. Both are there where rows are packed.
    """

    text: Any
    geometry: Geometry
    windows: tuple[int | None, ...]
    kinds: tuple[str, ...] = ()
    rope: Rotary | None = None

    @classmethod
    def from_text_model(cls, text: Any) -> Decoder:
        """Read it off the module.

        Raises:
            UnsupportedError: parts, layers or positions that the packed engine cannot run.
        """
        try:
            _check_parts(text)
            kinds = layer_kinds(text)
            rotary = Rotary(text, kinds)
            made = cls(text, Geometry.from_text_model(text), windows(text, kinds), kinds, rotary)
        except UnsupportedError:
            raise
        except Exception as error:  # whatever a strange config raises when it is asked
            raise _cannot(text, f"does not say what it is made of ({type(error).__name__}: {error})") from error
        if any(made.windows) and rotary.many_axes:
            raise UnsupportedError(
                "sliding windows over positions of several axes (M-RoPE) are not supported: load the checkpoint with "
                "use_sliding_window=False in its text config, if it was trained so"
            )
        return made

    @property
    def rotary(self) -> Rotary:
        """What makes rope, where rows are packed."""
        assert self.rope is not None
        return self.rope

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self.geometry.num_hidden_layers

    @property
    def latent(self) -> list[bool]:
        """Of each layer, whether its cache holds what keys and values are made of."""
        return [hasattr(layer.self_attn, "expand_kv") for layer in self.text.layers]

    @property
    def chunked(self) -> bool:
        """Whether some layer attends within chunks, which are counted from a row's first token."""
        return any(isinstance(window, Chunk) for window in self.windows)

    def check_midway(self) -> None:
        """Refuse to run layers one by one with the arguments of the first.

        Raises:
            UnsupportedError: layers that get arguments of their own.
        """
        attentions = [_said(layer.self_attn) for layer in self.text.layers]
        if any(self.rotary.kinds) or self.rotary.why_fixed or any(one != attentions[0] for one in attentions):
            raise UnsupportedError(
                f"the layers of {type(self.text).__name__} do not all take the same arguments, so a forward cannot "
                "stop between them and go on: search on another model, or set the policy by hand"
            )


def mlp_of(layer: Any) -> Any:
    """The part of a decoder layer behind its attention; None if it is called something else."""
    return next((found for name in MLPS if (found := getattr(layer, name, None)) is not None), None)


def layer_kinds(text: Any) -> tuple[str, ...]:
    """What attention each decoder layer has, by the names of transformers' configs.

    Raises:
        UnsupportedError: another kind than full, sliding or chunked attention.
    """
    config, depth = text.config, len(text.layers)
    plain = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = tuple(getattr(config, "layer_types", None) or (plain,) * depth)[:depth]
    if strange := set(kinds) - set(KINDS):
        raise _cannot(
            text, f"has layers with {', '.join(sorted(map(str, strange)))}", "use a model with causal attention "
            "(sliding windows and chunks are fine)",
        )  # fmt: skip
    return kinds


def windows(text: Any, kinds: tuple[str, ...]) -> tuple[int | None, ...]:
    """The sliding window or chunk of every decoder layer, in positions; None where attention is over everything."""
    sizes: dict[str, int | None] = {"sliding_attention": getattr(text.config, "sliding_window", None)}
    chunk = getattr(text.config, "attention_chunk_size", None)
    sizes["chunked_attention"] = None if chunk is None else Chunk(chunk)
    return tuple(sizes.get(kind) for kind in kinds)


def _check_parts(text: Any) -> None:
    """Raise UnsupportedError unless the engine finds what it hooks into."""
    for name in ("config", "layers", "rotary_emb", "norm"):
        if getattr(text, name, None) is None:
            raise _cannot(text, f"has no {name}")
    if not len(text.layers):
        raise _cannot(text, "has no decoder layers")
    if (getattr(text.config, "altup_num_inputs", None) or 0) > 1:
        raise _cannot(text, "carries several hidden states a token from layer to layer (AltUp)")
    for index, layer in enumerate(text.layers):
        attn = getattr(layer, "self_attn", None)
        if attn is None or mlp_of(layer) is None:
            raise _cannot(text, f"has no {'self_attn' if attn is None else 'MLP of a known name'} in layer {index}")
        if getattr(attn, "config", None) is None or getattr(attn, "layer_idx", None) is None:
            raise _cannot(text, f"has an attention without config and layer_idx in layer {index}")
        takes = inspect.signature(type(layer).forward).parameters
        if lacking := {"hidden_states", "position_embeddings"} - set(takes):
            raise _cannot(text, f"has layers that do not take {', '.join(sorted(lacking))}")
        if getattr(attn, "is_kv_shared_layer", False):
            raise _cannot(text, f"has layers (the first is {index}) that use the keys and values of an earlier one")
        if hasattr(attn, "indexer"):
            raise _cannot(text, f"chooses keys by an index of its own in layer {index}")


def _cannot(text: Any, why: str, way_out: str = "use a policy that acts before the decoder") -> UnsupportedError:
    return UnsupportedError(f"{type(text).__name__} {why}, which the packed engine cannot run: {way_out}")


def _said(attn: Any) -> dict[str, Any]:
    """What an attention module says of itself in plain values, but for those in which layers may differ."""
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(attn).items() if isinstance(v, plain) and not k.startswith("_") and k not in ALIKE}
