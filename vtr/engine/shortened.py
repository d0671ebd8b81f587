"""Rows that really are shorter, padded on the left again: what a decoder that cannot run packed rows is given instead.

Everything that is per token is cut as the embeddings are: positions, masks, arguments of the decoder. What a layer
makes of its neighbours (convolutions, recurrent states, relative positions, windows) is then made of the shorter row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vtr.base import UnsupportedError
from vtr.engine.compression import Compression
from vtr.engine.rows import Row
from vtr.engine.short_cache import ShortState


class ShortRows:
    """Where the tokens of the rows are, after their policies have compressed them.

    Args:
        rows: compressed. made: of those that a policy has compressed, how. length: logical columns. device: of the
            decoder's first layer.

    Attributes:
        lengths: of the rows. width: of the longest of them.
        mask: int64 [rows, width], 1 where a token is.
    """

    def __init__(self, rows: Sequence[Row], made: Mapping[int, Compression], length: int, device: torch.device) -> None:
        self.rows, self.made, self.length, self.device = rows, made, length, device
        self.lengths = [row.length for row in rows]
        self.width = max(self.lengths)
        self.pads = [self.width - n for n in self.lengths]
        slots = torch.cat([row.slots + b * length for b, row in enumerate(rows)])
        places = [torch.arange(pad, self.width) + b * self.width for b, pad in enumerate(self.pads)]
        self.slots, self.places = self._put(slots), self._put(torch.cat(places))
        self.mask = self._put((torch.arange(self.width) >= torch.tensor(self.pads)[:, None]).long())

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    # -- into the decoder ------------------------------------------------------------------------------------------
    def take(self, values: torch.Tensor, made: bool = True) -> torch.Tensor:
        """[rows, length, …] → [rows, width, …], 0 for padding.

        Args:
            made: a token that a policy made has the mean of what it was made of; else what belongs to its slot.
        """
        flat = values.flatten(0, 1)
        taken = flat.index_select(0, self.slots.to(flat.device))
        if made and any(one.pooled for one in self.made.values()):
            parts = list(taken.split(self.lengths))
            for b, one in self.made.items():
                if one.pooled:
                    parts[b] = _means(one, values[b].index_select(0, self.rows[b].given.slots.to(flat.device)))
            taken = torch.cat(parts)
        return self._padded(taken)

    def _padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens of all rows, …] → [rows, width, …]."""
        places = self.places.to(tokens.device)
        out = tokens.new_zeros(len(self.rows) * self.width, *tokens.shape[1:]).index_copy(0, places, tokens)
        return out.unflatten(0, (len(self.rows), self.width))

    def embeds(self, embeds: torch.Tensor) -> torch.Tensor:
        """[rows, length, D] → [rows, width, D], tokens that policies made among them."""
        taken = self.take(embeds, made=False).flatten(0, 1)
        places, features = [], []
        for b, one in self.made.items():
            for at, image in one.pooled:
                assert image.pooled is not None
                places.append(at + b * self.width + self.pads[b])
                features.append(image.pooled.features.to(taken))
        if places:
            taken = taken.index_copy(0, self._put(torch.cat(places)), torch.cat(features))
        return taken.unflatten(0, (len(self.rows), self.width))

    def position_ids(self, given: torch.Tensor | None, text_axis: bool) -> torch.Tensor:
        """int64 [rows, width], or [axes, rows, width]: those of one axis close up, of several a token keeps its own.

        Args:
            given: [1 or rows, length], [axes, 1 or rows, length], or None (then tokens are counted).
            text_axis: the first of several axes counts tokens.
        """
        closed = self._closed(given[0] if given is not None and given.dim() == 3 else given)
        if given is None or given.dim() == 2:
            return closed
        kept = torch.stack([self.take(axis.expand(len(self.rows), -1)) for axis in given])
        return torch.cat([closed[None], kept[1:]]) if text_axis else kept

    def _closed(self, given: torch.Tensor | None) -> torch.Tensor:
        """Compressed rows count on from their first position; others keep theirs. 0 for padding."""
        counted = (self.mask.cumsum(1) - 1).clamp(min=0)
        if given is None:
            return counted
        kept = self.take(given.expand(len(self.rows), -1), made=False)
        firsts = self._put(torch.tensor([int(row.given.slots[0]) for row in self.rows]))
        first = given.expand(len(self.rows), -1).gather(1, firsts.to(given.device)[:, None])
        closes = self._put(torch.tensor([b in self.made for b in range(len(self.rows))]))[:, None]
        return torch.where(closes, (counted + first) * self.mask, kept)

    def square(self, mask: torch.Tensor, window: int | None) -> torch.Tensor:
        """[1 or rows, heads, length, length] → [rows, heads, width, width]: a model's own mask, of what is left.

        Padding sees itself alone, and nobody sees it.

        Args:
            mask: bool, True where a token is seen; or float, added to scores.
            window: in tokens; None: all that came before may be seen. Within it the shorter row counts; whatever
                else a model lets its tokens see stays as it was.
        """
        if mask.dim() != 4 or mask.shape[-2:] != (self.length, self.length):
            raise UnsupportedError(
                f"a reduced call takes a 2-D attention_mask [rows, tokens], got one of shape {tuple(mask.shape)}: "
                "pass policy=None"
            )
        seen = (mask if mask.dtype == torch.bool else mask > -1e4).expand(len(self.rows), -1, -1, -1)
        out = seen.new_zeros(len(self.rows), seen.shape[1], self.width, self.width)
        for b, row in enumerate(self.rows):
            slots = row.slots.to(seen.device)
            mine = seen[b].index_select(1, slots).index_select(2, slots)
            if window is not None:
                mine = _within(torch.arange(row.length, device=seen.device), window) | (mine & ~_within(slots, window))
            out[b, :, self.pads[b] :, self.pads[b] :] = mine
        out |= torch.eye(self.width, dtype=torch.bool, device=out.device)
        if mask.dtype == torch.bool:
            return out
        return mask.new_zeros(out.shape).masked_fill(~out, torch.finfo(mask.dtype).min)

    def causal(self, window: int | None) -> torch.Tensor:
        """bool [rows, 1, width, width]: who sees whom where a model has built no mask, since all came before."""
        at = torch.arange(self.width, device=self.mask.device)
        seen = _within(at, self.width if window is None else window) & self.mask.bool()[:, None, None]
        return seen | torch.eye(self.width, dtype=torch.bool, device=seen.device)

    # -- out of the decoder ----------------------------------------------------------------------------------------
    def spread(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, width, D] → [rows, length, D]. A dropped slot carries the last surviving state before it."""
        sources, every = [], []
        for b, row in enumerate(self.rows):
            given = row.given.slots
            last = (torch.searchsorted(row.slots, given, right=True) - 1).clamp(min=0)
            sources.append(last + b * self.width + self.pads[b])
            every.append(given + b * self.length)
        at, into = (torch.cat(some).to(hidden.device, non_blocking=True) for some in (sources, every))
        states = hidden.flatten(0, 1).index_select(0, at)
        out = hidden.new_zeros(len(self.rows) * self.length, hidden.shape[-1]).index_copy(0, into, states)
        return out.unflatten(0, (len(self.rows), self.length))

    def state(self, given: torch.Tensor | None, positions: torch.Tensor) -> ShortState:
        """What a cache of these rows is to know. given: logical positions; positions: those that the decoder gets."""
        several = len(self.rows) > 1
        form = "none" if given is None else "axes" if given.dim() == 3 else "rows"
        if form == "rows" and several and given is not None and given.shape[0] == 1:
            form = "columns"
        if given is not None and form == "axes":
            there = torch.zeros(len(self.rows), self.length, dtype=torch.bool)
            for b, row in enumerate(self.rows):
                there[b, row.given.slots] = True
            known = given.expand(-1, len(self.rows), -1).amax(0)
            following = known.masked_fill(~there.to(known.device), -1).amax(1) + 1
        else:
            following = positions[:, -1] + 1
        return ShortState(
            policies=[row.policy for row in self.rows],
            dropped=[len(row.given.slots) - row.length for row in self.rows],
            mask=self.mask, lengths=list(self.lengths), missing=self.length - self.width, form=form,
            following=following,
        )  # fmt: skip


def _means(made: Compression, values: torch.Tensor) -> torch.Tensor:
    """[tokens before, …] → [tokens after, …]: of a made token the mean of its sources'."""
    flat = values.flatten(1) if values.dim() > 1 else values[:, None]
    numbers = flat.long() if flat.dtype == torch.bool else flat
    return made.means(numbers).to(values.dtype).view(-1, *values.shape[1:])


