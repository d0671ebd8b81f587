"""The model's ``generate`` that also takes ``policy=``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.cache import is_ragged
from vtr.engine.cache_state import Constant
from vtr.engine.call import Generation, busy, running
from vtr.engine.capture import WORTHWHILE, can_capture
from vtr.engine.captures import begin, capturing
from vtr.engine.choice import MISSING
from vtr.engine.choosing import check_choosing, chooses
from vtr.engine.compat import cache_in, cache_name
from vtr.engine.decode import note_cache
from vtr.engine.dense import dense_generation
from vtr.engine.prompt import Prompt, ids_of, new_part, read_prompt
from vtr.engine.refusals import check_call, check_generation, check_padded_generation
from vtr.engine.resolve import check_resolvable, resolve_rows
from vtr.engine.short_cache import note_short
from vtr.engine.static import StaticRaggedCache, decoding_of
from vtr.engine.trace import Trace, Tried
from vtr.engine.turns import behind_cache, go_on, refuse_new_pictures, state_of, without_cached_pictures
from vtr.image import CROP_GRIDS

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


class PreparesCache:
    """Stands in for the model's ``_prepare_cache_for_generation``: makes the static cache of a reduced ``generate``.

    Follows a deep copy of the model.
    """

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        self.patch, self.original = patch, original

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any,
    ) -> Any:  # fmt: skip
        args = generation_mode, batch_size, max_cache_length, *args
        generation, cache = self.patch.choice.generation(), cache_in(model_kwargs)
        reduces = generation is not None and generation.policies is not None
        again = isinstance(cache, StaticRaggedCache) and (reduces or is_ragged(cache))
        made = reduces and cache is None and _wants_static(generation_config)
        if generation is None or generation.started or not (again or made):
            return self.original(generation_config, model_kwargs, *args)
        if again:
            self.original(generation_config, model_kwargs, *args)
        else:
            cache = StaticRaggedCache(config=self.patch.decoder.text.config)
            model_kwargs[cache_name(type(self.patch.inner))] = cache  # type: ignore[arg-type]
        embeds = model_kwargs.get("inputs_embeds")
        prompt = generation.length if embeds is None else embeds.shape[1]
        longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        cache.constant = self._constant(generation_config, generation, max(longest + 1 - prompt, 1))
        if is_ragged(cache):
            cache.layers[0].state.constant = cache.constant
        return None

    def _constant(self, generation_config: Any, generation: Generation, room: int) -> Constant:
        compiles = generation_config.compile_config is not None
        wanted = not compiles and not getattr(generation_config, "disable_compile", False) and room >= WORTHWHILE
        captures = wanted and can_capture(self.patch.decoder.text)
        if captures:
            generation.until_done.enter_context(self.patch.graphs.standing_in())
        return Constant(room, compiles and not generation_config.disable_compile, captures)


class MakesMasks:
    """Stands in for ``create_masks_for_generate``: a reduced prefill wants the 2-D mask, the steps after it none.

    Follows a deep copy of the model.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if isinstance(cache, StaticRaggedCache):
            return None if decoding_of(cache) is not None else kwargs.get("attention_mask")
        return self.original(*args, **kwargs)


def _wants_static(generation_config: Any) -> bool:
    return generation_config.cache_implementation == "static" and generation_config.use_cache is not False


