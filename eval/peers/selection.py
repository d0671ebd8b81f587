"""How long choosing takes: our policies before the decoder beside AngelSlim's token_compressor, on the same tensors.

One image of 24 × 24 patches goes through a tower as wide as CLIP-L. What it gave (queries and keys, projected tokens)
is handed to their function and to our policy in turns, in one process; CPU seconds are compared. Their functions need
torch and a record of these tensors only, so they run in any transformers; their wrappers around whole models are run by
``wrapped``. Ours also makes queries and keys of the tower's states, which theirs are given.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vtr.eval.cost import midsize

import vtr
from vtr.image import Image
from vtr.settings import policy_class

PACKAGE = "angelslim.compressor.token_compressor"
SIDE, HEADS, DEPTH, OBJECT = 24, 16, 4, 1
"""Of the tower: patches along a side, heads, layers, and the layer where HiPrune looks for objects."""
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
"""As wide as CLIP-L's."""
THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "divprune": ("algorithm.divprune", "divprune", {}),
    "hiprune": ("algorithm.hiprune", "hiprune_pruning", {"object_layer": OBJECT, "last_vit_layer": -2, "alpha": 0.1}),
    "scope": ("algorithm.scope", "scope_pruning", {"layer_idx": -2}),
    "visionzip": ("algorithm.visionzip", "visionzip", {"layer_idx": -2}),
    "vispruner": ("algorithm.vispruner", "vispruner_pruning", {"layer_idx": -2}),
}
"""Method → module, function and settings of theirs."""
ROOMS = ("vtr.policies.picture.", "vtr.policies.question.")
LEFT_OUT = ("dycoke", "evs", "globalcom2", "vidcom2")
"""Not set by a count of an image's tokens."""
EMBEDDINGS = dict.fromkeys(("cdpruner", "trim"), ",relevance=embeddings")
"""What those are told that could have a CLIP text tower: there is none here."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        policy: ours. ours_ms, theirs_ms: median CPU milliseconds of a choice. ratio, low, high: ours ÷ theirs, the
            median and the range of neighbouring runs; None where they have no such method.
        of_prefill: ours ÷ the text model's reduced prefill. same: share of their kept tokens that we keep too.
        error: what theirs raised.
    """

    policy: str
    ours_ms: float
    of_prefill: float
    theirs_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    same: float | None = None
    error: str | None = None


def load(folder: Path, name: str) -> Any:
    """A module of their token_compressor in a checkout, without what its packages import on the way.

    Raises:
        ValueError: ``folder`` is no checkout of AngelSlim.
    """
    root = folder / PACKAGE.replace(".", "/")
    if not root.is_dir():
        raise ValueError(f"{folder} is no checkout of AngelSlim: {root} is not there")
    parts = [*PACKAGE.split("."), *name.split(".")[:-1]]
    for n in range(1, len(parts) + 1):
        package = ".".join(parts[:n])
        if package not in sys.modules:
            made = types.ModuleType(package)
            made.__path__ = [str(folder.joinpath(*parts[:n]))]
            sys.modules[package] = made
    return importlib.import_module(f"{PACKAGE}.{name}")


def names() -> list[str]:
    """Ours before the decoder that are set by a count of an image's tokens."""
    rooms = (name for name in vtr.list_policies() if policy_class(name).__module__.startswith(ROOMS))
    return sorted(name for name in rooms if name not in LEFT_OUT)


