"""Choosing while the prompt is read: rows try their policy's options one by one, and go on with what they have.

All happens inside the forward of the prompt, at the text model: images are encoded and merged once, rows that are
accepted leave the batch, and the accepted try's states and cache *are* those of the forward. ``generate`` around it
never learns that there were tries, so sampling, beams and streamers work as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import Began, Policy, UnsupportedError
from vtr.engine.ahead import Ahead, Drafted
from vtr.engine.cache import RaggedLayer
from vtr.engine.compat import NAMES, cache_in, put_cache
from vtr.engine.gauging import stayed
from vtr.engine.joining import joined
from vtr.engine.once import from_host
from vtr.engine.prefix import begun, behind, columns_of
from vtr.engine.request import Request, per_token
from vtr.engine.trace import Clock, Trace

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


def chooses(policies: Sequence[Policy | None] | None) -> bool:
    """Whether some row's policy chooses while the prompt is read."""
    return policies is not None and any(p is not None and p.asks("accept") for p in policies)


def options_of(policy: Policy | None, images: bool) -> list[Policy | None]:
    """What a row is tried under, one after the other. images: whether it has any; without, nothing is tried."""
    if policy is None or not policy.asks("accept"):
        return [policy]
    return list(policy.options())[0 if images else -1 :]


@dataclass(eq=False)
class Attempt:
    """Some rows of the batch, read under one policy each.

    Attributes:
        rows: which of the batch. policies: theirs. trace: what the try cost.
        states: [rows, L, D], the text model's output. layers: of the cache it filled.
        said: int64 [rows, t], the likeliest tokens behind the prompt; None before anybody has looked.
        sure: float32 [rows, t], the probability of each. there: bool [rows, t], False behind a row's end.
        ended: bool [rows], whose last token ends the answer.
        following: per token but the last: the output of the step that read it, [rows, 1, D].
    """

    rows: list[int]
    policies: list[Policy | None]
    trace: Trace
    out: Any
    layers: list[RaggedLayer]
    said: torch.Tensor | None = None
    sure: torch.Tensor | None = None
    there: torch.Tensor | None = None
    ended: torch.Tensor | None = None
    following: list[torch.Tensor] = field(default_factory=list)

    def began(self, at: Sequence[int], policy: Policy) -> Began:
        """What some of its rows, by their place in it, begin to say, as their chooser hears it."""
        assert self.said is not None and self.sure is not None and self.there is not None
        states, heard = self.out.last_hidden_state[:, -1], slice(policy.hears)
        found = [self.said[:, heard], self.sure[:, heard], self.there[:, heard], states]
        found += [stayed(self.trace.rows, states.device)] if policy.gauges else []
        if len(at) != len(self.rows):
            index = from_host(list(at), states.device)
            found = [t.index_select(0, index) for t in found]
        return Began(*found)


