"""The vision tower's own parts: its layers, their queries and keys, and what one image's policy reads of them.

A tower's layer says how its tokens look at each other with a norm, two projections and a softmax. No attention matrix
is built, and no layer runs again: of a layer whose attention policies ask for by its place, queries and keys are kept
as the layer makes them; GlobalCom²'s scores apply norm and projections to the states that entered the last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from vtr.base import UnsupportedError

if TYPE_CHECKING:
    from vtr.engine.captures import Place
    from vtr.image import Layout

CLS = ("class_embedding", "cls_token")
"""What towers with a CLS token call its embedding."""
LEADING = (*CLS, "register_tokens", "distillation_token")
"""What towers call the embeddings of all tokens that they put in front of the patches."""


_turns: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Towers that were looked through, and whether they have a module that turns queries and keys."""


class Entered(NamedTuple):
    """What entered one layer of the tower in one run.

    Attributes:
        states: [tiles, leading + patches, width], or [patches, width] of all images if these have grids of their own.
        rope: (cos, sin), [patches, head_dim] each; None where queries and keys are not turned.
        edges: int64 [segments + 1] on the CPU: who attends to whom where states are in one row; None: each image all
            of its own.
    """

    states: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    edges: torch.Tensor | None = None


def entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
    """What a layer is called with."""
    states = args[0] if args else kwargs["hidden_states"]
    edges = kwargs.get("cu_seqlens")
    if kwargs.get("position_embeddings") is not None and states.dim() == 3:
        states = states[0]  # Pixtral's images lie one behind the other in a batch of one
    return Entered(states, kwargs.get("position_embeddings"), None if edges is None else edges.cpu().long())


def tiles_of(run: torch.Tensor, place: Place, layout: Layout) -> torch.Tensor:
    """One image's part of what tower or projector gave in a run, [tiles, …], the thumbnail in front."""
    mine = run[place.first : place.first + place.count]
    return mine.roll(1, 0) if layout.thumbnail_last else mine


def layers_of(tower: Any) -> Any:
    """The tower's layers, first to last; empty if it is built otherwise."""
    model = getattr(tower, "vision_model", tower)
    encoder = getattr(model, "encoder", None) or getattr(model, "transformer", model)
    found = (getattr(encoder, name, None) for name in ("layers", "layer", "blocks"))
    return next((layers for layers in found if layers), ())


def has_cls(tower: Any) -> bool:
    """Whether a vision tower puts a CLS token in front of the patches."""
    return any(name.rpartition(".")[2] in CLS for name, _ in _embeddings(tower))


