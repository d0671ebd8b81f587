"""Before a ``generate`` runs: policies that look at pictures and try answers, then say what each row's policy is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr.base import Image, Layout, Policy, UnsupportedError
from vtr.engine.call import check_needs_and_wants, last_traces
from vtr.engine.compat import cache_in
from vtr.engine.memo import shared_features
from vtr.engine.prompt import Prompt
from vtr.engine.trace import Clock, Tried

ABSENT = "absent"


@dataclass
class Absent(Policy):
    """Stands in a try for rows that are not tried: their text alone is run."""

    name = ABSENT

    def compress(self, image: Image) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a row said in a try, its end-of-sequence token included.

    Attributes:
        ids: int64 [t]. logits: float [t, vocab_size], what each of them was chosen from.
    """

    ids: torch.Tensor
    logits: torch.Tensor


@dataclass(eq=False)
class Tries:
    """What ``resolve`` may look at and try, for those rows of a ``generate`` that have this policy.

    Rows count from 0; everything given is per row. The vision tower runs once, however much is tried.

    Attributes:
        layouts: where the tokens of each row's images lie.
    """

    patch: Any
    original: Callable[..., Any]
    ids: torch.Tensor
    kwargs: Mapping[str, Any]
    prompt: Prompt
    rows: Sequence[int]
    tried: Tried
    _seen: list[list[Image]] = field(default_factory=list)

    @property
    def layouts(self) -> list[list[Layout]]:
        return [self.prompt.layouts[row] for row in self.rows]

    def images(self) -> list[list[Image]]:
        """Each row's images as they would enter the text model; tower and projector run, the text model does not."""
        if not self._seen:
            self._seen = self._encode()
        return self._seen

    def _encode(self) -> list[list[Image]]:
        adapter = self.patch.adapter
        given = {name: self.kwargs[name] for name in adapter.image_inputs if self.kwargs.get(name) is not None}
        found = adapter.encode(self.patch.model, given)
        found = getattr(found, "pooler_output", found)
        features = torch.cat([part.flatten(0, -2) for part in found])
        sizes = [len(layout) for row in self.prompt.layouts for layout in row]
        if sum(sizes) != len(features):
            raise UnsupportedError(
                f"{type(self.patch.model).__name__} encodes these images into {len(features)} tokens, the prompt has "
                f"{sum(sizes)}: a policy that looks at pictures first works on images alone (no videos)"
            )
        parts, at = iter(features.split(sizes)), {}
        for row, layouts in enumerate(self.prompt.layouts):
            at[row] = [Image(next(parts), layout, i, len(layouts)) for i, layout in enumerate(layouts)]
        return [at[row] for row in self.rows]

    def questions(self) -> list[torch.Tensor]:
        """Each row's text tokens as the text model embeds them: float [n, hidden_size]."""
        table, out = self.patch.inner.get_input_embeddings(), []
        for row in self.rows:
            text = ~self.prompt.is_vision[row]
            if self.prompt.valid is not None:
                text &= self.prompt.valid[row]
            out.append(table(self.ids[row, -len(text) :][text.to(self.ids.device)]))
        return out

    def answer(self, policies: Mapping[int, Policy | None], tokens: int = 1) -> dict[int, Answer]:
        """Let some rows, each under a policy, say up to ``tokens`` tokens, greedily; what it costs is counted."""
        entries: list[Policy | None] = [Absent() for _ in self.prompt.layouts]
        for i, policy in policies.items():
            entries[self.rows[i]] = policy
        has_prompt = self.patch.inner is self.patch.model  # else its generate returns new tokens only
        names = self.patch.names if has_prompt else ("attention_mask", *self.patch.adapter.image_inputs)
        given = {name: self.kwargs[name] for name in names if name in self.kwargs}
        given |= {"input_ids": self.ids, "policy": entries, "max_new_tokens": tokens, "do_sample": False}
        out = self.patch.generate(
            self.original, (), {**given, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}
        )
        trace = last_traces.get()[self.patch.key]
        assert trace is not None  # the try was a call of this context
        self.tried.traces.append((trace, {self.rows[i] for i in policies}))
        ends = self.patch.inner.generation_config.eos_token_id
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


def check_resolvable(kwargs: Mapping[str, Any], default: Any, ids: Any) -> None:
    """Refuse ways of generating in which nothing can be tried first.

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


def resolve_rows(
    patch: Any, original: Callable[..., Any], ids: torch.Tensor, kwargs: Mapping[str, Any],
    policies: Sequence[Policy | None], prompt: Prompt,
) -> tuple[list[Policy | None], Tried]:  # fmt: skip
    """Every row's policy after those that choose one have chosen, and what choosing took.

    Raises:
        TypeError, ValueError: a policy did not choose one for each of its rows, or one that chooses again.
    """
    out = list(policies)
    tried = Tried(Clock(ids.device))
    kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"}
    with torch.no_grad(), tried.clock, shared_features(patch.model):
        for policy in {id(p): p for p in policies if p is not None and p.asks("resolve")}.values():
            rows = [row for row, p in enumerate(policies) if p is policy]
            chosen = policy.resolve(Tries(patch, original, ids, kwargs, prompt, rows, tried))
            if not isinstance(chosen, list) or len(chosen) != len(rows):
                raise TypeError(f"{type(policy).__name__}.resolve must return a list of {len(rows)} policies")
            for row, one in zip(rows, chosen, strict=True):
                if one is not None and one.asks("resolve"):
                    raise ValueError(f"{type(policy).__name__}.resolve chose {one.spec!r}, which would choose again")
                out[row] = one
        patch.adapter.refuse(out)
        for one in {id(p): p for p in out if p is not None}.values():
            one.check(patch.geometry.num_hidden_layers)
            check_needs_and_wants(one, patch.geometry.num_hidden_layers)
            one.check_model(patch.model)
    return out, tried
