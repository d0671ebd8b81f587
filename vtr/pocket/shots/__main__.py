"""Teaches the pocket model to read demonstrations: `python -m vtr.pocket.shots --out DIR`.

The language model's layers from FIRST on learn; tower, projector and the layers before stay as shipped. Each step draws
prompts of some pictures with one to three questions each, the words of the answers permuted. Every question whose word
was demonstrated before it in its prompt is one to answer. Prompts are short at first: of a picture only some patches of
its shapes are shown. Later most pictures are coarse, sometimes the last one whole, sometimes all of them. A probe,
which is not kept, has to read what a picture really shows off each question's end in a middle layer (NAMED), and off
its answer one layer further (CARRIED), so that the layers behind have something to match.

DIR/shots.pt is the checkpoint, DIR/log.txt says how it goes; an interrupted run goes on. At the end DIR/weights holds
what the package ships.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import WEIGHTS, load
from .. import scenes as S
from ..language import project
from ..model import BOS, EOS, IDS, LM_WIDTH, PAD, VOCAB, encode, pack, pixels_of
from ..nest import SCALES, pool
from ..optim import Muon, ramp
from ..processing import make_processor
from ..release import export
from ..stage import Figures, run_stage
from ..train import Context
from .prompts import WORDS, remapping

FIRST = 2  # the first decoder layer that learns
POSITIONS = 8192  # that it learns; the model it starts from has half as many
SCENES = 120  # pictures at hand
STEPS, LR = 1000, 1.2e-3
VIEWS = {
    "patches": (16, 0.80, 0.10), "coarse": (10, 0.18, 0.62), "query": (4, 0.02, 0.22), "whole": (2, 0.0, 0.06),
}  # fmt: skip
"""How a step shows its pictures: some patches of the shapes; all coarse; only the last one whole; all whole (two or
three of them). Of each: prompts a step, and its part of the steps in the first half and in the second."""
SPREAD = 0.4  # part of the steps in which coarse pictures take up as many positions as whole ones
LENGTH = 744  # tokens of a whole picture
NAMED, CARRIED, PROBED = 5, 6, 0.3  # layers behind which the probe reads, and the weight of its losses


@dataclass
class Shown:
    """A scene's picture as the language model gets it, by tokens a tile; which of the whole one's tokens show a shape,
    shape by shape; and its questions by type."""

    tokens: dict[int, torch.Tensor]
    shapes: list[list[int]]
    questions: dict[str, list[S.Question]]

    def patches(self, rng: random.Random) -> torch.Tensor:
        """Two tokens of each shape."""
        return self.tokens[144][sorted(i for at in self.shapes for i in rng.sample(at, min(2, len(at))))]


def show(model: Any, rng: random.Random) -> Shown:
    """Draws a scene; its features are made once, and kept in half precision."""
    while True:
        scene = S.make_scene(rng, "train", S.SIZES[0])
        asked = {t: qs for t, qs in S._all_questions(scene, rng).items() if t in WORDS and qs}
        if len(asked) == len(WORDS):
            break
    with torch.no_grad():
        tiles = project(model, pixels_of(torch.from_numpy(S.tiles_of(scene.image)))[None], False)[0]
        scales = {144: tiles, 9: pool(tiles, (S.GRID, S.GRID), SCALES[9])}
        tokens = {n: pack(model, part[None], 2, 2)[0].half() for n, part in scales.items()}
    return Shown(tokens, _shapes(scene), asked)


def _shapes(scene: S.Scene) -> list[list[int]]:
    """Which of a whole picture's tokens lie on each shape, at least half of the patch."""
    side, tile = 2 * S.GRID, S.GRID**2
    found = []
    for i, thing in enumerate(scene.objects):
        mask = (scene.owner == i + 1).reshape(side, S.PATCH, side, S.PATCH).sum((1, 3)) >= S.PATCH**2 / 2
        places = [tile + int(y) * (side + 1) + int(x) for y, x in zip(*mask.nonzero(), strict=True)]
        if thing.kind == "shape" and places:
            found.append(places)
    return found


@dataclass
class Row:
    """One prompt: parts of embeddings and words, their positions; at which places which word is to come next; those of
    them where it can be known; and where questions end, with the word that says what the picture shows."""

    parts: list[torch.Tensor | int]
    positions: list[int]
    labels: dict[int, int]
    asked: set[int]
    shows: dict[int, int]


def make_row(rng: random.Random, shown: list[Shown], view: str, spread: bool) -> Row:
    """A prompt of the given pictures. Every question whose word has come before is to be answered."""
    kind = rng.choice(list(WORDS))
    new, known = remapping(rng, WORDS[kind]), set[str]()
    row, place = Row([BOS], [0], {}, set(), {}), 1
    some = rng.randint(1, 3)
    for i, one in enumerate(shown):
        last = i == len(shown) - 1
        part = one.tokens[144 if view == "whole" or (view == "query" and last) else 9]
        if view == "patches":
            part = one.patches(rng)
        row.parts.append(part)
        row.positions += range(place, place + len(part))
        place += rng.randint(len(part), LENGTH) if spread else len(part)
        of_kind = one.questions[kind]
        chosen = rng.sample(of_kind, min(len(of_kind), some))
        if last and view in ("query", "whole") and (met := [q for q in of_kind if q.answer in known]):
            chosen = [rng.choice(met)]
        for q in chosen:
            words, answer = encode(q.text), IDS[new[q.answer]]
            row.parts += [*words, answer, EOS]
            row.positions += range(place, place + len(words) + 2)
            place += len(words) + 2
            end = len(row.positions) - 3  # the question's last word
            if q.answer in known:
                row.labels[end] = answer
                row.asked.add(end)
            row.labels[end + 1] = EOS
            row.shows[end] = IDS[q.answer]
            known.add(q.answer)
    return row