def leading_tokens(tower: Any) -> int:
    """How many tokens a vision tower puts in front of the patches: CLS, registers."""
    return sum(p.numel() // p.shape[-1] for name, p in _embeddings(tower) if name.rpartition(".")[2] in LEADING)


def _embeddings(tower: Any) -> list[tuple[str, Any]]:
    """A tower's parameters by name, without those of a head that pools the patches (its CLS is no token of theirs)."""
    return [(name, p) for name, p in tower.named_parameters() if "head" not in name.split(".")]


# -- one layer's attention ---------------------------------------------------------------------------------------------
def attention_of(tower: Any, layer: Any) -> tuple[Any, Any]:
    """(norm before attention, attention) of a layer of the vision tower.

    Raises:
        UnsupportedError: it is built otherwise.
    """
    norm = next((m for n in ("layer_norm1", "layernorm_before", "norm1", "attention_norm")
                 if (m := getattr(layer, n, None))), None)  # fmt: skip
    attention = attention_in(layer)
    if isinstance(getattr(attention, "qkv", None), nn.Linear) and hasattr(attention, "num_heads"):
        return norm, Unfused(attention)
    plain = norm is not None and all(hasattr(attention, name) for name in ("q_proj", "k_proj"))
    if not plain or heads_of(attention) is None:
        raise UnsupportedError(
            f"the layers of {type(tower).__name__} are not built of a norm and q_proj, k_proj, so how its tokens look "
            "at each other cannot be read: use a policy that needs no scores of the vision tower"
        )
    return norm, attention


def attention_in(layer: Any) -> Any:
    """A layer's attention module, whatever it is called there; None if there is none."""
    return next((m for n in ("self_attn", "attention", "attn") if (m := getattr(layer, n, None))), None)


def projections_of(layer: Any) -> list[tuple[Any, str]]:
    """The modules that make a layer's queries and keys ("q", "k"), or these and the values in one ("qkv")."""
    attention = attention_in(layer)
    if hasattr(attention, "qkv"):
        return [(attention.qkv, "qkv")]
    return [(attention.q_proj, "q"), (attention.k_proj, "k")]


class Unfused:
    """Query and key projections of an attention module that has one for queries, keys and values together.

    ``q_norm`` and ``k_norm``, where it has them, are over all heads at once (InternViT).
    """

    def __init__(self, attention: Any) -> None:
        self.num_heads = attention.num_heads
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.q_proj, self.k_proj = (_third(attention.qkv, which) for which in (0, 1))


def _third(qkv: Any, which: int) -> Any:
    """One of three projections in one; where it is only its weights, as a module of its own on their memory."""
    if not is_plain(qkv, qkv.weight):
        return lambda x: qkv(x).chunk(3, -1)[which]
    made = nn.Linear(qkv.in_features, qkv.out_features // 3, qkv.bias is not None, device="meta")
    made.weight = nn.Parameter(qkv.weight.detach().chunk(3)[which], requires_grad=False)
    if qkv.bias is not None:
        made.bias = nn.Parameter(qkv.bias.detach().chunk(3)[which], requires_grad=False)
    return made


def is_plain(projection: Any, x: torch.Tensor) -> bool:
    """Whether a projection is its weights and nothing else: no adapter, no quantization, nothing that moves them in."""
    weight = getattr(projection, "weight", None)
    return type(projection) is nn.Linear and type(weight) is nn.Parameter and weight.device == x.device


def is_normed(attention: Any) -> bool:
    """Whether queries and keys are normed (InternViT of 6B)."""
    return not isinstance(getattr(attention, "k_norm", None), nn.Identity | None)


def heads_of(attention: Any) -> int | None:
    """How many heads an attention module has, by itself or by its config; None if neither says."""
    found = getattr(attention, "num_heads", None) or getattr(attention, "num_attention_heads", None)
    return found or getattr(getattr(attention, "config", None), "num_attention_heads", None)


def cls_scores(tower: Any, states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The CLS row of a tower's last layer before the softmax, mean over heads, and the FLOPs it took.

    The mean over heads of q · k / sqrt(head_dim) is one product over the whole width divided by heads · sqrt(head_dim).
    No attention matrix is built, and the layer does not run again.

    Args:
        states: [tiles, 1 + patches, width], the last layer's input (``hidden_states[-2]``), CLS in front.

    Returns:
        float32 [tiles, patches].

    Raises:
        UnsupportedError: the tower's last layer has no such norm and projections.
    """
    layers = layers_of(tower)
    norm, attention = attention_of(tower, layers[-1] if layers else None)
    check_not_turned(tower)
    x = norm(states)
    tiles, tokens, width = x.shape
    q = attention.q_proj(x[:, :1])
    flops = 2 * tiles * width * q.shape[-1]
    normed = is_normed(attention)
    if not normed and is_plain(attention.k_proj, x):  # q · (W x + b) = (W' q) · x + q · b: patches need no projection
        key = attention.k_proj
        asked = torch.matmul(q.float(), key.weight.float())
        products = torch.matmul(x[:, 1:].float(), asked.transpose(1, 2))[..., 0]
        if key.bias is not None:
            products = products + (q.float() * key.bias.float()).sum(-1)
        flops += 2 * tiles * width * (q.shape[-1] + tokens - 1)
    else:
        k = attention.k_proj(x[:, 1:])
        q, k = (attention.q_norm(q), attention.k_norm(k)) if normed else (q, k)
        products = torch.matmul(k.float(), q.float().transpose(1, 2))[..., 0]
        flops += 2 * tiles * (tokens - 1) * q.shape[-1] * (width + 1)
    heads: int = heads_of(attention)  # type: ignore[assignment]
    return products / (heads * (q.shape[-1] // heads) ** 0.5), flops


def check_not_turned(tower: Any) -> None:
    """Raise UnsupportedError if a tower with a CLS token turns queries and keys by where they are."""
    if tower not in _turns:
        _turns[tower] = any("rope" in name.rpartition(".")[2] for name, _ in tower.named_modules())
    if _turns[tower]:
        raise UnsupportedError(
            f"{type(tower).__name__} has a CLS token, but turns the queries and keys of its patches by where they are "
            "(rope), which CLS scores leave out: use a policy that needs none"
        )


def on_grid(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What patches have, [tiles, patches] or [tiles, patches, channels], as what tokens have, [tiles, h * w, …].

    The mean where a token is made of several patches.
    """
    have, tokens = patches.shape[1], grid[0] * grid[1]
    if have == tokens:
        return patches
    height = round(grid[0] * (have / tokens) ** 0.5)
    flat = patches if patches.dim() == 3 else patches[..., None]
    cells = adaptive_avg_pool2d(flat.transpose(1, 2).unflatten(2, (height, -1)), grid).flatten(2).transpose(1, 2)
    return cells if patches.dim() == 3 else cells[..., 0]
