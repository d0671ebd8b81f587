"""Layers in whose attention not all tokens take part: who asks, who is seen, and what need not be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from vtr.base import Attend, Policy, UnsupportedError
from vtr.engine.checks import checked_keep
from vtr.engine.packed import Packed, on_device, sums
from vtr.engine.sight import OwnMask, near

PROJECTIONS = {"q_proj": "asks", "k_proj": "seen", "v_proj": "seen", "o_proj": "asks"}
"""Which of a layer's projections need which tokens only."""


@dataclass(frozen=True, eq=False)
class Taking:
    """Who takes part in one layer's attention, of the packed tokens that pass it.

    Attributes:
        asks, seen: int64, ascending: the tokens that are queries, and those that are keys (and cached).
        ask_lengths, seen_lengths: how many of each row.
        causal: per row, whether both are the same tokens, so that nothing but the order hides any.
        vision_asks, vision_seen: of each row the vision tokens among them.
        total: how many tokens pass the layer.
    """

    asks: torch.Tensor
    seen: torch.Tensor
    ask_lengths: tuple[int, ...]
    seen_lengths: tuple[int, ...]
    causal: tuple[bool, ...]
    vision_asks: tuple[int, ...]
    vision_seen: tuple[int, ...]
    total: int

    def products(self, past: Sequence[int]) -> int:
        """Pairs of queries and keys, over so many cached tokens of each row."""
        before = past or [0] * len(self.ask_lengths)
        return sum(a * (s + p) for a, s, p in zip(self.ask_lengths, self.seen_lengths, before, strict=True))

    def saved(self, layer: Any) -> int:
        """FLOPs of the layer's projections that are not done."""
        attn, found = layer.self_attn, 0
        for name, who in PROJECTIONS.items():
            linear = getattr(attn, name, None)
            if isinstance(linear, torch.nn.Linear):
                found += 2 * linear.in_features * linear.out_features * (self.total - len(getattr(self, who)))
        return found

    def scattered(self, out: torch.Tensor) -> torch.Tensor:
        """[1, who asks, heads, d] → [1, T, heads, d], zero for all others."""
        return out.new_zeros(1, self.total, *out.shape[2:]).index_copy(1, self.asks, out)


def taking(
    packed: Packed, answers: dict[int, Attend], policies: Sequence[Policy | None], lengths: Sequence[int],
    passing: Sequence[int],
) -> Taking:  # fmt: skip
    """Of checked answers (row → what its policy said), who takes part. All tokens of other rows that pass do.

    Args:
        lengths: tokens of each row that pass the layer, all of them in rows that have an answer. passing: the vision
            tokens among them.

    Raises:
        TypeError, ValueError: an answer that is none.
    """
    device = packed.vision.device
    asks, seen, causal, counts = [], [], [], []
    spans, visions, texts = packed.spans(), packed.vision_spans(), packed.text_spans()
    starts = sums(lengths)
    for row, here in enumerate(spans):
        answer, policy = answers.get(row), policies[row]
        if answer is None or policy is None:
            (everything,) = on_device([torch.arange(starts[row], starts[row + 1])], device)
            asks.append(everything)
            seen.append(everything)
            causal.append(True)
            counts.append((passing[row], passing[row]))
            continue
        vision, text = packed.vision[visions[row]], packed.text[texts[row]]
        prompt = packed.rows[row].text.prompt
        if answer.text is not None:
            chosen = checked_keep(answer.text, prompt, "attend", policy, device)
            text = torch.cat([text[:prompt].index_select(0, chosen), text[prompt:]])
        several = [
            vision if one is None else vision.index_select(0, checked_keep(one, len(vision), "attend", policy, device))
            for one in (answer.asks, answer.seen)
        ]
        counts.append((len(several[0]), len(several[1])))
        causal.append(answer.asks is answer.seen)
        mine = [
            torch.cat([one, text]).sort().values + (starts[row] - here.start)
            for one in several[: 1 if causal[-1] else 2]
        ]
        asks.append(mine[0])
        seen.append(mine[-1])
    sizes = [tuple(map(len, parts)) for parts in (asks, seen)]
    vision_asks, vision_seen = zip(*counts, strict=True)
    return Taking(
        torch.cat(asks), torch.cat(seen), sizes[0], sizes[1], tuple(causal), vision_asks, vision_seen,
        starts[-1],
    )  # fmt: skip