def states(model: Any, rows: list[Row]) -> list[torch.Tensor]:
    """Hidden states behind every layer, the last ones normed: [rows, longest, width] each.

    Rows are padded on the right, and a token sees those before it.
    """
    lm = model.model.language_model
    table, longest = lm.embed_tokens.weight.detach(), max(len(row.positions) for row in rows)
    embeds = table[PAD].expand(len(rows), longest, -1).clone()
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        parts = [table[part][None] if isinstance(part, int) else part.float() for part in row.parts]
        embeds[i, : len(row.positions)] = torch.cat(parts)
        positions[i, : len(row.positions)] = torch.tensor(row.positions)
    rope = lm.rotary_emb(embeds, positions)
    hidden = [embeds]
    for layer in lm.layers:
        out = layer(hidden[-1], attention_mask=None, position_embeddings=rope)
        hidden.append(out[0] if isinstance(out, tuple) else out)
    return [*hidden[1:-1], lm.norm(hidden[-1])]


def loss_of(model: Any, rows: list[Row], probe: torch.nn.Linear) -> tuple[torch.Tensor, Figures]:
    """Cross-entropy of the words that can be known, of the ends of answers (a tenth), and the probe's."""
    hidden = states(model, rows)
    figures: Figures = {}
    row, place, shows = _columns([(i, place, word) for i, one in enumerate(rows) for place, word in one.shows.items()])
    loss = hidden[-1].new_zeros(())
    for name, layer, behind in (("named", NAMED, 0), ("carried", CARRIED, 1)):
        read = probe(hidden[layer][row, place + behind])
        loss = loss + PROBED * F.cross_entropy(read, shows)
        figures[name] = (read.argmax(-1) == shows).float().mean().item()
    at = [(i, place, label, place in row.asked) for i, row in enumerate(rows) for place, label in row.labels.items()]
    row, place, label, asked = _columns(at)
    logits = model.lm_head(hidden[-1][row, place])
    each = F.cross_entropy(logits, label, reduction="none")
    loss = loss + 0.1 * each[~asked].mean()
    if asked.any():
        loss = loss + each[asked].mean()
        figures["right"] = (logits.argmax(-1) == label)[asked].float().mean().item()
    return loss, figures | {"loss": loss.item()}


def _columns(rows: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


def learnt(model: Any) -> dict[str, Any]:
    """The parameters that learn, by name."""
    prefix = "model.language_model."
    names = [f"{prefix}layers.{i}." for i in range(FIRST, len(model.model.language_model.layers))]
    return {n: p for n, p in model.named_parameters() if n.startswith((*names, f"{prefix}norm."))}


def train(model: Any, ctx: Context, steps: int = STEPS, lr: float = LR, most: int = 8, scenes: int = SCENES) -> None:
    """Trains the layers. most: pictures of a prompt. scenes: that are at hand, one of which is replaced each step."""
    model.requires_grad_(False)
    torch.manual_seed(ctx.seed)
    probe = torch.nn.Linear(LM_WIDTH, len(VOCAB))
    params = [p.requires_grad_() for p in learnt(model).values()]
    matrices = [p for p in params if p.ndim == 2]
    rest = [*(p for p in params if p.ndim != 2), *probe.parameters()]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr, 0.02),
        torch.optim.AdamW(rest, lr, (0.9, 0.95), weight_decay=0.0),
    ]
    at_hand: list[Shown] = []

    def gradients(step: int, rng: random.Random) -> Figures:
        while len(at_hand) < scenes:
            at_hand.append(show(model, rng))
        at_hand[rng.randrange(scenes)] = show(model, rng)
        view = rng.choices(list(VIEWS), [parts[1 + (step > steps / 2)] for parts in VIEWS.values()])[0]
        pictures = rng.randint(2, 3) if view == "whole" else rng.randint(2, most)
        spread = view != "whole" and rng.random() < SPREAD
        rows = [make_row(rng, rng.sample(at_hand, pictures), view, spread) for _ in range(VIEWS[view][0])]
        loss, figures = loss_of(model, rows, probe)
        loss.backward()
        return {name if name == "loss" else f"{view}-{name}": value for name, value in figures.items()}

    run_stage(
        "shots", ctx, model, steps, (matrices + rest, optimizers), gradients,
        rate=lambda step: ramp(step, steps, 20, "linear"), save_every=25, every=25, extra=probe,
    )  # fmt: skip


def write(model: Any, folder: Path) -> None:
    """What the package ships: the changes of the pocket model, and config and processor with more positions."""
    processor = make_processor()
    model.config.text_config.max_position_embeddings = processor.tokenizer.model_max_length = POSITIONS
    export(model, folder, processor, longest=4, base=WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--most", type=int, default=8, help="pictures of a prompt, at most")
    parser.add_argument("--scenes", type=int, default=SCENES, help="pictures at hand; one is replaced each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load()[0]
    train(model, Context(args.out, 0, 1, args.seed), args.steps, args.lr, args.most, args.scenes)
    write(model, args.out / "weights")


if __name__ == "__main__":
    main()
