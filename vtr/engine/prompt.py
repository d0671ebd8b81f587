"""What a call asks about: where its vision tokens sit and which images they form. Read off the device once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from vtr.base import UnsupportedError
from vtr.engine.adapters import Adapter
from vtr.engine.answers import answer_starts
from vtr.engine.captures import Place
from vtr.engine.compat import cache_in
from vtr.image import Layout


@dataclass(eq=False)
class Prompt:
    """The rows of one call (or of the new part of a conversation), on the CPU.

    Attributes:
        is_vision: bool [rows, L]. layouts: per row, those of its images, in order.
        places: likewise, where the vision tower has them.
        valid: bool [rows, L], False for padding; None if it was not said.
        labels: int64 [rows, L], -100 for what is asked; None where no answers are given along with the question.
        ids: int64 [rows, L], the tokens; None where only embeddings were given.
    """

    is_vision: torch.Tensor
    layouts: list[list[Layout]]
    places: list[list[Place]]
    valid: torch.Tensor | None
    labels: torch.Tensor | None = None
    ids: torch.Tensor | None = None

    def answer_starts(self) -> tuple[list[int], list[int]]:
        """As :func:`vtr.engine.answers.answer_starts`."""
        return answer_starts(self.labels, self.is_vision, self.valid)

    def repeated(self, times: int) -> Prompt:
        """Every row ``times`` times, as beam search and num_return_sequences expand a batch."""
        if times == 1:
            return self
        valid = None if self.valid is None else self.valid.repeat_interleave(times, 0)
        layouts = [row for row in self.layouts for _ in range(times)]
        places = [row for row in self.places for _ in range(times)]
        ids = None if self.ids is None else self.ids.repeat_interleave(times, 0)
        return Prompt(self.is_vision.repeat_interleave(times, 0), layouts, places, valid, ids=ids)

    def of(self, rows: Sequence[int]) -> Prompt:
        """Some of the rows, in this order."""
        at, chosen = list(rows), [None if t is None else t[list(rows)] for t in (self.valid, self.labels, self.ids)]
        return Prompt(self.is_vision[at], [self.layouts[row] for row in at], [self.places[row] for row in at], *chosen)

    def extended(self, length: int) -> Prompt:
        """With the tokens decoded since, up to ``length``: text, whatever their ids, and no padding."""
        more = (0, length - self.is_vision.shape[1])
        if more == (0, 0):
            return replace(self)
        valid = None if self.valid is None else pad(self.valid, more, value=True)
        return replace(self, is_vision=pad(self.is_vision, more), valid=valid)


def read_prompt(
    adapter: Adapter, model: Any, ids: torch.Tensor, mask: torch.Tensor | None, inputs: Mapping[str, Any]
) -> Prompt:
    """Find the vision tokens of ``ids`` ([rows, L]) and give every row its images.

    Args:
        mask: the call's attention_mask, whose last L columns belong to ``ids``. inputs: the call's keyword arguments,
            "labels" as :func:`vtr.engine.answers.answer_labels` gives them.

    Raises:
        ValueError: the images do not fit the placeholders.
        UnsupportedError: the mask hides vision tokens.
    """
    if (merged := adapter.prompt(model, ids, mask, inputs)) is not None:
        return merged
    ids = ids.cpu()
    layouts = adapter.layouts(model, {**inputs, "input_ids": ids})
    is_vision = torch.isin(ids, torch.tensor(adapter.placeholders(model)))
    valid = mask[:, -ids.shape[1] :].bool().cpu() if mask is not None and mask.dim() == 2 else None
    rows = assign_images(layouts, ids, is_vision)
    hidden = (is_vision & ~valid).sum(1) if valid is not None else is_vision.new_zeros(len(ids))
    if bool(hidden.any()):
        row = int(hidden.argmax())
        raise UnsupportedError(
            f"attention_mask hides {int(hidden[row])} of the {int(is_vision[row].sum())} vision tokens of row {row}, "
            "and a policy chooses among whole pictures: leave what is to be hidden out of the prompt (its placeholders "
            "and its picture), or pass policy=None for this call"
        )
    layouts_of, places_of = [[lay for lay, _ in row] for row in rows], [[at for _, at in row] for row in rows]
    known = None if bool((ids < 0).any()) else ids
    return Prompt(is_vision, layouts_of, places_of, valid, inputs.get("labels"), known)


def ids_of(adapter: Adapter, model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Stand-in ``input_ids`` [rows, L] for ``inputs_embeds`` [rows, L, D]: the placeholders' ids, -1 elsewhere.

    Raises:
        UnsupportedError: no placeholder embedding is there, so nothing says where vision tokens are.
    """
    table = model.get_input_embeddings()
    ids = torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)
    for placeholder in (p for p in adapter.placeholders(model) if p >= 0):  # a negative one is no word's
        mark = table(torch.tensor(placeholder, device=embeds.device)).to(embeds)
        ids.masked_fill_((embeds == mark).all(-1), placeholder)
    if not bool((ids >= 0).any()):
        raise UnsupportedError(
            "a reduced call must know where vision tokens are, and these inputs_embeds hold no image placeholder: "
            "pass input_ids and pixel_values, or inputs_embeds with the placeholder's embedding at every vision token "
            "and pixel_values beside them"
        )
    return ids