class Looking(vtr.Policy):
    """Asks for all that the measured policies want, and runs ``look`` on the image."""

    def __init__(self, look: Callable[[Image], None], wishes: tuple[str, ...]) -> None:
        self.look, self.wishes = look, wishes

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.wishes

    @property
    def question_guided(self) -> bool:  # type: ignore[override]
        return True

    def compress(self, image: Image) -> None:
        self.look(image)


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class Contest:
    """All methods on one image, in turns.

    Args:
        checkout: of AngelSlim; None: ours alone. keep: tokens that stay. rounds: runs of each.
        done: called after every policy, for a progress bar.
    """

    def __init__(
        self, size: midsize.Size, checkout: Path | None, keep: int, rounds: int, done: Callable[[], Any] = lambda: None
    ) -> None:
        self.done = done
        self.size, self.checkout = replace(size, side=SIDE), checkout
        self.model = vtr.patch(midsize.build(self.size, "cpu", torch.float32, tower=TOWER))
        self.keep, self.rounds = keep, rounds
        self.seen: dict[tuple[str, int], torch.Tensor] = {}
        for i, layer in enumerate(self.model.model.vision_tower.encoder.layers):
            for which in "qk":
                getattr(layer.self_attn, f"{which}_proj").register_forward_hook(partial(self._note, (which, i)))
        self.inputs = midsize.prompts(self.model, self.size, [(1, size.text_tokens)])

    def _note(self, key: tuple[str, int], module: Any, args: Any, out: torch.Tensor) -> None:
        self.seen.setdefault(key, out.unflatten(-1, (HEADS, -1)).transpose(1, 2))

    @torch.no_grad()
    def run(self, policies: Sequence[str]) -> list[Row]:
        rows: list[Row] = []
        made = {name: vtr.policy(f"{name}:{self.keep}{EMBEDDINGS.get(name, '')}") for name in policies}
        wishes = tuple(sorted({wish for p in made.values() for wish in p.wants}))

        def look(image: Image) -> None:
            context = None if self.checkout is None else self._context(image)
            for name, policy in made.items():
                rows.append(self._row(name, policy, image, context))
                self.done()

        prefill = self._prefill()
        self.model(**self.inputs, policy=Looking(look, wishes), logits_to_keep=1)
        return [replace(row, of_prefill=row.ours_ms / prefill) for row in rows]

    def _prefill(self) -> float:
        """CPU milliseconds of the text model on what stays."""
        length = self.keep + self.size.text_tokens
        embeds = torch.randn(1, length, self.size.hidden_size)
        text = self.model.model.language_model
        return statistics.median(seconds(lambda: text(inputs_embeds=embeds)) for _ in range(3)) * 1e3

    def _context(self, image: Image) -> Any:
        """Their record of what the model gave."""
        record = load(self.checkout, "base.context")  # type: ignore[arg-type]
        ids = self.inputs["input_ids"]
        embeds = self.model.get_input_embeddings()(ids).clone()
        embeds[ids == midsize.IMAGE_ID] = image.features
        config = {"model_type": "llava", "image_token_index": midsize.IMAGE_ID}
        context = record.PruningContext(input_ids=ids, inputs_embeds=embeds, model_config=config)
        context.vit_layer_num, context.spatial_merge_size = DEPTH, 1
        context.image_grid_thw = torch.tensor([[1, SIDE, SIDE]])
        for (which, layer), states in self.seen.items():
            getattr(context, f"vit_{which}")[layer] = states
        return context

    def _row(self, name: str, policy: vtr.Policy, image: Image, context: Any) -> Row:
        def ours() -> Any:
            image.tower.captures.made.clear()  # type: ignore[union-attr]  # as if this image were asked about first
            return policy.compress(image)

        kept = ours()
        if context is None or name not in THEIRS:
            return Row(policy.spec, self._median(ours), 0.0)
        module, called, settings = THEIRS[name]
        assert self.checkout is not None
        function, count = getattr(load(self.checkout, module), called), len(image)

        def theirs() -> Any:
            return function(context, ratio=1 - self.keep / count, **settings)

        try:
            mask = theirs()
        except Exception as error:  # whatever theirs raises is its row
            return Row(policy.spec, self._median(ours), 0.0, error=f"{type(error).__name__}: {error}")
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(self.rounds)]
        ratios = sorted(a / b for a, b in pairs)
        mine, other = (statistics.median(t) * 1e3 for t in zip(*pairs, strict=True))
        return Row(
            policy.spec, mine, 0.0, other, statistics.median(ratios), ratios[0], ratios[-1],
            self._same(kept, mask, image),
        )  # fmt: skip

    def _median(self, run: Callable[[], Any]) -> float:
        """CPU milliseconds."""
        return statistics.median(seconds(run) for _ in range(self.rounds)) * 1e3

    def _same(self, kept: Any, mask: Any, image: Image) -> float | None:
        """Share of their kept tokens that ours keeps; None where tokens are merged."""
        if not isinstance(kept, torch.Tensor) or not isinstance(mask, torch.Tensor):
            return None
        theirs = mask[0][self.inputs["input_ids"][0] == midsize.IMAGE_ID].nonzero().squeeze(1).tolist()
        return len(set(theirs) & set(kept.tolist())) / max(len(theirs), 1)


def table(rows: Sequence[Row]) -> Any:
    """What the terminal shows."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in (
        "policy",
        "ours\nms",
        "of reduced\nprefill",
        "AngelSlim's\nms",
        "ours ÷\ntheirs",
        "range",
        "same\ntokens",
    ):
        made.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in rows:
        ratio = ("[red]fails[/]", "") if row.error else ("–", "")
        if row.ratio is not None:
            ratio = f"{row.ratio:.2f}", f"{row.low:.2f}–{row.high:.2f}"
        theirs, same = row.theirs_ms, row.same
        made.add_row(
            row.policy.partition(":")[0], f"{row.ours_ms:.1f}", f"{row.of_prefill:.1%}",
            "–" if theirs is None else f"{theirs:.1f}", *ratio, "–" if same is None else f"{same:.0%}",
        )  # fmt: skip
    return made
