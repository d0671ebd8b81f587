"""Stages `align`, `read` and `mix`: from a tower that recognises things to a model that answers questions."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import listing as L
from . import scenes as S
from .model import EOS, IDS, PAD, VOCAB, answer_states, encode, pack, pixels_of, see, up_to_features
from .optim import Muon, average_gradients, ramp, set_lr
from .stage import Figures, run_stage

QUESTIONS = 24  # per picture, at most
LISTING = len(S.TYPES)  # the kind of a long answer's tokens
ILLEGIBLE = {"letter", "find", "word"}  # types a thumbnail cannot answer


# ---------------------------------------------------------------------------------------------------------- align
def word_targets(labels: np.ndarray, thumbnail: bool) -> torch.Tensor:
    """Which words each patch should name (patches, vocabulary): everything about the object it belongs to.

    Only the central thumbnail patch of a shape says "shapes" (that is what counting counts); thumbnail patches also
    say "where" next to the name of their region.
    """
    flat = torch.from_numpy(labels.reshape(8, -1))
    out = torch.zeros(flat.shape[1], len(VOCAB))
    for channel, words in enumerate(S.CHANNEL_WORDS):
        table = torch.tensor([PAD] + [IDS[w] for w in words])
        out.scatter_(1, table[flat[channel].clamp(min=0)][:, None], 1.0)
    out[flat[S.LETTER] > 0, IDS["letter"]] = 1
    if thumbnail:
        out[flat[S.REGION] > 0, IDS["where"]] = 1
        out[(flat[S.CENTER] > 0) & (flat[S.KIND] == 1), IDS["shapes"]] = 1
    out[:, PAD] = 0
    return out


def train_align(model: Any, ctx: Any, steps: int, lr: float = 3e-3, scenes_per_step: int = 3) -> None:
    """Projector and word table: the product of a patch with a word says whether the patch names the word."""
    table, projector = model.model.language_model.embed_tokens.weight, model.model.multi_modal_projector
    bias = torch.nn.Linear(1, 1)
    with torch.no_grad():
        torch.manual_seed(ctx.seed)
        table.normal_(0, 0.06)
        table[PAD] = 0
        model.model.image_newline.normal_(0, 0.06)
        bias.bias.fill_(-3.0)
    params = [*projector.parameters(), table, bias.bias]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.0)
    first = ctx.resume("align", model, [optimizer], bias)
    stream = S.scene_stream("train", ctx.stream_seed("align", first))
    patches = torch.zeros(0)
    for step in ctx.steps("align", first, steps):
        set_lr([optimizer], ramp(step, steps, 20, "cosine"))
        tiles, wanted = [], []
        for scene in [next(stream)[0] for _ in range(scenes_per_step)]:
            tiles.append(S.tiles_of(scene.image))
            fine = S.dense_labels(scene, True)
            wanted.append(word_targets(S.dense_labels(scene, False), True))
            for y in range(0, fine.shape[1], S.GRID):
                for x in range(0, fine.shape[2], S.GRID):
                    wanted.append(word_targets(fine[:, y : y + S.GRID, x : x + S.GRID], False))
        with torch.no_grad():
            seen = see(model, pixels_of(torch.from_numpy(np.concatenate(tiles))))[:, 1:]
        patches, want = projector(seen), torch.stack(wanted)
        logits = patches @ table.T + bias.bias
        each = F.binary_cross_entropy_with_logits(logits, want, reduction="none").sum(-1)
        front = want.sum(-1) > 0
        loss = each[front].mean() + each[~front].mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(params)
        optimizer.step()
        hit = logits > 0
        ctx.track(
            step,
            loss.item(),
            {
                "recall": (hit & (want > 0)).sum().item() / want.sum().item(),
                "precision": (hit & (want > 0)).sum().item() / max(1, hit.sum().item()),
            },
        )
    if steps > first:
        with torch.no_grad():  # pictures enter the language model about as loud as words do
            scale = 1.5 * table[5:].norm(dim=1).mean() / patches[front].norm(dim=-1).mean()
            projector.linear_2.weight.mul_(scale)
            projector.linear_2.bias.mul_(scale)
        ctx.save("align", steps, model, [optimizer], bias)


# ---------------------------------------------------------------------------------------------------- read and mix
@dataclass
class Batch:
    """Pictures of one size with their questions. block: number of a token's question; kind: index of its type."""

    pixels: torch.Tensor  # (B, tiles, 3, 96, 96)
    rows: int
    cols: int
    ids: torch.Tensor
    labels: torch.Tensor
    pos: torch.Tensor
    block: torch.Tensor
    kind: torch.Tensor


