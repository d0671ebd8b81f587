"""Stages `clips` and `films`: the language model learns to compare frames, first few of them, then all.

A film has up to a dozen questions, which share one run of its frames. Vision tokens are dropped at random, or whole
frames are left out. Early on, a head that is thrown away afterwards reads a layer in the middle and tells, token by
token, what has happened at its place up to then. Tower and projector stay as they are, so that a film is seen once and
used several times, each time with other questions and other tokens. Most of what the head tells it tells by the words
for it (a state times a row of the word table), as in stage `align` of the pocket model: the word that decides a
question finds what it is about.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..language import students
from ..model import EOS, LM_WIDTH, PAD, answer_states
from ..optim import ramp
from ..scenes import COLOR_NAMES, SHAPES
from ..stage import Figures, run_stage
from .films import FRAMES, SIDE, TYPES, WAYS, Actor, Film, all_questions, film_stream, make_film
from .model import IDS, TOKENS, prefix, see

QUESTIONS = 12  # about a film, at most
HEAD_LAYER = 5  # its output is what the head reads
EVENTS = ["moved", "appeared", "vanished", "first", "last"]
NAMED = [*EVENTS, *SHAPES, *COLOR_NAMES]
"""What the head tells by words of a shape that is here, or was here and is gone. First, last: of those that had
appeared up to then."""
SEEN = [*WAYS, "came", *NAMED]
"""All it tells. Those without a word for it: the side a shape has moved to, and that it came with this frame."""
WEIGHTS = [1.0] * (len(WAYS) + 1 + len(EVENTS)) + [0.25] * (len(SHAPES) + len(COLOR_NAMES))
KEEPS = (0.75, 0.5, 0.35, 0.25, 0.15)
USES = 3  # of a film, on average
POOL = 600  # films that are kept to be used again


class Reels:
    """Films of so many frames and what the language model gets of them, fresh ones and used ones."""

    def __init__(self, model: Any, frames: int) -> None:
        self.model, self.frames = model, frames
        self.pool: deque[tuple[Film, torch.Tensor]] = deque(maxlen=POOL)

    def take(self, count: int, rng: random.Random) -> tuple[list[Film], torch.Tensor]:
        """So many films, one in USES of them new, and their vision tokens (films, frames, 36, width)."""
        new = count if len(self.pool) < count else max(1, round(count / USES))
        fresh = [make_film(rng, self.frames) for _ in range(new)]
        old = rng.sample(self.pool, count - len(fresh))
        made = list(zip(fresh, see(self.model, pixels(fresh)), strict=True))
        self.pool.extend(made)
        films, vision = zip(*made, *old, strict=True)
        return list(films), torch.stack(vision)


def batch_of(films: list[Film], rng: random.Random) -> dict[str, torch.Tensor]:
    """Questions of films as rows: ids, labels, pos, block (number of a token's question), kind (index of its type)."""
    rows = []
    for film in films:
        asked = [rng.sample(questions, min(2, len(questions))) for questions in all_questions(film).values()]
        several = [question for two in asked for question in two]
        row: list[list[int]] = [[], [], [], [], []]
        for block, q in enumerate(rng.sample(several, min(QUESTIONS, len(several)))):
            words = [IDS[word] for word in q.text.split()]
            answer, count = [IDS[q.answer], EOS], len(words)
            kinds = [-1] * count + [TYPES.index(q.type), -1]
            columns = (words + answer, [-100] * count + answer, range(count + 2), [block] * (count + 2), kinds)
            for column, values in zip(row, columns, strict=True):
                column += values
        rows.append(row)
    length = max(len(row[0]) for row in rows)
    names = {"ids": PAD, "labels": -100, "pos": 0, "block": -1, "kind": -1}
    return {
        name: torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
        for i, (name, fill) in enumerate(names.items())
    }


def pixels(films: list[Film]) -> torch.Tensor:
    """uint8 (films, T, 96, 96, 3)."""
    return torch.from_numpy(np.stack([np.stack([np.asarray(frame) for frame in film.frames]) for film in films]))


def events(film: Film, shown: list[int]) -> torch.Tensor:
    """What there is to tell of every token of the frames that are shown: bool (shown · 36, SEEN)."""
    side = int(TOKENS**0.5)
    cell = SIDE / side
    fresh = [actor.there[0] for actor in film.actors if not actor.shown(shown[0]) and actor.there[0] > shown[0]]
    edges = torch.arange(side) * cell
    out = torch.zeros(len(shown), side, side, len(SEEN), dtype=torch.bool)
    for actor in film.actors:
        size = 2 * actor.radius
        for i, t in enumerate(shown):
            before = shown[i - 1] if i else t
            place = actor.place(t if actor.shown(t) else before)
            over = [
                (torch.minimum(edges + cell, torch.tensor(c + size / 2)) - edges.clamp(min=c - size / 2)).clamp(min=0)
                for c in place
            ]
            here = over[1][:, None] * over[0][None, :] > 0.15 * size**2
            for name in _told(actor, shown[0], before, t, fresh):
                out[i, :, :, SEEN.index(name)] |= here
    return out.view(-1, len(SEEN))


def _told(actor: Actor, start: int, before: int, t: int, fresh: list[int]) -> list[str]:
    """What there is to tell of a shape in frame ``t``, behind ``before``; ``fresh``: the frames in which some came."""
    names = [actor.shape, actor.color]
    if not actor.shown(t):
        return [*names, "vanished"] if actor.shown(start) and t > start else []
    if actor.way and actor.place(t) != actor.place(start):
        names += [actor.way, "moved"]
    if not actor.shown(start):
        names += ["appeared", *(["came"] if not actor.shown(before) else [])]
        names += ["first"] if actor.there[0] == min(fresh) else []
        names += ["last"] if actor.there[0] == max(come for come in fresh if come <= t) else []
    return names


def choose_view(rng: random.Random, frames: int) -> tuple[list[int], list[float]]:
    """Which frames are shown, and the share of tokens kept of each.

    All tokens; the same share of every frame; another share of each; every other frame.
    """
    u, every = rng.random(), list(range(frames))
    if u < 0.2:
        return every, [1.0] * frames
    if u < 0.6:
        return every, [rng.choice(KEEPS)] * frames
    if u < 0.8:
        return every, [rng.choice((1.0, *KEEPS, 0.05)) for _ in every]
    fewer = every[rng.randint(0, 1) :: 2]
    return fewer, [rng.choice((1.0, *KEEPS))] * len(fewer)


def keep_random(films: int, shares: list[float], seed: int) -> torch.Tensor:
    """A random part of every frame's tokens: bool (films, T · 36)."""
    noise = torch.rand(films, len(shares), TOKENS, generator=torch.Generator().manual_seed(seed))
    rank = noise.argsort(-1).argsort(-1)
    return (rank < torch.tensor([round(share * TOKENS) for share in shares])[:, None]).flatten(1)


def losses(
    model: Any, head: nn.Module | None, films: list[Film], vision: torch.Tensor, view: tuple[list[int], list[float]],
    rng: random.Random,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, list[bool]]]:  # fmt: skip
    """The answers' cross-entropy (end-of-answer at a tenth), the head's, and which answers were right, by kind.

    When tokens are dropped, half of the time the rest keep their positions, half of the time they close ranks.

    vision: of all frames, (films, T, 36, width).
    """
    shown, shares = view
    kept = keep_random(len(films), shares, rng.getrandbits(40))
    embeds, place, number = prefix(model, vision[:, shown], kept)
    close = rng.random() < 0.5
    where = torch.arange(embeds.shape[1]).expand(len(films), -1) if close else place
    start = int(where[0, -1]) + 2  # behind BOS
    batch, caught = batch_of(films, rng), []
    layer = model.model.language_model.layers[HEAD_LAYER]
    handle = layer.register_forward_hook(lambda module, args, out: caught.append(out[0] if type(out) is tuple else out))
    try:
        states = answer_states(model, embeds, where + 1, batch["ids"], batch["pos"] + start, batch["block"])[:, :-1]
    finally:
        handle.remove()
    labels, kind = batch["labels"][:, 1:], batch["kind"][:, 1:]
    chosen = labels != -100
    logits, labels, kind = model.lm_head(states[chosen]), labels[chosen], kind[chosen]
    answer = kind >= 0
    loss = F.cross_entropy(logits[answer], labels[answer]) + 0.1 * F.cross_entropy(logits[~answer], labels[~answer])
    right: dict[str, list[bool]] = defaultdict(list)
    for ok, k in zip((logits.argmax(-1) == labels)[answer].tolist(), kind[answer].tolist(), strict=True):
        right[TYPES[k]].append(ok)
    told = loss.new_zeros(())
    if head is not None:
        wanted = torch.stack([events(film, shown) for film in films])
        is_vision = number >= 0
        hidden = caught[0][:, 1:][is_vision]
        target = wanted.gather(1, number.clamp(min=0)[..., None].expand(-1, -1, len(SEEN)))[is_vision].float()
        logits = head(hidden, model.get_input_embeddings().weight)
        each = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(4.0), reduction="none")
        told = (each * torch.tensor(WEIGHTS)).sum(-1).mean()
    return loss, told, right


