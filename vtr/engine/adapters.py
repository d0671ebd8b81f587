"""What the engine must be told about a model family, and the list of families it knows."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtr.base import Policy, UnsupportedError
from vtr.image import Layout
from vtr.parts import members

if TYPE_CHECKING:
    from vtr.engine.prompt import Prompt


class Adapter(ABC):
    """Answers for one model family: where is the decoder, where do vision tokens sit, what grid do they form.

    Attributes:
        family: the name people know it by.
        classes: names of the model classes it serves.
        returns_new_tokens_only: ``generate`` gives the new tokens without the prompt in front of them.
        unsupported: policies (by name) that cannot work on this family, and why; asking for one raises.
        lacks: what policies may want (:data:`vtr.base.WANTED`) and cannot have on this family, and why.
        image_inputs: what :meth:`encode` takes of a call's keyword arguments.
        grids: where the grid of an image's tokens comes from, in words.
        proven: whether tests have compared the family with transformers' own models; else :func:`vtr.patch` does so.
    """

    family: str
    classes: tuple[str, ...]
    proven = True
    grids = "known of the family"
    returns_new_tokens_only = False
    unsupported: Mapping[str, str] = MappingProxyType({})
    lacks: Mapping[str, str] = MappingProxyType({})
    image_inputs: tuple[str, ...] = (
        "pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy",
    )  # fmt: skip

    def serves(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family: by its class names, or those of the classes it is derived from."""
        return bool({cls.__name__ for cls in type(model).__mro__} & set(self.classes))

    def for_model(self, model: nn.Module) -> Adapter:
        """The adapter of this very model: itself, where a family's models are alike."""
        return self

    def inner(self, model: nn.Module) -> Any:
        """The module whose forward hands keyword arguments on to the text model.

        As a rule the model itself. Else the model merges its images and calls this one with embeddings only, from its
        own ``forward`` and its own ``generate``.
        """
        return model

    def multimodal_module(self, model: nn.Module) -> Any:
        """The module whose forward merges images into the text; every way of calling the model goes through it."""
        return model.base_model

    def text_model(self, model: nn.Module) -> Any:
        """The module whose forward runs the decoder layers; it has ``.layers``, ``.rotary_emb`` and ``.config``."""
        return model.model.language_model  # type: ignore[union-attr]

    def placeholders(self, model: nn.Module) -> tuple[int, ...]:
        """The ids in ``input_ids`` that stand for one vision token each (of an image, of a video …)."""
        return (int(model.config.image_token_id),)  # type: ignore[union-attr,arg-type]

    def tower(self, model: nn.Module) -> Any:
        """The vision tower: called once for all images (tiles one behind the other), then once for all videos.

        None while it is not loaded yet; it is asked for again when a call needs it.
        """
        return model.model.vision_tower  # type: ignore[union-attr]

    def projector(self, model: nn.Module) -> Any:
        """The module that brings the tower's patches to the text model's width: [tiles, patches, hidden_size] out."""
        return model.model.multi_modal_projector  # type: ignore[union-attr]

    def features_at(self, model: nn.Module) -> int:
        """Which of the tower's ``hidden_states`` the projector gets.

        Raises:
            UnsupportedError: several of them together.
        """
        layer: Any = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise UnsupportedError(
                f"this model projects several layers of its vision tower together (vision_feature_layer={layer}): use "
                "a policy that reads none of them"
            )
        return layer

    def patch_order(self, model: nn.Module, layout: Layout) -> torch.Tensor | None:
        """int64 [tokens]: of an image with its own grid, where in the tower's order each token is; None: in order."""
        return None

    def newline(self, model: nn.Module) -> Any:
        """The embedding of a newline token, [hidden_size]; None if the family has none."""
        return getattr(getattr(model, "model", None), "image_newline", None)

    def own_hooks(self, model: nn.Module) -> list[Any]:
        """Register what the family needs besides the engine's hooks; returns the handles."""
        return []

    def prompt(
        self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, inputs: Mapping[str, Any]
    ) -> Prompt | None:
        """A call's rows as the text model will see them, where the model itself puts images between the words.

        None (the default): ``input_ids`` have a placeholder for every vision token.

        Args:
            ids: int64 [rows, L]. mask: the call's attention_mask or None. inputs: the call's keyword arguments.
        """
        return None

    def check_generation(self, model: nn.Module, prompt: Prompt) -> None:
        """Refuse a reduced ``generate`` that this family cannot answer rightly.

        Raises:
            UnsupportedError: naming the way out.
        """
        return None

    def encode(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What the model makes of images, as they would enter the text model (``image_inputs`` of a call)."""
        return model.get_image_features(**inputs)  # type: ignore[operator]

    def layer_features(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """What the text model adds to the vision tokens behind its first layers, taken out of its ``kwargs``.

        [vision tokens of the batch, hidden_size] for each of these layers, row by row; none for most families.
        """
        return []

    def refuse(self, policies: Iterable[Policy | None]) -> None:
        """Raise UnsupportedError if one of ``policies`` (or one that it is made of) cannot work here."""
        for policy in policies:
            for part in members(policy):
                if why := self.why_not(part):
                    raise UnsupportedError(f"{part.spec!r} does not work on {self.family}: {why}")

    def why_not(self, policy: Policy) -> str | None:
        """Why ``policy`` cannot work on this family; None: it can."""
        wishes = (wish for name in policy.wants for wish in (name, name.partition("[")[0]))
        return self.unsupported.get(policy.name) or next((self.lacks[w] for w in wishes if w in self.lacks), None)

    @abstractmethod
    def layouts(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """Per placeholder id one layout per image (a video counts as one), in the order of the images.

        The ids come in the order in which the vision tower runs for them (images, then videos).

        Args:
            inputs: the call's keyword arguments; ``input_ids`` [rows, L] are on the CPU and always there.
        """


_ADAPTERS: list[Adapter] = []
_REFUSED: dict[str, str] = {}


_RENAMED = {"says_answer_only": "returns_new_tokens_only", "merger": "multimodal_module"}
"""What adapters written for older versions call things, and what they are called now."""


def register_adapter(adapter: Adapter) -> None:
    """Make a family known to :func:`vtr.patch`; a later adapter of the same class name wins."""
    for old, new in _RENAMED.items():
        if hasattr(adapter, old):
            warnings.warn(f"{type(adapter).__name__}.{old} is now called {new}", DeprecationWarning, stacklevel=2)
            setattr(adapter, new, getattr(adapter, old))
    _ADAPTERS.insert(0, adapter)


def refuse_family(classes: Iterable[str], why: str) -> None:
    """Make it known that models of these classes cannot be patched, and why."""
    _REFUSED.update(dict.fromkeys(classes, why))


def families() -> dict[str, tuple[str, ...]]:
    """The known families and the transformers classes they cover."""
    return {a.family: a.classes for a in reversed(_ADAPTERS) if a.classes}


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "get_base_model()",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",
}
"""Classes that only stand around a model, by name, and where it is in them."""


def _way_in(model: object) -> str | None:
    """Where the model is inside of ``model``; None if that is no wrapper."""
    return next((way for cls in type(model).__mro__ if (way := _WRAPPERS.get(cls.__name__))), None)


def unwrapped(model: Any) -> Any:
    """The model inside of ``torch.compile``'s, peft's, accelerate's and torch's parallel wrappers, however nested."""
    while (way := _way_in(model)) is not None:
        found = getattr(model, way.removesuffix("()"))
        model = found() if way.endswith("()") else found
    return model


SEES = ("vision_config", "mm_vision_tower", "visual", "vq_config")
"""What the config of a model that sees pictures has, one or the other."""


def _advice(model: nn.Module) -> str:
    """What to patch instead of a wrapper or of a part of a model; empty if ``model`` is neither."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if (way := _way_in(model)) is not None:
        return f"It stands around a {type(unwrapped(model)).__name__}: give that one, model.{way}. "
    for full in (cls for adapter in _ADAPTERS for cls in adapter.classes):
        if name == full.removesuffix("ForConditionalGeneration") + "Model":
            return (
                f"It is the part of a {full} without the head: patch the whole model (load it with "
                f"transformers.{full} or AutoModelForImageTextToText). "
            )
    if config is None:
        return ""
    if hasattr(model, "get_image_features") or any(hasattr(config, part) for part in SEES):
        return (
            "It does not put image features at placeholder tokens that its config names (image_token_id) in front of a "
            "decoder that generates word by word, which is all that vtr can reduce. "
        )
    return "It sees no pictures by itself: where it is part of a vision-language model, patch that whole model. "


def find_adapter(model: object) -> Adapter:
    """The adapter of ``model``'s family.

    Raises:
        TypeError: ``model`` is no torch module.
        UnsupportedError: no adapter knows its class (the message lists the families and says how to add one), or the
            family is known to be impossible. Of a wrapper, or a part of a model, it names the model to give instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vtr.patch needs a model (a torch.nn.Module), got {type(model).__name__}")
    for adapter in (one for one in _ADAPTERS if one.proven):
        if adapter.serves(model):
            return adapter.for_model(model)
    for cls in type(model).__mro__:
        if why := _REFUSED.get(cls.__name__):
            raise UnsupportedError(f"{type(model).__name__} cannot be patched: {why}")
    for adapter in (one for one in _ADAPTERS if not one.proven):
        if adapter.serves(model):
            return adapter.for_model(model)
    known = "; ".join(f"{family} ({', '.join(classes)})" for family, classes in families().items())
    raise UnsupportedError(
        f"{type(model).__name__} is no model family vtr knows. {_advice(model)}Known: {known}. "
        "To add one, subclass vtr.engine.adapters.Adapter and call register_adapter (see integrations/llava.py)"
    )