def make_batch(
    rng: random.Random,
    split: str,
    pictures: int,
    skip: set[str] | None = None,
    listing: bool = False,
    questions: int = QUESTIONS,
) -> Batch:
    """Draws pictures and questions. listing: and what `listing` asks, as the last block (kind LISTING)."""
    size = S.SIZES[0] if rng.random() < 0.9 else rng.choice(S.SIZES[1:])
    tiles, rows = [], []
    for _ in range(pictures):
        scene = S.make_scene(rng, split, size)
        tiles.append(S.tiles_of(scene.image))
        ids: list[int] = []
        labels: list[int] = []
        pos: list[int] = []
        block: list[int] = []
        kind: list[int] = []
        for j, q in enumerate(S.questions(scene, rng, questions)):
            if skip and q.type in skip:
                continue
            words, answer = encode(q.text), [*encode(q.answer), EOS]
            ids += words + answer
            labels += [-100] * len(words) + answer
            pos += range(len(words) + len(answer))
            block += [j] * (len(words) + len(answer))
            kind += [-1] * len(words) + [S.TYPES.index(q.type), -1]
        if listing:
            words, answer = encode(L.QUESTION), [*encode(L.answer(scene, rng)), EOS]
            ids += words + answer
            labels += [-100] * len(words) + answer
            pos += range(len(words) + len(answer))
            block += [questions] * (len(words) + len(answer))
            kind += [-1] * len(words) + [LISTING] * len(answer)
        rows.append((ids, labels, pos, block, kind))
    length = max(len(r[0]) for r in rows)
    columns = [
        torch.tensor([r[i] + [fill] * (length - len(r[i])) for r in rows])
        for i, fill in enumerate((PAD, -100, 0, -1, -1))
    ]
    pixels = pixels_of(torch.from_numpy(np.stack(tiles)))
    return Batch(pixels, size[1] // S.TILE, size[0] // S.TILE, *columns)


def project(model: Any, pixels: torch.Tensor, train_tower: bool = True) -> torch.Tensor:
    """Every tile's projected features: (pictures, tiles, 144, width)."""
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        seen = see(model, pixels.flatten(0, 1))[:, 1:]
    return model.model.multi_modal_projector(seen).unflatten(0, pixels.shape[:2])


def embed_pictures(model: Any, batch: Batch, train_tower: bool, thumbnail: bool = False) -> torch.Tensor:
    """All vision tokens of a batch, or those of the thumbnails only: (B, N, width)."""
    pixels = batch.pixels[:, :1] if thumbnail else batch.pixels
    features = project(model, pixels, train_tower)
    return features[:, 0] if thumbnail else pack(model, features, batch.rows, batch.cols)


def pooled(tokens: torch.Tensor, rows: int, cols: int, side: int) -> torch.Tensor:
    """Nested average pooling: side x side blocks of the thumbnail and of the high-resolution grid become one token."""
    n, _, width = tokens.shape
    g = S.GRID // side
    thumb = tokens[:, : S.GRID**2].reshape(n, g, side, g, side, width).mean((2, 4)).flatten(1, 2)
    grid = tokens[:, S.GRID**2 :].view(n, rows * S.GRID, cols * S.GRID + 1, width)[:, :, :-1]
    grid = grid.reshape(n, rows * g, side, cols * g, side, width).mean((2, 4)).flatten(1, 2)
    return torch.cat([thumb, grid], 1)


def keep_random(
    count: int, total: int, thumb: float, crops: float, rng: random.Random, base: int = S.GRID**2
) -> torch.Tensor:
    """Sorted indices (count, kept) of a random part of the thumbnail's (the first ``base``) and the crops' tokens."""
    noise = torch.rand(count, total, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    parts = [
        noise[:, :base].topk(max(1, int(thumb * base)), 1)[1],
        noise[:, base:].topk(max(1, int(crops * (total - base))), 1)[1] + base,
    ]
    return torch.cat(parts, 1).sort(1)[0]


def choose_view(mode: str, rng: random.Random) -> tuple[str, float, float]:
    """How the pictures of a step are shortened: (view, kept part of the thumbnail, kept part of the crops)."""
    if mode == "read":  # whole thumbnail (mostly) and a random third of the crops
        return "keep", rng.choice([1.0, 1.0, 1.0, 0.6]), rng.uniform(0.2, 0.4)
    u = rng.random()
    if mode == "prune":  # what stage `mix` does to pictures, without whole and pooled ones
        u = rng.uniform(0.30, 0.70)
    if u < 0.30:
        return "full", 1.0, 1.0
    if u < 0.55:
        part = rng.choice([0.75, 0.5, 0.35, 0.25, 0.15])
        return "keep", part, part
    if u < 0.70:
        return "keep", 1.0, rng.uniform(0.1, 0.5)
    if u < 0.78:
        return "thumbnail", 1.0, 0.0
    return ("pool2", 1.0, 1.0) if u < 0.92 else ("pool4", 1.0, 1.0)


def shorten(
    tokens: torch.Tensor, batch: Batch, view: tuple[str, float, float], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Applies a view. Returns tokens, their positions, and the position of the first question word.

    When tokens are dropped, half of the time the rest keep their positions, half of the time they close ranks.
    """
    name, thumb, crops = view
    count, total, width = tokens.shape
    if name == "thumbnail":
        total += batch.rows * S.GRID * (batch.cols * S.GRID + 1)
    index = torch.arange(tokens.shape[1]).expand(count, -1)
    if name == "keep":
        index = keep_random(count, total, thumb, crops, rng)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, width))
    elif name.startswith("pool"):
        tokens = pooled(tokens, batch.rows, batch.cols, int(name[-1]))
    if name in ("keep", "thumbnail") and rng.random() < 0.5:
        return tokens, index + 1, total + 1
    short = tokens.shape[1]
    return tokens, torch.arange(1, short + 1).expand(count, -1), short + 1


def answer_loss(
    model: Any, tokens: torch.Tensor, where: torch.Tensor, start: int, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers (end-of-answer at a tenth), which answers were right, and their types."""
    states = answer_states(model, tokens, where, batch.ids, batch.pos + start, batch.block)[:, :-1]
    labels, kind = batch.labels[:, 1:], batch.kind[:, 1:]
    chosen = labels != -100
    logits, labels, kind = model.lm_head(states[chosen]), labels[chosen], kind[chosen]
    answer = kind >= 0
    loss = F.cross_entropy(logits[answer], labels[answer]) + 0.1 * F.cross_entropy(logits[~answer], labels[~answer])
    return loss, (logits.argmax(-1) == labels)[answer], kind[answer]


def students(model: Any, lr: float, tower: float) -> tuple[list[Any], list[torch.optim.Optimizer]]:
    """What learns in the stages from `read` on, and its optimizers: everything, the tower if ``tower`` is not 0."""
    lm, projector = model.model.language_model, model.model.multi_modal_projector
    matrices = [p for n, p in lm.named_parameters() if p.ndim == 2 and "layers" in n]
    matrices += [projector.linear_1.weight, projector.linear_2.weight]
    known = {id(p) for p in matrices}
    owned = [*lm.parameters(), *projector.parameters()]
    if (newline := getattr(model.model, "image_newline", None)) is not None:
        owned.append(newline)
    rest = [p for p in owned if id(p) not in known]
    params = matrices + rest
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr, 0.02),
        torch.optim.AdamW(rest, lr, (0.9, 0.95), weight_decay=0.0),
    ]
    if tower:
        seeing = [p for module in up_to_features(model) for p in module.parameters()]
        optimizers.append(torch.optim.AdamW(seeing, lr * tower, (0.9, 0.98), weight_decay=0.01))
        params += seeing
    return params, optimizers


def train_lm(
    model: Any,
    ctx: Any,
    mode: str,
    steps: int,
    lr: float,
    pictures: int,
    tower: float = 0.0,
    horizon: int | None = None,
) -> None:
    """Stages `read` and `mix`.

    tower: learning rate of the vision tower relative to lr (0: frozen). horizon: number of steps the learning rate
    is laid out for, when the stage stops before its decay is over.
    """

    def gradients(step: int, rng: random.Random) -> Figures:
        view = choose_view(mode, random.Random(f"{mode}-{ctx.seed}-{step}"))  # the same for all workers
        batch = make_batch(rng, "train", pictures, ILLEGIBLE if view[0] == "thumbnail" else None)
        whole = embed_pictures(model, batch, tower > 0, view[0] == "thumbnail")
        tokens, where, start = shorten(whole, batch, view, rng)
        loss, right, kind = answer_loss(model, tokens, where, start, batch)
        loss.backward()
        by_type = {t: right[kind == i].float().mean().item() for i, t in enumerate(S.TYPES) if (kind == i).any()}
        return {"loss": loss.item(), **by_type}

    def tell() -> None:
        ctx.say("val " + " ".join(f"{k}:{v:.2f}" for k, v in validate(model, 16).items()))

    run_stage(
        mode, ctx, model, steps, students(model, lr, tower), gradients,
        rate=lambda step: ramp(step, horizon or steps, 30, "linear"), save_every=150, tell=tell,
    )  # fmt: skip


@torch.no_grad()
def validate(model: Any, pictures: int, show: Callable[[Any, Batch], torch.Tensor] | None = None) -> dict[str, float]:
    """Accuracy by type on validation scenes, all vision tokens in place.

    show: what the language model gets of a batch's pictures, (B, N, width); None: what LLaVA-NeXT makes of them.
    """
    rng, hits = random.Random("val-check"), defaultdict(list)
    for _ in range(pictures // 4):
        batch = make_batch(rng, "val", 4)
        tokens = embed_pictures(model, batch, False) if show is None else show(model, batch)
        places = torch.arange(1, tokens.shape[1] + 1).expand(len(tokens), -1)
        _, right, kind = answer_loss(model, tokens, places, tokens.shape[1] + 1, batch)
        for ok, k in zip(right.tolist(), kind.tolist(), strict=True):
            hits[S.TYPES[k]].append(ok)
    out = {t: float(np.mean(hits[t])) for t in S.TYPES if hits[t]}
    return {"all": float(np.mean([x for v in hits.values() for x in v])), **out}
