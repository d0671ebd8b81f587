"""What a reduced call cannot do is refused before anything changes; what may surprise is said once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.cache import is_ragged
from vtr.engine.compat import cache_in
from vtr.engine.short_cache import check_own_cache


def check_call(kwargs: Mapping[str, Any], configs: Sequence[Any], path: str = "packed") -> None:
    """Refuse what a reduced call cannot do, before anything changes. path: how its rows go through the decoder.

    Raises:
        UnsupportedError: naming the way out.
    """
    for flag in ("output_attentions", "output_hidden_states"):
        if kwargs.get(flag) or any(getattr(c, flag, False) for c in configs):
            raise UnsupportedError(
                f"{flag}=True is not available while tokens are reduced (layers hold different tokens): "
                "drop it, or pass policy=None for this call"
            )
    check_mask(kwargs)
    if path == "packed":
        return check_cache(cache_in(kwargs))
    check_own_cache(cache_in(kwargs))


def check_mask(kwargs: Mapping[str, Any]) -> None:
    """Refuse a caller's own mask of who sees whom.

    Raises:
        UnsupportedError: naming the way out.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        said = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"a reduced call takes a 2-D attention_mask [rows, tokens], got {said}: custom masks are not supported, "
            "pass policy=None"
        )


def refuse_compiled() -> None:
    """Raise UnsupportedError: a call that may be reduced is being compiled."""
    raise UnsupportedError(COMPILED)


COMPILED = (
    "a reduced call cannot be compiled (how many tokens stay depends on the call): call the model itself instead of "
    "torch.compile(model), or pass policy=None. The steps of generate can be: cache_implementation='static' with "
    "compile_config=CompileConfig(…)"
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
    if implementation not in (None, "dynamic", "dynamic_full", "static"):
        raise UnsupportedError(
            f"cache_implementation={implementation!r} cannot hold rows of different lengths: leave it out, take "
            "cache_implementation='static', or pass policy=None"
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


def check_padded_generation(kwargs: Mapping[str, Any], default: Any) -> None:
    """Refuse ways of generating that need more of a cache than rows that are padded can give.

    Raises:
        UnsupportedError: naming the way out.
    """
    config = kwargs.get("generation_config") or default
    if (kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)) == "static":
        raise UnsupportedError(
            "cache_implementation='static' is not available for rows that are shortened and padded (this model's "
            "decoder cannot run packed rows): leave it out, or pass policy=None"
        )
    drafts = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha")
    if found := [name for name in drafts if kwargs.get(name) or getattr(config, name, None)]:
        raise UnsupportedError(
            f"{found[0]} takes back tokens that a cache of shortened rows cannot give back: leave it out, or pass "
            "policy=None"
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
    plain = (type(cache) is DynamicCache or hasattr(cache, "constant")) and all(
        type(layer) in kept for layer in cache.layers
    )
    if not plain or cache.offloading:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
        raise UnsupportedError(
            f"a reduced call needs a plain DynamicCache, got {type(cache).__name__}({', '.join(kinds)}): leave out "
            "the cache (rows get caches of their own length; generate(…, cache_implementation='static') makes one of "
            "constant shapes), or pass policy=None"
        )
    if cache.get_seq_length() > 0:
        raise UnsupportedError(
            f"this cache already holds {cache.get_seq_length()} unreduced tokens: pass the policy from the first call "
            "of the conversation on, or go on with policy=None"
        )


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
