"""The hooks of a patched model.

They do nothing until a call carries a policy; then: model pre-hook (which policy, which
images) → text model pre-hook (pack) → decoder layer pre-hooks (prune, route) → text model post-hook (unpack).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.engine.attention import PREFIX, Plan, attention_name, mlp_scale
from vtr.engine.cache import CacheState, RaggedLayer
from vtr.engine.call import (
    Generation,
    Given,
    assign_images,
    check_cache,
    check_call,
    check_text_model,
    in_use,
    is_ragged,
    last_traces,
    new_part,
    resolve,
    running,
    warn_on_continue,
)
from vtr.engine.decode import note_cache, remembering
from vtr.engine.session import Request, Session
from vtr.engine.trace import DenseTrace, Geometry, Trace

MISSING: Any = object()
"""A call that names no policy (``policy=None`` says: no reduction)."""
NAME = "_vtr"


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
        self.base = self.text.config._attn_implementation
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        check_text_model(self.text)
        attention_name(self.base)

    def install(self) -> None:
        model, text = self.model, self.text
        text.config._attn_implementation = attention_name(self.base)
        self.handles = [
            model.register_forward_pre_hook(self.before_model, with_kwargs=True),
            text.register_forward_pre_hook(self.before_text, with_kwargs=True),
            text.register_forward_hook(self.after_text, with_kwargs=True),
        ]
        for index, layer in enumerate(text.layers):
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
        if self.text.config._attn_implementation.startswith(PREFIX):
            self.text.config._attn_implementation = self.text.config._attn_implementation[len(PREFIX) :]
        del self.model.__dict__["generate"], self.model.__dict__[NAME]
        if self.own_generate is not MISSING:
            self.model.generate = self.own_generate

    # -- which policy ----------------------------------------------------------------------------------------------
    def policies(self, given: Given, rows: int | None) -> list[Policy | None] | None:
        """Argument of the call > ``vtr.use`` > the model's default."""
        if given is MISSING:
            given = in_use.get().get(self.key, self.default)
        return resolve(given, rows, self.geometry.num_hidden_layers)

    def generation(self) -> Generation | None:
        """The ``generate`` of this model that is running in this context."""
        generation = running.get()
        return generation if generation is not None and generation.key is self.key else None

    def publish(self, trace: Trace | DenseTrace | None) -> None:
        """Make ``trace`` what ``vtr.report`` shows: in this context, and to threads that have seen no other call."""
        last_traces.set({**last_traces.get(), self.key: trace})
        self.last = trace

    # -- generate --------------------------------------------------------------------------------------------------
    def generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop("policy", MISSING)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        rows = None if source is None else source.shape[0]
        policies = self.policies(given, rows)
        layouts = []
        if policies is not None:
            ids = self._check_generate(ids, kwargs)
            layouts = self.adapter.layouts(self.model, kwargs)
            assign_images(layouts, self._vision(new_part(ids, kwargs)).sum(1).tolist())
        generation = Generation(
            self.key, policies, layouts, 0 if source is None else source.shape[1], Trace(self.geometry)
        )
        token = running.set(generation)
        try:
            out = original(*args, **kwargs)
        finally:
            running.reset(token)
        if generation.started:
            note_cache(generation.trace, generation.cache_layers, generation.attended_before)
            self.publish(generation.trace)
        elif ids is not None:
            self.publish(self._dense_generation(ids, kwargs, out))
        return out

    def _check_generate(self, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        if ids is None:
            raise UnsupportedError("a reduced generate needs input_ids, which say where vision tokens are: pass them")
        check_call(kwargs, [self.model.config, self.text.config])
        if kwargs.get("mm_encoder_outputs") is not None:
            raise UnsupportedError("a reduced generate needs pixel_values, not mm_encoder_outputs: pass the images")
        implementation = kwargs.get("cache_implementation") or getattr(
            kwargs.get("generation_config") or self.model.generation_config, "cache_implementation", None
        )
        if implementation not in (None, "dynamic", "dynamic_full"):
            raise UnsupportedError(
                f"cache_implementation={implementation!r} cannot hold rows of different lengths: leave it out, or pass "
                "policy=None"
            )
        return ids

    def _vision(self, ids: torch.Tensor) -> torch.Tensor:
        """bool [rows, L] on the CPU: the one read of the prompt that packing needs."""
        return ids.cpu() == self.adapter.image_token_id(self.model)

    def _dense(self, ids: torch.Tensor, kwargs: dict[str, Any], steps: int = 0, beams: int = 1) -> DenseTrace:
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        return DenseTrace(
            geometry=self.geometry,
            input_ids=ids,
            image_token_id=self.adapter.image_token_id(self.model),
            itemsize=self.model.dtype.itemsize,
            cached=bool(self.text.config.use_cache if use_cache is None else use_cache),
            past=0 if cache is None else int(cache.get_seq_length()),
            steps=steps,
            beams=beams,
        )

    def _dense_generation(self, ids: torch.Tensor, kwargs: dict[str, Any], out: Any) -> DenseTrace:
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        config = kwargs.get("generation_config") or self.model.generation_config
        several = (kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
        steps = max(sequences.shape[1] - ids.shape[1] - 1, 0)  # the first token comes out of the prompt's forward
        return self._dense(ids, {**kwargs, "past_key_values": None}, steps, max(n or 1 for n in several))

    # -- the model's pre-hook: which policy, which images ----------------------------------------------------------
    def before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generation = self.generation()
        given = kwargs.pop("policy", MISSING) if "policy" in kwargs else MISSING
        if args:
            kwargs, args = {**dict(zip(self.names, args, strict=False)), **kwargs}, ()
        cache = kwargs.get("past_key_values")
        if generation is not None and (generation.policies is None or (generation.started and is_ragged(cache))):
            return args, kwargs
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        rows = None if source is None else source.shape[0]
        policies = generation.policies if generation is not None else self.policies(given, rows)
        if policies is None:
            if not is_ragged(cache):
                self.publish(None if ids is None else self._dense(ids, kwargs))
            return args, kwargs
        if ids is None:
            raise UnsupportedError("a reduced call needs input_ids, which say where vision tokens are: pass them")
        check_call(kwargs, [self.model.config, self.text.config])
        kwargs["vtr_request"] = self._request(generation, policies, ids, kwargs)
        return args, kwargs

    def _request(
        self, generation: Generation | None, policies: list[Policy | None], ids: torch.Tensor, kwargs: dict[str, Any]
    ) -> Request:
        is_vision, rows = self._vision(ids), ids.shape[0]
        if generation is not None and generation.started:
            is_vision[:, generation.queries_end :] = False  # a decoded token is text, whatever its id
        beams = rows // len(policies)  # beam search and num_return_sequences repeat each prompt
        layouts = generation.layouts if generation is not None else self.adapter.layouts(self.model, kwargs)
        images = assign_images(layouts, is_vision[::beams].sum(1).tolist())
        continued, offset, end = is_ragged(kwargs.get("past_key_values")), 0, ids.shape[1]
        if continued and (generation is None or not generation.started):
            warn_on_continue([p for p in kwargs["past_key_values"].layers[0].state.policies if p is not None])
        if generation is not None:
            generation.trace.beams = beams
            if not generation.started:
                generation.queries_end = end
            end = generation.queries_end
            offset = max(generation.length - ids.shape[1], 0) if not generation.started else 0
        per_row = [p for p in policies for _ in range(beams)]
        return Request(per_row, [row for row in images for _ in range(beams)], is_vision, end, offset)

    # -- the text model's hooks: pack, unpack ----------------------------------------------------------------------
    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mlp_scale.set(None)  # an interrupted forward may have left one
        request: Request | None = kwargs.pop("vtr_request", None)
        cache: Any = kwargs.get("past_key_values")
        ragged = is_ragged(cache)
        if request is None and not ragged:
            return None
        name = module.config._attn_implementation
        if not name.startswith(PREFIX):  # somebody called set_attn_implementation on the patched model
            module.config._attn_implementation = attention_name(name)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.pop("input_ids", None)
            embeds = module.get_input_embeddings()(args[0] if ids is None else ids)
            args = ()
        generation = self.generation()
        trace = generation.trace if generation is not None else Trace(self.geometry)
        if not ragged:
            check_cache(cache)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                f"a reduced call takes a 2-D attention_mask [rows, tokens], got {tuple(mask.shape)}: custom masks are "
                "not supported, pass policy=None"
            )
        past = cache.get_seq_length() if ragged else 0
        if past and len(cache.layers[0].place) != embeds.shape[0]:
            raise ValueError(f"{embeds.shape[0]} rows for a cache of {len(cache.layers[0].place)}")
        length = embeds.shape[1]
        now = None if mask is None else mask[:, -length:].bool()
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        if positions.dim() != 2:
            raise UnsupportedError("position_ids with more than one axis per token are not supported by this adapter")
        kwargs["attention_mask"] = embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)  # 4-D: taken as is, no mask is built
        every_row_real = now is None or generation is not None or bool(now.all())
        if past and length == 1 and every_row_real and (request is None or not any(request.layouts)):
            return args, self._decode(cache, embeds, positions, trace, generation, kwargs)
        return args, self._pack(module, request, cache, embeds, now, positions, trace, generation, kwargs)

    def _pack(
        self, module: Any, request: Request | None, cache: Any, embeds: torch.Tensor, mask: torch.Tensor | None,
        positions: torch.Tensor, trace: Trace, generation: Generation | None, kwargs: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        layers, state = None, None
        if is_ragged(cache):
            layers = cache.layers
            state = layers[0].state
        elif cache is not None or self._wants_cache(module, kwargs):
            assert request is not None
            state = CacheState(list(request.policies), [0] * embeds.shape[0])
            layers = [RaggedLayer(state, i) for i in range(len(module.layers))]
        session = Session(request, embeds, mask, layers, state, trace, len(module.layers))
        kwargs["inputs_embeds"], kwargs["position_ids"] = session.pack(embeds, positions)
        if state is not None and request is not None:  # nothing can be refused any more
            state.policies = list(request.policies)
        if layers is not None and not is_ragged(cache):
            from transformers import DynamicCache

            cache = DynamicCache() if cache is None else cache
            cache.layers, cache.layer_class_to_replicate = layers, None
            kwargs["past_key_values"] = cache
        if generation is not None:
            generation.runs_on(layers)
        kwargs["vtr_session"] = session
        return kwargs

    def _wants_cache(self, module: Any, kwargs: dict[str, Any]) -> bool:
        if module.training and getattr(module, "gradient_checkpointing", False):
            return False
        use_cache = kwargs.get("use_cache")
        return bool(module.config.use_cache if use_cache is None else use_cache)

    def _decode(
        self, cache: Any, embeds: torch.Tensor, positions: torch.Tensor, trace: Trace, generation: Generation | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        layers, state = cache.layers, cache.layers[0].state
        if any(state.dropped):
            gone = torch.tensor(state.dropped, device=positions.device)
            positions = positions.expand(embeds.shape[0], -1) - gone[:, None]
        kwargs["position_ids"], kwargs["inputs_embeds"] = positions, embeds
        plan = Plan(decode=True, layers=layers, trace=trace)
        for layer in layers:
            layer.staged = plan
        kwargs["vtr_plan"] = plan
        asks = any(p is not None and p.asks("remember") for p in state.policies)
        if asks:
            state.memos = [{} for _ in state.policies]
            kwargs["vtr_session"] = "remember"
        if generation is not None:
            generation.runs_on(layers)
        trace.note_decode(embeds.shape[0])
        return kwargs

    def after_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        session, plan = kwargs.get("vtr_session"), kwargs.get("vtr_plan")
        if isinstance(session, Session):
            out.last_hidden_state = session.unpack(out.last_hidden_state)
            session.finish()
            trace, layers = session.trace, session.layers
        elif plan is not None:
            trace, layers = plan.trace, plan.layers
            state = layers[0].state
            state.logical += 1
            state.tail += 1
        else:
            return None
        if self.generation() is None:
            note_cache(trace, layers)
            self.publish(trace)
        return out


class LayerHook:
    """A decoder layer's pre-hook."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = kwargs.pop("vtr_session", None)
        if session is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(session, Session):
            hidden = session.layer(self.index, hidden, kwargs)
        else:
            remembering(self.index, hidden, kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs


def after_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Put the tokens that went around the layer back beside those that passed it."""
    plan: Plan | None = kwargs.get("vtr_plan")
    if plan is None or plan.routing is None:
        return None
    return plan.routing.around.index_copy(1, plan.routing.through, out)


def after_mlp(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
    """Scale the MLP's output where a routed layer asks for it."""
    scale = mlp_scale.get()
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
        return self.patch.generate(self.__wrapped__, args, kwargs)
