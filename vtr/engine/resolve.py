"""Before a ``generate`` runs: policies that look at pictures and try answers, then say what each row's policy is.

All that they try shares one forward of the vision tower, by what anyone may use: :func:`shared_features`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import Answer, Policy, UnsupportedError
from vtr.engine.adapters import Adapter, unwrapped
from vtr.engine.call import last_traces
from vtr.engine.captures import Captures, Inside, VisionHooks, active, kept_inside
from vtr.engine.compat import cache_in
from vtr.engine.prompt import Prompt
from vtr.engine.trace import Clock, Tried
from vtr.image import CROP_GRIDS, Image, Layout

if TYPE_CHECKING:
    from vtr.engine.generate import Generate


@dataclass
class TextOnly(Policy):
    """In a try, the policy of rows that are not tried."""

    name = "text-only"

    def compress(self, image: Image) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)


@dataclass(eq=False)
class GenerateTries:
    """:class:`~vtr.base.Tries` in a ``generate``; the vision tower runs once, however much is tried."""

    generate: Generate
    ids: torch.Tensor
    kwargs: Mapping[str, Any]
    prompt: Prompt
    rows: Sequence[int]
    tried: Tried

    @property
    def layouts(self) -> list[list[Layout]]:
        return [self.prompt.layouts[row] for row in self.rows]

    def images(self) -> list[list[Image]]:
        adapter, model = self.generate.patch.adapter, self.generate.patch.model
        given = {name: self.kwargs[name] for name in adapter.image_inputs if self.kwargs.get(name) is not None}
        found = adapter.encode(model, given)
        features = torch.cat([part.flatten(0, -2) for part in getattr(found, "pooler_output", found)])
        sizes = [len(layout) for row in self.prompt.layouts for layout in row]
        if sum(sizes) != len(features):
            raise UnsupportedError(
                f"{type(model).__name__} encodes these images into {len(features)} tokens, the prompt has "
                f"{sum(sizes)}: a policy that looks at pictures first works on images alone (no videos)"
            )
        parts = iter(features.split(sizes))
        rows = [
            [Image(next(parts), layout, i, len(row)) for i, layout in enumerate(row)] for row in self.prompt.layouts
        ]
        return [rows[row] for row in self.rows]

    def questions(self) -> list[torch.Tensor]:
        table, out = self.generate.patch.inner.get_input_embeddings(), []
        for row in self.rows:
            text = ~self.prompt.is_vision[row]
            if self.prompt.valid is not None:
                text &= self.prompt.valid[row]
            out.append(table(self.ids[row, -len(text) :][text.to(self.ids.device)]))
        return out

    def answer(self, policies: Mapping[int, Policy | None], tokens: int = 1) -> dict[int, Answer]:
        patch = self.generate.patch
        entries: list[Policy | None] = [TextOnly() for _ in self.prompt.layouts]
        for i, policy in policies.items():
            entries[self.rows[i]] = policy
        has_prompt = patch.inner is patch.model  # else its generate returns new tokens only
        names = patch.forward_hooks.inner_names if has_prompt else ("attention_mask", *patch.adapter.image_inputs)
        given = {name: self.kwargs[name] for name in (*names, CROP_GRIDS) if name in self.kwargs}
        given |= {"input_ids": self.ids, "policy": entries, "max_new_tokens": tokens, "do_sample": False}
        out = self.generate(**{**given, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True})
        trace = last_traces.get()[patch.key]
        assert trace is not None  # the try was a call of this context
        self.tried.traces.append((trace, {self.rows[i] for i in policies}))
        ends = patch.inner.generation_config.eos_token_id
        said = answers_in(out, self.ids.shape[1] if has_prompt else 0, ends)
        return {i: said[self.rows[i]] for i in policies}


def answers_in(out: Any, prompt_length: int, ends: int | Sequence[int] | None) -> list[Answer]:
    """What each row of a ``generate`` said, up to its first end-of-sequence token.

    Args:
        out: made with ``return_dict_in_generate=True, output_logits=True``. ends: the ids of such tokens.
    """
    stops = set(ends) if isinstance(ends, Sequence) else {ends}
    logits, answers = torch.stack(out.logits, 1), []
    for ids, row in zip(out.sequences[:, prompt_length:], logits, strict=True):
        n = next((t + 1 for t, token in enumerate(ids.tolist()) if token in stops), len(ids))
        answers.append(Answer(ids[:n], row[:n]))
    return answers


def check_resolvable(adapter: Adapter, kwargs: Mapping[str, Any], default: Any, ids: Any) -> None:
    """Refuse ways of generating, and families, in which nothing can be tried first.

    Raises:
        UnsupportedError: naming the way out.
    """
    config = kwargs.get("generation_config") or default
    several = [kwargs.get(n, getattr(config, n, None)) or 1 for n in ("num_beams", "num_return_sequences")]
    cache = cache_in(kwargs)
    for wrong, what in (
        (max(several) > 1, "num_beams or num_return_sequences above 1"),
        (kwargs.get("streamer") is not None, "a streamer"),
        (kwargs.get("assistant_model") is not None, "an assistant_model"),
        (cache is not None and cache.get_seq_length() > 0, "a cache that already holds tokens"),
        (ids is None or kwargs.get("inputs_embeds") is not None, "inputs_embeds"),
    ):
        if wrong:
            raise UnsupportedError(
                f"a policy that tries answers before it chooses cannot work with {what}: leave it out, or give a fixed "
                "policy (e.g. m3:tokens=36)"
            )
    if adapter.returns_new_tokens_only:
        raise UnsupportedError(
            f"policies that try answers before they choose do not run on {adapter.family}: give a fixed "
            "policy (e.g. m3:tokens=36), or convert the checkpoint to transformers' own LLaVA (`vtr convert`)"
        )


def resolve_rows(
    generate: Generate, ids: torch.Tensor, kwargs: Mapping[str, Any], policies: Sequence[Policy | None], prompt: Prompt
) -> tuple[list[Policy | None] | None, Tried]:
    """Every row's policy after those that choose one have chosen (None: nothing is reduced), and what choosing took.

    Raises:
        TypeError, ValueError: a policy did not choose one for each of its rows, or one that chooses again.
    """
    out, tried = list(policies), Tried(Clock(ids.device))
    kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"}
    with torch.no_grad(), tried.clock, shared_features(generate.patch.model):
        for policy in {id(p): p for p in policies if p is not None and p.asks("resolve")}.values():
            rows = [row for row, p in enumerate(policies) if p is policy]
            chosen = policy.resolve(GenerateTries(generate, ids, kwargs, prompt, rows, tried))
            if not isinstance(chosen, list) or len(chosen) != len(rows):
                raise TypeError(f"{type(policy).__name__}.resolve must return a list of {len(rows)} policies")
            for row, one in zip(rows, chosen, strict=True):
                if one is not None and one.asks("resolve"):
                    raise ValueError(f"{type(policy).__name__}.resolve chose {one.spec!r}, which would choose again")
                out[row] = one
        return generate.patch.choice.policies(out, len(out)), tried


# -- one run of the tower for all -------------------------------------------------------------------------------------
PLAIN = (bool, int, float, str, type(None))
"""What a tower may be called with beside tensors, by itself or in a list, so that a run of it can be shared."""


@dataclass(frozen=True)
class Run:
    """One forward of the tower.

    Attributes:
        given: its arguments but for ``output_hidden_states``, by name or place.
        states: the hidden states it was asked for: True for all, a set of layers, None for none.
        inside: what of its layers policies read.
    """

    given: dict[str | int, Any]
    states: bool | frozenset[int] | None
    out: Any
    inside: Inside

    def serves(self, given: dict[str | int, Any], states: bool | frozenset[int] | None, call: Captures | None) -> bool:
        """Whether this run gave what such a run would give, bit for bit."""
        if self.states != states and (self.states is not True or states is None):
            return False
        same = self.given.keys() == given.keys() and self.inside.serves(call)
        return same and all(_equal(self.given[name], value) for name, value in given.items())


def _equal(one: Any, other: Any) -> bool:
    """Of two arguments. Tensors bit for bit, and where and how they are kept."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and one == other
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and torch.equal(one, other)