class Head(nn.Module):
    """Tells SEEN from tokens' states (…, width): logits (…, SEEN). The rows of the word table say what has a word."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wordless = nn.RMSNorm(LM_WIDTH), nn.Linear(LM_WIDTH, len(SEEN) - len(NAMED))
        self.scale, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((len(NAMED),), -3.0))

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden)
        named = hidden @ table[[IDS[word] for word in NAMED]].T * self.scale + self.bias
        return torch.cat([self.wordless(hidden), named], -1)


def train_watch(
    model: Any, ctx: Any, stage: str, steps: int, lr: float, frames: int, films: int, told: float, save_every: int = 100
) -> None:
    """Runs a stage. lr: of the language model. told: weight of the head's loss, which falls to 0."""
    params, optimizers = students(model, lr, 0.0)
    torch.manual_seed(ctx.seed)
    head = Head()
    optimizers.append(torch.optim.AdamW(head.parameters(), lr, weight_decay=0.0))
    params += list(head.parameters())
    reels = Reels(model, frames)

    def gradients(step: int, rng: random.Random) -> Figures:
        view = choose_view(random.Random(f"{stage}-{ctx.seed}-{step}"), frames)  # the same for all workers
        count = films if sum(view[1]) > 0.5 * frames else 2 * films  # short ones: more of them
        loss, seen, right = losses(model, head, *reels.take(count, rng), view, rng)
        (loss + told * (1 - step / steps) * seen).backward()
        figures = {kind: float(np.mean(hits)) for kind, hits in right.items()}
        return figures | {"loss": loss.item(), "told": seen.item()}

    def tell() -> None:
        for name, share in (("all", 1.0), ("quarter", 0.25)):
            ctx.say(f"val {name} " + " ".join(f"{k}:{v:.2f}" for k, v in validate(model, 12, share, frames).items()))

    run_stage(
        stage, ctx, model, steps, (params, optimizers), gradients,
        rate=lambda step: ramp(step, steps, 30, "linear"), save_every=save_every, extra=head, tell=tell,
    )  # fmt: skip


@torch.no_grad()
def validate(model: Any, films: int, share: float = 1.0, frames: int = FRAMES) -> dict[str, float]:
    """Accuracy by kind on validation films, a random ``share`` of every frame's tokens in place."""
    hits: dict[str, list[bool]] = defaultdict(list)
    stream, rng = film_stream("val", frames=frames), random.Random("val")
    for _ in range(films // 4):
        several = [next(stream)[0] for _ in range(4)]
        view = list(range(frames)), [share] * frames
        for kind, right in losses(model, None, several, see(model, pixels(several)), view, rng)[2].items():
            hits[kind] += right
    every = [ok for right in hits.values() for ok in right]
    return {"over all": float(np.mean(every)), **{kind: float(np.mean(hits[kind])) for kind in TYPES if hits[kind]}}