def _within(at: torch.Tensor, window: int) -> torch.Tensor:
    """bool [n, n]: whether the token at ``at[i]`` sees the one at ``at[j]`` by a causal window."""
    far = at[:, None] - at[None]
    return (far >= 0) & (far < window)


def take_features(
    short: ShortRows, is_vision: torch.Tensor, features: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a text model adds to vision tokens behind its first layers (DeepStack), and to which of the shorter rows.

    Args:
        is_vision: bool [rows, length] on the CPU. features: [vision tokens, D] each, row by row.

    Returns:
        bool [rows, width], and what is added to the tokens that it marks.

    Raises:
        UnsupportedError: features that are not one for each vision token.
    """
    count = int(is_vision.sum())
    if any(one.dim() != 2 or len(one) != count for one in features):
        raise UnsupportedError(
            f"this model adds features of shapes {[tuple(one.shape) for one in features]} to {count} vision tokens "
            "behind its layers, which cannot be told apart: pass policy=None"
        )
    left = torch.zeros(len(short.rows), short.width, dtype=torch.bool)
    for b, row in enumerate(short.rows):
        left[b, row.vision.index + short.pads[b]] = True
    before, after = (some.flatten().nonzero().squeeze(1) for some in (is_vision, left))
    taken = []
    for one in features:
        every = one.new_zeros(is_vision.numel(), one.shape[1]).index_copy(0, before.to(one.device), one)
        kept = short.take(every.unflatten(0, is_vision.shape)).flatten(0, 1)
        taken.append(kept.index_select(0, after.to(one.device)))
    return left, taken
