"""The frontend's part: which policy each image has, how many placeholders it gets, what it is called in caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vtr.integrations.vllm import metrics
from vtr.integrations.vllm.layouts import LayoutOf, check_tower, count_of, shortened
from vtr.integrations.vllm.specs import NONE, RequestError, acts_before, decoder_layers, identity, packed, read, scaled

from vtr.image import Layout

KEY = "vtr"
DEFAULT = "vtr_default"
"""The key of the model's config (``--hf-overrides``) that says what requests get that name no policy."""


def _without(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != KEY}


def embeds(items: Any) -> bool:
    """Whether a request brings embeddings instead of pictures."""
    return isinstance(items, (DictEmbeddingItems, ImageEmbeddingItems))


class Reduced:
    """Mixed in before a processor of vLLM: takes ``vtr`` out of ``mm_processor_kwargs`` and acts on it.

    From :meth:`apply` on, ``vtr`` in the processor's keyword arguments is a list with one checked spec for each image
    that is processed.
    """

    layout_of: ClassVar[LayoutOf]
    instead: ClassVar[str] = "reduce them before they are sent (vtr encode)"
    """What to do with embeddings that a request brings along."""

    # -- the request -----------------------------------------------------------------------------------------------
    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Check the policies of all images, then process."""
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        items, count = self._images(inputs.mm_data_items)
        asked = inputs.hf_processor_mm_kwargs.get(KEY)
        if embeds(items):
            if any(spec != NONE for spec in read(asked, count, decoder_layers(config))):
                raise RequestError(f"image_embeds are taken as they are: {self.instead}")
            specs = [NONE] * count
        else:
            chosen = asked if asked is not None or not count else getattr(config, DEFAULT, None)
            specs = read(chosen, count, decoder_layers(config))
            for spec in specs:
                self._check(config, spec)
        kwargs = {**_without(inputs.hf_processor_mm_kwargs), KEY: specs}
        inputs = self._scaled(replace(inputs, hf_processor_mm_kwargs=kwargs), items, specs)
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        if count and not embeds(items):
            for i, (spec, place) in enumerate(zip(specs, made["mm_placeholders"]["image"], strict=True)):
                if items.get(i) is not None:
                    full = len(self._layout(items, i, kwargs)) * self._parts(items, i, kwargs)
                    metrics.seen(spec, full, place.get_num_embeds())
        return made

    def _scaled(self, inputs: Any, items: Any, specs: Sequence[str]) -> Any:
        """The request with the pictures that policies before the tower leave, where there are such."""
        if not any(map(acts_before, specs)):
            return inputs
        images = self.info.get_hf_processor().image_processor  # type: ignore[attr-defined]
        given = [items.get(i) for i in range(len(specs))]
        given = [getattr(one, "media", one) for one in given]  # (vLLM may keep a file's bytes beside its picture)
        pictures = [scaled(one, spec, images) for one, spec in zip(given, specs, strict=True)]
        known = inputs.mm_data_items
        return replace(inputs, mm_data_items=type(known)({**known, "image": ImageProcessorItems(pictures)}))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What memory is measured with: images with all of their tokens, whatever the server's default."""
        made = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        made.hf_processor_mm_kwargs = {**made.hf_processor_mm_kwargs, KEY: NONE}
        return made

    def _images(self, mm_items: Any) -> tuple[Any, int]:
        if "image" not in mm_items:
            return None, 0
        items = mm_items.get_items("image", (DictEmbeddingItems, ImageEmbeddingItems, ImageProcessorItems))
        return items, items.get_count()

    def _check(self, config: Any, spec: str) -> None:
        """Raise RequestError for a checked spec that cannot be served on this family, whatever the picture."""
        check_tower(config, spec)

    def _layout(self, items: Any, i: int, kwargs: Mapping[str, object]) -> Layout:
        """How the tokens of image ``i`` lie before anything is reduced."""
        size = items.get_image_size(i)
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        return type(self).layout_of(config, (size.height, size.width), self._tiles(size, _without(kwargs)))

    def _tiles(self, size: Any, kwargs: Mapping[str, object]) -> int:
        """How many tiles a picture of this size is cut into, for families whose layout follows from that."""
        return 1

    def _parts(self, items: Any, i: int, kwargs: Mapping[str, object]) -> int:
        """How many images vtr sees in image ``i``, all of the same layout: its tiles, where text is between them."""
        return 1

    def _left(self, spec: str, layout: Layout) -> int:
        """How many tokens of an image of this layout stay; raises RequestError where the spec cannot be served."""
        return count_of(spec, layout)

    # -- what goes to the worker -----------------------------------------------------------------------------------
    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]
        items, count = self._images(mm_items)
        if count:
            specs = self._specs(hf_kwargs, count)
            rows = [packed(spec, self._count(items, i, spec, hf_kwargs)) for i, spec in enumerate(specs)]
            data[KEY] = [torch.tensor(list(row), dtype=torch.uint8) for row in rows]
        return data

    def _count(self, items: Any, i: int, spec: str, kwargs: Mapping[str, object]) -> int:
        if embeds(items):
            return 0  # nobody asks: nothing is done to them
        return self._left(spec, self._layout(items, i, kwargs)) * self._parts(items, i, kwargs)

    @staticmethod
    def _specs(kwargs: Mapping[str, object], count: int) -> list[str]:
        specs = kwargs.get(KEY)
        assert isinstance(specs, list) and len(specs) == count
        return specs

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]
        return {**fields, KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    # -- placeholders ----------------------------------------------------------------------------------------------
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        updates = super()._get_prompt_updates(mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]
        items, count = self._images(mm_items)
        if not count or embeds(items):
            return updates
        specs = self._specs(hf_processor_mm_kwargs, count)
        return [
            self._shorter(update, items, specs, hf_processor_mm_kwargs) if update.modality == "image" else update
            for update in updates
        ]

    def _shorter(self, update: Any, items: Any, specs: Sequence[str], kwargs: Mapping[str, object]) -> Any:
        """The replacement of an image's placeholder, cut to as many tokens as its policy leaves."""
        (mark,) = update.target

        def replacement(i: int) -> Any:
            stock = update.replacement(i) if callable(update.replacement) else update.replacement
            if specs[i] == NONE:
                return stock
            ids = stock.full if isinstance(stock, PromptUpdateDetails) else stock
            layout, parts = self._layout(items, i, kwargs), self._parts(items, i, kwargs)
            if ids.count(mark) != len(layout) * parts:
                raise RequestError(
                    f"vLLM gives image {i} {ids.count(mark)} tokens, vtr counts {len(layout) * parts}: send it without "
                    "vtr"
                )
            cut = shortened(ids, mark, len(layout), self._left(specs[i], layout))
            return PromptUpdateDetails.select_token_id(cut, mark) if isinstance(stock, PromptUpdateDetails) else cut

        return PromptReplacement(modality="image", target=update.target, replacement=replacement)

    # -- caches ----------------------------------------------------------------------------------------------------
    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Every image by its own policy, not by the request's list of them."""
        stock = replace(inputs, hf_processor_mm_kwargs=_without(inputs.hf_processor_mm_kwargs))
        hashes = super()._get_mm_hashes(stock)  # type: ignore[misc]
        specs = inputs.hf_processor_mm_kwargs.get(KEY)
        if "image" in hashes:
            specs = self._specs(inputs.hf_processor_mm_kwargs, len(hashes["image"]))
            hashes = {**hashes, "image": [identity(h, s) for h, s in zip(hashes["image"], specs, strict=True)]}
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, Sequence[bool]]) -> Any:
        """The policies of the images that are not in the cache."""
        given = inputs.hf_processor_mm_kwargs
        stock = replace(inputs, hf_processor_mm_kwargs=_without(given))
        kwargs = super()._get_cache_missing_processor_kwargs(stock, mm_is_cached)  # type: ignore[misc]
        cached = mm_is_cached.get("image", [])
        specs = self._specs(given, len(cached)) if cached else []
        return {**kwargs, KEY: [s for s, known in zip(specs, cached, strict=True) if not known]}
