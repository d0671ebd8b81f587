"""Before the decoder: a policy shrinks a row's images, and the row is really shorter afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from vtr.base import Policy
from vtr.engine.captures import Captures, Place
from vtr.engine.checks import GuardedFields, checked_keep
from vtr.engine.rows import FIELDS, Row
from vtr.engine.trace import Sources
from vtr.image import Image, Layout, Pooled

IMAGE_TENSORS = ("features", "tiles", "newline", "question", "question_ids", *(f"layout.{name}" for name in FIELDS))
NOTHING = torch.empty(0)


class Shrunk(NamedTuple):
    """What became of one image.

    Attributes:
        old: int64 [n], row-local indices of its tokens. new: int64 [m], those among them whose slots its new tokens
            take, ascending.
        fields: tile, group, y, x, newline and frame of the new tokens, int64 [m] each.
        pooled: what the new tokens are, and what they were made from; None: they are the tokens of these slots.
    """

    old: torch.Tensor
    new: torch.Tensor
    fields: dict[str, torch.Tensor]
    pooled: Pooled | None


@dataclass(frozen=True, eq=False)
class Compression:
    """Takes what a row had per token before it was compressed to what it has after.

    Attributes:
        kept: int64 [m], row-local indices (as before) of the tokens whose slots are left, ascending.
        pooled: the images that were pooled: where (as after) their new tokens are, and what became of the image.
        flops: of the policy's own matrix products.
    """

    kept: torch.Tensor
    pooled: list[tuple[torch.Tensor, Shrunk]]
    flops: int = 0

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """[n, k] → [m, k]: kept tokens have their own values, a pooled token the mean of its sources'.

        Integers are rounded down; a pooled token made of nothing has what belongs to the slot it took.
        """
        out = values.index_select(0, self.kept.to(values.device, non_blocking=True))
        for new, image in self.pooled:
            assert image.pooled is not None
            sources = image.pooled.sources
            flat = image.old[torch.tensor([s for some in sources for s in some], dtype=torch.int64)]
            into = torch.arange(len(new)).repeat_interleave(torch.tensor([len(some) for some in sources]))
            at, flat, into = (t.to(values.device, non_blocking=True) for t in (new, flat, into))
            sums = values.new_zeros(len(at), values.shape[1]).index_add(0, into, values.index_select(0, flat))
            sizes = torch.zeros_like(at).index_add(0, into, torch.ones_like(into))[:, None]
            mean = sums / sizes if values.is_floating_point() else sums // sizes.clamp(min=1)
            out = out.index_copy(0, at, torch.where(sizes > 0, mean, out.index_select(0, at)))
        return out


def shrinks(row: Row) -> bool:
    """Whether the row's policy is asked about images before the decoder."""
    return bool(row.given.layouts) and row.asks("compress")


def ranked_places(rows: Sequence[Row]) -> list[Place]:
    """The images of these rows whose CLS scores policies want: they are scored together."""
    found = []
    for row in filter(shrinks, rows):
        assert row.policy is not None
        places = row.given.places
        mine = [row.policy.of_image(i, len(places)) for i in range(len(places))]
        found += [place for place, one in zip(places, mine, strict=True) if one is not None and "cls" in one.wants]
    return found


def compress_row(row: Row, embeds: torch.Tensor, captures: Captures | None) -> Compression:
    """Let the row's policy shrink each of its images. embeds: [columns, D], the row with its padding.

    Raises:
        TypeError, ValueError: the policy's answer is none that ``compress`` may give.
    """
    assert row.policy is not None
    parts = row.vision.index.split([len(layout) for layout in row.given.layouts])
    images = [_image(row, i, old, embeds, captures) for i, old in enumerate(parts)]
    shrunk = [
        _shrunk(old, image, *found) for old, image, found in zip(parts, images, asked(row.policy, images), strict=True)
    ]
    flops = sum(image.flops for image in images)
    sizes = [len(image.new) for image in shrunk]
    fields = {name: torch.cat([image.fields[name] for image in shrunk]) for name in FIELDS}
    fields["image"] = torch.arange(len(shrunk)).repeat_interleave(torch.tensor(sizes))
    origin, sources = [], []
    for image in shrunk:
        own, pooled = row.slots[image.new], image.pooled
        origin.append(own if pooled is None else torch.full((len(own),), -1))
        sources.append(Sources(own, None) if pooled is None else Sources(row.slots[image.old], pooled.sources))
    vision = replace(
        row.vision,
        index=torch.cat([image.new for image in shrunk]),
        origin=torch.cat(origin),
        fields=fields,
        per_image=tuple(sizes),
        sources=sources,
    )
    kept = row.shorten(vision)
    return Compression(kept, [(torch.searchsorted(kept, i.new), i) for i in shrunk if i.pooled is not None], flops)


