"""A decoder of vLLM as the engine's questions and probes see one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vtr.answers import KeyNorms
from vtr.base import UnsupportedError
from vtr.engine.asked import Asked, AskedNorms
from vtr.engine.checks import check_route
from vtr.engine.packed import Packed
from vtr.engine.positions import Positions
from vtr.engine.probes import Probes
from vtr.engine.questions import Questions
from vtr.engine.rows import Row
from vtr.engine.scores import Queries
from vtr.engine.trace import Geometry, Trace

Fail = Callable[[Sequence[int], Exception], None]
"""(rows, what their policy raised): these requests end in an error, and go on without their policy until then."""


class PlainPositions:
    """In place of a rotary embedding: vLLM's layers turn by positions themselves, so these go along as they are."""

    kinds: tuple[None, ...]
    why_fixed = None

    def __init__(self, depth: int, axes: int) -> None:
        self.kinds, self.many_axes = (None,) * depth, axes > 1

    def of(self, kind: str | None, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """int64 [1, T, axes] of ids [axes, T]."""
        return ids.T[None]


@dataclass(frozen=True, eq=False)
class ServedDecoder:
    """The language model of a vLLM model.

    Attributes:
        text: the module with ``layers`` and ``norm``. geometry: its sizes on this rank. names: of each layer's
            attention, as caches and metadata are called.
    """

    text: Any
    geometry: Geometry
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: Any) -> ServedDecoder:
        """Read it off a loaded model.

        Raises:
            UnsupportedError: layers that are built in another way than those policies have been tried in.
        """
        language = model.get_language_model() if hasattr(model, "get_language_model") else model
        text = getattr(language, "model", None)
        layers = list(getattr(text, "layers", ()))
        for layer in layers:
            attn = getattr(layer, "self_attn", None)
            if not hasattr(getattr(attn, "attn", None), "layer_name") or not hasattr(layer, "mlp"):
                raise _strange(language)
        if not layers or not hasattr(text, "norm"):
            raise _strange(language)
        first = layers[0].self_attn.attn
        geometry = Geometry(len(layers), first.num_heads, first.num_kv_heads, first.head_size, (0,) * len(layers))
        return cls(text, geometry, tuple(layer.self_attn.attn.layer_name for layer in layers))

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self.geometry.num_hidden_layers

    @property
    def windows(self) -> tuple[None, ...]:
        """No layer has one: decoders with sliding windows are refused."""
        return (None,) * self.depth


def _strange(language: Any) -> UnsupportedError:
    return UnsupportedError(
        f"policies act inside decoders whose layers have a self_attn.attn and an mlp, in front of a norm; "
        f"{type(language).__name__} is built otherwise: start the server without --decoder-policies"
    )


class ServedQuestions(Questions):
    """Asks policies; what one of them raises is the matter of its own requests, not of the whole engine."""

    def __init__(
        self, rows: list[Row], packed: Packed, positions: Positions, decoder: Any, trace: Trace, fail: Fail
    ) -> None:
        super().__init__(rows, packed, positions, None, decoder, trace)
        self.probes: Probes = ServedProbes(rows, packed, positions, None, decoder, trace)
        self.fail = fail

    def leave_out(self, rows: Sequence[int]) -> None:
        """Ask nothing more of these rows."""
        for row in rows:
            self.pruned[row] = self.routed[row] = False

    def _ask(
        self, question: str, index: int, hidden: torch.Tensor, asks: Sequence[bool], layer: Any = None
    ) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            if asks[i]:
                groups.setdefault(id(row.policy), []).append(i)
        for rows in groups.values():
            mine = [i in rows for i in range(len(self.rows))]
            try:
                said = super()._ask(question, index, hidden, mine, layer)
                if question == "route":
                    for i, answer in said.items():
                        if answer is not None:
                            check_route(answer, self.packed.counts[i], self.rows[i].policy)  # type: ignore[arg-type]
                answers.update(said)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a policy raises must not end the engine
                self.fail(rows, error)
        return answers

    def _kept(self, question: str, answers: dict[int, Any], width: int) -> list[Any]:
        try:
            return super()._kept(question, answers, width)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # some answer is none: whose?
            for i, answer in list(answers.items()):
                try:
                    super()._kept(question, {i: answer}, width)
                except Exception as error:
                    answers.pop(i)
                    self.fail([i], error)
            return super()._kept(question, answers, width)