@dataclass(eq=False)
class Shared:
    """What one block has encoded. ``computed``, ``reused``: how often each happened."""

    runs: list[Run] = field(default_factory=list)
    computed: int = 0
    reused: int = 0


_blocks: ContextVar[Mapping[int, Shared]] = ContextVar("vtr_shared_features", default=MappingProxyType({}))
"""The blocks open in this context, by the id of their tower; replaced, never changed in place."""
_lock = threading.Lock()


@dataclass(eq=False)
class SharedForward:
    """Stands in for a tower's forward while some context shares features; the others get the forward itself.

    Attributes:
        own: what the tower's ``__dict__`` held before. users: open blocks, in whatever context.
    """

    tower: Any
    forward: Any
    own: Any
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = _blocks.get().get(id(self.tower))
        given = dict[str | int, Any](enumerate(args)) | kwargs
        states = _states(given.pop("output_hidden_states", None))
        if block is None or not self._simple(given):
            return self.forward(*args, **kwargs)
        call = active()
        for run in block.runs:
            if run.serves(given, states, call):
                block.reused += 1
                run.inside.give(call)
                return copy.copy(run.out)
        with kept_inside() as inside:
            out = self.forward(*args, **kwargs)
        block.computed += 1
        block.runs.append(Run(given, states, out, inside))
        return copy.copy(out)

    def _simple(self, given: dict[str | int, Any]) -> bool:
        """Whether the output depends on tensors and plain values alone, and nothing else is to happen."""
        plain = all(isinstance(value, torch.Tensor) or _is_plain(value) for value in given.values())
        return plain and not torch.is_grad_enabled() and not _has_inner_hooks(self.tower)


