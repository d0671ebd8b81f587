"""Teaches the pocket model to read demonstrations: `python -m vtr.pocket.shots --out DIR`.

The language model's layers from FIRST on learn; tower, projector and the layers before stay as shipped. Each step draws
prompts of 1 to 8 pictures with one to three questions each, the words of the answers permuted, mostly with coarse
pictures (prompts are then short), sometimes with a whole last picture or whole pictures throughout. Every question
whose word was demonstrated before it in its prompt is one to answer. DIR/shots.pt is the checkpoint; an interrupted run
goes on from there. At the end DIR/weights holds what the package ships. One process of one thread.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import load
from .. import scenes as S
from ..language import project
from ..model import BOS, EOS, IDS, PAD, encode, pack, pixels_of
from ..nest import SCALES, pool
from ..optim import Muon, ramp
from ..stage import Figures, run_stage
from ..train import Context
from . import FILE, learnt
from .prompts import WORDS, remapping

SCENES, FRESH = 320, 1  # pictures at hand, and how many of them are replaced in a step
STEPS, LR, BATCH, WHOLE = 1500, 1.2e-3, 16, 2  # prompts a step: with coarse pictures, and with whole ones
VIEWS = {"coarse": 0.78, "query": 0.17, "whole": 0.05}
"""How a step shows its pictures: all coarse; only the last one whole; all whole (two or three of them)."""
SPREAD = 0.4  # part of the steps in which coarse pictures take up as many positions as whole ones
LENGTH = 725  # tokens of a whole picture


@dataclass
class Shown:
    """A scene's picture as the language model gets it, by tokens a tile, and its questions by type."""

    tokens: dict[int, torch.Tensor]
    questions: dict[str, list[S.Question]]


def show(model: Any, rng: random.Random) -> Shown:
    """Draws a scene; its features are made once, and kept in half precision."""
    while True:
        scene = S.make_scene(rng, "train", S.SIZES[0])
        asked = {t: qs for t, qs in S._all_questions(scene, rng).items() if t in WORDS and qs}
        if len(asked) == len(WORDS):
            break
    with torch.no_grad():
        tiles = project(model, pixels_of(torch.from_numpy(S.tiles_of(scene.image)))[None], False)[0]
        scales = {n: pool(tiles, (S.GRID, S.GRID), SCALES[n]) if n < 144 else tiles for n in (1, 9, 36, 144)}
        tokens = {n: pack(model, part[None], 2, 2)[0].half() for n, part in scales.items()}
    return Shown(tokens, asked)


@dataclass
class Row:
    """One prompt: parts of embeddings and words, their positions, and at which places which word is to come next."""

    parts: list[torch.Tensor | int]
    positions: list[int]
    labels: dict[int, int]
    asked: set[int]


def make_row(rng: random.Random, shown: list[Shown], view: str, spread: bool) -> Row:
    """A prompt of the given pictures. Every question whose word has come before is to be answered."""
    kind = rng.choice(list(WORDS))
    new, known = remapping(rng, WORDS[kind]), set[str]()
    row, place = Row([BOS], [0], {}, set()), 1
    some = rng.randint(1, 3)
    for i, one in enumerate(shown):
        last = i == len(shown) - 1
        tokens = 144 if view == "whole" or (view == "query" and last) else rng.choice([9, 9, 9, 9, 36, 1])
        if last and view == "coarse":
            tokens = rng.choice([9, 36])
        part = one.tokens[tokens]
        row.parts.append(part)
        row.positions += range(place, place + len(part))
        place += rng.randint(len(part), LENGTH) if spread else len(part)
        of_kind = one.questions[kind]
        chosen = rng.sample(of_kind, min(len(of_kind), some))
        if last and view != "coarse" and (met := [q for q in of_kind if q.answer in known]):
            chosen = [rng.choice(met)]
        for j, q in enumerate(chosen):
            if j:  # further questions about a picture stand behind it as they would behind an answer
                assert row.parts[-1] == EOS
            words, answer = encode(q.text), IDS[new[q.answer]]
            row.parts += [*words, answer, EOS]
            row.positions += range(place, place + len(words) + 2)
            place += len(words) + 2
            end = len(row.positions) - 3  # the question's last word
            if q.answer in known:
                row.labels[end] = answer
                row.asked.add(end)
            row.labels[end + 1] = EOS
            known.add(q.answer)
    return row


