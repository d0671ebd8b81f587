"""What vision tower and projector gave, kept from when they run until the images of the call are compressed.

transformers encodes images before ``generate``'s first forward (or inside a direct one) and hands on merged tokens
only. Hooks on tower and projector keep what some row's policy ``wants``, in the call that is under way in this context:
a context variable points to its :class:`Captures`, weakly, so that an interrupted call leaves nothing behind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity

from vtr.base import Policy, UnsupportedError, acting, tower_wish
from vtr.engine.image_tower import ImageTower, attention_index, state_index
from vtr.engine.tower import (
    Entered,
    attention_of,
    cls_scores,
    entered,
    has_cls,
    layers_of,
    leading_tokens,
    on_grid,
    projections_of,
    tiles_of,
)
from vtr.image import Image, Layout, tokens_at

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch
    from vtr.engine.prompt import Prompt

_attaching = threading.Lock()


@dataclass(frozen=True)
class Place:
    """Where an image's tiles are: in which run of the tower (images, then videos), from which tile on, how many."""

    run: int
    first: int
    count: int


@dataclass
class Inside:
    """What the hooked layers of a tower gave in one run: by layer, what entered it, and its queries and keys."""

    entered: dict[int, Entered] = field(default_factory=dict)
    asked: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def serves(self, captures: Captures | None) -> bool:
        """Whether all that a call wants of the tower's layers is there."""
        if captures is None:
            return True
        return captures.entered.keys() <= self.entered.keys() and captures.asked.keys() <= self.asked.keys()

    def give(self, captures: Captures | None) -> None:
        """Hand it to a call, as if the tower had run in it."""
        if captures is None:
            return
        for layer, runs in captures.entered.items():
            runs.append(self.entered[layer])
        for layer, parts in captures.asked.items():
            for name, runs_of in parts.items():
                runs_of.append(self.asked[layer][name])


class Captures:
    """Tower and projector outputs of one call.

    Args:
        patch: whose model it is. projected, states: whether projector outputs and the tower's states are to be kept.
        tiles: how many there are in each run of the tower.
        layers: of the tower, counted from 0, into which states are kept (one past the last: those that leave it).
        attended: those of them whose queries and keys are kept as well.
        places: of the call's images with their layouts; they are asked for where images have grids of their own.
        projector: whether policies may run the projector.
    """

    def __init__(
        self, patch: Patch, projected: bool, states: bool, tiles: list[int], layers: Sequence[int] = (),
        attended: Sequence[int] = (), places: Mapping[Place, Layout] = MappingProxyType({}), projector: bool = False,
    ) -> None:  # fmt: skip
        self.patch, self.tiles, self.places = patch, tiles, places
        self.keeps_projected, self.keeps_states, self.keeps_projector = projected, states, projector
        self.entered: dict[int, list[Entered]] = {layer: [] for layer in layers}
        """Per layer of the tower that is asked for, and per run: what entered it."""
        self.asked: dict[int, dict[str, list[torch.Tensor]]] = {layer: {"q": [], "k": []} for layer in attended}
        """Per layer whose attention is asked for, and per run: its queries and keys, before any norm of theirs."""
        self.features_at = patch.adapter.features_at(patch.model) if layers else -1
        self.made: dict[Any, torch.Tensor] = {}
        """What policies have asked of the tower so far: rows that share an image share it."""
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
            self.projected, self.states, self._scores, self.made = [], [], {}, {}
            self.entered = {layer: [] for layer in self.entered}
            self.asked = {layer: {"q": [], "k": []} for layer in self.asked}

    def image(
        self, features: torch.Tensor, layout: Layout, place: Place, index: int, count: int, policy: Policy
    ) -> Image:
        """What ``policy.compress`` sees of one image, but for the question."""
        tiles = self._tiles(features, layout, place) if "tiles" in policy.wants else None
        scorer = partial(self._cls_attention, features, layout, place) if "cls" in policy.wants else None
        newline = self.patch.adapter.newline(self.patch.model)
        tower = ImageTower(self, place, layout) if self.entered or self.keeps_projector else None
        return Image(features, layout, index, count, tiles, newline, scorer, tower)

    def span(self, place: Place) -> tuple[int, int]:
        """Of images with grids of their own: where one's patches begin and end in the run."""
        run = sorted((p for p in self.places if p.run == place.run), key=lambda p: p.first)
        sizes = [_cells(self.places[p]) for p in run]
        states = next(iter(self.entered.values()))[place.run].states
        each, at = states.shape[0] // sum(sizes), run.index(place)
        return sum(sizes[:at]) * each, sum(sizes[: at + 1]) * each

    def order_of(self, place: Place) -> torch.Tensor | None:
        """Where in the tower's order each token of an image is; None: they are in order."""
        return self.patch.adapter.patch_order(self.patch.model, self.places[place])

    def _tiles(self, features: torch.Tensor, layout: Layout, place: Place) -> torch.Tensor:
        if layout.has_all_patches:
            patches = features.index_select(0, tokens_at(layout).to(features.device, non_blocking=True))
            tiles: torch.Tensor = patches.unflatten(0, (layout.tiles, -1))
            return tiles
        self.check_ran(self.projected, "projector")
        return tiles_of(self.projected[place.run], place, layout)

    def check_ran(self, runs: list[torch.Tensor], what: str) -> None:
        """Raise UnsupportedError unless tower or projector has given something for all images of the call."""
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
                self.check_ran(self.states, "vision tower")
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
_keeping: ContextVar[Inside | None] = ContextVar("vtr_keeping", default=None)
"""Where hooked layers put what they give in a run of the tower that other calls of this context may share."""


