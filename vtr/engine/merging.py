"""New tokens that ``prune`` makes out of some that go: where they stand, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vtr.base import Merged, Policy
from vtr.engine.checks import checked_keep
from vtr.engine.once import from_host
from vtr.engine.packed import Packed, on_device
from vtr.engine.trace import Merge, RowTrace


class Growth(NamedTuple):
    """What a merge does to the packed tokens, after a cut.

    Attributes:
        origin: int64 [T], which of the tokens that were left each one was (of a new one: the one in front of it).
        places: int64 [new]. states: [new, D].
    """

    origin: torch.Tensor
    places: torch.Tensor
    states: torch.Tensor

    def applied(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, T before, D] → [1, T, D]."""
        grown = hidden.index_select(1, self.origin)
        return grown.index_copy(1, self.places, self.states[None].to(grown))


def checked_merge(answer: Merged, count: int, width: int, policy: Policy, device: torch.device) -> torch.Tensor:
    """What a merging answer keeps, ascending.

    Raises:
        TypeError, ValueError: it keeps nothing, makes more tokens than there were, or names sources that there are not.
    """
    who = f"{type(policy).__name__}.prune"
    keep = checked_keep(answer.keep, count, "prune", policy, device)
    states, sources = answer.states, answer.sources
    if not isinstance(states, torch.Tensor) or not states.is_floating_point() or states.dim() != 2:
        raise TypeError(f"{who}: the states of vtr.Merged are floats [new tokens, hidden_size]")
    if tuple(states.shape) != (len(sources), width):
        raise ValueError(
            f"{who}: {len(sources)} sources need states of {(len(sources), width)}, got {tuple(states.shape)}"
        )
    if len(keep) == 0:
        raise ValueError(f"{who}: vtr.Merged keeps at least one token, behind which the new ones stand")
    if len(keep) + len(states) > count:
        raise ValueError(f"{who} makes {len(keep) + len(states)} tokens out of {count}: a row cannot become longer")
    if any(not 0 <= s < count for one in sources for s in one):
        raise ValueError(f"{who}: sources are indices in [0, {count})")
    return keep


class Merging:
    """The merges of one layer.

    Args:
        packed: as it is before the cut. answers: row → what its policy answered.
    """

    def __init__(self, packed: Packed, answers: Mapping[int, Merged], traces: list[RowTrace]) -> None:
        self.packed, self.answers, self.traces = packed, answers, traces
        spans = packed.vision_spans()
        ends = from_host([spans[row].stop - 1 for row in answers], packed.vision.device)
        self.last = packed.vision.index_select(0, ends)
        self.before = {row: packed.alive[spans[row]] for row in answers}

    def grow(self, places: torch.Tensor) -> Growth:
        """After a cut that has left ``places``: stand behind what the row's last vision token stood behind."""
        packed, new = self.packed, {row: len(answer.states) for row, answer in self.answers.items()}
        at = torch.searchsorted(places, self.last, right=True) - 1
        self._describe()
        origin, made = packed.grow(at, new)
        return Growth(origin, made, torch.cat([answer.states for answer in self.answers.values()]))

    def _describe(self) -> None:
        packed, device = self.packed, self.packed.vision.device
        number = packed.entered()
        flat: list[torch.Tensor] = []
        sizes: list[int] = []
        for row, answer in self.answers.items():
            made_of = [list(one) or [0] for one in answer.sources]
            self.traces[row].merges.append(Merge(number, self.before[row], answer.sources))
            number += len(made_of)
            (every,) = on_device([torch.tensor([s for one in made_of for s in one], dtype=torch.int64)], device)
            flat.append(self.before[row].index_select(0, every))
            sizes += map(len, made_of)
        sources = torch.cat(flat)
        first = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        each = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        first, each, many = on_device([first, each, torch.tensor(sizes)], device)
        means = []
        for features in packed.features:
            total = features.new_zeros(len(sizes), features.shape[1])
            means.append(total.index_add(0, each, features.index_select(0, sources)) / many[:, None])
        packed.describe(sources.index_select(0, first), means)


def merges_of(answers: Mapping[int, Any]) -> dict[int, Merged]:
    """Those answers that make new tokens, by row."""
    return {row: answer for row, answer in sorted(answers.items()) if isinstance(answer, Merged) and len(answer.states)}
