"""The text model's hooks: pack the rows before the decoder layers, unpack them after, or take one decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vtr.base import UnsupportedError
from vtr.engine.attention import Plan, attention_name, mlp_scale
from vtr.engine.cache import CacheState, RaggedLayer
from vtr.engine.call import MISSING, Generation, check_cache, is_ragged, refuse_compiled
from vtr.engine.compat import cache_in, check_checkpointing, put_cache
from vtr.engine.decode import DecodeStep, note_cache
from vtr.engine.positions import many_axes
from vtr.engine.request import Request
from vtr.engine.session import Session
from vtr.engine.trace import Trace

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


class TextHooks:
    """Pre- and post-hook of the module that runs the decoder layers."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reduced calls only: replace embeddings, positions and mask by packed ones, or by those of a decode step."""
        cache: Any = cache_in(kwargs)
        ragged = is_ragged(cache)
        asked = kwargs.pop("vtr_request", MISSING)
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
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.pop("input_ids", None)
            embeds = module.get_input_embeddings()(args[0] if ids is None else ids)
            args = ()
        given = kwargs.get("position_ids") is not None
        mask, positions, past = _checked(cache, embeds, kwargs, many_axes(module.rotary_emb))
        if given and request is not None and request.generation is None:
            _check_one_sequence(positions, mask)
        kwargs["attention_mask"] = embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)  # 4-D: taken as is, no mask is built
        one_each = past > 0 and embeds.shape[1] == 1 and (request is None or not any(request.prompt.layouts))
        generation = self._generation(cache) if request is None else request.generation
        if one_each and (mask is None or generation is not None or bool(mask[:, -1].all())):
            return args, self._decode(module, cache, embeds, positions, generation, kwargs)
        return args, self._pack(module, request, cache, embeds, mask, positions, generation, kwargs)

    def _generation(self, cache: Any) -> Generation | None:
        """The ``generate`` that goes on with ``cache``; None for a call by hand, also inside a generate."""
        generation = self.patch.generation()
        return generation if generation is not None and generation.owns_cache(cache) else None

    def _trace(self, generation: Generation | None) -> Trace:
        return generation.trace if generation is not None else Trace(self.patch.geometry)

    def _pack(
        self, module: Any, request: Request | None, cache: Any, embeds: torch.Tensor, mask: torch.Tensor | None,
        positions: torch.Tensor, generation: Generation | None, kwargs: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        layers, state, windows = None, None, self.patch.windows
        if is_ragged(cache):
            layers = cache.layers
            state = layers[0].state
        elif cache is not None or _wants_cache(module, kwargs):
            assert request is not None
            rows = embeds.shape[0]
            state = CacheState(list(request.policies), [0] * rows, [[0] * rows for _ in windows])
            layers = [RaggedLayer(state, i, window) for i, window in enumerate(windows)]
            if any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ())):
                for layer in layers:  # assisted decoding will take drafts back
                    layer.activate_past_recording()
        valid = request.prompt.valid if request is not None else None
        if valid is None and mask is not None:
            valid = mask.bool().cpu()
        session = Session(request, embeds, valid, layers, state, self._trace(generation), module.rotary_emb, windows)
        captures = None if request is None else request.captures
        extra = self.patch.adapter.layer_features(kwargs)
        kwargs["inputs_embeds"], kwargs["position_ids"] = session.pack(embeds, positions, captures, extra)
        if captures is not None:  # without a cache, every step of a generate compresses again
            captures.close(keep=generation is not None and layers is None)
        if state is not None and request is not None:  # nothing can be refused any more
            state.policies = list(request.policies)
        if layers is not None and not is_ragged(cache):
            from transformers import DynamicCache

            cache = DynamicCache() if cache is None else cache
            cache.layers, cache.layer_class_to_replicate = layers, None
            put_cache(module, kwargs, cache)
        if generation is not None:
            generation.note_forward(layers)
        session.generation = generation
        kwargs["vtr_session"] = session
        return kwargs

    def _decode(
        self, module: Any, cache: Any, embeds: torch.Tensor, positions: torch.Tensor, generation: Generation | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        layers, state, trace, rows = cache.layers, cache.layers[0].state, self._trace(generation), embeds.shape[0]
        if any(state.dropped):
            gone = torch.tensor(state.dropped).to(positions.device, non_blocking=True)
            positions = positions.expand(rows, -1) - gone[:, None]
        kwargs["position_ids"], kwargs["inputs_embeds"] = positions, embeds
        positions = positions[0] if positions.dim() == 3 else positions
        at = positions.expand(rows, -1)[:, 0] if any(self.patch.windows) else None
        plan = Plan(decode=True, layers=layers, trace=trace, positions=at, max_distance=state.logical + 1)
        for layer in layers:
            layer.staged = plan
        kwargs["vtr_plan"] = plan
        step = DecodeStep(state, positions.expand(rows, -1), module.rotary_emb, trace)
        if step.asks or step.renumbers:
            kwargs["vtr_session"] = step
        if generation is not None:
            generation.note_forward(layers)
        trace.note_decode(rows)
        return kwargs

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Back to [rows, L, D]; note what the forward did."""
        session, plan = kwargs.get("vtr_session"), kwargs.get("vtr_plan")
        if isinstance(session, Session):
            out.last_hidden_state = session.unpack(out.last_hidden_state)
            session.finish()
            trace, layers, generation = session.trace, session.layers, session.generation
        elif plan is not None:
            trace, layers, generation = plan.trace, plan.layers, self.patch.generation()
            generation = generation if generation is not None and generation.trace is trace else None
            state = layers[0].state
            state.logical += 1
            state.tail += 1
        else:
            return None
        if generation is None:
            note_cache(trace, layers)
            self.patch.publish(trace)
        return out


def _checked(
    cache: Any, embeds: torch.Tensor, kwargs: dict[str, Any], axes: bool
) -> tuple[torch.Tensor | None, torch.Tensor, int]:
    """(this forward's part of the 2-D mask or None, position ids, tokens already cached).

    Args:
        axes: whether position ids have several axes: they come, and are given back, as [axes, rows, tokens].

    Raises:
        UnsupportedError, ValueError: a cache, mask or positions that a reduced call cannot take.
    """
    ragged = is_ragged(cache)
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
        raise ValueError(
            f"{embeds.shape[0]} rows for a cache of {len(cache.layers[0].place)}: go on with the rows it was filled "
            "by, or start with a new cache"
        )
    length, positions = embeds.shape[1], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + length, device=embeds.device)[None]
    if axes:  # by hand, transformers gives those of all tokens there have been
        positions = (positions if positions.dim() == 3 else positions[None])[..., -length:]
    elif positions.dim() != 2:
        raise UnsupportedError(
            f"this model's positions have one axis: pass position_ids as [rows, tokens], got {tuple(positions.shape)}"
        )
    return None if mask is None else mask[:, -length:], positions, past


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


def _wants_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    if module.training and getattr(module, "gradient_checkpointing", False):
        return False
    use_cache = kwargs.get("use_cache")
    return bool(module.config.use_cache if use_cache is None else use_cache)
