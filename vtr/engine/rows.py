"""One row of the batch, packed: which of its tokens are still there, and where they came from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from vtr.base import Image, Layout, Policy, Pooled, Route, Tokens
from vtr.engine.captures import Captures, Place
from vtr.engine.trace import RowTrace, Sources

_FIELDS = ("tile", "y", "x", "newline")
IMAGE_TENSORS = ("features", "tiles", "newline", *(f"layout.{name}" for name in _FIELDS))
COPIES = ("hidden", "text")
NOTHING = torch.empty(0)


class Row:
    """A row's tokens. ``text`` and ``vision`` are row-local indices (int64, ascending) of what is still there.

    Args:
        index: which row of the batch.
        policy: what reduces it, or None.
        slots: int64 [n] on the CPU: logical slots of the row's tokens (padding left out), ascending.
        is_vision: bool [n] on the CPU.
        layouts, places: the row's images, in order; empty where the row is treated as text only.
        end: logical slot from which on text was decoded, or given as the answer, not asked (it ranks nothing).
    """

    def __init__(
        self,
        index: int,
        policy: Policy | None,
        slots: torch.Tensor,
        is_vision: torch.Tensor,
        layouts: list[Layout],
        places: list[Place],
        end: int,
    ) -> None:
        self.index, self.policy, self.layouts, self.places = index, policy, layouts, places
        self.slots, self.is_vision = slots, is_vision
        self.asked_slots = slots
        """The row's slots before anything was dropped."""
        self.length = len(slots)
        self.dropped = 0
        self.lost = 0
        """Tokens that cuts in the decoder dropped and that the row's positions closed up over."""
        self.first = torch.empty(0)
        """int64 [1]: position of the row's first token."""
        vision, text = is_vision.nonzero().squeeze(1), (~is_vision).nonzero().squeeze(1)
        self.original = self.total = self.count = len(vision)
        first, last = (int(vision[0]), int(vision[-1])) if len(vision) else (0, -1)
        asked = slots[text] < end
        decoded = text[~asked]
        self.answered = len(decoded) > 0
        self.answer_slots = slots[decoded]
        self.decoded = decoded[:-1]
        """Text tokens that were decoded, but for the newest: what a run without a cache meets again."""
        self._asked = len(text) - len(decoded)
        """How many of the text tokens, the first ones, belong to the prompt."""
        self._text_queries = ((text > first) & asked).nonzero().squeeze(1)
        """Which of the text tokens may rank vision tokens."""
        self.rankable = bool(((text > last) & asked).any())
        """False if some vision token has no text query after it."""
        self.text, self.vision = text, vision
        self.alive: torch.Tensor | None = None
        """Which of the vision tokens that entered the text model are still there; None for all."""
        self._here: torch.Tensor | None = None
        """Which of ``slots`` (text too) are still there; None for all."""
        self.origin = slots[vision]
        self.sources: list[Sources] | None = None
        self.pieces: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        """For a compressed row: (row-local indices, [k, D] features) of the new tokens of each image."""
        self.merged: list[tuple[torch.Tensor, torch.Tensor, Sequence[Sequence[int]]]] = []
        """For each pooled image: row-local indices of its new tokens, of its old ones before, and which of the old ones
        each new one was made from."""
        self.layer_features: list[torch.Tensor] = []
        """[vision tokens on entering the text model, D] each: what is added to them behind the first layers."""
        self.per_image = tuple(map(len, layouts))
        """Vision tokens of each image on entering the text model."""
        self._fields = {}
        if layouts:
            self._fields = {name: torch.cat([getattr(lay, name) for lay in layouts]) for name in _FIELDS}
            self._fields["image"] = torch.cat([torch.full((len(lay),), i) for i, lay in enumerate(layouts)])

    def again(self, index: int, policy: Policy | None) -> Row:
        """This row as it is now, as row ``index`` under ``policy``; cutting one of them leaves the other alone."""
        row = copy.copy(self)  # nothing of a row is changed in place
        row.index, row.policy = index, policy
        return row

    # -- before the decoder ----------------------------------------------------------------------------------------
    def compress(self, embeds: torch.Tensor, captures: Captures | None) -> None:
        """Let the policy shrink each image. embeds: [n, D], the row's tokens; afterwards the row is really shorter."""
        assert self.policy is not None
        per_image = self.vision.split([len(lay) for lay in self.layouts])
        gone = torch.zeros(self.length, dtype=torch.bool)
        fields: dict[str, list[torch.Tensor]] = {name: [] for name in (*_FIELDS, "image")}
        origin, sources, pieces, made_of = [], [], [], []
        for i, (layout, local) in enumerate(zip(self.layouts, per_image, strict=True)):
            first, n = int(local[0]), len(local)
            together = int(local[-1]) - first + 1 == n  # as a rule an image's slots follow each other
            mine = embeds[first : first + n] if together else embeds.index_select(0, local.to(embeds.device))
            image = self._image(mine, i, captures)
            keep, pooled = compressed(self.policy, image)
            at, slots = local[keep], self.slots[local]
            gone[local] = True
            gone[at] = False
            known, where = _standing(layout, keep, pooled)
            for name in _FIELDS:
                fields[name].append(getattr(known, name)[where])
            fields["image"].append(torch.full((len(keep),), i))
            if pooled is None:
                origin.append(slots[keep])
                sources.append(Sources(slots[keep], None))
            else:
                origin.append(torch.full((len(keep),), -1))
                sources.append(Sources(slots, pooled.sources))
                pieces.append((at, pooled.features.to(image.features)))
                made_of.append((local, pooled.sources))
        kept = (~gone).nonzero().squeeze(1)
        self.pieces = [(torch.searchsorted(kept, at), f) for at, f in pieces]
        self.merged = [(at, *made) for (at, _), made in zip(self.pieces, made_of, strict=True)]
        self.kept = kept
        self.dropped = self.length - len(kept)
        self.slots, self.is_vision, self.length = self.slots[kept], self.is_vision[kept], len(kept)
        self.text = torch.searchsorted(kept, self.text)
        self.decoded = torch.searchsorted(kept, self.decoded)
        self.per_image = tuple(map(len, fields["image"]))
        self.vision = self.is_vision.nonzero().squeeze(1)
        self.total = self.count = len(self.vision)
        self.origin = torch.cat(origin)
        self.sources = sources
        self._fields = {name: torch.cat(parts) for name, parts in fields.items()}

    def carried(self, values: torch.Tensor) -> torch.Tensor:
        """[n, k] of the row's tokens before :meth:`compress` → of those after: a pooled token has its sources' mean.

        Integers are rounded down; a pooled token made of nothing has what belongs to the slot it took.
        """
        out = values.index_select(0, self.kept.to(values.device, non_blocking=True))
        for new, old, made_of in self.merged:
            flat = old[torch.tensor([s for some in made_of for s in some], dtype=torch.int64)]
            into = torch.arange(len(new)).repeat_interleave(torch.tensor([len(some) for some in made_of]))
            at, flat, into = (t.to(values.device, non_blocking=True) for t in (new, flat, into))
            sums = values.new_zeros(len(at), values.shape[1]).index_add(0, into, values.index_select(0, flat))
            sizes = torch.zeros_like(at).index_add(0, into, torch.ones_like(into))[:, None]
            mean = sums / sizes if values.is_floating_point() else sums // sizes.clamp(min=1)
            out = out.index_copy(0, at, torch.where(sizes > 0, mean, out.index_select(0, at)))
        return out

    def _image(self, features: torch.Tensor, i: int, captures: Captures | None) -> Image:
        layout, count = self.layouts[i], len(self.layouts)
        assert self.policy is not None
        if captures is None or not self.policy.wants:
            return Image(features, layout, i, count)
        return captures.image(features, layout, self.places[i], i, count, self.policy)

    # -- in the decoder --------------------------------------------------------------------------------------------
    def to(self, device: torch.device) -> None:
        """Move the index tensors to the device, once, before the first layer; nobody waits for them to arrive."""

        def moved(t: torch.Tensor) -> torch.Tensor:
            return t.to(device, non_blocking=device.type == "cuda")  # back to the CPU one would have to wait

        self.text, self.vision, self._text_queries = moved(self.text), moved(self.vision), moved(self._text_queries)
        self.decoded = moved(self.decoded)
        self.alive = self.alive if self.alive is None else moved(self.alive)
        self._here = self._here if self._here is None else moved(self._here)
        self._fields = {name: moved(t) for name, t in self._fields.items()}

    def tokens(
        self, layer: int, depth: int, hidden: torch.Tensor, scores: torch.Tensor | None,
        ahead: Callable[[], torch.Tensor],
    ) -> Tokens:  # fmt: skip
        """What the policy sees. hidden: [n, D], the row's tokens entering the layer; scores: [n] or None."""

        ranked = None if scores is None else scores.index_select(0, self.vision)
        fields = GuardedFields(partial(self._field, hidden))
        return Tokens(layer, depth, self.total, self.count, fields, ranked, ahead, self.per_image, self.length)

    def _field(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        if name == "hidden":
            return hidden.index_select(0, self.vision)
        if name == "place":
            return self.vision
        if name == "text":
            return hidden.index_select(0, self.text[: self._asked])
        field = self._fields[name]
        return field if self.alive is None else field.index_select(0, self.alive)

    def queries(self, kind: str) -> torch.Tensor:
        """Row-local indices of the text tokens that rank: the last one, or all after the first vision token."""
        chosen = self._text_queries[-1:] if kind.startswith("last") else self._text_queries
        return self.text.index_select(0, chosen)

    def cut(self, keep: torch.Tensor) -> torch.Tensor:
        """Drop all vision tokens but ``keep`` (ascending); returns the row-local indices that are kept, ascending."""
        vision = self.vision.index_select(0, keep)
        kept = torch.cat([self.text, vision]).sort().values
        self.text, self.vision = torch.searchsorted(kept, self.text), torch.searchsorted(kept, vision)
        self.decoded = torch.searchsorted(kept, self.decoded)
        self.alive = self.alive_of(keep)
        self._keep(kept)
        self.count = len(keep)
        return kept

    def forget(self, remembered: torch.Tensor) -> torch.Tensor:
        """Drop the ``decoded`` tokens that are not ``remembered`` (bool [n]); returns what is kept, as :meth:`cut`."""
        gone = torch.zeros(self.length, dtype=torch.bool, device=self.text.device)
        gone[self.decoded] = ~remembered
        kept = (~gone).nonzero().squeeze(1)
        self.decoded = torch.searchsorted(kept, self.decoded[remembered])
        self.text, self.vision = (torch.searchsorted(kept, t[~gone[t]]) for t in (self.text, self.vision))
        self._keep(kept)
        return kept

    def _keep(self, kept: torch.Tensor) -> None:
        self._here = kept if self._here is None else self._here.index_select(0, kept)
        self.length = len(kept)

    def alive_of(self, keep: torch.Tensor) -> torch.Tensor:
        """``keep``, an index into the vision tokens still there, as one into those that entered the text model."""
        return keep if self.alive is None else self.alive.index_select(0, keep)

    def passing(self, keep: torch.Tensor) -> torch.Tensor:
        """Row-local indices of the text and of the vision tokens ``keep``, ascending; the row stays as it is."""
        return torch.cat([self.text, self.vision.index_select(0, keep)]).sort().values

    def carriers(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every slot the row had: the slot, and the row-local index of the last surviving token up to it."""
        slots = self.asked_slots.to(device, non_blocking=True)
        alive = self.slots.to(device, non_blocking=True)
        if self._here is not None:
            alive = alive.index_select(0, self._here)
        return slots, (torch.searchsorted(alive, slots, right=True) - 1).clamp_(min=0)

    def trace(self, offset: int) -> RowTrace:
        """What the report needs; ``offset`` is where this forward's slots start in the row the caller passed."""
        slots = torch.where(self.origin >= 0, self.origin + offset, self.origin) if offset else self.origin
        sources = self.sources and [Sources(s.slots + offset, s.made_of) for s in self.sources]
        return RowTrace(self.policy.spec if self.policy else None, slots, sources, original=self.original)


class Passing(NamedTuple):
    """Who of all rows passes a layer that some tokens go around.

    Attributes:
        through: int64 [t], packed indices. lengths, counts, alive: per row, the tokens that pass, the vision tokens
            among them, and which ones these are. weights: [T] of all tokens, or None.
    """

    through: torch.Tensor
    lengths: list[int]
    counts: list[int]
    alive: list[torch.Tensor | None]
    weights: torch.Tensor | None


class GuardedFields:
    """Tensors on their way to a policy; what it sees of the engine's own must come back as it was.

    ``hidden`` and ``text`` are copies, made whenever they are read: a write to them is lost, and harms nobody
    (``check_policy`` says so).
    """

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        self.make = make
        self.seen: dict[str, tuple[torch.Tensor, int]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name in COPIES:
            return self.make(name)
        if name not in self.seen:
            made = self.make(name)
            self.seen[name] = made, version(made)
        return self.seen[name][0]

    def check(self, policy: Policy, question: str, what: str) -> None:
        """Raise ValueError if a tensor was changed in place."""
        for name, (tensor, before) in self.seen.items():
            if version(tensor) != before:
                raise write_error(policy, question, f"{what}.{name}")


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; always 0 in inference mode, where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def write_error(policy: Policy, question: str, what: str) -> ValueError:
    return ValueError(
        f"{type(policy).__name__}.{question} writes into {what}: what is handed over is not changed in place, since "
        "the write is lost or reaches what other layers, rows and calls see. Work on a clone(); to merge tokens, "
        "answer compress with vtr.Pooled"
    )


def packed_indices(parts: Sequence[torch.Tensor | None], before: list[int], device: torch.device) -> torch.Tensor:
    """Row-local indices (None = the whole row) as indices into the packed sequence."""
    out, start = [], 0
    for part, n in zip(parts, before, strict=True):
        out.append(torch.arange(start, start + n, device=device) if part is None else part + start)
        start += n
    return out[0] if len(out) == 1 else torch.cat(out)


def checked_keep(answer: Any, count: int, question: str, policy: Policy, device: torch.device) -> torch.Tensor:
    """A policy's indices, ascending, on ``device``.

    Raises:
        TypeError, ValueError: not a 1-D int64 tensor of distinct indices below ``count``.
    """
    who = f"{type(policy).__name__}.{question}"
    if not isinstance(answer, torch.Tensor) or answer.dtype != torch.int64 or answer.dim() != 1:
        raise TypeError(f"{who} must return a 1-D int64 tensor of kept indices, got {_short(answer)}")
    keep = answer.to(device, non_blocking=True).sort().values
    if len(keep) > count:
        raise ValueError(f"{who} keeps {len(keep)} of {count} tokens: answer with each index at most once")
    on_cpu = keep.device.type == "cpu" and len(keep) > 0  # elsewhere the check would make the device wait
    if on_cpu and (int(keep[0]) < 0 or int(keep[-1]) >= count or bool((keep[1:] == keep[:-1]).any())):
        raise ValueError(f"{who} must return distinct indices in [0, {count}), got {_short(answer)}")
    return keep


def _standing(layout: Layout, keep: torch.Tensor, pooled: Pooled | None) -> tuple[Layout, torch.Tensor]:
    """A layout, and where in it an image's new tokens stand: their own one, or that of their first sources."""
    if pooled is None:
        return layout, keep
    if pooled.layout is not None:
        return pooled.layout, torch.arange(len(keep))
    first = [made[0] if made else at for made, at in zip(pooled.sources, keep.tolist(), strict=True)]
    return layout, torch.tensor(first, dtype=torch.int64)


def compressed(policy: Policy, image: Image) -> tuple[torch.Tensor, Pooled | None]:
    """Which of the image's slots one image's new tokens take, and what they are (None: the tokens of these slots).

    Raises:
        TypeError, ValueError: the policy's answer is none that ``compress`` may give.
    """
    n, guarded = len(image), GuardedFields(partial(_of_image, image))
    for name in IMAGE_TENSORS:
        guarded(name)
    answer = policy.compress(image)
    guarded.check(policy, "compress", "image")
    if answer is None:
        return torch.arange(n), None
    if not isinstance(answer, Pooled):
        return checked_keep(answer, n, "compress", policy, torch.device("cpu")), None
    m, width = len(answer.sources), image.features.shape[1]
    who = f"{type(policy).__name__}.compress"
    if tuple(answer.features.shape) != (m, width):
        raise ValueError(f"{who}: {m} sources need features of shape {(m, width)}, got {tuple(answer.features.shape)}")
    if answer.layout is not None and len(answer.layout) != m:
        raise ValueError(f"{who}: a layout of {len(answer.layout)} tokens for {m} new ones")
    if m > n:
        raise ValueError(f"{who} makes {m} tokens out of {n}: an image cannot become longer")
    if any(not 0 <= s < n for s in itertools.chain.from_iterable(answer.sources)):
        raise ValueError(f"{who}: sources must be indices in [0, {n})")
    # pooled tokens take evenly spread slots of the image, the last one the last slot, so that order is kept
    return torch.arange(1, m + 1) * n // max(m, 1) - 1, answer


def _of_image(image: Image, name: str) -> torch.Tensor:
    found = image
    for part in name.split("."):
        found = getattr(found, part)
    return NOTHING if found is None else found  # type: ignore[return-value]


def check_route(answer: Any, count: int, policy: Policy) -> None:
    """Raise TypeError or ValueError unless ``answer`` is a Route without weights, or with one for each token."""
    who = f"{type(policy).__name__}.route"
    if not isinstance(answer, Route):
        raise TypeError(f"{who} must return vtr.Route(keep, weights) or None, got {_short(answer)}")
    w = answer.weights
    if w is not None and not (isinstance(w, torch.Tensor) and w.is_floating_point() and w.shape == (count,)):
        raise ValueError(f"{who}: weights are floats [{count}], one for each token that it was shown, got {_short(w)}")


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)[:80]
