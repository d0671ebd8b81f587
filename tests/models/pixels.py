"""A tiny model with pictures: its own tower and projector, where one of the usual forms of pixels fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import vtr
from tests.models.oracles import PASSES, TOLERANCE, first_line
from tests.models.paint import Inputs, apart, batch, generate, marks
from vtr.base import UnsupportedError
from vtr.engine.install import patch_of

SPECS = {
    "fastv": "fastv:keep=0.5,layer=2",
    "uniform": "uniform:keep=0.5",
    "random": "random:keep=0.5,before_decoder=true",
    "m3": "m3:tokens=4",
    "cls": "cls:keep=0.5",
}


def forms(model: Any) -> Iterator[tuple[str, Inputs]]:
    """Pixels of two pictures as processors give them: the form's name, and the inputs."""
    draw = torch.Generator().manual_seed(0)

    def pixels(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", 32) or 32
    side = side if isinstance(side, int) else side[0]
    sizes = torch.tensor([[side, side]] * 2)
    yield "pixels", {"pixel_values": pixels(2, 3, side, side)}
    yield "pixels, sizes", {"pixel_values": pixels(2, 3, side, side), "image_sizes": sizes}
    yield "tiles, sizes", {"pixel_values": pixels(2, 3, 3, side, side), "image_sizes": sizes}
    yield "pictures of one tile", {"pixel_values": pixels(2, 1, 3, side, side)}
    patch, merge = getattr(vision, "patch_size", None), getattr(vision, "spatial_merge_size", 2)
    if not isinstance(patch, int) or not isinstance(merge, int):
        return
    side = 4 * merge
    grid, channels = torch.tensor([[1, side, side]] * 2), getattr(vision, "in_channels", 3) or 3
    for frames in (getattr(vision, "temporal_patch_size", 2) or 2, 1):
        flat = pixels(2 * side * side, channels * frames * patch * patch)
        yield "patches, grids", {"pixel_values": flat, "image_grid_thw": grid}
    yield (
        "square patches, grids",
        {"pixel_values": pixels(2 * side * side, channels, patch, patch), "image_grid_thw": grid},
    )


def lengths(model: Any, given: Inputs) -> list[int]:
    """Tokens of each of the two pictures."""
    owner = next(part for part in (getattr(model, "model", model), model) if hasattr(part, "get_image_features"))
    with torch.no_grad():
        out = owner.get_image_features(**given)
    out = getattr(out, "pooler_output", out)
    if isinstance(out, tuple) and out and isinstance(out[0], (list, tuple)):
        out = out[0]
    if isinstance(out, (list, tuple)):
        found = [part.numel() // part.shape[-1] for part in out]
    else:
        found = [out.shape[1]] * out.shape[0] if out.dim() == 3 else [out.shape[0] // 2] * 2
    return found if len(found) == 2 else [sum(found) // 2] * 2


class Pictures:
    """Two rows with a picture each and one without, in the first form that the unpatched model takes.

    Attributes:
        form: its name; None if there is none. rows: tokens. full, single: inputs of all rows, and of each alone.
    """

    form: str | None = None

    def __init__(self, stock: Any) -> None:
        self.stock, mark = stock, marks(stock)[0]
        for form, given in forms(stock):
            try:
                counts = lengths(stock, given)
                one, two = ([mark] * count for count in counts)
                self.rows = [[10, 20, *one, 21, 22, 23], [11, 30, 31, 32, *two, 33, 34, 35, 36], [12, *range(40, 52)]]
                halves = [{name: value.chunk(2)[i] for name, value in given.items()} for i in range(2)]
                self.full = {**batch(self.rows), **given}
                self.single = [{**batch([row]), **half} for row, half in zip(self.rows, [*halves, {}], strict=True)]
                self.alone = [generate(stock, inputs)[0][:, 0] for inputs in self.single]
                if apart(generate(stock, self.full)[0], torch.stack(self.alone, 1)) > TOLERANCE:
                    continue
            except Exception:  # not this form
                continue
            self.form, self.counts = form, counts
            return

    def outcome(self, model: Any) -> dict[str, Any] | None:
        """What a patched model does with them; None where no form fits."""
        if self.form is None:
            return None
        layouts = patch_of(model).adapter.layouts(model, self.full)
        first = next(iter(layouts.values()))[0]
        grid = "unknown" if not first.known else "x".join(map(str, first.grid))
        policies = {name: self.policy(model, name) for name in SPECS}
        return {"form": self.form, "tokens": self.counts[0], "grid": grid, "policies": policies}

    def policy(self, model: Any, name: str) -> str:
        """As :meth:`tests.models.oracles.Oracles.policy`, for "batch", "others" and "acts"."""
        spec = SPECS[name]
        try:
            got = generate(model, self.full, policy=spec)[0]
            each = torch.stack([generate(model, inputs, policy=spec)[0][:, 0] for inputs in self.single], 1)
            mixed = generate(model, self.full, policy=[spec, None, None])[0]
        except UnsupportedError as error:
            return f"refused: {error}"
        except Exception as error:
            return f"raises: {type(error).__name__}: {first_line(error)}"
        tests = {
            "batch": apart(got, each) <= TOLERANCE,
            "others": apart(mixed[:, 1:], torch.stack(self.alone[1:], 1)) <= TOLERANCE,
            "acts": apart(got[:, 0], self.alone[0]) > TOLERANCE,
        }
        failed = [test for test, passed in tests.items() if not passed]
        return f"fails: {', '.join(failed)}" if failed else PASSES


assert vtr  # registers the policies that SPECS name
