"""What vision tower and projector gave, kept from when they run until the images of the call are compressed.

transformers encodes images before ``generate``'s first forward (or inside a direct one) and hands on merged tokens
only. Hooks on tower and projector keep what some row's policy ``wants``, in the call that is under way in this context:
a context variable points to its :class:`Captures`, weakly, so that an interrupted call leaves nothing behind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from vtr.base import Policy, UnsupportedError
from vtr.image import Image, Layout, tokens_at

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch
    from vtr.engine.prompt import Prompt

_attaching = threading.Lock()
CLS = ("class_embedding", "cls_token")
"""What towers with a CLS token call its embedding."""
LEADING = (*CLS, "register_tokens", "distillation_token")
"""What towers call the embeddings of all tokens that they put in front of the patches."""


@dataclass(frozen=True)
class Place:
    """Where an image's tiles are: in which run of the tower (images, then videos), from which tile on, how many."""

    run: int
    first: int
    count: int


class Captures:
    """Tower and projector outputs of one call.

    Args:
        patch: whose model it is. projected, states: whether projector outputs and the tower's states are to be kept.
        tiles: how many there are in each run of the tower.
    """

    def __init__(self, patch: Patch, projected: bool, states: bool, tiles: list[int]) -> None:
        self.patch, self.tiles = patch, tiles
        self.keeps_projected, self.keeps_states = projected, states
        self.projected: list[torch.Tensor] = []
        """Per run of the projector: [tiles, patches, hidden_size]."""
        self.states: list[torch.Tensor] = []
        """Per run of the tower: [tiles, 1 + patches, width], the input of its last layer."""
        self.open = True
        self.flops = 0
        """Spent on scores since somebody last asked."""
        self.ranked: list[Place] = []
        """The images whose scores policies want: they are scored together."""
        self._scores: dict[Place, torch.Tensor] = {}

    def close(self, keep: bool) -> None:
        """All images are compressed: take nothing in any more, and give free what is not needed again."""
        self.open = False
        if not keep:
            self.projected, self.states, self._scores = [], [], {}

    def image(
        self, features: torch.Tensor, layout: Layout, place: Place, index: int, count: int, policy: Policy
    ) -> Image:
        """What ``policy.compress`` sees of one image."""
        tiles = self._tiles(features, layout, place) if "tiles" in policy.wants else None
        scorer = partial(self._cls_attention, features, layout, place) if "cls" in policy.wants else None
        newline = self.patch.adapter.newline(self.patch.model)
        return Image(features, layout, index, count, tiles, newline, scorer)

    def _tiles(self, features: torch.Tensor, layout: Layout, place: Place) -> torch.Tensor:
        if layout.has_all_patches:
            patches = features.index_select(0, tokens_at(layout).to(features.device, non_blocking=True))
            tiles: torch.Tensor = patches.unflatten(0, (layout.tiles, -1))
            return tiles
        return self._run_tiles(self.projected, place, layout, "projector")

    def _run_tiles(self, runs: list[torch.Tensor], place: Place, layout: Layout, what: str) -> torch.Tensor:
        """One image's part of a run's output, the thumbnail in front."""
        self._check_ran(runs, what)
        mine = runs[place.run][place.first : place.first + place.count]
        return mine.roll(1, 0) if layout.thumbnail_last else mine

    def _check_ran(self, runs: list[torch.Tensor], what: str) -> None:
        if len(runs) != len(self.tiles) or any(len(run) < n for run, n in zip(runs, self.tiles, strict=True)):
            raise UnsupportedError(
                f"the {what} of {type(self.patch.model).__name__} did not run for all images of this call, but a "
                "policy needs what it gives: pass pixel_values, and memoise images (if at all) in the vision tower's "
                "own forward, not above it"
            )

    @torch.no_grad()
    def _cls_attention(self, features: torch.Tensor, layout: Layout, place: Place) -> torch.Tensor:
        if place not in self._scores:
            if self.keeps_states:
                self._check_ran(self.states, "vision tower")
                self._score(place)
            else:
                tiles = self._tiles(features, layout, place).float()
                self._scores[place] = -cosine_similarity(tiles, tiles.mean(1, keepdim=True), dim=-1)
        found = self._scores[place]
        if self.keeps_states:
            found = on_grid(found.roll(1, 0) if layout.thumbnail_last else found, layout.grid)
        return found.clone()  # rows that share an image share its scores

    def _score(self, place: Place) -> None:
        """Take the scores of all ranked images of the run that ``place`` is of: float32 [tiles, patches] each."""
        together = list(dict.fromkeys([place, *(p for p in self.ranked if p.run == place.run)]))
        together.sort(key=lambda p: p.first)
        run, first, last = self.states[place.run], together[0], together[-1]
        tiles = sum(p.count for p in together)
        if last.first + last.count - first.first == tiles:
            states = run[first.first : first.first + tiles]
        else:
            states = torch.cat([run[p.first : p.first + p.count] for p in together])
        found, flops = cls_scores(self.patch.vision.tower, states)
        self.flops += flops
        self._scores.update(zip(together, found.split([p.count for p in together]), strict=True))


