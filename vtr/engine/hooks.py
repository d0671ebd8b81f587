"""The hooks of a patched model: what ``patch`` puts in, and ``unpatch`` takes out.

They do nothing until a call carries a policy; then: model pre-hook (which policy, which
images) → text model pre-hook (pack) → decoder layer pre-hooks (prune, route) → text model post-hook (unpack). A decoder
that cannot run packed rows has no hooks inside: those of its text model shorten the rows, and spread them again.
"""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from vtr.base import UnsupportedError
from vtr.engine import attending
from vtr.engine.adapters import Adapter
from vtr.engine.attention import AttentionConfig, Plan, attention_name, mlp_scale
from vtr.engine.call import last_traces, pending_request
from vtr.engine.capture import GraphedForward
from vtr.engine.captures import VisionHooks
from vtr.engine.choice import MISSING, PolicyChoice
from vtr.engine.decode import DecodeStep
from vtr.engine.decoder import Decoder, mlp_of
from vtr.engine.forward import ForwardHooks
from vtr.engine.generate import Generate, MakesMasks, PreparesCache
from vtr.engine.outer import install_outer
from vtr.engine.padded import PaddedHooks
from vtr.engine.session import Session
from vtr.engine.text import TextHooks
from vtr.engine.trace import DenseTrace, Trace
from vtr.engine.unpackable import decoder_of, refuse_inside

NAME = "_vtr"


class Patch:
    """What ``patch`` put into a model. Lives in the model's ``__dict__``; a deep copy of the model gets its own.

    Attributes:
        inner: the module whose forward calls the text model. decoder: the text model. key: see ``PolicyChoice``.
        request_by_context: whether a call's request goes to the text model by a context variable.
        entry: the module in front of which the request is made.
        path: "packed"; or "padded" for a decoder that cannot run packed rows: policies act before it, on rows that are
            padded. why: what is wrong with that decoder; None where it is packed.
        last: what the last call did, in whatever thread.
        off: what the self-test found (:mod:`vtr.engine.selftest`), where there was one.
    """

    off: float | None = None

    def __init__(self, model: Any, adapter: Adapter, path: str | None = None, why: str | None = None) -> None:
        """Nothing of the model is touched yet.

        Args:
            path: "padded" takes that path though the decoder could be packed. why: the reason.
        """
        self.model, self.adapter, self.inner = model, adapter, adapter.inner(model)
        self.path, self.why, self.decoder = _decoder(adapter.text_model(model), path, why)
        refuse = None if self.path == "packed" else partial(refuse_inside, self.decoder.depth, self.why)
        self.choice = PolicyChoice(model, adapter, self.decoder.depth, refuse)
        self.key = self.choice.key
        self.last: Trace | DenseTrace | None = None
        parameters = inspect.signature(type(self.inner).forward).parameters.values()
        closed = all(p.kind is not p.VAR_KEYWORD for p in parameters)
        packed = self.path == "packed"
        self.request_by_context = closed or self.inner is not model or not packed
        by_entry = not self.request_by_context or (not packed and self.inner is model)
        self.entry = adapter.multimodal_module(model) if by_entry else self.inner
        self.graphs = GraphedForward(self.decoder.text)
        self.forward_hooks, self.vision = ForwardHooks(self), VisionHooks(self)
        self.text_hooks: TextHooks | PaddedHooks = TextHooks(self) if packed else PaddedHooks(self)
        if packed:
            attention_name(self.decoder.text.config._attn_implementation)  # raises if it cannot run packed rows

    def install(self) -> None:
        model, text = self.model, self.decoder.text
        self.handles = [
            *(install_outer(self) if self.inner is not model else []),
            self.entry.register_forward_pre_hook(self.forward_hooks.before, with_kwargs=True),
            text.register_forward_pre_hook(self.text_hooks.before, with_kwargs=True),
            text.register_forward_hook(self.text_hooks.after, with_kwargs=True),
            *self.vision.install(),
            *self.adapter.own_hooks(model),
        ]
        if self.path == "padded" and self.inner is model and self.entry is not model:
            self.handles.append(model.register_forward_pre_hook(self.forward_hooks.before, with_kwargs=True))
        if self.request_by_context:
            ends = dict.fromkeys([model, self.inner, self.entry])
            self.handles += [module.register_forward_hook(clear_pending_request, always_call=True) for module in ends]
        if self.path == "packed":
            self._hook_layers()
        self._stand_in()
        model.__dict__[NAME] = self

    def _hook_layers(self) -> None:
        for index, layer in enumerate(self.decoder.text.layers):
            layer.self_attn.config = AttentionConfig(layer.self_attn.config)
            self.handles += [
                layer.register_forward_pre_hook(LayerHook(index, self.handles), with_kwargs=True),
                layer.register_forward_hook(after_layer, with_kwargs=True),
            ]

    def _stand_in(self) -> None:
        """Put ours in place of the model's methods."""
        stands_in: dict[str, tuple[Any, Any]] = {"generate": (self.model, Generate(self, self.model.generate))}
        inner = self.inner
        if self.path == "packed" and hasattr(inner, "_prepare_cache_for_generation"):
            masks = getattr(inner, "create_masks_for_generate", create_masks_for_generate)
            prepares = PreparesCache(self, inner._prepare_cache_for_generation)
            stands_in["_prepare_cache_for_generation"] = inner, prepares
            stands_in["create_masks_for_generate"] = inner, MakesMasks(masks)
        self.own = {name: module.__dict__.get(name, MISSING) for name, (module, _) in stands_in.items()}
        self.replaced = {name: module for name, (module, _) in stands_in.items()}
        for name, (module, made) in stands_in.items():
            setattr(module, name, made)

    def remove(self) -> None:
        self.graphs.leave()
        for handle in self.handles:
            handle.remove()
        for layer in self.decoder.text.layers if self.path == "packed" else ():
            layer.self_attn.config = layer.self_attn.config.own
        del self.model.__dict__[NAME]
        for name, module in self.replaced.items():
            del module.__dict__[name]
            if self.own[name] is not MISSING:
                setattr(module, name, self.own[name])

    def pop_request(self) -> Any:
        """What the model's pre-hook left for the text model's, where the model passes no keyword arguments on.

        A request, or None for an unreduced call; ``MISSING`` if no pre-hook was asked.
        """
        left = pending_request.get() if self.request_by_context else None
        if left is None or left[0] is not self.key:
            return MISSING
        pending_request.set(None)
        return left[1]

    def publish(self, trace: Trace | DenseTrace | None) -> None:
        """Make ``trace`` what ``vtr.report`` shows: in this context, and to threads that have seen no other call."""
        last_traces.set({**last_traces.get(), self.key: trace})
        self.last = trace


