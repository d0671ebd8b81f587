"""LLaVA's own package (PyPI ``llava-torch``): an image is one -200 among the words, the model merges them itself.

How it merges is not repeated here. Its ``prepare_inputs_labels_for_multimodal`` is run dry, on a stand-in for the model
whose "features" say where they come from; where they come out is where the vision tokens are.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vtr.integrations.llava_next import canvas_of

from vtr.base import UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.engine.captures import Place
from vtr.engine.prompt import Prompt
from vtr.image import Layout, remembered

IMAGE = -200
"""What the package puts into ``input_ids`` for a whole image."""
MERGE = "prepare_inputs_labels_for_multimodal"
TAKES = ["input_ids", "position_ids", "attention_mask", "past_key_values", "labels", "images", "image_sizes"]
WORD, PADDING, NEWLINE = -1.0, 0.0, 0.5
"""In the first column of what comes out of a dry run; patches have numbers from 1 on."""


@dataclass(frozen=True)
class Kind:
    """What decides how one model lays out images.

    Attributes:
        cls: the model's class. merge, aspect: config.mm_patch_merge_type and image_aspect_ratio.
        pinpoints: resolutions of canvases, (width, height). tile: pixels of a tile's side.
    """

    cls: Any
    merge: str
    aspect: str
    pinpoints: tuple[tuple[int, int], ...]
    tile: int

    @classmethod
    def from_model(cls, model: Any) -> Kind:
        config = model.config
        found = getattr(config, "image_grid_pinpoints", None) or ()
        pinpoints = tuple((int(w), int(h)) for w, h in (ast.literal_eval(found) if isinstance(found, str) else found))
        merge, aspect = getattr(config, "mm_patch_merge_type", "flat"), getattr(config, "image_aspect_ratio", "square")
        return cls(type(model), merge, aspect, pinpoints, int(model.get_vision_tower().config.image_size))


def dry_run(
    kind: Kind, side: int, features: Tensor, newline: Tensor, ids: Tensor, mask: Tensor | None,
    images: Any, sizes: Any, labels: Tensor | None = None, **config: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the merge code makes of ``features`` [tiles, side · side, C] and ``labels``: [rows, L, C] and [rows, L].

    Args:
        images: tensors whose leading dimensions are those of the real images. config: further settings it may read.

    Raises:
        ValueError: it does not take them.
    """
    tower = SimpleNamespace(num_patches_per_side=side, config=SimpleNamespace(image_size=kind.tile))
    inner = SimpleNamespace(
        embed_tokens=lambda ids: torch.full((len(ids), features.shape[-1]), WORD), image_newline=newline,
        get_vision_tower=lambda: tower,
    )  # fmt: skip
    settings = SimpleNamespace(
        mm_patch_merge_type=kind.merge,
        image_aspect_ratio=kind.aspect,
        image_grid_pinpoints=list(kind.pinpoints),
        **config,
    )
    stand_in = SimpleNamespace(
        config=settings, device=torch.device("cpu"), dtype=features.dtype, model=inner, get_model=lambda: inner,
        get_vision_tower=lambda: tower, encode_images=lambda images: features,
    )  # fmt: skip
    try:
        return getattr(kind.cls, MERGE)(stand_in, ids, None, mask, None, labels, images, sizes)[4:6]
    except (AttributeError, IndexError, TypeError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"{kind.cls.__name__}.{MERGE} cannot merge these images into these input_ids "
            f"({type(error).__name__}: {error}): give one image for every {IMAGE} (and any one for a row without), "
            "with image_sizes where the model takes crops"
        ) from error


