"""The padded path: hooks of a text model that cannot run packed rows, for policies that act before the decoder.

In front of the decoder rows are shortened and padded on the left again (``shortened.py``); behind it they are spread
over their logical columns. In between nothing is hooked: the model's own layers run on a shorter prompt, and its own
cache, whatever its layers keep, holds that. Later calls on the cache get its mask and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import UnsupportedError
from vtr.engine.call import Generation
from vtr.engine.choice import MISSING
from vtr.engine.compat import NAMES, cache_in, put_cache
from vtr.engine.compression import compress_row, ranked_places, shrinks
from vtr.engine.forward import names_of
from vtr.engine.refusals import refuse_compiled
from vtr.engine.request import Request, check_rows, rows_of
from vtr.engine.rotary import many_axes
from vtr.engine.rows import Row
from vtr.engine.short_cache import (
    ShortCache,
    ShortState,
    check_own_cache,
    columns_of,
    inside,
    is_short,
    note_short,
    shorten,
)  # fmt: skip
from vtr.engine.shortened import ShortRows, take_features
from vtr.engine.trace import Clock, RowTrace, Trace
from vtr.engine.unpackable import NO_ATTENTION

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch

DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
"""What text models are given to add to vision tokens behind their first layers, and to which columns."""


@dataclass(eq=False)
class Under:
    """A forward of the text model that is under way.

    Attributes:
        key: whose. trace: of the call. rows: what is noted of each. generation: it is part of, or None.
        columns: that are computed in each row. held: per layer, columns that its cache had before.
        cache: of shortened rows that goes on, or None. state: of the one that is being filled, or None.
        short: the rows that were shortened, or None.
    """

    key: object
    trace: Trace
    rows: list[RowTrace]
    generation: Generation | None
    columns: int
    held: list[int]
    cache: ShortCache | None = None
    state: ShortState | None = None
    short: ShortRows | None = None


under: ContextVar[Under | None] = ContextVar("vtr_under", default=None)
"""The reduced forward of a text model that is running in this context; every forward begins by emptying it."""


class PaddedHooks:
    """Pre- and post-hook of the module that runs the decoder layers."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.names = names_of(patch.decoder.text)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reduced calls only: shorten the rows, or go on with a cache of shortened ones."""
        cache, asked = cache_in(kwargs), kwargs.pop("vtr_request", MISSING)
        if torch.compiler.is_compiling():
            if is_short(cache) or (asked is not None and asked is not MISSING):
                refuse_compiled()
            if asked is MISSING:
                self.patch.forward_hooks.check_compiling(kwargs)
            return None
        under.set(None)
        asked = self.patch.pop_request() if asked is MISSING else asked
        request: Request | None = None if asked is MISSING else asked
        if request is None and not is_short(cache):
            if asked is MISSING:
                self.patch.forward_hooks.check_unasked(kwargs)
            return None
        if args:
            kwargs, args = {**dict(zip(self.names, args, strict=False)), **kwargs}, ()
        if is_short(cache):
            self._go_on(request, cache, kwargs)
        else:
            assert request is not None
            check_own_cache(cache)
            self._shorten(module, request, kwargs)
        return args, kwargs

    # -- the prompt ------------------------------------------------------------------------------------------------
    def _shorten(self, module: Any, request: Request, kwargs: dict[str, Any]) -> None:
        """Put shortened rows into the arguments of the text model."""
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = module.get_input_embeddings()(kwargs.pop("input_ids"))
        embeds, captures = kwargs["inputs_embeds"], request.captures
        batch, length = embeds.shape[:2]
        given, mask = _positions_in(kwargs, length), kwargs.get("attention_mask")
        trace, clock = self._trace(request.generation), Clock(embeds.device)
        rows = rows_of(request, batch, length, _valid(request, mask, length))
        uses_cache = kwargs.get("use_cache") or cache_in(kwargs) is not None
        check_rows(rows, bool(uses_cache), self.patch.decoder.depth, None)
        if captures is not None:
            captures.ranked = ranked_places(rows)
        with clock:
            made = {b: compress_row(row, embeds[b], captures) for b, row in enumerate(rows) if shrinks(row)}
        short = ShortRows(rows, made, length, embeds.device)
        self._cut(module, short, request, kwargs)
        positions = short.position_ids(given, _counts_text(module, given))
        kwargs["inputs_embeds"], kwargs["attention_mask"] = short.embeds(embeds), self._masks(short, mask)
        if given is not None or "position_ids" in self.names:
            kwargs["position_ids"] = positions
        state = short.state(given, positions)
        self._note(state, request, rows, length)
        trace.clocks.append(clock)
        trace.selector_flops += sum(one.flops for one in made.values())
        if captures is not None:
            trace.selector_flops += captures.flops
            captures.flops = 0
            captures.close(keep=request.generation is not None and cache_in(kwargs) is None)
        if request.generation is not None:
            request.generation.note_forward(None)
        noted = _traces(rows, request.offset, self.patch.decoder.depth)
        held = [0] * self.patch.decoder.depth
        under.set(Under(self.patch.key, trace, noted, request.generation, short.width, held, None, state, short))

    def _masks(self, short: ShortRows, mask: Any) -> Any:
        """The mask of the shorter rows; those that the model has built itself are cut."""
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return short.mask if mask is None else short.mask.to(mask.dtype)
        if isinstance(mask, Mapping):
            return {kind: self._mask(short, one, kind) for kind, one in mask.items()}
        return self._mask(short, mask, "full_attention")

    def _mask(self, short: ShortRows, mask: Any, kind: str) -> Any:
        """One that the model has built: of all columns, or of layers of a kind."""
        text = self.patch.decoder.text
        window = text.config.sliding_window if "sliding" in kind else None
        if kind in NO_ATTENTION and (mask is None or getattr(mask, "ndim", 0) == 2):  # they read all but padding
            return short.mask if mask is None else short.mask.to(mask.dtype)
        if kind in ("full_attention", "sliding_attention"):
            if (mask is None and "flash" in text.config._attn_implementation) or getattr(mask, "ndim", 0) == 2:
                return short.mask if mask is None else short.mask.to(mask.dtype)
            if mask is None:  # causal, without padding
                return short.causal(window)
            if isinstance(mask, torch.Tensor):
                return short.square(mask, window)
        raise UnsupportedError(
            f"this model has built a mask of {kind} ({type(mask).__name__}) for the whole prompt, which cannot be made "
            "for a shorter one: pass policy=None, or take another attn_implementation"
        )

    def _cut(self, module: Any, short: ShortRows, request: Request, kwargs: dict[str, Any]) -> None:
        """Cut whatever else the text model is given per token."""
        marks, features = (kwargs.pop(name, None) for name in DEEPSTACK)
        ours = ("inputs_embeds", "position_ids", "attention_mask", "input_ids", *NAMES)
        cut = {name: _cut_one(short, name, value) for name, value in kwargs.items() if name not in ours}
        kwargs.update(cut)
        if features is not None:
            left, taken = take_features(short, request.prompt.is_vision, list(features))
            kwargs[DEEPSTACK[0]], kwargs[DEEPSTACK[1]] = left.to(marks.device), taken

    def _note(self, state: ShortState, request: Request | None, rows: list[Row], columns: int) -> None:
        """What those who go on with the cache will need to know of these columns."""
        valid = torch.zeros(len(rows), columns, dtype=torch.bool)
        for b, row in enumerate(rows):
            valid[b, row.given.slots] = True
        state.note(None if request is None else request.prompt.ids, valid, len(rows), columns)
        deltas = getattr(self.patch.entry, "rope_deltas", None)
        if isinstance(deltas, torch.Tensor) and state.form == "axes" and len(rows) % len(deltas) == 0:
            state.rope_deltas = deltas.repeat_interleave(len(rows) // len(deltas), 0)

    # -- what comes after it ---------------------------------------------------------------------------------------
    def _go_on(self, request: Request | None, cache: ShortCache, kwargs: dict[str, Any]) -> None:
        """Text behind shortened rows: the mask and the positions of their columns.

        Raises:
            UnsupportedError, ValueError: what cannot go on from this cache.
        """
        state, given = cache.vtr_state, kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        batch, n = given.shape[:2]
        generation = self._generation(cache) if request is None else request.generation
        if batch != len(state.lengths):
            raise ValueError(
                f"{batch} rows for a cache of {len(state.lengths)}: go on with the rows it was filled by, or start "
                "with a new cache"
            )
        self._check_more(kwargs, n, stepping=generation is not None and generation.started)
        if "position_ids" in self.names or kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._next(state, _positions_in(kwargs, n), n)
        mask = kwargs.get("attention_mask")
        dtype = mask.dtype if isinstance(mask, torch.Tensor) and mask.dim() == 2 else torch.long
        kwargs["attention_mask"] = state.longer(n).to(dtype)
        put_cache(self.patch.decoder.text, kwargs, inside(cache))
        trace = self._trace(generation)
        rows = rows_of(request, batch, n, None)
        if generation is None or not generation.started:
            self._note(state, request, rows, n)
        if generation is not None:
            generation.note_forward(None)
        depth = self.patch.decoder.depth
        noted = _traces(rows, 0 if request is None else request.offset, depth)
        under.set(Under(self.patch.key, trace, noted, generation, n, columns_of(cache, depth), cache))

    def _check_more(self, kwargs: Mapping[str, Any], n: int, stepping: bool) -> None:
        """Refuse new columns that some row does not have, and masks that were built for logical columns."""
        mask = kwargs.get("attention_mask")
        if n > 1 and mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise UnsupportedError(
                "this model builds the mask of several new tokens itself, over columns that were dropped: start the "
                "conversation anew, with a new cache, or run it with policy=None"
            )
        if stepping or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return
        if not bool(mask[:, -n:].all()):
            raise UnsupportedError(
                "rows that go on must have as many new tokens each (this model's layers cannot leave out padding "
                "behind what they have read): run rows of different lengths one by one, or start with a new cache"
            )

    def _next(self, state: ShortState, given: torch.Tensor | None, n: int) -> torch.Tensor:
        """Positions of the next ``n`` tokens, int64 [rows, n] or [axes, rows, n]; given: logical ones, or None."""
        assert state.following is not None
        device, batch = state.following.device, len(state.lengths)
        counted = state.following[:, None] + torch.arange(n, device=device)
        lost = state.on_device(state.dropped, device)[:, None]
        if given is not None and given.dim() == 3:
            if not _counts_text(self.patch.decoder.text, given):
                return given
            given = given.expand(-1, batch, -1)
            return torch.cat([(given[0] - lost.to(given.device))[None], given[1:]])
        if state.form == "axes":
            if given is not None:
                return given
            text = self.patch.decoder.text
            return counted[None].expand(len(text.rotary_emb.mrope_section) if many_axes(text.rotary_emb) else 3, -1, -1)
        if given is None or (given.shape[0] < batch and state.form != "columns"):
            return counted
        return given.expand(batch, -1) - lost.to(given.device)

    # -- behind the decoder ----------------------------------------------------------------------------------------
    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Spread the rows over their logical columns; note what the forward did."""
        now = None if torch.compiler.is_compiling() else under.get()
        if now is None or now.key is not self.patch.key:
            return None
        under.set(None)
        cache: Any = now.cache
        if now.short is not None:
            out.last_hidden_state = now.short.spread(out.last_hidden_state)
            made = cache_in(out)
            if made is not None:
                assert now.state is not None
                now.state.logical = now.short.length
                cache = shorten(made, now.state)
        else:
            cache.vtr_state.append(now.columns)
            for name in NAMES:
                if out.get(name) is not None:
                    out[name] = cache
        now.trace.note_padded(now.rows, out.last_hidden_state.shape[0], now.columns, now.held)
        if now.generation is not None:
            now.generation.short = cache
            return out
        if cache is not None:
            note_short(now.trace, cache)
        self.patch.publish(now.trace)
        return out

    def _trace(self, generation: Generation | None) -> Trace:
        trace = Trace(self.patch.decoder.geometry) if generation is None else generation.trace
        trace.path = "padded"
        return trace

    def _generation(self, cache: Any) -> Generation | None:
        """The ``generate`` that goes on with ``cache``; None for a call by hand, also inside a generate."""
        generation = self.patch.choice.generation()
        return generation if generation is not None and generation.owns_cache(cache) else None


def _positions_in(kwargs: Mapping[str, Any], length: int) -> torch.Tensor | None:
    """Position ids of this forward's columns, [1 or rows, length] or [axes, 1 or rows, length]; None if not given.

    Raises:
        UnsupportedError: positions of another form.
    """
    given = kwargs.get("position_ids")
    if given is not None and (given.dim() not in (2, 3) or given.shape[-1] < length):
        raise UnsupportedError(
            f"pass position_ids as [rows, tokens] (or [axes, rows, tokens]), got {tuple(given.shape)}, or none"
        )
    return None if given is None else given[..., -length:]


def _counts_text(text: Any, given: torch.Tensor | None) -> bool:
    """Whether the first of several axes only counts tokens: one more than rotary positions have."""
    sections = getattr(getattr(text, "rotary_emb", None), "mrope_section", None)
    return given is not None and given.dim() == 3 and sections is not None and given.shape[0] == len(sections) + 1


def _valid(request: Request, mask: Any, length: int) -> torch.Tensor | None:
    """bool [rows, length] on the CPU, False for padding; None if there is none."""
    if request.prompt.valid is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return request.prompt.valid
    return mask[:, -length:].bool().cpu()


def _cut_one(short: ShortRows, name: str, value: Any) -> Any:
    """An argument of the text model, its rows shortened where it is per token.

    Raises:
        UnsupportedError: a tensor of which it cannot be told how it belongs to the tokens.
    """
    batch, length = len(short.rows), short.length
    if isinstance(value, Mapping):
        return {key: _cut_one(short, f"{name}[{key!r}]", one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut_one(short, name, one) for one in value)
    if not isinstance(value, torch.Tensor) or value.numel() <= 1:
        return value
    if name == "cache_position" and value.shape == (length,):
        return value[: short.width]
    if value.dim() >= 2 and value.shape[:2] == (batch, length):
        return short.take(value)
    if value.dim() >= 2 and value.shape[:2] == (1, length):
        return short.take(value.expand(batch, *value.shape[1:]))
    raise UnsupportedError(
        f"this model gives its decoder {name} of shape {tuple(value.shape)}, of which vtr does not know how it belongs "
        f"to the {length} tokens of {batch} rows: pass policy=None"
    )


def _traces(rows: list[Row], offset: int, depth: int) -> list[RowTrace]:
    """What is noted of rows whose vision tokens all pass every layer."""
    found, first = [], 0
    for row in rows:
        trace, n = row.trace(offset, first), row.vision.count
        trace.counts, trace.alive = [n] * depth, [torch.arange(first, first + n)] * depth
        trace.asked, trace.seen = [n] * depth, [n] * depth
        found.append(trace)
        first += n
    return found
