"""The hooks of a patched model.

They do nothing until a call carries a policy; then: model pre-hook (which policy, which
images) → text model pre-hook (pack) → decoder layer pre-hooks (prune, route) → text model post-hook (unpack).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.engine.attention import AttentionConfig, Plan, attention_name, mlp_scale
from vtr.engine.call import (
    MISSING,
    Generation,
    busy,
    check_call,
    check_generation,
    handed,
    in_use,
    last_traces,
    resolve,
    running,
    windows,
)
from vtr.engine.captures import VisionHooks, begin, capturing
from vtr.engine.compat import NAMES, cache_in
from vtr.engine.decode import Step, note_cache
from vtr.engine.forward import ForwardHooks
from vtr.engine.outer import install_outer
from vtr.engine.positions import many_axes
from vtr.engine.prompt import Prompt, ids_of, new_part, read_prompt
from vtr.engine.resolve import check_resolvable, resolve_rows
from vtr.engine.session import Session
from vtr.engine.text import TextHooks
from vtr.engine.trace import DenseTrace, Geometry, Trace, held_windows

NAME = "_vtr"
_counting = threading.Lock()


class Key:
    """Stands for one patched model in context variables, so that these hold no reference to it."""


class Patch:
    """What ``patch`` put into a model. Lives in the model's ``__dict__``; a deep copy of the model gets its own."""

    def __init__(self, model: Any, adapter: Adapter, default: Policy | None) -> None:
        self.model, self.adapter, self.default = model, adapter, default
        self.text = adapter.text_model(model)
        self.key = Key()
        self.geometry = Geometry.of(self.text)
        self.last: Trace | DenseTrace | None = None
        self.inner = adapter.inner(model)
        parameters = inspect.signature(type(self.inner).forward).parameters
        self.names = list(parameters)[1:]
        closed = all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
        self.hands_on = closed or self.inner is not model
        self.entry = self.inner if self.hands_on else adapter.merger(model)
        """Where a call's request is made."""
        self.users = 0
        """Open ``vtr.use`` blocks and running ``generate`` calls that reduce, in whatever thread."""
        self.windows = windows(self.text)
        if any(self.windows) and many_axes(self.text.rotary_emb):
            raise UnsupportedError(
                "sliding windows over positions of several axes (M-RoPE) are not supported: load the checkpoint with "
                "use_sliding_window=False in its text config, if it was trained so"
            )
        self.forward_hooks, self.text_hooks, self.vision = ForwardHooks(self), TextHooks(self), VisionHooks(self)
        attention_name(self.text.config._attn_implementation)  # raises if it cannot run packed rows

    def install(self) -> None:
        model, text = self.model, self.text
        self.handles = [
            *(install_outer(self) if self.inner is not model else []),
            self.entry.register_forward_pre_hook(self.forward_hooks.before, with_kwargs=True),
            text.register_forward_pre_hook(self.text_hooks.before, with_kwargs=True),
            text.register_forward_hook(self.text_hooks.after, with_kwargs=True),
            *self.vision.install(),
            *self.adapter.own_hooks(model),
        ]
        if self.hands_on:
            ends = [model] if self.inner is model else [model, self.inner]
            self.handles += [module.register_forward_hook(forget, always_call=True) for module in ends]
        for index, layer in enumerate(text.layers):
            layer.self_attn.config = AttentionConfig(layer.self_attn.config)
            self.handles += [
                layer.register_forward_pre_hook(LayerHook(index), with_kwargs=True),
                layer.register_forward_hook(after_layer, with_kwargs=True),
                layer.mlp.register_forward_hook(after_mlp),
            ]
        self.own_generate = model.__dict__.get("generate", MISSING)
        model.generate = Generate(self, model.generate)
        model.__dict__[NAME] = self

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.text.layers:
            layer.self_attn.config = layer.self_attn.config.own
        del self.model.__dict__["generate"], self.model.__dict__[NAME]
        if self.own_generate is not MISSING:
            self.model.generate = self.own_generate

    # -- which policy ----------------------------------------------------------------------------------------------
    def policies(self, given: Any, rows: int | None) -> list[Policy | None] | None:
        """Argument of the call > ``vtr.use`` > the model's default. ``given``: a ``Given``, or MISSING."""
        if given is MISSING:
            given = in_use.get().get(self.key, self.default)
        found = resolve(given, rows, self.geometry.num_hidden_layers, self.model)
        self.adapter.refuse(found or [])
        return found

    def generation(self) -> Generation | None:
        """The ``generate`` of this model that is running in this context."""
        generation = running.get()
        return generation if generation is not None and generation.key is self.key else None

    def applies(self) -> bool:
        """Whether a call that names no policy has one here: by ``vtr.use``, or the model's default."""
        given = in_use.get().get(self.key, self.default)
        return any(p is not None for p in given) if isinstance(given, (list, tuple)) else given is not None

    def taken(self) -> Any:
        """What the model's pre-hook left for the text model's, where the model passes no keyword arguments on.

        A request, or None for an unreduced call; ``MISSING`` if no pre-hook was asked.
        """
        left = handed.get() if self.hands_on else None
        if left is None or left[0] is not self.key:
            return MISSING
        handed.set(None)
        return left[1]

    def publish(self, trace: Trace | DenseTrace | None) -> None:
        """Make ``trace`` what ``vtr.report`` shows: in this context, and to threads that have seen no other call."""
        last_traces.set({**last_traces.get(), self.key: trace})
        self.last = trace

    @contextmanager
    def using(self, policy: Any) -> Iterator[None]:
        """While the block runs, compiled calls of the model may be meant to be reduced."""
        with _counting:
            self.users += policy is not None
        try:
            yield
        finally:
            with _counting:
                self.users -= policy is not None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, made inside such a block: nobody uses it yet."""
        return {**self.__dict__, "users": 0}

    # -- generate --------------------------------------------------------------------------------------------------
    def generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop("policy", MISSING)
        if given is MISSING and getattr(kwargs.get("generation_config"), "is_assistant", False):
            given = None  # another model's draft: that model checks it, and has encoded the images already
        if self.inner is not self.model:  # its own generate may have anything in front
            args, kwargs = (), {**dict(zip(inspect.signature(original).parameters, args, strict=False)), **kwargs}
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        embeds = kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        policies = self.policies(given, None if source is None else source.shape[0])
        prompt = None if policies is None else self._check_generate(ids, kwargs, policies)
        tried = None
        if policies is not None and prompt is not None and any(p is not None and p.asks("resolve") for p in policies):
            check_resolvable(kwargs, self.inner.generation_config, ids)
            if self.adapter.says_answer_only:
                raise UnsupportedError(
                    f"policies that try answers before they choose do not run on {self.adapter.family}: give a fixed "
                    "policy (e.g. m3:tokens=36), or convert the checkpoint to transformers' own LLaVA (`vtr convert`)"
                )
            assert ids is not None
            with busy(self.key, "it is generating; wait until generate has returned"):
                policies, tried = resolve_rows(self, original, ids, kwargs, policies, prompt)
            if all(p is None for p in policies):
                policies = prompt = None
        length = 0 if ids is None else ids.shape[1]
        captures = None if policies is None or prompt is None else self.vision.wanted(policies, prompt)
        new_ids = None if ids is None or policies is None else new_part(ids, kwargs)
        generation = Generation(self.key, policies, prompt, length, Trace(self.geometry), captures, new_ids)
        token, before = running.set(generation), begin(captures)
        try:
            with busy(self.key, "it is generating; wait until generate has returned"), self.using(policies):
                out = original(*args, **kwargs)
        finally:
            running.reset(token)
            capturing.reset(before)
        if generation.started:
            for layer in generation.cache_layers or []:
                layer.drop_unseen()
            note_cache(generation.trace, generation.cache_layers, generation.attended_before)
            generation.trace.tried = tried
            self.publish(generation.trace)
        elif ids is not None:
            dense = self._dense_generation(ids, kwargs, out)
            if dense is not None:
                dense.tried = tried
            self.publish(dense)
        return out

    def _check_generate(
        self, ids: torch.Tensor | None, kwargs: dict[str, Any], policies: list[Policy | None]
    ) -> Prompt:
        """Refuse what cannot be done, and read where the vision tokens are before transformers encodes the images."""
        check_call(kwargs, [self.model.config, self.text.config])
        check_generation(kwargs, self.inner.generation_config, policies)
        embeds = kwargs.get("inputs_embeds")
        given = embeds is not None and (ids is None or ids.shape != embeds.shape[:2])
        if kwargs.get("use_cache") is False and (given or self.adapter.says_answer_only):
            raise UnsupportedError(
                "generate with inputs_embeds and use_cache=False forgets the prompt: leave out use_cache=False"
            )
        if given:
            assert embeds is not None
            ids = ids_of(self.adapter, self.model, embeds)
        assert ids is not None  # policies are only resolved for a known number of rows
        prompt = read_prompt(self.adapter, self.model, new_part(ids, kwargs), kwargs.get("attention_mask"), kwargs)
        self.adapter.check_generation(self.model, prompt)
        return prompt

    def dense(
        self, ids: torch.Tensor, kwargs: dict[str, Any], steps: int = 0, beams: int = 1,
        windows: tuple[int | None, ...] | None = None,
    ) -> DenseTrace | None:  # fmt: skip
        """None for a call that this model may understand and vtr does not: there is nothing to report of it.

        Args:
            windows: those that the cache is cut to; None: as it says.
        """
        cache, use_cache = cache_in(kwargs), kwargs.get("use_cache")
        try:
            merged = self.adapter.prompt(self.model, ids, kwargs.get("attention_mask"), kwargs)
        except (ValueError, UnsupportedError):
            return None
        if merged is not None:
            ids = torch.where(merged.is_vision, self.adapter.placeholders(self.model)[0], 0)
        return DenseTrace(
            geometry=self.geometry,
            input_ids=ids,
            placeholders=self.adapter.placeholders(self.model),
            itemsize=self.model.dtype.itemsize,
            cached=bool(self.text.config.use_cache if use_cache is None else use_cache),
            past=0 if cache is None else int(cache.get_seq_length()),
            steps=steps,
            beams=beams,
            windows=held_windows(self.windows, cache) if windows is None else windows,
        )

    def _dense_generation(self, ids: torch.Tensor, kwargs: dict[str, Any], out: Any) -> DenseTrace | None:
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        config = kwargs.get("generation_config") or self.inner.generation_config
        several = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
        whole = self.inner is self.model and not self.adapter.says_answer_only  # the prompt stands in front
        new = sequences.shape[1] - (ids.shape[1] if whole else 0)
        steps = max(new - 1, 0)  # the first token comes out of the prompt's forward
        full = (kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)) == "dynamic_full"
        windows = () if full else held_windows(self.windows, cache_in(kwargs))
        return self.dense(ids, {**kwargs, **dict.fromkeys(NAMES)}, steps, max(n or 1 for n in several), windows)


class LayerHook:
    """A decoder layer's pre-hook."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session: Session | Step | None = kwargs.pop("vtr_session", None)
        if session is None:
            if kwargs.get("policy") is not None:
                raise UnsupportedError(
                    "policy= reached a decoder layer: call model(…), not the text model's forward(…)"
                )
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = session.layer(self.index, module, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs


def forget(module: Any, args: tuple[Any, ...], out: Any) -> None:
    """A forward is over, whatever became of it: leave no request behind."""
    if not torch.compiler.is_compiling():
        handed.set(None)


def after_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Put the tokens that went around the layer back beside those that passed it."""
    plan: Plan | None = kwargs.get("vtr_plan")
    if plan is None or plan.routing is None:
        return None
    around, through = plan.routing.around.to(out.device), plan.routing.through.to(out.device)
    return around.index_copy(1, through, out)


def after_mlp(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
    """Scale the MLP's output where a routed layer asks for it."""
    scale = None if torch.compiler.is_compiling() else mlp_scale.get()
    if scale is None:
        return None
    mlp_scale.set(None)
    return out * scale


class Generate:
    """The model's ``generate`` that also takes ``policy=``; follows a deep copy of the model."""

    def __init__(self, patch: Patch, original: Callable[..., Any]) -> None:
        self.patch, self.__wrapped__ = patch, original
        self.__name__, self.__doc__ = "generate", getattr(original, "__doc__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1:
            parameters = inspect.signature(self.__wrapped__).parameters
            names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
            if len(args) <= len(names):
                args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        return self.patch.generate(self.__wrapped__, args, kwargs)