class Choosing:
    """One forward of the text model in which rows choose.

    Args:
        request: of the whole batch. kwargs: the text model's arguments, inputs_embeds [B, L, D] among them.
    """

    def __init__(self, patch: Patch, module: Any, request: Request, kwargs: dict[str, Any]) -> None:
        self.patch, self.module, self.request, self.kwargs = patch, module, request, kwargs
        self.embeds: torch.Tensor = kwargs["inputs_embeds"]
        generation = request.generation
        assert generation is not None  # direct forwards are refused
        self.generation = generation
        self.ends = torch.tensor(generation.ends, device=self.embeds.device)
        self.options = [
            options_of(p, bool(images)) for p, images in zip(request.policies, request.prompt.layouts, strict=True)
        ]
        self.tried: list[list[tuple[str | None, int]]] = [[] for _ in self.options]
        self.history: dict[int, list[tuple[Attempt, int]]] = {row: [] for row in range(len(self.options))}
        self.clock = Clock(self.embeds.device)
        self.before: Attempt | None = None

    def run(self) -> Any:
        """The text model's output; the cache of the call is filled with the rows of what each has accepted."""
        captures, open_, step = self.request.captures, list(range(len(self.options))), 0
        taken, attempts = list[tuple[Attempt, list[int]]](), list[Attempt]()
        while open_:
            attempts.append(attempt := self._try(open_, step))
            doubtful = self._doubtful(attempt, step)
            mine = [i for i, row in enumerate(open_) if row not in doubtful]
            if mine:
                taken.append((attempt, mine))
            self._note_left(attempt, doubtful)
            open_, step = sorted(doubtful), step + 1
        if captures is not None:
            captures.close(keep=False)
        return self._together(taken, attempts)

    # -- one try -----------------------------------------------------------------------------------------------------
    def _try(self, rows: list[int], step: int) -> Attempt:
        from transformers import DynamicCache

        trace, policies = Trace(self.patch.decoder.geometry), [self.options[row][step] for row in rows]
        judged = [self.request.policies[row] if step < len(self.options[row]) - 1 else None for row in rows]
        request = replace(
            self.request, policies=policies, prompt=self.request.prompt.of(rows),
            answer_starts=[self.request.answer_starts[row] for row in rows], attempt=trace,
            gauged=[one is not None and one.gauges for one in judged],
        )  # fmt: skip
        kwargs = dict(self.kwargs) if len(rows) == len(self.options) else self._part(rows)
        cache, read = DynamicCache(), self.before
        columns = 0 if read is None else columns_of(request.prompt, read.layers, kwargs.get("attention_mask"))
        if read is not None and columns:
            at = [read.rows.index(row) for row in rows]
            cache.layers = begun(read.layers, at, request.prompt, policies, columns)  # type: ignore[assignment]
            cache.layer_class_to_replicate = None
            request, kwargs = behind(request, kwargs, columns)
        put_cache(self.module, kwargs, cache)
        out = self.module(**{**kwargs, "use_cache": True, "vtr_request": request})
        if read is not None and columns:
            first = read.out.last_hidden_state[:, :columns].index_select(0, from_host(at, self.embeds.device))
            out.last_hidden_state = torch.cat([first, out.last_hidden_state], 1)
        layers: list[RaggedLayer] = cache.layers  # type: ignore[assignment]
        self.before = Attempt(rows, policies, trace, out, layers)
        return self.before

    def _part(self, rows: list[int]) -> dict[str, Any]:
        """The arguments of a forward of some rows."""
        whole, (batch, length) = self.kwargs, self.embeds.shape[:2]
        at = from_host(rows, self.embeds.device)
        out = dict(whole)
        for name in ("inputs_embeds", *per_token(whole, batch, length)):
            out[name] = whole[name].index_select(0, at.to(whole[name].device))
        ids = whole.get("position_ids")
        if ids is not None and ids.shape[-2] == batch:
            out["position_ids"] = ids.index_select(ids.dim() - 2, at.to(ids.device))
        out["attention_mask"] = _of_rows(whole.get("attention_mask"), at, batch)
        is_vision = self.request.prompt.is_vision
        owner = torch.arange(batch)[:, None].expand_as(is_vision)[is_vision]
        mine = (owner[:, None] == torch.tensor(rows)).any(1).nonzero().squeeze(1)
        for name, value in whole.items():  # [vision tokens of the batch, D] for each of the first layers
            if isinstance(value, list) and value and all(_is_of(t, len(owner)) for t in value):
                out[name] = [t.index_select(0, mine.to(t.device)) for t in value]
        return out

    # -- deciding ------------------------------------------------------------------------------------------------------
    def _doubtful(self, attempt: Attempt, step: int) -> set[int]:
        """The rows of a try that are to be read again."""
        groups: dict[int, tuple[Policy, list[int]]] = {}
        for i, row in enumerate(attempt.rows):
            policy = self.request.policies[row]
            if policy is not None and step < len(self.options[row]) - 1:
                groups.setdefault(id(policy), (policy, []))[1].append(i)
        if not groups:
            return set()
        with self.clock:
            self._look(attempt, max(policy.hears for policy, _ in groups.values()))
            said = []
            for policy, mine in groups.values():
                rows = [attempt.rows[i] for i in mine]
                for i, row in zip(mine, rows, strict=True):
                    self.history[row].append((attempt, i))
                accepted = policy.accept(step, self._began(rows, policy))
                check_accepted(policy, accepted, len(rows))
                said.append(accepted.to(self.embeds.device))
            known = torch.cat(said).tolist()
        rows = [attempt.rows[i] for _, mine in groups.values() for i in mine]
        doubtful = {row for row, sure in zip(rows, known, strict=True) if not sure}
        return self._beams_alike(doubtful)

    def _began(self, rows: list[int], policy: Policy) -> list[Began]:
        """What rows that have tried the same options begin to say under each."""
        out = []
        for tried in zip(*(self.history[row] for row in rows), strict=True):
            attempts = {id(attempt) for attempt, _ in tried}
            assert len(attempts) == 1  # rows are open together from the first option on
            out.append(tried[0][0].began([i for _, i in tried], policy))
        return out

    def _beams_alike(self, doubtful: set[int]) -> set[int]:
        """Beams of one prompt go on together: as the first of them."""
        beams = self.generation.trace.beams
        return {row for row in range(len(self.options)) if row - row % beams in doubtful} if beams > 1 else doubtful

    def _look(self, attempt: Attempt, tokens: int) -> None:
        """Read the first tokens off a try, and let it say the others."""
        head = self.patch.inner.get_output_embeddings()
        states = attempt.out.last_hidden_state[:, -1]
        said, sure = _likeliest(head(states))
        ids, probabilities = [said], [sure]
        ended = torch.isin(said, self.ends)
        there = [torch.ones_like(ended)]
        for number in range(1, min(tokens, self.generation.room)):
            if bool(ended.all()):
                break
            if number == 1:
                for layer in attempt.layers:  # a window keeps what is seen from where the answer begins
                    layer.activate_past_recording()
            states = self._step(attempt, said, number)
            attempt.following.append(states)
            there.append(~ended)
            said, sure = _likeliest(head(states[:, -1]))
            ids.append(said)
            probabilities.append(sure)
            ended = ended | torch.isin(said, self.ends)
        attempt.said, attempt.sure = torch.stack(ids, 1), torch.stack(probabilities, 1)
        attempt.there, attempt.ended = torch.stack(there, 1), ended

    def _step(self, attempt: Attempt, said: torch.Tensor, number: int) -> torch.Tensor:
        """One token more of every row: the text model's output, [rows, 1, D]."""
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = attempt.layers, None  # type: ignore[assignment]
        kwargs: dict[str, Any] = {"inputs_embeds": self.module.get_input_embeddings()(said[:, None]), "use_cache": True}
        ids = self.kwargs.get("position_ids")
        if ids is not None:
            last = ids[..., -1:] + number
            if last.shape[-2] == len(self.options):
                last = last.index_select(last.dim() - 2, from_host(attempt.rows, last.device))
            kwargs["position_ids"] = last
        put_cache(self.module, kwargs, cache)
        states: torch.Tensor = self.module(**kwargs).last_hidden_state
        return states

    # -- what comes of it ------------------------------------------------------------------------------------------
    def _note_left(self, attempt: Attempt, doubtful: set[int]) -> None:
        for row, noted in zip(attempt.rows, attempt.trace.rows, strict=True):
            if row in doubtful:
                self.tried[row].append((noted.spec, noted.counts[0]))

    def _together(self, taken: list[tuple[Attempt, list[int]]], attempts: list[Attempt]) -> Any:
        """The output of all rows; their cache becomes that of the call."""
        drafts = self._drafts(taken)
        first, everything = taken[0][0], len(taken[0][1]) == len(self.options)
        tail = min(a.layers[0].state.tail - len(a.following) for a, _ in taken)
        parts = [(attempt.layers, mine, [attempt.rows[i] for i in mine]) for attempt, mine in taken]
        self._note(taken, attempts)
        layers = first.layers if everything else joined(parts)
        out = first.out
        if not everything:
            out = copy.copy(out)
            out.last_hidden_state = _gathered(taken, self.embeds)
        state = layers[0].state
        state.attempt, state.logical, state.tail = None, self.embeds.shape[1], tail
        state.rope_deltas = self._deltas(state.rope_deltas)
        self._publish(out, layers)
        if drafts:
            fields = {name: value for name, value in out.items() if name != "last_hidden_state"}
            module, trace, pad = self.module, self.generation.trace, self.generation.pad
            state.decoding = Ahead(module, layers, drafts, fields, type(out), pad, trace)
        return out

    def _publish(self, out: Any, layers: list[RaggedLayer]) -> None:
        from transformers import DynamicCache

        cache = cache_in(self.kwargs)
        cache = DynamicCache() if cache is None else cache
        cache.layers, cache.layer_class_to_replicate = layers, None
        for name in NAMES:
            if getattr(out, name, None) is not None:
                setattr(out, name, cache)
        self.generation.note_forward(layers)

    def _note(self, taken: list[tuple[Attempt, list[int]]], attempts: list[Attempt]) -> None:
        """The trace of the call: its rows as they were accepted, and what all tries cost."""
        trace = self.generation.trace
        found = {a.rows[i]: a.trace.rows[i] for a, mine in taken for i in mine}
        trace.rows = [found[row] for row in range(len(self.options))]
        for row, tried in zip(trace.rows, self.tried, strict=True):
            row.tries = tried
        geometry, kept = self.patch.decoder.geometry, {id(attempt) for attempt, _ in taken}
        for attempt in attempts:
            one, pairs = attempt.trace, [layer.attended for layer in attempt.layers]
            decode = one.decode_flops + sum(geometry.attention(i).pair * int(n) for i, n in enumerate(pairs))
            trace.prefill_flops += one.prefill_flops + (0 if id(attempt) in kept else decode)
            trace.decode_flops += decode if id(attempt) in kept else 0
            trace.selector_flops += one.selector_flops
            trace.clocks += one.clocks
        trace.clocks.append(self.clock)

    def _deltas(self, found: torch.Tensor | None) -> torch.Tensor | None:
        """int64 [rows, 1]: what M-RoPE adds to positions of text to come, of the whole batch."""
        deltas, ids = getattr(self.patch.entry, "rope_deltas", None), self.kwargs.get("position_ids")
        rows = len(self.options)
        if deltas is None or ids is None or ids.dim() != 3 or rows % len(deltas):
            return found
        made: torch.Tensor = deltas.repeat_interleave(rows // len(deltas), 0)
        return made

    def _drafts(self, taken: list[tuple[Attempt, list[int]]]) -> list[Drafted]:
        """What the accepted tries have said beyond the first token, for ``generate`` to say it again at no cost.

        Rows that nobody has looked at say as much as the others.
        """
        longest = max(len(attempt.following) for attempt, _ in taken)
        if not longest:
            return []
        drafts = []
        for attempt, mine in taken:
            if attempt.said is None:
                self._look(attempt, longest + 1)
            assert attempt.said is not None and attempt.there is not None and attempt.ended is not None
            over = bool(attempt.ended.index_select(0, from_host(mine, attempt.ended.device)).all())
            rows = [attempt.rows[i] for i in mine]
            drafts.append(Drafted(rows, mine, attempt.said, attempt.there, attempt.following, over))
        return drafts


def check_accepted(policy: Policy, said: Any, rows: int) -> None:
    """Raise TypeError unless a policy has answered for each of its rows."""
    if not isinstance(said, torch.Tensor) or said.dtype != torch.bool or said.shape != (rows,):
        raise TypeError(f"{type(policy).__name__}.accept must return a bool tensor [{rows}], got {said!r}")


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [rows], float32 [rows]): the likeliest token and its probability. logits: [rows, vocab_size]."""
    logits = logits.float()
    best, ids = logits.max(-1)
    return ids, (best - logits.logsumexp(-1)).exp()


def _of_rows(mask: Any, at: torch.Tensor, batch: int) -> Any:
    """Masks of some rows: 2-D, 4-D, or several of these by name."""
    if isinstance(mask, Mapping):
        return {name: _of_rows(one, at, batch) for name, one in mask.items()}
    if not isinstance(mask, torch.Tensor) or mask.shape[0] != batch:
        return mask
    return mask.index_select(0, at.to(mask.device))


def _is_of(t: Any, tokens: int) -> bool:
    return isinstance(t, torch.Tensor) and t.dim() == 2 and len(t) == tokens


def _gathered(taken: Sequence[tuple[Attempt, list[int]]], like: torch.Tensor) -> torch.Tensor:
    """[B, L, D]: the output of every row in the try that was accepted. like: [B, L, D]."""
    first = taken[0][0].out.last_hidden_state
    out = first.new_empty(len(like), *first.shape[1:])
    for attempt, mine in taken:
        part = attempt.out.last_hidden_state
        here = part if len(mine) == len(attempt.rows) else part.index_select(0, from_host(mine, part.device))
        out.index_copy_(0, from_host([attempt.rows[i] for i in mine], part.device), here)
    return out


def check_choosing(kwargs: Mapping[str, Any], default: Any, patch: Patch) -> None:
    """Refuse ways of generating in which nothing can be tried on the way. default: the model's generation config.

    Raises:
        UnsupportedError: naming the way out.
    """
    config = kwargs.get("generation_config") or default
    cache = cache_in(kwargs)

    def said(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    for wrong, what in (
        (kwargs.get("assistant_model") is not None or said("prompt_lookup_num_tokens"), "drafts of another model"),
        (said("assistant_early_exit"), "assistant_early_exit"),
        (said("penalty_alpha"), "penalty_alpha"),
        (said("use_cache") is False, "use_cache=False, where every token reads the prompt again"),
        (said("cache_implementation") == "static", "cache_implementation='static'"),
        (cache is not None and cache.get_seq_length() > 0, "a cache that already holds tokens"),
    ):
        if wrong:
            raise UnsupportedError(
                f"a policy that chooses while the prompt is read cannot work with {what}: leave it out, or give a "
                "fixed policy (e.g. m3:tokens=36)"
            )
    if patch.path != "packed":
        raise UnsupportedError(
            "a policy that chooses while the prompt is read needs a decoder that runs packed rows, and this model's "
            f"does not ({patch.why}): use a fixed policy, or autoscale, which tries around generate"
        )
    if not callable(getattr(patch.inner, "get_output_embeddings", None)) or patch.inner.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{type(patch.inner).__name__} names no head (get_output_embeddings) to read a try's answer off: give a "
            "fixed policy"
        )