def _is_plain(value: Any) -> bool:
    return all(isinstance(one, PLAIN) for one in (value if isinstance(value, (list, tuple)) else [value]))


def _states(wanted: Any) -> bool | frozenset[int] | None:
    """transformers takes True, a layer, or a list of layers."""
    if wanted is None or isinstance(wanted, bool):
        return wanted or None
    return frozenset(wanted if isinstance(wanted, (list, tuple)) else [wanted])


def _has_inner_hooks(tower: Any) -> bool:
    """Whether somebody else listens to the tower's inner modules; transformers' own hooks take part in the output."""
    inner = (module for module in tower.modules() if module is not tower)
    hooks = (h for m in inner for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(not (VisionHooks.is_own(hook) or _is_transformers(hook)) for hook in hooks)


def _is_transformers(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("transformers.")


@contextmanager
def shared_features(model: Any) -> Iterator[Shared]:
    """Within the block, the vision tower runs once for the same pixels; later calls get the same output again.

    Exact: what is reused is the very output of an earlier run on bit-equal tensors with equal arguments (tensors that
    are not changed in place meanwhile), and what the layers gave in it, where a policy reads them. The tower's own
    hooks, projector, packing and everything behind run as always. If a hook of somebody else sits on a module inside
    the tower, or gradients are on, nothing is reused. Only this thread (this context) is concerned; a block inside a
    block shares the outer one's. The outputs are held until the block ends.

    Raises:
        ValueError: the model has no vision tower of its own.
    """
    model = unwrapped(model)
    tower = model.get_encoder(modality="image")
    if not isinstance(tower, torch.nn.Module) or tower is model:
        raise ValueError(
            f"{type(model).__name__} has no vision tower whose output could be shared: leave the block out"
        )
    known = _blocks.get().get(id(tower))
    if known is not None:
        yield known
        return
    block = Shared()
    token, stand_in = _blocks.set({**_blocks.get(), id(tower): block}), _enter(tower)
    try:
        yield block
    finally:
        _blocks.reset(token)
        _leave(stand_in)


def _enter(tower: Any) -> SharedForward:
    with _lock:
        found = tower.__dict__.get("forward")
        if not isinstance(found, SharedForward) or found.tower is not tower:
            found = tower.forward = SharedForward(tower, tower.forward, found)
        found.users += 1
        return found


def _leave(stand_in: SharedForward) -> None:
    with _lock:
        stand_in.users -= 1
        if not stand_in.users:
            del stand_in.tower.forward
            if stand_in.own is not None:
                stand_in.tower.forward = stand_in.own