def active() -> Captures | None:
    """The call that takes in what tower and projector give here and now."""
    if torch.compiler.is_compiling() or (found := capturing.get()) is None:
        return None
    captures = found()
    return captures if captures is not None and captures.open else None


def keeping() -> Inside | None:
    """Where hooked layers put what they give here and now, for other calls."""
    return None if torch.compiler.is_compiling() else _keeping.get()


@contextmanager
def kept_inside() -> Iterator[Inside]:
    """Keep what the hooked layers give within the block, whoever asked for the hooks."""
    inside = Inside()
    token = _keeping.set(inside)
    try:
        yield inside
    finally:
        _keeping.reset(token)


def _cells(layout: Layout) -> int:
    return layout.tiles * layout.grid[0] * layout.grid[1]


class VisionHooks:
    """Hooks of vision tower and projector; silent unless a call in this context is taking in what they give."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.projector = patch.adapter.projector(patch.model)
        self.tower: Any = None
        self.cls, self.leading = False, 0
        self.hooked: set[int] = set()
        """Layers of the tower that have a hook: those that some call has asked for."""
        self.hooked_attention: set[int] = set()

    @staticmethod
    def is_own(hook: Any) -> bool:
        """Whether a module's hook is one that keeps what some layer of the tower gives."""
        method = getattr(hook, "func", hook)
        return isinstance(getattr(method, "__self__", None), VisionHooks)

    def install(self) -> list[Any]:
        """Register them; returns the handles."""
        return [self.projector.register_forward_hook(self.after_projector), *self.attach()]

    def attach(self) -> list[Any]:
        """Register those of the tower as soon as it is there; returns the handles."""
        with _attaching:
            tower = self.patch.adapter.tower(self.patch.model) if self.tower is None else None
            if tower is None:
                return []
            self.tower, self.cls, self.leading = tower, has_cls(tower), leading_tokens(tower)
            return [
                tower.register_forward_pre_hook(self.before_tower, with_kwargs=True),
                tower.register_forward_hook(self.after_tower),
            ]

    def wanted(self, policies: Sequence[Policy | None], prompt: Prompt) -> Captures | None:
        """What the rows' policies want of the images of this call; None if nothing."""
        rows = zip(policies, prompt.layouts, strict=True)
        asking = [(one.wants, row) for p, row in rows for one in acting(p) if row]
        if not any(wants for wants, _ in asking):
            return None
        self.patch.handles += self.attach()
        layers, attended = self._layers({wish for wants, _ in asking for wish in wants})
        states = self.cls and any("cls" in wants for wants, _ in asking)
        tiles = [row for wants, row in asking if "tiles" in wants or ("cls" in wants and not self.cls)]
        last = {place.run: place.first + place.count for row in prompt.places for place in row}
        projected = any(not layout.has_all_patches for row in tiles for layout in row)
        pairs = zip(prompt.places, prompt.layouts, strict=True)
        places = {place: layout for row in pairs for place, layout in zip(*row, strict=True)}
        projector = any("projector" in wants for wants, _ in asking)
        counts = [last[run] for run in sorted(last)]
        return Captures(self.patch, projected, states, counts, layers, attended, places, projector)

    def _layers(self, wishes: Iterable[str]) -> tuple[list[int], list[int]]:
        """The layers that ``wishes`` name, and those whose attention they name, with a hook on each.

        Raises:
            ValueError: a layer that the tower does not have.
            UnsupportedError: a tower without CLS token or layers that can be read, or features of several layers.
        """
        named = [wish for wish in map(tower_wish, sorted(wishes)) if wish is not None]
        name = type(self.tower).__name__
        if "cls_token" in wishes and not self.cls:
            raise UnsupportedError(f"{name} has no CLS token, which this policy is about: use another policy")
        if not named:
            return [], []
        depth, at = len(layers_of(self.tower)), self.patch.adapter.features_at(self.patch.model)
        if not depth:
            raise UnsupportedError(f"the layers of {name} cannot be found: use a policy that reads none of them")
        found: dict[int, bool] = {}
        for kind, layer in named:
            index = (state_index if kind == "hidden_states" else attention_index)(layer, depth, at)
            most = depth if kind == "hidden_states" else depth - 1
            if not 0 <= index <= most:
                raise ValueError(
                    f"{kind}[{layer}] is asked for, but {name} has {depth} layers: choose {-most - 1}…{most}"
                )
            found[index] = found.get(index, False) or kind == "attentions"
        attended = sorted(index for index, too in found.items() if too)
        with _attaching:
            for index in found.keys() - self.hooked:
                self._hook(index, depth)
            for index in set(attended) - self.hooked_attention:
                self._hook_attention(index)
        return sorted(found), attended

    def _hook(self, index: int, depth: int) -> None:
        """Keep what enters a layer of the tower (or leaves the last one) from now on, where a call asks for it.

        Hooks are bound methods, so that those of a copied model belong to the copy.
        """
        layers = layers_of(self.tower)
        if index < depth:
            handle = layers[index].register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
        else:
            handle = layers[-1].register_forward_hook(partial(self._after_last, index), with_kwargs=True)
        self.patch.handles.append(handle)
        self.hooked.add(index)

    def _before_layer(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captures, inside = self._active(), keeping()
        wanted = captures is not None and index in captures.entered
        if not wanted and inside is None:
            return
        given = entered(args, kwargs)
        if captures is not None and wanted:
            captures.entered[index].append(given)
        if inside is not None:
            inside.entered[index] = given

    def _after_last(self, index: int, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self._before_layer(index, module, (out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs)

    def _hook_attention(self, index: int) -> None:
        """Keep a layer's queries and keys from now on, where a call asks for them."""
        layer = layers_of(self.tower)[index]
        attention_of(self.tower, layer)  # (it can be read)
        for module, which in projections_of(layer):
            handle = module.register_forward_hook(partial(self._after_projection, index, which))
            self.patch.handles.append(handle)
        self.hooked_attention.add(index)

    def _after_projection(self, index: int, which: str, module: Any, args: Any, out: torch.Tensor) -> None:
        captures, inside = self._active(), keeping()
        wanted = captures is not None and index in captures.asked
        if not wanted and inside is None:
            return
        parts = dict(zip("qk", out.chunk(3, -1), strict=False)) if which == "qkv" else {which: out}
        if captures is not None and wanted:
            for name, part in parts.items():
                captures.asked[index][name].append(part)
        if inside is not None:
            inside.asked.setdefault(index, {}).update(parts)

    def _active(self) -> Captures | None:
        captures = active()
        return captures if captures is not None and captures.patch is self.patch else None

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