@remembered(1024)
def image_layout(kind: Kind, size: tuple[int, int] | None, tiles: int, stacked: bool, side: int) -> Layout:
    """The tokens of one image of ``size`` (width, height) in pixels.

    Args:
        tiles: how many the tower gets of it. stacked: images come as a list or with five dimensions.

    Raises:
        UnsupportedError: crops are laid out in no way that vtr knows.
    """
    where = torch.cartesian_prod(torch.arange(tiles), torch.arange(side), torch.arange(side)).float()
    features = torch.nn.functional.pad(where, (1, 0), value=1.0).unflatten(0, (tiles, -1))
    newline = torch.tensor([NEWLINE, 0, 0, 0])
    images = [torch.empty(tiles, 1, 1, 1)] if stacked else torch.empty(1, 1, 1, 1)
    out = dry_run(kind, side, features, newline, torch.tensor([[0, IMAGE]]), None, images, [size])[0][0, 1:]
    ends = out[:, 0] == NEWLINE
    # a newline token stands one past the last patch before it
    before = torch.where(ends, -1, torch.arange(len(out))).cummax(0).values
    place = out[before, 1:].long()
    place[:, 2] += ends
    tile, y, x = place.T.contiguous()
    crops = _crops(kind, size, tiles)
    window = _window(place[~ends], int(ends.sum()), crops, side) if crops[0] and kind.merge != "flat" else None
    return Layout(
        tile, y, x, ends.long(), (side, side), crops, window,
        shrunk=lambda k: image_layout(kind, size, tiles, stacked, side // k),
    )  # fmt: skip


def _crops(kind: Kind, size: tuple[int, int] | None, tiles: int) -> tuple[int, int]:
    """(rows, columns) of an image's crops; (0, 0) if its tiles are no thumbnail and crops."""
    if tiles == 1 or size is None or kind.aspect != "anyres":
        return 0, 0
    rows, columns = get_anyres_image_grid_shape(size[::-1], [[h, w] for w, h in kind.pinpoints], kind.tile)
    return (rows, columns) if rows * columns + 1 == tiles else (0, 0)


def _window(patches: Tensor, newlines: int, crops: tuple[int, int], side: int) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of what is left of the crops' canvas. patches: int64 [n, 3], tile, y and x."""
    canvas, body = canvas_of(*crops, side), patches[side * side :]
    full = canvas.shape[1:]
    height = newlines or (full[0] if len(body) else 0)
    width = len(body) // height if height else 0
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    if not torch.equal(canvas[:, top : top + height, left : left + width].flatten(1).T, body):
        raise UnsupportedError(
            "this model lays out an image's crops in a way vtr does not know: pass policy=None, or convert the "
            "checkpoint to transformers' own LLaVA (`vtr convert`)"
        )
    return top, left, height, width


class LlavaOriginal(Adapter):
    """``LlavaLlamaForCausalLM`` and ``LlavaMistralForCausalLM`` of the ``llava`` package (1.2)."""

    family = "LLaVA, original package"
    classes = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
    returns_new_tokens_only = True

    def text_model(self, model: Any) -> Any:
        """
        Raises:
            UnsupportedError: the package's version, or a fork of it, merges images otherwise.
        """
        merge: Any = getattr(model, MERGE, None)
        takes = list(inspect.signature(merge).parameters) if merge is not None else []
        if takes[: len(TAKES)] != TAKES:
            raise UnsupportedError(
                f"{type(model).__name__} has no {MERGE}({', '.join(TAKES)}): vtr knows llava-torch 1.2 "
                "(pip install --no-deps llava-torch)"
            )
        return model.model

    def placeholders(self, model: Any) -> tuple[int, ...]:
        return (IMAGE,)

    def tower(self, model: Any) -> Any:
        wrapper = model.get_vision_tower()
        return wrapper.vision_tower if getattr(wrapper, "is_loaded", False) else None

    def projector(self, model: Any) -> Any:
        return model.model.mm_projector

    def own_hooks(self, model: Any) -> list[Any]:
        """transformers' ``generate`` calls the cache ``cache`` since 5.24, the package ``past_key_values``."""
        if "cache" in inspect.signature(type(model).forward).parameters:
            return []
        return [model.register_forward_pre_hook(rename_cache, with_kwargs=True)]

    def layouts(self, model: Any, inputs: Mapping[str, Any]) -> dict[int, list[Layout]]:
        """One per image, also for those that stand in for a row without."""
        images = inputs.get("images")
        if images is None:
            return {}
        if getattr(model.get_vision_tower(), "select_feature", "patch") != "patch":
            raise UnsupportedError(
                "mm_vision_select_feature='cls_patch' sends CLIP's CLS token along with the patches, which has no "
                "place in the grid: use 'patch'"
            )
        stacked, kind, side = _stacked(images), Kind.from_model(model), model.get_vision_tower().num_patches_per_side
        sizes = inputs.get("image_sizes") if stacked else None  # one tile an image: they are not read
        sizes = [None] * len(images) if sizes is None else sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
        if len(sizes) != len(images):
            raise ValueError(f"{len(sizes)} image_sizes for {len(images)} images: give one for each")
        sizes = [None if size is None else (int(size[0]), int(size[1])) for size in sizes]
        made = [image_layout(kind, s, n, stacked, side) for s, n in zip(sizes, _tiles(images), strict=True)]
        return {IMAGE: made}

    def prompt(self, model: Any, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]) -> Prompt:
        """
        Raises:
            ValueError: images do not fit the prompt, or are cut off by ``config.tokenizer_model_max_length``.
        """
        ids = ids.cpu()
        valid = None if mask is None or mask.dim() != 2 else mask[:, -ids.shape[1] :].bool().cpu()
        images = inputs.get("images")
        if images is None or ids.shape[1] == 1:
            if bool((ids == IMAGE).any()):
                raise ValueError(f"the prompt has an image ({IMAGE}), but no images were given: pass images=")
            none: list[Any] = [[] for _ in ids]
            return Prompt(torch.zeros(ids.shape).bool(), none, none, valid, inputs.get("labels"))
        layouts, counts = self.layouts(model, inputs)[IMAGE], _tiles(images)
        side = model.get_vision_tower().num_patches_per_side
        number = torch.arange(1.0, len(counts) + 1).repeat_interleave(torch.tensor(counts))
        features = number.view(-1, 1, 1).expand(-1, side * side, 1)
        names = ("tokenizer_model_max_length", "tokenizer_padding_side")
        config = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
        small = [torch.empty(*image.shape[:-3], 1, 1, 1) for image in images]
        found, labels = dry_run(
            Kind.from_model(model), side, features, torch.tensor([NEWLINE]), ids, valid,
            small if isinstance(images, list) else torch.stack(small), inputs.get("image_sizes"), inputs.get("labels"),
            **config,
        )  # fmt: skip
        merged = found[..., 0]
        first = [sum(counts[:i]) for i in range(len(counts))]
        rows = [_images_of(row, layouts, b) for b, row in enumerate(merged)]
        places = [[Place(0, first[i], counts[i]) for i in row] for row in rows]
        words, named = torch.full(merged.shape, -1), ids != IMAGE if valid is None else (ids != IMAGE) & valid
        for b, row in enumerate(merged):
            at = (row == WORD).nonzero().squeeze(1)
            words[b, at] = ids[b][named[b]][: len(at)]
        own = [[layouts[i] for i in row] for row in rows]
        return Prompt(merged > 0, own, places, merged != PADDING, labels, words)

    def features_at(self, model: Any) -> int:
        return int(model.get_vision_tower().select_layer)

    def check_generation(self, model: Any, prompt: Prompt) -> None:
        """
        Raises:
            UnsupportedError: the package padded shorter rows on the right (its default), where the answer is to go on.
        """
        if prompt.valid is not None and not bool(prompt.valid[:, -1].all()):
            raise UnsupportedError(
                "the shorter rows of this batch end in padding, and their answers would go on from that: set "
                "model.config.tokenizer_padding_side = 'left'"
            )


def _stacked(images: Any) -> bool:
    return isinstance(images, list) or images.ndim == 5


def _tiles(images: Any) -> list[int]:
    """How many tiles the tower gets of each image."""
    return [len(image) if image.ndim == 4 else 1 for image in images]


def _images_of(row: Tensor, layouts: Sequence[Layout], b: int) -> list[int]:
    """Which images stand in a merged row [L], in order.

    Raises:
        ValueError: one was cut off.
    """
    numbers = torch.unique_consecutive(row[row >= 1]).long() - 1
    images = numbers.tolist()
    if sum(len(layouts[i]) for i in images) != int((row > 0).sum()):
        raise ValueError(
            f"row {b} is longer than config.tokenizer_model_max_length, and an image of it is cut off: raise that "
            "limit, or ask with fewer images"
        )
    return images


def rename_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand the cache on under the name that the package's forward has for it."""
    if "cache" in kwargs:
        kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs
