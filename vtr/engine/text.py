"""The text model's hooks: pack the rows before the decoder layers, unpack them after, or take one decode step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.ahead import Ahead
from vtr.engine.attention import Plan, attention_name, mlp_scale
from vtr.engine.cache import RaggedLayer, is_ragged
from vtr.engine.cache_state import PADDING, CacheState
from vtr.engine.call import Generation
from vtr.engine.capture import StepGraph
from vtr.engine.choice import MISSING
from vtr.engine.choosing import Choosing, chooses
from vtr.engine.compat import cache_in, check_checkpointing, put_cache
from vtr.engine.decode import DecodeStep, note_cache
from vtr.engine.once import from_host
from vtr.engine.refusals import check_cache, refuse_compiled
from vtr.engine.request import Request, per_token
from vtr.engine.session import Session
from vtr.engine.sight import OwnMasks, padding_of, parted
from vtr.engine.static import Decoding, StaticStep, freeze, takes_static_step
from vtr.engine.trace import Trace

if TYPE_CHECKING:
    from vtr.engine.decoder import Decoder
    from vtr.engine.hooks import Patch


@dataclass(eq=False)
class TextCall:
    """A call of the text model that is to be reduced, its arguments checked.

    Attributes:
        request: what the call asks; None where a ragged cache goes on with text only.
        past: tokens that its ragged cache holds, as transformers counts them. embeds: [rows, L, D].
        mask: this forward's part of the 2-D mask, or None. own: masks that the model made itself, or None.
        positions: int64 [1 or rows, L], or [axes, 1 or rows, L].
        generation: the running ``generate`` that it is part of, or None. kwargs: its arguments, to be changed.
    """

    module: Any
    request: Request | None
    cache: Any
    past: int
    embeds: torch.Tensor
    mask: torch.Tensor | None
    own: Any
    positions: torch.Tensor
    generation: Generation | None
    kwargs: dict[str, Any]

    @property
    def one_token_each(self) -> bool:
        """Whether it is a decode step: one text token behind every row's cache."""
        new_images = self.request is not None and any(self.request.prompt.layouts)
        if self.past == 0 or self.embeds.shape[1] != 1 or new_images:
            return False
        return self.mask is None or self.generation is not None or bool(self.mask[:, -1].all())

    def valid(self) -> torch.Tensor | None:
        """bool [rows, L] on the CPU, False for padding; None if there is none."""
        said = None if self.request is None else self.request.prompt.valid
        return self.mask.bool().cpu() if said is None and self.mask is not None else said

    def own_masks(self, decoder: Decoder) -> OwnMasks | None:
        """Those that the model made itself, read; None where there are none.

        Raises:
            UnsupportedError: they say of cached tokens what a reduced cache cannot follow.
        """
        if self.own is None:
            return None
        rows, columns, device = *self.embeds.shape[:2], self.embeds.device
        valid = torch.ones(rows, columns, dtype=torch.bool) if self.mask is None else self.mask.bool()
        before = None
        if self.past:
            state = self.cache.layers[0].state
            before = torch.ones(rows, self.past, dtype=torch.bool) if state.seen is None else state.seen != PADDING
        if isinstance(self.own, dict):
            return OwnMasks(self.own, decoder.kinds, decoder.windows, valid.to(device), before)
        given = dict.fromkeys(decoder.windows, self.own)
        return OwnMasks(given, decoder.windows, decoder.windows, valid.to(device), before)

    def wants_cache(self) -> bool:
        if self.module.training and getattr(self.module, "gradient_checkpointing", False):
            return False
        use_cache = self.kwargs.get("use_cache")
        return bool(getattr(self.module.config, "use_cache", True) if use_cache is None else use_cache)

    def layers(self, decoder: Decoder) -> list[RaggedLayer] | None:
        """Those of its ragged cache, new ones where it is to get one, or None."""
        if is_ragged(self.cache) and self.cache.layers[0].place:  # after a reset there is none
            return self.cache.layers
        if self.cache is None and not self.wants_cache():
            return None
        rows = self.embeds.shape[0]
        policies: list[Policy | None] = [None] * rows if self.request is None else list(self.request.policies)
        constant = getattr(self.cache, "constant", None)
        state = CacheState(policies, [0] * rows, [[0] * rows for _ in decoder.windows], constant)
        layers = [RaggedLayer(state, i, window, decoder.latent[i]) for i, window in enumerate(decoder.windows)]
        if any(getattr(layer, "record_past", False) for layer in getattr(self.cache, "layers", ())):
            for layer in layers:  # assisted decoding will take drafts back
                layer.activate_past_recording()
        return layers


