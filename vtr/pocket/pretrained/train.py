"""Trains the projector and LoRA of the pretrained pocket model: ``python -m vtr.pocket.pretrained train``.

Canvases of one to four drawings (and cut-out photographs), six questions each, put into one sequence whose questions
see the picture and not each other. Random image tokens are left out at random ratios, so that no way of choosing
tokens is favoured. The style that decides when to stop is another one than the style the figures are of.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import trange

from . import adapter, drawings
from .align import PLACES, Seen, align, joined, owners
from .canvases import Canvas, Question, ask, paint
from .drawings import Drawing
from .start import one_tile

PLACING = 1200
"""Canvases that say how features tell a place."""
EACH = 180
"""Drawings of each style that a picture is made of."""
LOOK, LOOKS = 8, 8
"""Canvases a batch, and batches, of the style that decides when to stop."""


@dataclass
class Recipe:
    """Everything that decides how training runs.

    Attributes:
        aligned: canvases of the first half (``align``). canvases: of the second. batch: canvases a step. rank, alpha:
            of LoRA. lr, lora_lr: peaks of the projector and of LoRA, after ``warmup`` steps, then down to a twentieth
            along a cosine. decay: of weights. smoothing: of the labels. whole: share of canvases that keep all tokens.
            least: the others keep between this share and all of them. photographs: share of canvases.
        every: steps between two looks at the validation style.
    """

    aligned: int = 5200
    canvases: int = 5600
    batch: int = 4
    rank: int = 8
    alpha: int = 16
    lr: float = 1e-4
    lora_lr: float = 6e-4
    warmup: int = 40
    decay: float = 0.05
    smoothing: float = 0.05
    whole: float = 0.5
    least: float = 0.1
    photographs: float = 0.12
    every: int = 100
    seed: int = 0


@dataclass
class Batch:
    """Some canvases with their questions as one batch of sequences.

    Attributes:
        pixels: [canvases, 3, side, side]. asked: of each canvas.
    """

    canvases: list[Canvas]
    asked: list[list[Question]]
    pixels: torch.Tensor = field(repr=False)


@dataclass
class Row:
    """A canvas and its questions as one sequence.

    Attributes:
        embeds: [length, width]. places: position ids. blocks: 0 is seen by all, n by question n alone. before: the
            places whose next token is part of an answer. answers: those tokens. lengths: of the answers.
    """

    embeds: torch.Tensor
    places: torch.Tensor
    blocks: torch.Tensor
    before: torch.Tensor
    answers: torch.Tensor
    lengths: list[int]


class Student:
    """The model in bfloat16 with a projector in float32 and peft's adapters in its decoder."""

    def __init__(self, model: Any, processor: Any, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self.processor, self.recipe = model.eval().requires_grad_(False), processor, recipe
        inner = model.model
        self.words = model.get_input_embeddings().weight.detach().clone()
        self.tower = inner.vision_tower.to(torch.bfloat16)
        self.projector = inner.multi_modal_projector.float()
        for part in (self.projector.layer_norm, self.projector.linear_1):  # behind them lies what spreads noise
            part.requires_grad_(True)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(adapter.TARGETS))
        self.decoder = get_peft_model(inner.language_model.to(torch.bfloat16), config, autocast_adapter_dtype=False)
        for name, weight in self.decoder.named_parameters():
            weight.requires_grad_("lora_" in name)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "§"}]}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, self.behind = text.split("§")
        head, tail = before.split(processor.image_token)
        self.head, self.tail = self.ids(head + processor.start_image_token), self.ids(processor.end_image_token + tail)
        self.end = "<|im_end|>"

    def ids(self, text: str) -> list[int]:
        """Of a text without anything around it."""
        return list(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    # -- one batch -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def see(self, batches: Iterable[Batch]) -> Seen:
        """Canvases as the tower gives them, for :mod:`align`."""
        parts = []
        for batch in batches:
            features = self.look(batch.pixels).half()
            across = math.isqrt(features.shape[1])
            parts.append(Seen(features, torch.stack([owners(one, across) for one in batch.canvases])))
        return joined(parts)

    def start(self, seen: Seen, held: Seen, say: Callable[[str], None] = print) -> None:
        """Align the projector with the decoder's words."""
        names = torch.stack([self.words[self.ids(" " + one.name)].mean(0) for one in drawings.things()])
        ends = [[self.words[self.ids(" " + word)].mean(0) for word in pair] for pair in PLACES]
        some = Seen(seen.features[:PLACING], seen.owners[:PLACING])
        found = align(seen, held, names, say=say)
        found.put_into(self.projector, some, torch.stack([first - last for first, last in ends]))

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the tower gives the projector, [canvases, tokens, 4 · width] float32."""
        inner = self.model.model
        seen = self.tower(pixel_values=pixels.to(torch.bfloat16)).last_hidden_state[:, 1:].float()
        across = math.isqrt(seen.shape[1])
        seen = inner.pixel_shuffle(seen.reshape(len(seen), across, across, -1), scale_factor=0.5)
        return seen.reshape(len(seen), -1, seen.shape[-1])

    def forward(
        self, features: torch.Tensor, asked: list[list[Question]], draw: random.Random | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[slice]]]:
        """Logits of the answers' tokens [answer tokens, words], those tokens, and where each answer lies among them.

        Args:
            features: as :meth:`look`. draw: leaves out tokens of the picture; None keeps all.
        """
        seen = self.projector(features)
        rows = [self._row(one, questions, draw) for one, questions in zip(seen, asked, strict=True)]
        longest = max(len(row.embeds) for row in rows)
        embeds = torch.stack([F.pad(row.embeds, (0, 0, 0, longest - len(row.embeds))) for row in rows])
        places = torch.stack([F.pad(row.places, (0, longest - len(row.places))) for row in rows])
        blocks = torch.stack([F.pad(row.blocks, (0, longest - len(row.blocks)), value=-1) for row in rows])
        ours = (blocks[:, :, None] == blocks[:, None]) | (blocks[:, None] == 0)
        mask = ours & torch.ones(longest, longest, dtype=torch.bool).tril()
        hidden = self.decoder(
            inputs_embeds=embeds.to(torch.bfloat16), attention_mask=mask[:, None], position_ids=places, use_cache=False
        ).last_hidden_state
        taken = torch.cat([hidden[n, row.before] for n, row in enumerate(rows)])
        logits = (taken @ self.words.to(taken.dtype).T).float()
        where, at = [], 0
        for row in rows:
            where.append([slice(at := at, at := at + length) for length in row.lengths])
        return logits, torch.cat([row.answers for row in rows]), where

    def _row(self, seen: torch.Tensor, questions: list[Question], draw: random.Random | None) -> Row:
        kept = torch.arange(len(seen))
        if draw is not None and draw.random() > self.recipe.whole:
            share = draw.uniform(self.recipe.least, 1.0)
            kept = torch.tensor(sorted(draw.sample(range(len(seen)), max(1, round(share * len(seen))))))
        head, count = len(self.head), len(self.head) + len(seen)
        ids, places, blocks = list(self.tail), list(range(count, count + len(self.tail))), [0] * len(self.tail)
        before: list[int] = []
        answers: list[int] = []
        lengths: list[int] = []
        shared = head + len(kept)
        for n, one in enumerate(questions):
            said = self.ids(one.answer + self.end)
            block = self.ids(one.text + self.behind)
            first = shared + len(ids) + len(block) - 1
            before += range(first, first + len(said))
            answers += said
            lengths.append(len(said))
            block = block + said
            places += range(count + len(self.tail), count + len(self.tail) + len(block))
            blocks += [n + 1] * len(block)
            ids += block
        embeds = torch.cat([self.words[self.head], seen[kept], self.words[ids]])
        where = torch.cat([torch.arange(head), head + kept, torch.tensor(places)])
        whose = torch.tensor([0] * shared + blocks)
        return Row(embeds, where, whose, torch.tensor(before), torch.tensor(answers), lengths)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is shipped, as :func:`adapter.save` takes it."""
        found = {adapter.PROJECTOR + name: value for name, value in self.projector.state_dict().items()}
        scale = self.recipe.alpha / self.recipe.rank
        for name, value in self.decoder.named_parameters():
            if "lora_" in name:
                layer = adapter.LORA + name.split("base_model.model.")[1].split(".lora_")[0]
                found[layer + (adapter.DOWN if "lora_A" in name else adapter.UP)] = value.detach().float() * (
                    1.0 if "lora_A" in name else scale
                )
        return {name: value.detach().clone() for name, value in found.items()}


# -- data --------------------------------------------------------------------------------------------------------------
class Source:
    """Canvases of drawings: styles take turns, so that a style with few drawings is seen as often as one with many."""

    def __init__(self, styles: Mapping[str, Sequence[Drawing]], photographs: float = 0.0, seed: int = 0) -> None:
        self.draw = random.Random(f"train-{seed}")
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
        return Batch(
            canvases, [ask(self.draw, one) for one in canvases], one_tile(processor, [one.image for one in canvases])
        )


# -- training ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def score(student: Student, batches: Sequence[Batch], wrong: bool = False) -> dict[str, float]:
    """Answers whose every token is the likeliest one (= greedy decoding), a share of each type, and the loss.

    Args:
        wrong: show each question the picture of the canvas after.
    """
    right: dict[str, list[bool]] = {}
    lost = tokens = 0.0
    for batch in batches:
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
    return {"loss": lost / tokens} | {name: sum(some) / len(some) for name, some in sorted(right.items())}


def train(
    student: Student, source: Source, val: Sequence[Batch], out: Path, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Train, keep in ``out`` the weights of the best look at ``val``, return the curve (also ``out``/curve.json)."""
    recipe = student.recipe
    steps = recipe.canvases // recipe.batch
    lora = [one for one in student.decoder.parameters() if one.requires_grad]
    master = [one.detach().float().clone().requires_grad_(True) for one in lora]
    projector = [one for one in student.projector.parameters() if one.requires_grad]
    groups = [{"params": projector, "lr": recipe.lr}, {"params": master, "lr": recipe.lora_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / recipe.warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * n / steps)) / 2)
    )
    draw = random.Random(f"tokens-{recipe.seed}")
    curve: list[dict[str, Any]] = []
    best, run, began = math.inf, 0.0, time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    for step in range(steps + 1):
        if step % recipe.every == 0 or step == steps:
            now = {"canvases": step * recipe.batch, "cpu_s": time.process_time() - began, "train_loss": run}
            now |= score(student, val)
            curve.append(now)
            (out / "curve.json").write_text(json.dumps({"recipe": asdict(recipe), "curve": curve}, indent=1) + "\n")
            say(" ".join(f"{name} {value:.3g}" for name, value in now.items()))
            if now["loss"] < best:
                best = now["loss"]
                adapter.save(student.weights(), out / adapter.FILE)
        if step == steps:
            break
        batch = source.batch(student.processor, recipe.batch)
        logits, answers, _ = student.forward(student.look(batch.pixels), batch.asked, draw)
        loss = F.cross_entropy(logits, answers, label_smoothing=recipe.smoothing)
        loss.backward()
        for full, half in zip(master, lora, strict=True):
            full.grad, half.grad = None if half.grad is None else half.grad.float(), None
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
    recipe: Recipe, out: Path, cache: Path, photographs: Path | None, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Fetch the drawings, train, write trained.safetensors, curve.json and curve.png. Returns the curve.

    Args:
        cache: the folder of the drawings' packages. photographs: that of Tux Paint's stamps, or None.

    Raises:
        ValueError: the model is not built, or no photographs are in the folder. PackageError: drawings cannot be had.
    """
    from .. import load

    seen = parted(drawings.photographs(photographs))[0] if photographs else []
    model, processor = load("pretrained")
    styles: dict[str, dict[str, list[Drawing]]] = {"train": {}, "val": {}}
    for style in drawings.STYLES:
        if style.use in styles:
            say(f"drawing {style.package} ({style.licence})")
            styles[style.use][style.name] = drawings.read(style, cache)
    torch.manual_seed(recipe.seed)
    student = Student(model, processor, recipe)
    source = Source({**styles["train"], "photographs": seen}, recipe.photographs, recipe.seed)
    val = Source(styles["val"], seed=recipe.seed + 100)
    looks = [val.batch(processor, LOOK) for _ in range(LOOKS)]
    say(f"the tower looks at {recipe.aligned} canvases")
    seen_first = student.see(source.batch(processor, LOOK) for _ in trange(recipe.aligned // LOOK))
    student.start(seen_first, student.see(looks), say)
    curve = train(student, source, looks, out, say)
    plot(curve, out / "curve.png")
    return curve


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
