"""The worker's part: what a model's tower and projector gave, made into the image a policy sees, and its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from vtr.integrations.vllm import guard, start
from vtr.integrations.vllm.specs import made_of, unpacked

from vtr.base import Policy
from vtr.engine.captures import Captures, Place
from vtr.image import Layout

LAST = re.compile(r"(?:^|\.)vision_tower\.(?:vision_model\.)?encoder\.layers?\.(\d+)\.(.+)")
SHORT = re.compile(r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\.)")
"""Checkpoints that transformers 5 saved leave ``vision_model.`` out of the tower's names."""


class Reducing:
    """Mixed in before a model of vLLM: images leave :meth:`embed_multimodal` as their policies want them.

    The tower's last layer is kept beside vLLM's own modules where it is needed for CLS scores: vLLM builds towers only
    up to the layer the features leave, and fuses its projections.
    """

    layer_of: ClassVar[Callable[[Any], nn.Module] | None] = None
    """Makes a layer of the tower as transformers has it, for families whose towers have a CLS token."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        start.check(vllm_config)
        guard.watch(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def image_layouts(self, kwargs: dict[str, Any], count: int) -> tuple[list[Layout], list[int]]:
        """The layout of each image, and how many tiles the tower sees of it (padding included)."""
        raise NotImplementedError

    # -- weights ---------------------------------------------------------------------------------------------------
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's own loading; the tower's last layer is kept as well."""
        found: dict[str, torch.Tensor] = {}
        loaded = super().load_weights(self._passed_on(weights, found))  # type: ignore[misc]
        self.__dict__["_vtr_tower"] = Tower(self, found)
        return loaded

    def _passed_on(
        self, weights: Iterable[tuple[str, torch.Tensor]], found: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        last = self.config.vision_config.num_hidden_layers - 1  # type: ignore[attr-defined]
        short = hasattr(self.vision_tower, "vision_model")  # type: ignore[attr-defined]
        for name, weight in weights:
            match = LAST.search(name)
            if match and int(match[1]) == last and type(self).layer_of is not None:
                found[match[2]] = weight.clone()
            yield (SHORT.sub(r"\1vision_model.", name) if short else name), weight

    # -- images ----------------------------------------------------------------------------------------------------
    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As vLLM's own, then each image reduced to exactly as many embeddings as its placeholders."""
        rows = kwargs.pop("vtr", None)
        if kwargs.get("image_embeds") is not None:
            return self._given(kwargs)
        if rows is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        asked = [unpacked(bytes(row.tolist())) for row in rows]
        policies = [made_of(spec) for spec, _ in asked]
        if not any(policies):
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return self._reduced(kwargs, asked, policies)

    def _given(self, kwargs: dict[str, Any]) -> Any:
        """Embeddings that a request brings along."""
        return list(kwargs["image_embeds"])  # vLLM's own check wants all of one batch equally long

    def _reduced(
        self, kwargs: dict[str, Any], asked: Sequence[tuple[str, int]], policies: Sequence[Policy | None]
    ) -> list[torch.Tensor]:
        """The embeddings of each image.

        Args:
            asked: (spec, number of embeddings promised) of each. policies: what the specs say.
        """
        layouts, tiles = self.image_layouts(kwargs, len(asked))
        with self._tower().taking() as taken:
            features = list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
        captures = taken.captures(sum(tiles))
        out, first = [], 0
        for (spec, count), policy, layout, run, whole in zip(asked, policies, layouts, tiles, features, strict=True):
            if policy is None:
                out.append(whole)
            else:
                image = captures.image(whole, layout, Place(0, first, layout.tiles), 0, 1, policy)
                out.append(guard.exactly(count, spec, policy, image))
            first += run
        return out

    def _tower(self) -> Tower:
        if "_vtr_tower" not in self.__dict__:  # weights were drawn, not loaded
            self.__dict__["_vtr_tower"] = Tower(self, {})
        return self.__dict__["_vtr_tower"]


class Taken:
    """What tower and projector gave in one run. projected, states: one [tiles, …] for each time they were called."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.projected: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def captures(self, tiles: int) -> Captures:
        """The engine's own record of a run of ``tiles`` tiles."""
        found = Captures(self.tower.as_patch(), True, self.tower.last is not None, [tiles])
        found.projected = [torch.cat(self.projected)]
        found.states = [torch.cat(self.states)] if self.states else []
        return found


class Tower:
    """Hooks on a model's tower and projector, silent but inside :meth:`taking`.

    Args:
        weights: those of the tower's last layer, by transformers' names; none if the model's are drawn at random.
    """

    def __init__(self, model: Any, weights: dict[str, torch.Tensor]) -> None:
        self.model = model
        self.taken: Taken | None = None
        self.last: nn.Module | None = None
        tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
        model.multi_modal_projector.register_forward_hook(self._projected)
        if (make := type(model).layer_of) is None:
            return
        layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
        depth = model.config.vision_config.num_hidden_layers
        if len(layers) == depth:
            layers[-1].register_forward_pre_hook(self._entering)
        elif len(layers) == depth - 1:
            layers[-1].register_forward_hook(self._left)
        layer, like = make(model.config.vision_config), next(tower.parameters())
        if weights:
            layer.load_state_dict({name: w for name, w in weights.items() if name in layer.state_dict()})
        self.last = layer.to(device=like.device, dtype=like.dtype).eval()

    @contextmanager
    def taking(self) -> Iterator[Taken]:
        """Keep what runs in the block."""
        self.taken = Taken(self)
        try:
            yield self.taken
        finally:
            self.taken = None

    def _projected(self, module: Any, args: Any, out: torch.Tensor) -> None:
        if self.taken is not None:
            self.taken.projected.append(out)

    def _entering(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if self.taken is not None:
            self.taken.states.append(args[0])

    def _left(self, module: Any, args: Any, out: torch.Tensor) -> None:
        if self.taken is not None:
            self.taken.states.append(out)

    def as_patch(self) -> Any:
        """What :class:`Captures` asks of a patched model."""
        newline = getattr(self.model, "image_newline", None)
        return SimpleNamespace(
            model=self.model,
            adapter=SimpleNamespace(newline=lambda model: newline),
            vision=SimpleNamespace(tower=Last(self.last)),
        )


class Last(nn.Module):
    """A tower of which the last layer is left, for who looks for that."""

    def __init__(self, layer: nn.Module | None) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([] if layer is None else [layer])
