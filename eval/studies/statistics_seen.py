"""What one prompt's forward shows: hooks take of every attention matrix the rows that count, and let the rest go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Seen:
    """Of one prompt, mean over heads and queries.

    Attributes:
        tokens: of the prompt. first: [layers], attention on the first token. picture: [layers, vision tokens].
        norms: of the states that enter a layer: [3, layers], of the first token, the picture's and the text's median.
        tower: "best_tenth" and "itself", a number for each of its layers; None without a CLS token.
    """

    tokens: int
    first: np.ndarray
    picture: np.ndarray
    norms: np.ndarray
    tower: dict[str, np.ndarray] | None


@contextmanager
def hooked(modules: list[Any], take: Any) -> Iterator[None]:
    """``take(module's index, args, kwargs, output)`` after each of the modules runs."""
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, at=at: take(at, args, kwargs, output), with_kwargs=True
        )
        for at, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_modules(layers: Any, what: str) -> list[Any]:
    """The attention of each layer.

    Raises:
        ValueError: a layer has none of a known name.
    """
    found = []
    for layer in layers:
        named = [getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name)]
        if not named:
            raise ValueError(f"the {what}'s layers ({type(layer).__name__}) have no attention that can be looked at")
        found.append(named[0])
    return found


def weights_in(output: Any, what: str) -> torch.Tensor:
    """The attention matrix that a module returned, [rows, heads, queries, keys].

    Raises:
        ValueError: it returned none.
    """
    if not isinstance(output, tuple) or len(output) < 2 or not torch.is_tensor(output[1]):
        raise ValueError(f"the {what} gives no attention matrix, even with attn_implementation='eager'")
    found: torch.Tensor = output[1]
    return found


def look(model: Any, inputs: Any, queries: str) -> Seen:
    """Run a prompt of one row through a model with eager attention.

    Args:
        queries: "text", all tokens behind the picture, or "last".

    Raises:
        ValueError: no picture in the prompt, no text behind it, or attention that cannot be looked at.
    """
    ids = inputs["input_ids"][0]
    places = (ids == model.config.image_token_id).nonzero()[:, 0].cpu()
    if not len(places) or places[-1] == len(ids) - 1:
        raise ValueError("the prompt needs a picture, and text behind it")
    asking = slice(len(ids) - 1 if queries == "last" else int(places[-1]) + 1, len(ids))
    text = torch.ones(len(ids), dtype=torch.bool)
    text[places], text[0] = False, False
    rows: list[torch.Tensor] = []
    norms: list[list[float]] = []
    tower = TowerSeen(model)

    def attended(_at: int, _args: Any, _kwargs: Any, output: Any) -> None:
        rows.append(weights_in(output, "decoder")[0, :, asking].float().mean((0, 1)).cpu())

    def entered(_at: int, args: Any, kwargs: Any, _output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        size = states[0].float().norm(dim=-1).cpu()
        norms.append([float(size[0]), float(size[places].median()), float(size[text].median())])

    layers = list(model.get_decoder().layers)
    modules = attention_modules(layers, "decoder")
    with hooked(modules, attended), hooked(layers, entered), tower.watched():
        model(**inputs, use_cache=False, logits_to_keep=1)
    received = torch.stack(rows).numpy()
    return Seen(len(ids), received[:, 0], received[:, places.numpy()], np.array(norms).T, tower.found())


class TowerSeen:
    """The CLS rows of a tower's attention, where it has a CLS token."""

    def __init__(self, model: Any) -> None:
        tower = model.base_model.vision_tower if hasattr(model.base_model, "vision_tower") else None
        self.cls = any(hasattr(part, name) for part in _embeddings(tower) for name in ("cls_token", "class_embedding"))
        encoder = getattr(tower, "encoder", None) or getattr(getattr(tower, "vision_model", None), "encoder", None)
        self.layers = next((getattr(encoder, n) for n in ("layer", "layers") if hasattr(encoder, n)), None)
        self.tenth: dict[int, float] = {}
        self.itself: dict[int, float] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the model runs."""
        if not self.cls or self.layers is None:
            yield
            return
        with hooked(attention_modules(self.layers, "tower"), self._take):
            yield

    def _take(self, at: int, _args: Any, _kwargs: Any, output: Any) -> None:
        row = weights_in(output, "tower")[:, :, 0].float().mean(1)
        patches = row[:, 1:] / row[:, 1:].sum(1, keepdim=True)
        best = patches.topk(max(1, patches.shape[1] // 10), 1).values.sum(1)
        self.tenth[at], self.itself[at] = float(best.mean()), float(row[:, 0].mean())

    def found(self) -> dict[str, np.ndarray] | None:
        """By layer; None if there is no CLS token."""
        if not self.tenth:
            return None
        return {
            "best_tenth": np.array([self.tenth[at] for at in sorted(self.tenth)]),
            "itself": np.array([self.itself[at] for at in sorted(self.itself)]),
        }


def _embeddings(tower: Any) -> list[Any]:
    return [] if tower is None else [module for name, module in tower.named_modules() if name.endswith("embeddings")]
