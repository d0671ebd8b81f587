"""Trains the projector and LoRA of the pretrained pocket model: ``python -m vtr.pocket.pretrained train``.

Canvases of one to four drawings (and cut-out photographs), the questions of each put into one sequence, in which they
see the picture and not each other. Random image tokens are left out at random ratios, so that no way of choosing
tokens is favoured. The style that decides when to stop is another one than the style the figures are of.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import trange

from . import adapter, drawings, home, processes
from .build import assemble
from .canvases import ask, paint
from .drawings import Drawing
from .parts import parts
from .start import one_tile
from .student import Batch, Recipe, Student

EACH = 180
"""Drawings of each style that a picture is made of."""
LOOK, LOOKS = 8, 16
"""Canvases a batch, and batches, of the style that decides when to stop."""


# -- data --------------------------------------------------------------------------------------------------------------
class Source:
    """Canvases of drawings: styles take turns, so that a style with few drawings is seen as often as one with many."""

    def __init__(
        self,
        styles: Mapping[str, Sequence[Drawing]],
        photographs: float = 0.0,
        seed: int | str = 0,
        names: bool = False,
    ) -> None:
        self.draw, self.names = random.Random(f"train-{seed}"), names
        self.drawn = [list(some) for name, some in styles.items() if name != "photographs"]
        self.photographs, self.share = list(styles.get("photographs", ())), photographs

    def batch(self, processor: Any, count: int) -> Batch:
        """Fresh canvases with their questions."""
        canvases = []
        for _ in range(count):
            pool = self.photographs if self.photographs and self.draw.random() < self.share else None
            if pool is None:
                pool = [one for some in self.drawn for one in self.draw.sample(some, min(len(some), EACH))]
            canvases.append(paint(self.draw, pool))
        asked = [ask(self.draw, one, names=self.names) for one in canvases]
        return Batch(canvases, asked, one_tile(processor, [one.image for one in canvases]))


# -- training ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score(student: Student, batches: Sequence[Batch], wrong: bool = False) -> dict[str, float]:
    """Answers whose every token is the likeliest one (= greedy decoding), a share of each type, and the loss.

    Args:
        wrong: show each question the picture of the canvas after.
    """
    right: dict[str, list[bool]] = {}
    lost = tokens = 0.0
    for batch in batches[processes.rank() :: processes.count()]:
        features = student.look(batch.pixels)
        if wrong:
            features = features.roll(1, 0)
        logits, answers, where = student.forward(features, batch.asked, None)
        lost += float(F.cross_entropy(logits, answers, reduction="sum"))
        tokens += len(answers)
        good = logits.argmax(1) == answers
        for questions, places in zip(batch.asked, where, strict=True):
            for one, place in zip(questions, places, strict=True):
                right.setdefault(one.type, []).append(bool(good[place].all()))
    parts = processes.gather((lost, tokens, right))
    types = sorted({name for _, _, one in parts for name in one})
    shares = {name: [hit for _, _, one in parts for hit in one.get(name, ())] for name in types}
    loss = sum(one[0] for one in parts) / sum(one[1] for one in parts)
    return {"loss": loss} | {name: sum(some) / len(some) for name, some in shares.items()}


def train(
    student: Student, source: Source, val: Sequence[Batch], out: Path, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Train, keep in ``out`` the weights of the best look at ``val``, return the curve (also ``out``/curve.json).

    Several processes (:mod:`processes`) share each batch; the first one writes.
    """
    recipe, first = student.recipe, processes.rank() == 0
    steps = recipe.canvases // recipe.batch
    lora = [value for _, value in student.lora()]
    master = [one.detach().float().clone().requires_grad_(True) for one in lora]
    projector = [one for one in student.projector.parameters() if one.requires_grad]
    groups = [{"params": projector, "lr": recipe.lr}, {"params": master, "lr": recipe.lora_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / recipe.warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * n / steps)) / 2)
    )
    draw = random.Random(f"tokens-{recipe.seed}-{processes.rank()}")
    mine = recipe.batch // processes.count()
    curve: list[dict[str, Any]] = []
    best, run, began = math.inf, 0.0, time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    for step in range(steps + 1):
        if step % recipe.every == 0 or step == steps:
            now = {"canvases": step * recipe.batch, "cpu_s": time.process_time() - began, "train_loss": run}
            now |= score(student, val)
            curve.append(now)
            if first:
                (out / "curve.json").write_text(json.dumps({"recipe": asdict(recipe), "curve": curve}, indent=1) + "\n")
                say(" ".join(f"{name} {value:.3g}" for name, value in now.items()))
                if now["loss"] < best:
                    best = now["loss"]
                    adapter.save(student.weights(), out / adapter.FILE)
        if step == steps:
            break
        batch = source.batch(student.processor, mine)
        logits, answers, _ = student.forward(student.look(batch.pixels), batch.asked, draw)
        loss = F.cross_entropy(logits, answers, label_smoothing=recipe.smoothing)
        loss.backward()
        for full, half in zip(master, lora, strict=True):
            full.grad, half.grad = None if half.grad is None else half.grad.float(), None
        processes.average([one.grad for one in (*projector, *master) if one.grad is not None])
        torch.nn.utils.clip_grad_norm_([*projector, *master], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for full, half in zip(master, lora, strict=True):
                half.copy_(full)
        run = loss.item() if not step else 0.95 * run + 0.05 * loss.item()
    return curve


def parted(photographs: Sequence[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """Photographs to train on, and others to measure with.

    Raises:
        ValueError: there are none.
    """
    if not photographs:
        raise ValueError("no photographs are there: name the folder of Debian's tuxpaint-stamps-default")
    mixed = list(photographs)
    random.Random(7).shuffle(mixed)
    return mixed[::2], mixed[1::2]


def run(
    recipe: Recipe,
    out: Path,
    cache: Path,
    photographs: Path | None,
    weights: Path | None = None,
) -> None:
    """Fetch the drawings, train, write trained.safetensors, curve.json and curve.png. Each process calls it.

    Args:
        cache: the folder of the drawings' packages. photographs: that of Tux Paint's stamps, or None. weights: a
            trained.safetensors to go on from; None starts anew.

    Raises:
        ValueError: no photographs are in the folder, or the weights are of another model. PackageError: a package of
            the model or of drawings cannot be had.
    """
    first = processes.rank() == 0
    say = _say if first else (lambda line: None)
    seen = parted(drawings.photographs(photographs))[0] if photographs else []
    with torch.no_grad():
        model, processor = assemble(parts(home() / "wheels", say=say))
    styles: dict[str, dict[str, list[Drawing]]] = {"train": {}, "val": {}}
    for style in drawings.STYLES:
        if style.use in styles:
            say(f"drawing {style.package} ({style.licence})")
            styles[style.use][style.name] = drawings.read(style, cache)
    torch.manual_seed(recipe.seed)
    student = Student(model, processor, recipe)
    own = f"{recipe.seed}-{processes.rank()}"
    source = Source({**styles["train"], "photographs": seen}, recipe.photographs, own, names=True)
    val = Source(styles["val"], seed=recipe.seed + 100)
    looks = [val.batch(processor, LOOK) for _ in range(LOOKS)]
    if weights is not None:
        student.go_on(adapter.load(weights))
    elif first:
        say(f"the tower looks at {recipe.aligned} canvases")
        seen_first = student.see(source.batch(processor, LOOK) for _ in trange(recipe.aligned // LOOK))
        student.start(seen_first, student.see(looks), say)
    processes.share([*student.projector.parameters(), *(value for _, value in student.lora())])
    curve = train(student, source, looks, out, say)
    if first:
        plot(curve, out / "curve.png")


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def plot(curve: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and right answers over the pictures seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, right = figure.subplots(1, 2)
    seen = [one["canvases"] for one in curve]
    loss.plot(seen[1:], [one["train_loss"] for one in curve[1:]], label="training (smoothed labels)")
    loss.plot(seen[1:], [one["loss"] for one in curve[1:]], label="a style not trained on")
    loss.set(xlabel="pictures", ylabel="loss per answer token")
    for kind in sorted(set(curve[0]) - {"canvases", "cpu_s", "train_loss", "loss"}):
        right.plot(seen, [100 * one[kind] for one in curve], label=kind)
    right.set(xlabel="pictures", ylabel="right answers, %", ylim=(0, 100))
    loss.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