class Generate:
    """Stands in for the model's ``generate``; follows a deep copy of the model."""

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        self.patch, self.__wrapped__ = patch, original
        self.__name__, self.__doc__ = "generate", getattr(original, "__doc__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._named(args, kwargs)
        given = kwargs.pop("policy", MISSING)
        if given is MISSING and getattr(kwargs.get("generation_config"), "is_assistant", False):
            given = None  # another model's draft: that model checks it, and has encoded the images already
        args, kwargs = self._behind_cache(args, kwargs)
        refuse_new_pictures(cache_in(kwargs), kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        grids = kwargs.pop(CROP_GRIDS, None)  # ours: the model's own generate refuses what it does not know
        generation, tried = self._prepared(given, ids, kwargs, grids)
        with self._running(generation), generation.until_done:
            try:
                out = self.__wrapped__(*args, **kwargs)
            finally:
                if generation.cache_layers:
                    generation.cache_layers[0].thaw()
        if generation.started:
            for layer in generation.cache_layers or []:
                layer.drop_unseen()
            note_cache(generation.trace, generation.cache_layers, generation.attended_before)
            if generation.short is not None:
                note_short(generation.trace, generation.short)
            generation.trace.tried = tried
            self.patch.publish(generation.trace)
        elif ids is not None:
            dense = dense_generation(self.patch, ids, kwargs, out)
            if dense is not None:
                dense.tried = tried
            self.patch.publish(dense)
        return out

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by their names, but for the ids where the model's own ``generate`` takes them first."""
        parameters = inspect.signature(self.__wrapped__).parameters if args else {}
        if self.patch.inner is not self.patch.model:  # its own generate may have anything in front
            return (), {**dict(zip(parameters, args, strict=False)), **kwargs}
        names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if 1 < len(args) <= len(names):
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        return args, kwargs

    def _behind_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Where a ragged cache goes on, the arguments that say of its columns what it holds."""
        patch, cache = self.patch, cache_in(kwargs)
        if state_of(cache) is None:
            return args, kwargs
        name = "inputs" if kwargs.get("inputs") is not None else "input_ids"
        ids = args[0] if args else kwargs.get(name)
        go_on(patch.entry, cache, None if ids is None else len(ids))
        if ids is None or kwargs.get("inputs_embeds") is not None or patch.inner is not patch.model:
            return args, kwargs
        ids, kwargs = behind_cache(ids, kwargs)
        kwargs = without_cached_pictures(new_part(ids, kwargs).cpu(), patch.forward_hooks.marks(), kwargs)
        return (), {**kwargs, name: ids}

    def _prepared(
        self, given: Any, ids: torch.Tensor | None, kwargs: dict[str, Any], grids: Any
    ) -> tuple[Generation, Tried | None]:
        """What the call carries through its forwards, and what was tried to choose its policies."""
        patch, tried = self.patch, None
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        policies = patch.choice.policies(given, None if source is None else source.shape[0])
        prompt = None if policies is None else self._check(ids, kwargs, policies, grids)
        if policies is not None and prompt is not None and any(p is not None and p.asks("resolve") for p in policies):
            check_resolvable(patch.adapter, kwargs, patch.inner.generation_config, ids)
            assert ids is not None
            with busy(patch.key, "it is generating; wait until generate has returned"):
                policies, tried = resolve_rows(self, ids, {**kwargs, CROP_GRIDS: grids}, policies, prompt)
            prompt = None if policies is None else prompt
        length = 0 if ids is None else ids.shape[1]
        captures = None if policies is None or prompt is None else patch.vision.wanted(policies, prompt)
        new_ids = None if ids is None or policies is None else new_part(ids, kwargs)
        trace = Trace(patch.decoder.geometry)
        generation = Generation(patch.key, policies, prompt, length, trace, captures, new_ids)
        if chooses(policies):
            self._let_choose(generation, kwargs)
        return generation, tried

    def _let_choose(self, generation: Generation, kwargs: dict[str, Any]) -> None:
        """Its first forward tries policies: note how answers end, and let the text model's forward be stood in for."""
        config = kwargs.get("generation_config") or self.patch.inner.generation_config

        def said(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        ends, pad = said("eos_token_id"), said("pad_token_id")
        ends = [] if ends is None else ends.tolist() if isinstance(ends, torch.Tensor) else ends
        generation.ends = tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
        generation.pad = int(pad) if pad is not None else (*generation.ends, 0)[0]
        longest = said("max_length")
        generation.room = said("max_new_tokens") or (longest - generation.length if longest else 2**20)
        generation.until_done.enter_context(self.patch.graphs.standing_in())

    @contextmanager
    def _running(self, generation: Generation) -> Iterator[None]:
        """While the block runs, forwards in this context are steps of ``generation``."""
        token, before = running.set(generation), begin(generation.captures)
        try:
            with (
                busy(generation.key, "it is generating; wait until generate has returned"),
                self.patch.choice.using(generation.policies),
            ):
                yield
        finally:
            running.reset(token)
            capturing.reset(before)

    def _check(
        self, ids: torch.Tensor | None, kwargs: dict[str, Any], policies: list[Policy | None], grids: Any
    ) -> Prompt:
        """Refuse what cannot be done, and read where the vision tokens are before transformers encodes the images."""
        patch, adapter, model = self.patch, self.patch.adapter, self.patch.model
        check_call(kwargs, [model.config, patch.decoder.text.config], patch.path)
        check_generation(kwargs, patch.inner.generation_config, policies)
        if chooses(policies):
            check_choosing(kwargs, patch.inner.generation_config, patch)
        if patch.path == "padded":
            check_padded_generation(kwargs, patch.inner.generation_config)
        embeds = kwargs.get("inputs_embeds")
        given = embeds is not None and (ids is None or ids.shape != embeds.shape[:2])
        if kwargs.get("use_cache") is False and (given or adapter.returns_new_tokens_only):
            raise UnsupportedError(
                "generate with inputs_embeds and use_cache=False forgets the prompt: leave out use_cache=False"
            )
        if given:
            assert embeds is not None
            ids = ids_of(adapter, model, embeds)
        assert ids is not None  # policies are only resolved for a known number of rows
        prompt = read_prompt(
            adapter, model, new_part(ids, kwargs), kwargs.get("attention_mask"), {**kwargs, CROP_GRIDS: grids}
        )
        adapter.check_generation(model, prompt)
        return prompt
