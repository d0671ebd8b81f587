"""What comes out for one class: how vtr runs it, and which oracles it passes. Plain data, without times."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import transformers

import vtr
from tests.models import tiny
from tests.models.oracles import SPECS, Oracles, first_line, leaves_nothing, mask_kind
from tests.models.paint import by_runs, paint
from tests.models.pixels import Pictures
from vtr.base import UnsupportedError
from vtr.engine.describe import describe
from vtr.engine.install import patch_of

PATHS = ("packed", "padded", "refused", "not built")
IMAGE_TOKEN = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id")
Outcome = dict[str, Any]


def outcome(name: str, policies: Iterable[str] = tuple(SPECS), pictures: bool = True) -> Outcome:
    """Of the class of this name.

    Args:
        policies: names of :data:`tests.models.oracles.SPECS` to ask for. pictures: run the class's own tower, too.
    """
    cls = getattr(transformers, name)
    out: Outcome = {"family": cls.__module__.split(".")[-2]}
    try:
        model = tiny.build(name)
    except Exception as error:
        return out | {"path": "not built", "why": f"{type(error).__name__}: {first_line(error)}"}
    out |= {"image_token": next((n for n in IMAGE_TOKEN if getattr(model.config, n, None) is not None), None)}
    stock, plain = copy.deepcopy(model), copy.deepcopy(model)
    try:
        vtr.patch(model)
    except UnsupportedError as error:
        return out | {"path": "refused", "why": str(error)}
    except Exception as error:  # it should be refused by a sentence
        return out | {"path": "refused", "why": f"{type(error).__name__}: {first_line(error)}", "by_accident": True}
    out |= parts(model)
    pictured = copy.deepcopy(model)
    by_runs(model)
    for painted in (model, stock):
        paint(painted)
    oracles = Oracles(stock, model)
    try:
        out |= {"mask": mask_kind(stock), "unsteady": oracles.unsteady}
    except Exception as error:
        out |= {"mask": "?", "not_painted": f"{type(error).__name__}: {first_line(error)}"}
    else:
        out |= {"off": oracles.off(), "unpatch": leaves_nothing(plain)}
        out |= {"policies": {policy: oracles.policy(policy) for policy in policies}}
    if pictures:
        out |= {"pictures": Pictures(plain).outcome(pictured)}
    return out


def parts(model: Any) -> Outcome:
    """What vtr found of a patched model."""
    found, patch = describe(patch_of(model)), patch_of(model)
    kinds = getattr(patch.decoder.text.config, "layer_types", None) or []
    named = [None if part is None else part.split(",")[0] for part in (found.tower, found.projector)]
    return {
        "adapter": found.family, "decoder": type(patch.decoder.text).__name__,
        "layers": sorted({str(kind).removesuffix("_attention") for kind in kinds}), "positions": found.positions,
        "tower": named[0], "projector": named[1], "attention": patch.decoder.text.config._attn_implementation,
        "path": found.path, "why": found.why, "self_test": magnitude(found.off),
    }  # fmt: skip


def magnitude(off: float | None) -> str | None:
    """A difference as the power of ten it is below, so that machines that round otherwise say the same."""
    return None if off is None else f"< 1e{max(math.floor(math.log10(max(off, 1e-30))) + 1, -5)}"
