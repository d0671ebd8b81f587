"""Which policy applies to a call, and what one ``generate`` carries through its forwards.

Three context variables, so that threads and interleaved generations never see each other's: what ``vtr.use`` set, the
``generate`` now running, and the trace of the last call.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch

from vtr.base import SCORES, Policy, UnsupportedError, Wanted
from vtr.engine.cache import RaggedLayer
from vtr.engine.captures import Captures
from vtr.engine.compat import cache_in
from vtr.engine.prompt import Prompt
from vtr.engine.trace import DenseTrace, Trace
from vtr.registry import policy as as_policy

Given = Policy | str | None | Sequence[Policy | str | None]


class MISSING:
    """A call that names no policy (``policy=None`` says: no reduction). A class, so that copies and pickles keep it."""


# both are replaced, never changed in place
in_use: ContextVar[Mapping[object, Given]] = ContextVar("vtr_in_use", default=MappingProxyType({}))
last_traces: ContextVar[Mapping[object, Trace | DenseTrace | None]] = ContextVar(
    "vtr_last_traces", default=MappingProxyType({})
)


@dataclass(eq=False)
class Generation:
    """One running ``generate``.

    Attributes:
        key: whose model it is. policies: one per prompt, or None if nothing is reduced.
        prompt: where its vision tokens sit, read off the arguments before transformers encodes and drops the images.
            What stands behind its columns was decoded, or drafted.
        length: columns of input_ids as passed. started: True after the first forward.
        captures: what its policies want of the vision tower, or None.
        ids: int64 [prompts, L], the prompt's new part; None where only embeddings are known.
    """

    key: object
    policies: list[Policy | None] | None
    prompt: Prompt | None
    length: int
    trace: Trace
    captures: Captures | None = None
    ids: torch.Tensor | None = None
    started: bool = False
    cache_layers: list[RaggedLayer] | None = None
    attended_before: list[Any] | None = None

    def note_forward(self, layers: list[RaggedLayer] | None) -> None:
        """Note that a forward is under way, and on which cache (counted from what it had attended to before)."""
        self.started, self.cache_layers = True, layers
        if self.attended_before is None and layers is not None:
            self.attended_before = [layer.attended for layer in layers]

    def owns_cache(self, cache: Any) -> bool:
        """Whether ``cache`` is the ragged one that this generate runs on (any, before its first forward)."""
        return is_ragged(cache) and (not self.started or cache.layers is self.cache_layers)

    def owns(self, ids: torch.Tensor | None, kwargs: Mapping[str, Any], cache: Any) -> bool:
        """Whether a forward is a step of this generate, not one that a callback makes by hand while it runs."""
        if not self.started:
            return True
        if self.cache_layers is not None:
            return self.owns_cache(cache)
        brings_images = any(kwargs.get(name) is not None for name in PIXELS)
        return cache is None and not brings_images and self.starts_with_prompt(ids)

    def starts_with_prompt(self, ids: torch.Tensor | None) -> bool:
        """Whether ``ids`` begin with this generate's prompt in every row (reads the device)."""
        if self.ids is None or ids is None or ids.shape[1] < self.ids.shape[1] or ids.shape[0] % self.ids.shape[0]:
            return False
        prompts = self.ids.repeat_interleave(ids.shape[0] // self.ids.shape[0], 0).to(ids.device)
        return torch.equal(ids[:, : prompts.shape[1]], prompts)

    def policies_for(self, rows: int) -> list[Policy | None]:
        """The policies of a forward of ``rows`` rows that is made by hand and names none.

        Raises:
            UnsupportedError: which row is whose cannot be told.
        """
        assert self.policies is not None
        if rows % len(self.policies) == 0:
            return [p for p in self.policies for _ in range(rows // len(self.policies))]
        if all(p == self.policies[0] for p in self.policies):
            return self.policies[:1] * rows
        raise UnsupportedError(
            f"a forward of {rows} rows inside a generate of {len(self.policies)} rows with different policies: name "
            "the policy of this call, model(…, policy=p), or policy=None"
        )


PIXELS = ("pixel_values", "pixel_values_videos", "images")
"""What calls bring images in."""

running: ContextVar[Generation | None] = ContextVar("vtr_running", default=None)

pending_request: ContextVar[tuple[object, Any] | None] = ContextVar("vtr_pending_request", default=None)
"""(whose model, its request or None), between the pre-hooks of model and text model, where forward passes no keyword
arguments on."""

_lock = threading.Lock()
_busy: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


@contextmanager
def busy(key: object, why: str) -> Iterator[None]:
    """While the block runs, in whatever thread, the model of ``key`` may not be patched again or unpatched."""
    with _lock:
        _busy.setdefault(key, []).append(why)
    try:
        yield
    finally:
        with _lock:
            _busy[key].remove(why)


def refuse_if_busy(key: object, what: str) -> None:
    """Raise RuntimeError if some thread uses the model of ``key`` right now."""
    with _lock:
        whys = list(_busy.get(key, ()))
    if whys:
        raise RuntimeError(f"cannot {what} this model now: {whys[0]}")


def refuse_replica(key: object, policy: Given) -> None:
    """Refuse the reduced call of a copy that ``torch.nn.DataParallel`` made: its thread knows nothing of this context.

    Raises:
        UnsupportedError: a policy was given, is the default, or a ``vtr.use`` block is open.
    """
    with _lock:
        used = bool(_busy.get(key))
    if policy is not None or used:
        raise UnsupportedError(
            "torch.nn.DataParallel on several devices cannot reduce (a batch's policies and vtr.use do not reach its "
            "copies): call model.module, use DistributedDataParallel, or pass policy=None outside of vtr.use"
        )


def policies_per_row(given: Given, rows: int | None, num_hidden_layers: int, model: Any) -> list[Policy | None] | None:
    """One policy or one per row → a list with one entry per row; None if nothing is reduced.

    Raises:
        TypeError: neither policies, spec strings nor None.
        ValueError: an unknown spec, settings impossible on this model, scores asked for that there are none of, weights
            of another model, or not one policy per row.
    """
    if given is None:
        return None
    several = isinstance(given, Sequence) and not isinstance(given, str)
    entries: Sequence[Any] = given if several else [given]  # type: ignore[assignment]
    made = [None if p is None else as_policy(p) for p in entries]
    for p in {id(p): p for p in made if p is not None}.values():
        p.check(num_hidden_layers)
        check_needs_and_wants(p, num_hidden_layers)
        p.check_model(model)
    if several and rows is not None and len(made) != rows:
        raise ValueError(
            f"{len(made)} policies for {rows} rows: give one policy for all rows or a list with one per row "
            "(None for a row that is not to be reduced)"
        )
    if rows is None:
        raise UnsupportedError("vtr needs input_ids (or inputs_embeds) to know how many rows the call has")
    return None if all(p is None for p in made) else made if several else made * rows


def check_needs_and_wants(p: Policy, num_hidden_layers: int) -> None:
    """Refuse a policy that asks for scores or captures that there are none of, before anything runs.

    Raises:
        ValueError: naming what there is.
    """
    who = type(p).__name__
    for layer in range(num_hidden_layers):
        kind = p.needs(layer)
        if kind is not None and not (isinstance(kind, str) and kind in SCORES):
            raise ValueError(
                f"{who}.needs({layer}) answers {kind!r}, which are no scores: choose among "
                f"{', '.join(map(repr, SCORES))}, or None"
            )
        if kind is not None and layer == 0:
            raise ValueError(
                f"{who}.needs(0) answers {kind!r}, but scores are those of the layer before, and layer 0 has none: "
                "answer None there and rank from layer 1 on (or by tokens.ahead(), which any layer has)"
            )
    wants = p.wants
    if not isinstance(wants, (tuple, list)) or any(one not in get_args(Wanted) for one in wants):
        known = ", ".join(map(repr, get_args(Wanted)))
        raise ValueError(f'{who}.wants = {wants!r}: write a tuple of what there is ({known}), e.g. wants = ("cls",)')


def check_call(kwargs: Mapping[str, Any], configs: Sequence[Any]) -> None:
    """Refuse what a reduced call cannot do, before anything changes.

    Raises:
        UnsupportedError: naming the way out.
    """
    for flag in ("output_attentions", "output_hidden_states"):
        if kwargs.get(flag) or any(getattr(c, flag, False) for c in configs):
            raise UnsupportedError(
                f"{flag}=True is not available while tokens are reduced (layers hold different tokens): "
                "drop it, or pass policy=None for this call"
            )
    check_cache(cache_in(kwargs))


def refuse_compiled() -> None:
    """Raise UnsupportedError: a call that may be reduced is being compiled."""
    raise UnsupportedError(COMPILED)


COMPILED = (
    "a reduced call cannot be compiled (how many tokens stay depends on the call): call the model itself instead of "
    "torch.compile(model), or pass policy=None"
)
_reason = {"reason": COMPILED} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
refuse_compiled = torch.compiler.disable(refuse_compiled, **_reason)  # traced, it would not reach the user


def check_generation(kwargs: Mapping[str, Any], default: Any, policies: Sequence[Policy | None]) -> None:
    """Refuse ways of generating that a reduced call cannot go. ``default``: the model's generation config.

    Raises:
        UnsupportedError: naming the way out.
    """
    check_pixels(kwargs)
    config = kwargs.get("generation_config") or default
    implementation = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if implementation not in (None, "dynamic", "dynamic_full"):
        raise UnsupportedError(
            f"cache_implementation={implementation!r} cannot hold rows of different lengths: leave it out, or pass "
            "policy=None"
        )
    if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
        raise UnsupportedError(
            "prefill_chunk_size cuts the prompt into pieces, but a policy chooses among all of its tokens: leave it "
            "out (a reduced prefill needs less memory anyway), or pass policy=None"
        )
    drafts = kwargs.get("assistant_model") or any(
        kwargs.get(name) or getattr(config, name, None) for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    )
    if drafts and (forgets := next((p for p in policies if p is not None and p.asks("remember")), None)):
        raise UnsupportedError(
            f"assisted decoding takes back drafted tokens, but {forgets.spec!r} may have forgotten them: leave out the "
            "assistant, or use a policy that remembers what is decoded"
        )


def check_pixels(kwargs: Mapping[str, Any]) -> None:
    """Refuse images that the caller has encoded: the tiles and CLS states behind them are not there any more.

    Raises:
        UnsupportedError: naming the way out.
    """
    if kwargs.get("mm_encoder_outputs"):
        raise UnsupportedError("a reduced call needs pixel_values, not mm_encoder_outputs: pass the images")


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot become ragged.

    Raises:
        UnsupportedError: static, quantized, offloaded or sliding caches; a filled cache of an unreduced prompt.
    """
    if cache is None or is_ragged(cache):
        return
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kept = (DynamicLayer, DynamicSlidingWindowLayer)
    plain = type(cache) is DynamicCache and all(type(layer) in kept for layer in cache.layers)
    if not plain or cache.offloading:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
        raise UnsupportedError(
            f"a reduced call needs a plain DynamicCache, got {type(cache).__name__}({', '.join(kinds)}): leave out "
            "the cache and cache_implementation (rows get caches of their own length), or pass policy=None"
        )
    if cache.get_seq_length() > 0:
        raise UnsupportedError(
            f"this cache already holds {cache.get_seq_length()} unreduced tokens: pass the policy from the first call "
            "of the conversation on, or go on with policy=None"
        )


def is_ragged(cache: Any) -> bool:
    """True for a cache whose layers are vtr's."""
    layers = getattr(cache, "layers", None) or [None]
    return isinstance(layers[0], RaggedLayer)


def windows(text: Any) -> tuple[int | None, ...]:
    """The sliding window of every decoder layer, in positions; None where attention is causal over everything.

    Raises:
        UnsupportedError: layers with another kind of attention.
    """
    config, depth = text.config, len(text.layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * depth
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(
            f"{type(text).__name__} has layers with {', '.join(sorted(strange))}, which the packed engine cannot run: "
            "use a model with causal attention (sliding windows are fine)"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def warn_on_continue(policies: Sequence[Policy]) -> None:
    """Say what question-guided policies may have dropped that a later turn needs.

    Raises:
        UnsupportedError: a policy's on_continue is "error".
    """
    for p in {p.spec: p for p in policies if p.question_guided}.values():
        how = getattr(p, "on_continue", "warn")
        text = (
            f"the conversation goes on with image tokens that {p.spec!r} kept for the first question; a later one may "
            "miss something. Policies that do not look at the question (see `vtr list`) keep what any question needs"
        )
        if how == "error":
            raise UnsupportedError(text + "; on_continue='keep' accepts that")
        if how == "warn":
            warnings.warn(text, UserWarning, stacklevel=2)


def warn_on_labels(policies: Sequence[Policy | None]) -> None:
    """Say that labels leave no question, so that the whole text ranks for these policies."""
    for spec in dict.fromkeys(p.spec for p in policies if p is not None and p.question_guided):
        text = (
            f"labels mark all text behind a row's last image, so they do not tell the answer from the question: all of "
            f"it ranks for {spec!r}, which a generate would not do. Set the question's labels to -100, or say with "
            "vtr_queries_end where the answer begins"
        )
        warnings.warn(text, UserWarning, stacklevel=2)