def states(model: Any, rows: list[Row]) -> torch.Tensor:
    """Final hidden states, [rows, longest, width]: right-padded, each token sees those before it."""
    lm = model.model.language_model
    table, longest = lm.embed_tokens.weight.detach(), max(len(row.positions) for row in rows)
    embeds = table[PAD].expand(len(rows), longest, -1).clone()
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        parts = [table[part][None] if isinstance(part, int) else part.float() for part in row.parts]
        embeds[i, : len(row.positions)] = torch.cat(parts)
        positions[i, : len(row.positions)] = torch.tensor(row.positions)
    rope = lm.rotary_emb(embeds, positions)
    hidden = embeds
    for layer in lm.layers:
        out = layer(hidden, attention_mask=None, position_embeddings=rope)
        hidden = out[0] if isinstance(out, tuple) else out
    return lm.norm(hidden)


def loss_of(model: Any, rows: list[Row]) -> tuple[torch.Tensor, Figures]:
    """Cross-entropy of the words that can be known, and of the ends of answers (a tenth)."""
    at = [(i, place, label, place in row.asked) for i, row in enumerate(rows) for place, label in row.labels.items()]
    row, place, label, asked = (torch.tensor(column) for column in zip(*at, strict=True))
    logits = model.lm_head(states(model, rows)[row, place])
    each = F.cross_entropy(logits, label, reduction="none")
    loss = 0.1 * each[~asked].mean()
    if not asked.any():
        return loss, {"loss": loss.item()}
    loss = loss + each[asked].mean()
    right = (logits.argmax(-1) == label)[asked].float().mean().item()
    return loss, {"loss": loss.item(), "right": right}


def train(model: Any, ctx: Context, steps: int = STEPS, lr: float = LR, batch: int = BATCH, most: int = 8) -> None:
    """Trains the layers. batch: prompts of a step with coarse pictures. most: pictures of a prompt."""
    model.requires_grad_(False)
    params = [p.requires_grad_() for p in learnt(model).values()]
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr, 0.02),
        torch.optim.AdamW(rest, lr, (0.9, 0.95), weight_decay=0.0),
    ]
    at_hand: list[Shown] = []

    def gradients(step: int, rng: random.Random) -> Figures:
        fresh = FRESH if at_hand else SCENES
        for _ in range(fresh):
            made = show(model, rng)
            if len(at_hand) < SCENES:
                at_hand.append(made)
            else:
                at_hand[rng.randrange(SCENES)] = made
        view = rng.choices(list(VIEWS), list(VIEWS.values()))[0]
        pictures = rng.randint(2, 3) if view == "whole" else rng.randint(2, most)
        rows = [
            make_row(rng, rng.sample(at_hand, pictures), view, view != "whole" and rng.random() < SPREAD)
            for _ in range({"coarse": batch, "query": batch // 4, "whole": WHOLE}[view])
        ]
        loss, figures = loss_of(model, rows)
        loss.backward()
        return {name if name == "loss" else f"{view}-{name}": value for name, value in figures.items()}

    run_stage(
        "shots", ctx, model, steps, (params, optimizers), gradients,
        rate=lambda step: ramp(step, steps, 20, "linear"), save_every=50, every=25,
    )  # fmt: skip


def export(model: Any, folder: Path) -> None:
    """The layers that have learnt, in half precision."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().half().contiguous() for name, p in learnt(model).items()}, str(folder / FILE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--batch", type=int, default=BATCH, help="prompts a step")
    parser.add_argument("--most", type=int, default=8, help="pictures of a prompt, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load()[0]
    train(model, Context(args.out, 0, 1, args.seed), args.steps, args.lr, args.batch, args.most)
    export(model, args.out / "weights")


if __name__ == "__main__":
    main()