def check_attend(answer: Any, policy: Policy, layer: Any) -> None:
    """Raise TypeError or UnsupportedError unless ``answer`` is an Attend, and the layer one that can follow it."""
    if not isinstance(answer, Attend):
        raise TypeError(
            f"{type(policy).__name__}.attend must return vtr.Attend(asks, seen) or None, got {answer!r:.80}"
        )
    attn = getattr(layer, "self_attn", None)
    if attn is None or not hasattr(attn, "o_proj"):
        raise UnsupportedError(
            f"{type(layer).__name__} has no self_attn.o_proj, behind which tokens that do not ask get nothing: "
            f"{policy.spec} does not work on this language model, take one that drops tokens (fastv, pyramid)"
        )


# -------------------------------------------------------------------------------------------------- the layer's hooks
_taking: ContextVar[Taking | None] = ContextVar("vtr_taking", default=None)
"""Who takes part in the attention that is running. Set and taken back by the attention module's hooks."""


def install(attn: Any) -> list[Any]:
    """Hooks by which a layer's projections run for those tokens only that need them; returns their handles."""
    handles = [
        attn.register_forward_pre_hook(_begin, with_kwargs=True),
        attn.register_forward_hook(_end, always_call=True),
    ]
    for name, who in PROJECTIONS.items():
        linear = getattr(attn, name, None)
        if linear is not None:
            handles.append(linear.register_forward_pre_hook(_Narrow(who)))
            handles.append(linear.register_forward_hook(_Widen(who)))
    return handles


def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _taking.set(getattr(kwargs.get("vtr_plan"), "taking", None))


def _end(module: Any, args: tuple[Any, ...], out: Any) -> None:
    if not torch.compiler.is_compiling():
        _taking.set(None)


@dataclass(frozen=True)
class _Narrow:
    """A projection's pre-hook: only the tokens that need it go in."""

    who: str

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        now = None if torch.compiler.is_compiling() else _taking.get()
        return None if now is None else (args[0].index_select(1, getattr(now, self.who)), *args[1:])


@dataclass(frozen=True)
class _Widen:
    """A projection's hook: the others get zeros."""

    who: str

    def __call__(self, module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
        now = None if torch.compiler.is_compiling() else _taking.get()
        if now is None:
            return None
        return out.new_zeros(1, now.total, out.shape[-1]).index_copy(1, getattr(now, self.who), out)


# ------------------------------------------------------------------------------------------------------- the attention
def row_masks(
    now: Taking, past: Sequence[int], positions: Callable[[int, int], torch.Tensor] | None, window: int | None,
    masked_keys: torch.Tensor | None, own: OwnMask | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Per row bool [a, past + s], which keys its queries see; None where it is causal and nothing else says otherwise.

    Args:
        positions: (row, how many) → the positions of a row's keys, cached ones first, and of its queries behind them.
    """
    asks, seen = now.asks.split(now.ask_lengths), now.seen.split(now.seen_lengths)
    masks: list[torch.Tensor | None] = []
    for row, (q, k) in enumerate(zip(asks, seen, strict=True)):
        if now.causal[row] and window is None and masked_keys is None and own is None:
            masks.append(None)
            continue
        mask, before = k[None] <= q[:, None], past[row] if past else 0
        mask = torch.cat([mask.new_ones(len(q), before), mask], 1) if before else mask
        if window is not None and positions is not None:
            at = positions(row, before)
            mask = mask & near(at[before + len(k) :][:, None], at[None, : before + len(k)], window)
        if own is not None:
            mask = torch.cat([mask[:, :before], own.over(mask[:, before:], q, k)], 1)
        if masked_keys is not None:
            hidden = masked_keys.index_select(0, k)[None] & (k[None] != q[:, None])
            mask = torch.cat([mask[:, :before], mask[:, before:] & ~hidden], 1)
        masks.append(mask)
    return masks