def _decoder(text: Any, path: str | None, why: str | None) -> tuple[str, str | None, Decoder]:
    """The path a decoder takes, why if that is the padded one, and what is read off it."""
    try:
        if path != "padded":
            return "packed", None, Decoder.from_text_model(text)
    except UnsupportedError as error:
        why = str(error)
    return "padded", why, decoder_of(text)


_hooking = threading.Lock()


class LayerHook:
    """A decoder layer's pre-hook.

    Args:
        handles: of the model's hooks. That of the layer's MLP comes with the first route that has weights, those of its
            projections with the first attention in which not all take part.
    """

    def __init__(self, index: int, handles: list[Any]) -> None:
        self.index, self.handles, self.weighs, self.narrows = index, handles, False, False

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session: Session | DecodeStep | None = kwargs.pop("vtr_session", None)
        if session is None:
            if kwargs.get("policy") is not None:
                raise UnsupportedError(
                    "policy= reached a decoder layer: call model(…), not the text model's forward(…)"
                )
            return None
        if len(args) > 1:
            kwargs.update(zip(self._names(module), args[1:], strict=False))
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = session.layer(self.index, module, hidden, kwargs)
        if not self.weighs and kwargs["vtr_plan"].scale is not None:
            self._weigh(module)
        if not self.narrows and getattr(kwargs["vtr_plan"], "taking", None) is not None:
            self._narrow(module)
        if args:
            return (hidden,), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _names(self, module: Any) -> list[str]:
        """Of the layer's arguments behind its hidden states."""
        return list(inspect.signature(type(module).forward).parameters)[2:]

    def _narrow(self, module: Any) -> None:
        with _hooking:
            if not self.narrows:
                self.handles += attending.install(module.self_attn)
                self.narrows = True

    def _weigh(self, module: Any) -> None:
        with _hooking:
            if not self.weighs:
                self.handles.append(mlp_of(module).register_forward_hook(after_mlp))
                self.weighs = True


def clear_pending_request(module: Any, args: tuple[Any, ...], out: Any) -> None:
    """A forward is over, whatever became of it: leave no request behind."""
    if not torch.compiler.is_compiling():
        pending_request.set(None)


def after_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Put the tokens that went around the layer back beside those that passed it."""
    plan: Plan | None = kwargs.get("vtr_plan")
    if plan is None or plan.routing is None:
        return None
    states = out[0] if isinstance(out, tuple) else out
    around, through = plan.routing.around.to(states.device), plan.routing.through.to(states.device)
    whole = around.index_copy(1, through, states)
    return (whole, *out[1:]) if isinstance(out, tuple) else whole


def after_mlp(module: Any, args: tuple[Any, ...], out: Any) -> Any:
    """Scale the MLP's output where a routed layer asks for it."""
    scale = None if torch.compiler.is_compiling() else mlp_scale.get()
    if scale is None:
        return None
    mlp_scale.set(None)
    if isinstance(out, tuple):  # what the router said stands behind it
        return out[0] * scale.to(out[0].device), *out[1:]
    return out * scale.to(out.device)
