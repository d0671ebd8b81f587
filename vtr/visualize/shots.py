"""One image of one prompt, and what a policy kept of it: taken from a call, or by asking under several policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtr.accounting import RowReport, report
from vtr.base import Policy
from vtr.data.pictures import upright
from vtr.image import Layout
from vtr.picture import image_spans, kept_pixels, seen, verdict, views

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Shot:
    """One image of one prompt, and what a policy kept of it.

    Attributes:
        picture: as given to the processor. layout: of its tokens. first_slot: the prompt's slot of its first token.
        row: the report's row. answer: what the model said, where that is known. flops: of the call.
        question: that was asked; "" where that is not known. expected: the right answer; None where nobody knows.
    """

    picture: Image.Image
    layout: Layout
    first_slot: int
    row: RowReport
    answer: str = ""
    flops: int = 0
    question: str = ""
    expected: str | None = None

    @property
    def label(self) -> str:
        """The policy's spec string."""
        return self.row.policy or "none"

    @property
    def verdict(self) -> tuple[str, str]:
        """What the model said, with ✓ or ✗ where the right answer is known, and the color to write it in."""
        return verdict(self.answer, self.expected) if self.answer else ("", "black")

    @property
    def tiles(self) -> list[str]:
        """What there is to see: the thumbnail, and the crops where there are any."""
        return views(self.layout)

    def pixels(self, layer: int, tiles: str | None = None) -> np.ndarray:
        """The picture with what does not enter ``layer`` faded: float [height, width, 3] in [0, 1].

        Args:
            tiles: "thumbnail" or "crops"; None for the finest there is.

        Raises:
            ValueError: no such layer, or tiles that this image does not have.
        """
        tiles = self.tiles[-1] if tiles is None else tiles
        if tiles not in self.tiles:
            raise ValueError(f"tiles={tiles!r}: this image has {' and '.join(self.tiles)}")
        picture = seen(self.picture, self.layout)
        return kept_pixels(picture, self.layout, self.first_slot, self.row, self.layer(layer), tiles)

    def layer(self, layer: int) -> int:
        """``layer`` counted from 0 (negative ones count from the end).

        Raises:
            ValueError: the decoder has no such layer.
        """
        depth = len(self.row.vision_tokens)
        if not -depth <= layer < depth:
            raise ValueError(f"layer={layer}, but the model has {depth} decoder layers: choose 0…{depth - 1}")
        return layer % depth


def last(model: Any, inputs: Any, picture: Image.Image, row: int = 0, image: int = 0) -> Shot:
    """What the last call of a patched model kept of one image.

    Args:
        inputs: what the call was given (``input_ids``, sizes). picture: the image, as given to the processor.
        row: which prompt of the batch. image: which of its images.

    Raises:
        ValueError: nothing was called yet, or the row has no such image, or it is a video.
    """
    done, rows = report(model), inputs["input_ids"].shape[0]
    if not 0 <= row < rows:
        raise ValueError(f"row={row}, but the call had {rows} row(s), counted from 0")
    first_slot, layout = span_of(model, inputs, row, image)
    return Shot(picture, layout, first_slot, done.rows[row], flops=done.flops if rows == 1 else 0)


def span_of(model: Any, inputs: Any, row: int, image: int) -> tuple[int, Layout]:
    """(first slot, layout) of one image of one row."""
    mine = [(slot, layout) for b, slot, layout in image_spans(model, inputs) if b == row]
    if not 0 <= image < len(mine):
        have = f"{len(mine)} image(s), counted from 0" if mine else "no image: choose a row with one"
        raise ValueError(f"image={image} of row {row}: it has {have}")
    slot, layout = mine[image]
    if layout.crops == (0, 0) and layout.tiles > 1 and not layout.groups:
        raise ValueError("videos cannot be drawn: ask about one frame as an image")
    return slot, layout


def ask(
    model: Any,
    processor: Any,
    picture: Image.Image,
    question: str,
    policies: Sequence[Policy | str | None],
    max_new_tokens: int = 8,
    expected: str | None = None,
) -> list[Shot]:
    """Ask one question under each of several policies, ``None`` among them for no reduction.

    Args:
        expected: the right answer, if it is known: figures then mark right and wrong ones.

    Returns:
        A shot a policy, with the answer; the vision tower has run once for all that see the same tiles.
    """
    import vtr
    from vtr.chat import decode, encode

    picture, shots = upright(picture), []
    vtr.patch(model)
    with torch.inference_mode(), vtr.shared_features(model):
        for policy in policies:
            before, rest = vtr.split(policy)
            inputs = encode(processor, [question], [picture], before).to(model.device)
            first_slot, layout = span_of(model, inputs, 0, 0)
            out = model.generate(**inputs, policy=rest, max_new_tokens=max_new_tokens, do_sample=False)
            done, said = report(model), decode(processor, out, inputs["input_ids"].shape[1])[0]
            shots.append(Shot(picture, layout, first_slot, done.rows[0], said, done.flops, question, expected))
    return shots