def _image(row: Row, i: int, old: torch.Tensor, embeds: torch.Tensor, captures: Captures | None) -> Image:
    """What the row's policy sees of its ``i``-th image, whose tokens have the row-local indices ``old``."""
    given = row.given
    assert row.policy is not None
    policy = row.policy.of_image(i, len(given.layouts))
    layout, slots, n = given.layouts[i], row.slots[old], len(old)
    first = int(slots[0])
    in_a_row = int(slots[-1]) - first + 1 == n  # as a rule an image's slots follow each other
    features = embeds[first : first + n] if in_a_row else embeds.index_select(0, slots.to(embeds.device))
    if captures is None or policy is None or not policy.wants:
        return Image(features, layout, i, len(given.layouts), memo=row.memo)
    image = captures.image(features, layout, given.places[i], i, len(given.layouts), policy)
    image.memo = row.memo
    if "question" in policy.wants:
        behind = row.text.index[row.text.queries]
        behind = behind[behind > row.vision.index[-1]]
        image.question = embeds.index_select(0, row.slots[behind].to(embeds.device, non_blocking=True))
        image.question_ids = None if given.ids is None else given.ids[behind]
    return image


def _shrunk(old: torch.Tensor, image: Image, keep: torch.Tensor, pooled: Pooled | None) -> Shrunk:
    known, where = _standing(image.layout, keep, pooled)
    return Shrunk(old, old[keep], {name: getattr(known, name)[where] for name in FIELDS}, pooled)


Answered = tuple[torch.Tensor, Pooled | None]
"""Which of an image's slots its new tokens take, and what they are (None: the tokens of these slots)."""


def asked(policy: Policy, images: Sequence[Image]) -> list[Answered]:
    """What becomes of a row's images.

    Raises:
        TypeError, ValueError: the policy's answer is none that ``compress`` may give.
    """
    guards = [GuardedFields(partial(_tensor_of, image)) for image in images]
    for guarded in guards:
        for name in IMAGE_TENSORS:
            guarded(name)
    answers = policy.compress_row(images)
    if not isinstance(answers, Sequence) or len(answers) != len(images):
        raise ValueError(f"{type(policy).__name__}.compress_row must answer for each of {len(images)} images")
    for guarded in guards:
        guarded.check(policy, "compress", "image")
    return [_checked(policy, image, answer) for image, answer in zip(images, answers, strict=True)]


def compressed(policy: Policy, image: Image) -> Answered:
    """Of one image by itself: as :func:`asked`."""
    return asked(policy, [image])[0]


def _checked(policy: Policy, image: Image, answer: torch.Tensor | Pooled | None) -> Answered:
    n = len(image)
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


def _tensor_of(image: Image, name: str) -> torch.Tensor:
    found = image
    for part in name.split("."):
        found = getattr(found, part)
    return NOTHING if found is None else found  # type: ignore[return-value]


def _standing(layout: Layout, keep: torch.Tensor, pooled: Pooled | None) -> tuple[Layout, torch.Tensor]:
    """A layout, and where in it an image's new tokens stand: their own one, or that of their first sources."""
    if pooled is None:
        return layout, keep
    if pooled.layout is not None:
        return pooled.layout, torch.arange(len(keep))
    first = [made[0] if made else at for made, at in zip(pooled.sources, keep.tolist(), strict=True)]
    return layout, torch.tensor(first, dtype=torch.int64)