capturing: ContextVar[Callable[[], Captures | None] | None] = ContextVar("vtr_capturing", default=None)
"""The call that is taking in tower and projector outputs, in this context."""


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
    norm, attention = last_layer(tower)
    x = norm(states)
    tiles, tokens, width = x.shape
    q = attention.q_proj(x[:, :1])
    flops = 2 * tiles * width * q.shape[-1]
    normed = not isinstance(getattr(attention, "k_norm", None), nn.Identity | None)
    if not normed and _plain(attention.k_proj, x):  # q · (W x + b) = (W' q) · x + q · b: the patches need no projection
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
    heads = heads_of(attention)
    return products / (heads * (q.shape[-1] // heads) ** 0.5), flops


def _plain(projection: Any, x: torch.Tensor) -> bool:
    """Whether a projection is its weights and nothing else: no adapter, no quantization, nothing that moves them in."""
    weight = getattr(projection, "weight", None)
    return type(projection) is nn.Linear and type(weight) is nn.Parameter and weight.device == x.device


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
    if not _plain(qkv, qkv.weight):
        return lambda x: qkv(x).chunk(3, -1)[which]
    made = nn.Linear(qkv.in_features, qkv.out_features // 3, qkv.bias is not None, device="meta")
    made.weight = nn.Parameter(qkv.weight.detach().chunk(3)[which], requires_grad=False)
    if qkv.bias is not None:
        made.bias = nn.Parameter(qkv.bias.detach().chunk(3)[which], requires_grad=False)
    return made


def last_layer(tower: Any) -> tuple[Any, Any]:
    """(norm before attention, attention) of the vision tower's last layer.

    Raises:
        UnsupportedError: it is built otherwise.
    """
    model = getattr(tower, "vision_model", tower)
    encoder = getattr(model, "encoder", model)
    layers = getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
    last = layers[-1] if layers else None
    norm = next((m for n in ("layer_norm1", "layernorm_before", "norm1") if (m := getattr(last, n, None))), None)
    attention = next((m for n in ("self_attn", "attention", "attn") if (m := getattr(last, n, None))), None)
    if isinstance(getattr(attention, "qkv", None), nn.Linear) and hasattr(attention, "num_heads"):
        return norm, Unfused(attention)
    plain = norm is not None and all(hasattr(attention, name) for name in ("q_proj", "k_proj"))
    if not plain or heads_of(attention) is None:
        raise UnsupportedError(
            f"{type(tower).__name__} has a CLS token, but its last layer is not built of a norm and q_proj, k_proj, so "
            "how it looks at the patches cannot be read: use a policy that needs no CLS scores"
        )
    if any("rope" in name.rpartition(".")[2] for name, _ in tower.named_modules()):
        raise UnsupportedError(
            f"{type(tower).__name__} has a CLS token, but turns the queries and keys of its patches by where they are "
            "(rope), which CLS scores leave out: use a policy that needs none"
        )
    return norm, attention


def heads_of(attention: Any) -> int | None:
    """How many heads an attention module has, by itself or by its config; None if neither says."""
    found = getattr(attention, "num_heads", None) or getattr(attention, "num_attention_heads", None)
    return found or getattr(getattr(attention, "config", None), "num_attention_heads", None)


def has_cls(tower: Any) -> bool:
    """Whether a vision tower puts a CLS token in front of the patches."""
    return any(name.rpartition(".")[2] in CLS for name, _ in _embeddings(tower))


def leading_tokens(tower: Any) -> int:
    """How many tokens a vision tower puts in front of the patches: CLS, registers."""
    return sum(p.numel() // p.shape[-1] for name, p in _embeddings(tower) if name.rpartition(".")[2] in LEADING)


def _embeddings(tower: Any) -> list[tuple[str, Any]]:
    """A tower's parameters by name, without those of a head that pools the patches (its CLS is no token of theirs)."""
    return [(name, p) for name, p in tower.named_parameters() if "head" not in name.split(".")]


def on_grid(scores: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Scores of patches [tiles, patches] as those of tokens [tiles, h * w]: the mean where a token is several."""
    patches, tokens = scores.shape[1], grid[0] * grid[1]
    if patches == tokens:
        return scores
    height = round(grid[0] * (patches / tokens) ** 0.5)
    return adaptive_avg_pool2d(scores.view(len(scores), height, -1), grid).flatten(1)


class VisionHooks:
    """Hooks of vision tower and projector; silent unless a call in this context is taking in what they give."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.projector = patch.adapter.projector(patch.model)
        self.tower: Any = None
        self.cls = False

    def install(self) -> list[Any]:
        """Register them; returns the handles."""
        return [self.projector.register_forward_hook(self.after_projector), *self.attach()]

    def attach(self) -> list[Any]:
        """Register those of the tower as soon as it is there; returns the handles."""
        with _attaching:
            tower = self.patch.adapter.tower(self.patch.model) if self.tower is None else None
            if tower is None:
                return []
            self.tower, self.cls = tower, has_cls(tower)
            return [
                tower.register_forward_pre_hook(self.before_tower, with_kwargs=True),
                tower.register_forward_hook(self.after_tower),
            ]

    def wanted(self, policies: Sequence[Policy | None], prompt: Prompt) -> Captures | None:
        """What the rows' policies want of the images of this call; None if nothing."""
        asking = [(p.wants, row) for p, row in zip(policies, prompt.layouts, strict=True) if p is not None and row]
        if not any(wants for wants, _ in asking):
            return None
        self.patch.handles += self.attach()
        states = self.cls and any("cls" in wants for wants, _ in asking)
        tiles = [row for wants, row in asking if "tiles" in wants or ("cls" in wants and not self.cls)]
        last = {place.run: place.first + place.count for row in prompt.places for place in row}
        projected = any(not layout.has_all_patches for row in tiles for layout in row)
        return Captures(self.patch, projected, states, [last[run] for run in sorted(last)])

    def _active(self) -> Captures | None:
        if torch.compiler.is_compiling() or (found := capturing.get()) is None:
            return None
        captures = found()
        return captures if captures is not None and captures.open and captures.patch is self.patch else None

    def before_tower(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        captures = self._active()
        if captures is None or not captures.keeps_states:
            return None
        layers = kwargs.get("output_hidden_states")
        if layers is None or layers is False:
            kwargs["output_hidden_states"] = True
        elif layers is not True:  # the indices of those wanted; the last layer's input is one before its output
            several = layers if isinstance(layers, (list, tuple)) else [layers]
            kwargs["output_hidden_states"] = [*several, module.config.num_hidden_layers - 1]
        return args, kwargs

    def after_tower(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        captures = self._active()
        if captures is None or not captures.keeps_states:
            return
        states = (getattr(out, "hidden_states", None) or [None, None])[-2]
        if states is None:
            raise UnsupportedError(
                "the vision tower gave no hidden_states[-2], which CLS scores are made of: a wrapper around its "
                "forward must pass output_hidden_states on and keep what it asks for"
            )
        captures.states.append(states)

    def after_projector(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        captures = self._active()
        if captures is not None and captures.keeps_projected:
            captures.projected.append(out)


def begin(captures: Captures | None) -> Any:
    """Let ``captures`` take in what runs in this context from now on; returns what undoes it."""
    return capturing.set(None if captures is None else weakref.ref(captures))