class TextHooks:
    """Pre- and post-hook of the module that runs the decoder layers."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reduced calls only: replace embeddings, positions and mask by packed ones, or by those of a decode step."""
        cache: Any = cache_in(kwargs)
        ragged = is_ragged(cache)
        asked = kwargs.pop("vtr_request", MISSING)
        if takes_static_step(cache, kwargs):
            return args, self._static_step(module, cache, kwargs)
        if torch.compiler.is_compiling():
            if ragged or (asked is not None and asked is not MISSING):
                refuse_compiled()
            if asked is MISSING:
                self.patch.forward_hooks.check_compiling(kwargs)
            return None
        asked = self.patch.pop_request() if asked is MISSING else asked
        request: Request | None = None if asked is MISSING else asked
        if mlp_scale.get() is not None:  # an interrupted forward left it
            mlp_scale.set(None)
        if request is None and not ragged:
            if asked is MISSING:
                self.patch.forward_hooks.check_unasked(kwargs)
            return None
        check_checkpointing(module)
        attention_name(module.config._attn_implementation)  # set_attn_implementation may have changed it
        if kwargs.get("inputs_embeds") is None:
            ids = kwargs.pop("input_ids", None)
            kwargs["inputs_embeds"] = module.get_input_embeddings()(args[0] if ids is None else ids)
            args = ()
        if (instead := self._instead(module, request, cache, kwargs)) is not None:
            return (), {"vtr_instead": instead}
        call = self._call(module, request, cache, kwargs)
        return args, self._decode(call) if call.one_token_each else self._pack(call)

    def _instead(self, module: Any, request: Request | None, cache: Any, kwargs: dict[str, Any]) -> Any:
        """What gives the output in place of a forward: tries among which rows choose, or what was said in one."""
        if request is not None and request.attempt is None and chooses(request.policies):
            return Choosing(self.patch, module, request, kwargs).run
        ahead = cache.layers[0].state.decoding if is_ragged(cache) else None
        if isinstance(ahead, Ahead) and self._generation(cache) is not None and ahead.says(kwargs["inputs_embeds"]):
            return ahead
        return None

    def _call(self, module: Any, request: Request | None, cache: Any, kwargs: dict[str, Any]) -> TextCall:
        """The call with its arguments checked.

        Raises:
            UnsupportedError, ValueError: a cache, mask or positions that a reduced call cannot take.
        """
        embeds, given = kwargs["inputs_embeds"], kwargs.get("position_ids")
        past = 0
        if is_ragged(cache):
            cache.layers[0].thaw()
            past = cache.get_seq_length()
        own, mask = parted(kwargs.get("attention_mask"))
        if own is not None:
            mask = padding_of(own, past)
        mask = _checked_mask(cache, past, embeds.shape, mask)
        if given is None and past:
            given = _next_positions(cache.layers[0].state, embeds, mask)
        if self.patch.decoder.chunked:
            _check_begins(past, given, mask)
        positions = _checked_positions(past, embeds, given, self.patch.decoder.rotary.many_axes)
        if given is not None and request is not None and request.generation is None:
            _check_one_sequence(positions, mask)
        if past:
            kwargs["attention_mask"] = cache.layers[0].state.no_mask(embeds.device)
        else:
            kwargs["attention_mask"] = embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)  # 4-D: taken as it is
        generation = self._generation(cache) if request is None else request.generation
        return TextCall(module, request, cache, past, embeds, mask, own, positions, generation, kwargs)

    def _generation(self, cache: Any) -> Generation | None:
        """The ``generate`` that goes on with ``cache``; None for tries, and for a call by hand, also inside one."""
        generation = self.patch.choice.generation()
        if is_ragged(cache) and cache.layers[0].state.attempt is not None:
            return None
        return generation if generation is not None and generation.owns_cache(cache) else None

    def _static_step(self, module: Any, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a step of constant shapes."""
        decoding = cache.layers[0].state.decoding
        if not decoding.constant.captures or per_token(kwargs, len(cache.layers[0].place), 1):
            return {**kwargs, **StaticStep(decoding, kwargs["position_ids"], self.patch.decoder.rotary).arguments()}
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = module.get_input_embeddings()(kwargs.pop("input_ids"))
        if decoding.graph is None:
            kept = {name: value for name, value in kwargs.items() if name not in ("inputs_embeds", "position_ids")}
            decoding.graph = StepGraph(partial(self._whole_step, module, decoding, kept))
        return {**kwargs, "vtr_graph": decoding.graph}

    def _whole_step(
        self, module: Any, decoding: Decoding, kwargs: dict[str, Any], embeds: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        """A step of the text model from its embeddings [rows, 1, D] to its output, with all that hooks would do."""
        step = StaticStep(decoding, positions, self.patch.decoder.rotary)
        out = self.patch.graphs.original(**{**kwargs, "inputs_embeds": embeds, **step.arguments()})
        step.finish()
        return out

    def _trace(self, generation: Generation | None, attempt: Trace | None) -> Trace:
        if attempt is not None:
            return attempt
        return generation.trace if generation is not None else Trace(self.patch.decoder.geometry)

    def _pack(self, call: TextCall) -> dict[str, Any]:
        request, generation, kwargs, embeds = call.request, call.generation, call.kwargs, call.embeds
        attempt = None if request is None else request.attempt
        decoder, trace = self.patch.decoder, self._trace(generation, attempt)
        layers = call.layers(decoder)
        masks = call.own_masks(decoder)
        session = Session(decoder, request, embeds.shape[:2], embeds.device, call.valid(), layers, trace, masks)
        extra = self.patch.adapter.layer_features(kwargs)
        kwargs["inputs_embeds"], kwargs["position_ids"] = session.pack(embeds, call.positions, request, extra)
        session.pack_along(kwargs)
        if request is not None and request.captures is not None:
            # without a cache, every step of a generate compresses again; and so does the next try
            request.captures.close(keep=attempt is not None or (generation is not None and layers is None))
        if layers is not None:  # nothing can be refused any more
            self._note(call, layers[0].state)
        if layers is not None and layers is not getattr(call.cache, "layers", None):
            from transformers import DynamicCache

            cache = DynamicCache() if call.cache is None else call.cache
            cache.layers, cache.layer_class_to_replicate = layers, None
            put_cache(call.module, kwargs, cache)
        if layers is not None:
            layers[0].state.attempt = attempt
        if generation is not None and attempt is None:
            generation.note_forward(layers)
        session.generation = generation
        kwargs["vtr_session"] = session
        return kwargs

    def _note(self, call: TextCall, state: CacheState) -> None:
        """What those who go on with the cache will need to know of this forward."""
        rows, columns = call.embeds.shape[:2]
        prompt = None if call.request is None else call.request.prompt
        state.note(None if prompt is None else prompt.ids, call.valid(), rows, columns)
        if call.request is not None:
            state.policies = list(call.request.policies)
        deltas = getattr(self.patch.entry, "rope_deltas", None)
        if deltas is not None and call.positions.dim() == 3 and rows % len(deltas) == 0:
            state.rope_deltas = deltas.repeat_interleave(rows // len(deltas), 0)

    def _decode(self, call: TextCall) -> dict[str, Any]:
        kwargs, generation, positions, rows = call.kwargs, call.generation, call.positions, call.embeds.shape[0]
        layers = call.cache.layers
        state = layers[0].state
        trace = self._trace(generation, state.attempt)
        if any(state.dropped):
            positions = positions.expand(rows, -1) - state.on_device(state.dropped, positions.device)[:, None]
        kwargs["position_ids"] = positions
        positions = positions[0] if positions.dim() == 3 else positions
        at = positions.expand(rows, -1)[:, 0] if any(self.patch.decoder.placed) else None
        far = state.logical + 1
        plan = Plan(decode=True, layers=layers, trace=trace, positions=at, max_distance=far, once=state.once)
        for layer in layers:
            layer.staged = plan
        kwargs["vtr_plan"] = plan
        step = DecodeStep(state, positions.expand(rows, -1), self.patch.decoder.rotary, trace)
        if step.asks or step.renumbers:
            kwargs["vtr_session"] = step
        if generation is not None:
            generation.note_forward(layers)
        trace.note_decode(rows)
        return kwargs

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Back to [rows, L, D]; note what the forward did."""
        session, plan = kwargs.get("vtr_session"), kwargs.get("vtr_plan")
        if isinstance(plan, StaticStep):
            plan.finish()
            return None
        if isinstance(session, Session):
            out.last_hidden_state = session.unpack(out.last_hidden_state)
            session.finish()
            trace, layers, generation = session.log.trace, session.layers, session.generation
            if generation is not None and layers is not None and layers[0].may_freeze:
                freeze(layers, trace)
        elif plan is not None:
            trace, layers, generation = plan.trace, plan.layers, self.patch.choice.generation()
            generation = generation if generation is not None and generation.trace is trace else None
            state = layers[0].state
            state.logical += 1
            state.tail += 1
        else:
            return None
        if generation is None and not _is_try(layers):
            note_cache(trace, layers)
            self.patch.publish(trace)
        return out


def _is_try(layers: list[RaggedLayer] | None) -> bool:
    return layers is not None and layers[0].state.attempt is not None


def _checked_mask(cache: Any, past: int, shape: torch.Size, mask: torch.Tensor | None) -> torch.Tensor | None:
    """This forward's part of the 2-D mask, or None. past: tokens cached. shape: [rows, L, D] of the embeddings.

    Raises:
        UnsupportedError, ValueError: a cache that a reduced call cannot take.
    """
    if not past:
        check_cache(cache)
    if past and len(cache.layers[0].place) != shape[0]:
        raise ValueError(
            f"{shape[0]} rows for a cache of {len(cache.layers[0].place)}: go on with the rows it was filled "
            "by, or start with a new cache"
        )
    return None if mask is None else mask[:, -shape[1] :]


def _next_positions(state: CacheState, embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """int64 [rows, L]: where text behind a cache stands, its padding and that of earlier turns left out.

    Args:
        mask: of the L new columns. None: all are there. Without any padding, None: they just go on.
    """
    gaps = state.gaps()
    if mask is None and not any(gaps):
        return None
    length, device = embeds.shape[1], embeds.device
    there = torch.ones(len(gaps), length, device=device) if mask is None else mask.to(device)
    starts = from_host([state.logical - gap - 1 for gap in gaps], device)
    return starts[:, None] + there.long().cumsum(-1)


def _checked_positions(
    past: int, embeds: torch.Tensor, positions: torch.Tensor | None, axes: bool
) -> torch.Tensor:  # fmt: skip
    """Position ids of this forward, counted where none are given.

    Args:
        axes: whether position ids have several axes: they come, and are given back, as [axes, rows, tokens].

    Raises:
        UnsupportedError: positions of several axes for a model of one.
    """
    length = embeds.shape[1]
    if positions is None:
        positions = torch.arange(past, past + length, device=embeds.device)[None]
    if axes:  # by hand, transformers gives those of all tokens there have been
        return (positions if positions.dim() == 3 else positions[None])[..., -length:]
    if positions.dim() != 2:
        raise UnsupportedError(
            f"this model's positions have one axis: pass position_ids as [rows, tokens], got {tuple(positions.shape)}"
        )
    return positions


def _check_begins(past: int, given: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """Refuse positions of which chunks, that are counted from a row's first token, do not begin at 0.

    Raises:
        UnsupportedError: padding in front of rows, and no position_ids that leave it out.
    """
    if given is None and mask is not None and not past and not bool(mask[:, 0].all()):
        raise UnsupportedError(
            "this model attends in chunks that begin with a row's first token: with padding in front of it pass "
            "position_ids that do not count it, or pad on the right"
        )


def _check_one_sequence(positions: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse rows that hold several sequences one behind the other, told by their positions alone (reads the device).

    Raises:
        UnsupportedError: positions that fall within a row.
    """
    if positions.dim() != 2 or positions.shape[1] < 2:
        return
    falls = positions[:, 1:] < positions[:, :-1]
    if mask is not None:  # padding may have any position
        falls = falls & mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(falls.any()):
        raise UnsupportedError(
            "position_ids start anew within a row, so it holds several sequences (padding-free batches), which "
            "a reduced call would let see each other: give each sequence a row of its own, or pass policy=None"
        )