Located = tuple[Layout, Place]
"""An image: where its tokens lie in the row, and its tiles in the vision tower."""


def located(layouts: Sequence[Layout], run: int) -> list[Located]:
    """Images whose tiles the vision tower gets one behind the other in its run ``run``."""
    found, first = [], 0
    for layout in layouts:
        count = layout.tiles
        found.append((layout, Place(run, first, count)))
        first += count
    return found


def assign_images(
    layouts: Mapping[int, Sequence[Layout]], ids: torch.Tensor, is_vision: torch.Tensor
) -> list[list[Located]]:
    """Give every row its images, in the order of their slots. ids, is_vision: [rows, L] on the CPU.

    Raises:
        ValueError: the images do not fit the placeholders.
    """
    total = int(is_vision.sum())
    if total and not any(layouts.values()):
        raise ValueError(
            f"the prompt has {total} image placeholders but no image: pass pixel_values (and image_sizes) "
            "as the processor returned them"
        )
    queues = {placeholder: located(images, run) for run, (placeholder, images) in enumerate(layouts.items())}
    rows = [_images_of(queues, ids[row][is_vision[row]], row) for row in range(len(ids))]
    left = sum(map(len, queues.values()))
    if left:
        raise ValueError(
            f"{left} images are left over after every row's placeholders are filled: tokenize text and images in one "
            "processor call, and do not truncate"
        )
    return rows


def _images_of(queues: dict[int, list[Located]], slots: torch.Tensor, row: int) -> list[Located]:
    """The images that fill ``slots`` ([n] placeholder ids); takes them off ``queues``."""
    mine: list[Located] = []
    at = 0
    while at < len(slots):
        kind = int(slots[at])
        queue = queues.get(kind)
        n = len(queue[0][0]) if queue else 0
        if not queue or at + n > len(slots) or not bool((slots[at : at + n] == kind).all()):
            there = f"the next image gives {n}" if queue else "no image is left for the rest"
            raise ValueError(
                f"row {row} has {len(slots)} image placeholders, which is not what its images give (from its "
                f"{at + 1}. on, {there}): tokenize text and images in one processor call, and do not truncate"
            )
        mine.append(queue.pop(0))
        at += n
    return mine


def new_part(ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The columns of ``input_ids`` that a generate will run: all, or those behind what its cache already holds.

    transformers takes input_ids for the whole conversation if they are as long as the attention_mask, or none is given.
    """
    cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
    past = 0 if cache is None else cache.get_seq_length()
    return ids[:, past:] if mask is None or mask.shape[1] == ids.shape[1] else ids