class ServedProbes(Probes):
    """Takes scores from what vLLM's attention modules are called with."""

    def take(self, attention: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        """Note what is wanted of a layer. query, key: [T, heads · d] of the tokens that pass it, after rope."""
        q, k = (t.view(len(t), -1, attention.head_size).transpose(0, 1) for t in (query, key))
        for number, probe in enumerate(self._probes):
            self.taken[number] = over_ranks(probe.asked, q, k, attention)

    def _asked_of(self, kind: Any, rows: list[int]) -> Any:
        if not isinstance(kind, str) and isinstance(kind[1], KeyNorms):
            return ServedNorms(kind[0], tuple(rows), ())  # type: ignore[arg-type]
        return super()._asked_of(kind, rows)

    def _ahead(self, layer: Any, hidden: torch.Tensor, rope: Any, asked: Any, *rest: Any) -> torch.Tensor:
        found = looked(layer, hidden[0], rope[0].T)
        return over_ranks(asked, *found, layer.self_attn.attn)


class ServedNorms(AskedNorms):
    """Norms of keys: a request's positions begin at 0 here, so nothing is to be turned back."""

    def found(self, key: torch.Tensor, heads: int, attn: Any) -> torch.Tensor:
        """float32 [T] of keys [kv_heads, T, d] after rope, of which each counts for ``heads // kv_heads``."""
        return key.float().abs().sum((0, 2)) * (heads // key.shape[0])


class _Looked(Exception):
    """Queries and keys are known: the attention itself is not to run."""


def looked(layer: Any, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [heads, T, d] that ``layer`` is about to make of hidden states [T, D]; nothing is cached."""
    inner, found = layer.self_attn.attn, SimpleNamespace()

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        found.query, found.key = args[0], args[1]
        raise _Looked

    handle = inner.register_forward_pre_hook(stop, prepend=True)
    try:
        layer.self_attn(
            positions=positions if len(positions) > 1 else positions[0], hidden_states=layer.input_layernorm(hidden)
        )
    except _Looked:
        pass
    finally:
        handle.remove()
    q, k = (t.view(len(hidden), -1, inner.head_size).transpose(0, 1) for t in (found.query, found.key))
    return q, k


def over_ranks(asked: Any, query: torch.Tensor, key: torch.Tensor, attention: Any) -> torch.Tensor:
    """What ``asked`` find in queries and keys [heads, T, d], of the heads of all ranks: every rank chooses alike."""
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )

    ranks = get_tensor_model_parallel_world_size()
    if isinstance(asked, AskedNorms):
        norms = asked.found(key, query.shape[0], attention)
        return norms if ranks == 1 else tensor_model_parallel_all_reduce(norms)
    query = query.index_select(1, asked.places.flatten())
    apart = ranks > 1 and adds_up(asked)
    if ranks > 1 and not apart:
        query, key = (tensor_model_parallel_all_gather(t.contiguous(), dim=0) for t in (query, key))
    found: torch.Tensor = asked.found(query, key, attention.impl.scale, None, None)
    return tensor_model_parallel_all_reduce(found) / ranks if apart else found


def adds_up(asked: Queries | Asked) -> bool:
    """Whether what the ranks find of their heads may be averaged: not where the strongest head may be elsewhere, nor
    where the largest of several tokens' means is asked for.
    """
    if isinstance(asked, Queries):
        return not asked.strongest
    return asked.request.heads == "mean" and asked.request.over != "max"
