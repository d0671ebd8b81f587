"""Stage `join`: one set of weights for every policy, the trained ones included, and for long answers.

Each step draws how the pictures are shown: whole, at all of M3's scales, randomly pruned, through p-MoD's routers, or
masked by Dynamic-LLaVA's predictors, whose weights learn beside the model's. Every picture has short questions and the
long answer of `listing`.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from vtr.policies.dynamic_llava import DynamicLLaVA
from vtr.policies.pmod import PMoD
from vtr.training.dynamic_llava import DynamicLLaVATraining, Masking, temperature
from vtr.training.m3 import backward_nested

from .language import LISTING, Batch, choose_view, embed_pictures, make_batch, project, shorten, students
from .model import BOS, answer_states
from .nest import SCALES, at_scale
from .optim import ramp
from .stage import Figures, of_view, run_stage

EARLY = {"full": 0.2, "nest": 0.3, "prune": 0.5}  # until long answers are learnt: cheap steps
VIEWS = {"full": 0.1, "nest": 0.3, "prune": 0.12, "pmod": 0.24, "dynamic": 0.24}
EARLY_PART = 0.45
IMAGE_KEEP, TEXT_KEEP = 0.25, 0.5
ROUTER_LR, PREDICTOR_LR = 1e-4, 1e-3  # routers read hidden states as they are, which are large; predictors norm them


def new_policies(model: Any) -> tuple[PMoD, DynamicLLaVA]:
    """Both trained policies with fresh weights; the predictors' width is scaled to the model."""
    pmod = PMoD().init_weights(model)
    return pmod, DynamicLLaVA(keep=IMAGE_KEEP, width=64, heads=4, inner=128, blocks=2).init_weights(model)


# -- the loss of a step ------------------------------------------------------------------------------------------------


def loss_of(model: Any, states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Figures]:
    """Cross-entropy of short answers, their ends (a tenth) and long answers; what was right of both kinds.

    states: final hidden states of the text, (B, T, width).
    """
    labels, kind = batch.labels[:, 1:], batch.kind[:, 1:]
    chosen = labels != -100
    logits, labels, kind = model.lm_head(states[:, :-1][chosen]), labels[chosen], kind[chosen]
    each = F.cross_entropy(logits, labels, reduction="none")
    long, short, right = kind == LISTING, (kind >= 0) & (kind != LISTING), logits.argmax(-1) == labels
    loss = each[short].mean() + 0.1 * each[kind < 0].mean()
    figures = {"short": right[short].float().mean().item()}
    if long.any():
        loss, figures["long"] = loss + each[long].mean(), right[long].float().mean().item()
    return loss, figures


def whole_states(model: Any, vision: torch.Tensor, batch: Batch, **kwargs: Any) -> torch.Tensor:
    """Final hidden states of the text, picture and all questions in one sequence: [BOS | vision | text]."""
    lm, (count, n) = model.model.language_model, vision.shape[:2]
    start = n + 1
    embeds = torch.cat([lm.embed_tokens(batch.ids.new_full((count, 1), BOS)), vision, lm.embed_tokens(batch.ids)], 1)
    pos = torch.cat([torch.arange(start).expand(count, -1), batch.pos + start], 1)
    block = torch.cat([batch.block.new_full((count, start), -2), batch.block], 1)
    same = (block[:, :, None] == block[:, None, :]) | (block == -2)[:, None, :]
    mask = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
    return lm(None, mask, pos, None, embeds, use_cache=False, **kwargs).last_hidden_state[:, start:]


@contextmanager
def routed(model: Any, policy: PMoD, start: int, end: int) -> Any:
    """Within the block the language model routes the tokens from slot ``start`` to ``end`` as p-MoD does.

    Nothing is taken out of the sequence: keys of the skipped are masked, and what a layer makes of them is put back.
    """
    layers, handles = model.model.language_model.layers, []
    for i, (layer, ratio) in enumerate(zip(layers, policy.layers(len(layers)), strict=True)):
        if ratio is not None:
            handles += _route(layer, i, ratio, policy, slice(start, end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _route(layer: Any, index: int, ratio: float, policy: PMoD, vision: slice) -> list[Any]:
    now: dict[str, torch.Tensor] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        weight, keep = hidden.new_ones(hidden.shape[:2]), torch.ones(hidden.shape[:2], dtype=torch.bool)
        mine = policy.weights(index, hidden[:, vision])
        best = mine.detach().topk(int(mine.shape[1] * ratio), 1).indices
        keep[:, vision] = torch.zeros(mine.shape, dtype=torch.bool).scatter_(1, best, True)
        weight = torch.cat([weight[:, : vision.start], mine, weight[:, vision.stop :]], 1)[..., None]
        now.update(hidden=hidden, weight=weight, keep=keep[..., None])
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] & keep[:, None, None]}

    def scale(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * now["weight"]

    def after(module: Any, args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        out = torch.where(now["keep"], out, now["hidden"] * now["weight"])
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.mlp.register_forward_hook(scale),
        layer.register_forward_hook(after),
    ]


def masking_of(batch: Batch, n: int, tau: float, forget: bool = True) -> Masking:
    """What Dynamic-LLaVA decides in :func:`whole_states`: every picture and, to ``forget``, every long answer."""
    images = [(row, torch.arange(1, n + 1)) for row in range(len(batch.ids))]
    answers = []
    for row, kind in enumerate(batch.kind if forget else ()):
        long = (kind == LISTING).nonzero().squeeze(1)
        answers.append((row, n + 1 + int(long[0]), n + 1 + int(long[-1]) + 1))
    return Masking(images, answers, tau, min_answer=1)


# -- the stage ---------------------------------------------------------------------------------------------------------
def train_join(model: Any, ctx: Any, steps: int, lr: float, pictures: int, tower: float) -> None:
    """Runs the stage. lr: of language model and projector; tower: the vision tower's, relative to it."""
    pmod, dynamic = new_policies(model)
    assert pmod.module is not None and dynamic.module is not None
    extra = torch.nn.ModuleDict({"pmod": pmod.module, "dynamic": dynamic.module}).requires_grad_(True)
    params, optimizers = students(model, lr, tower)
    groups = [
        {"params": list(extra[k].parameters()), "lr": r} for k, r in (("pmod", ROUTER_LR), ("dynamic", PREDICTOR_LR))
    ]
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0))
    params += list(extra.parameters())
    objective = DynamicLLaVATraining(model, dynamic, TEXT_KEEP)

    def gradients(step: int, rng: random.Random) -> Figures:
        shared = random.Random(f"join-{ctx.seed}-{step}")  # the same for all workers
        odds = EARLY if step < EARLY_PART * steps else VIEWS
        view = shared.choices(list(odds), list(odds.values()))[0]
        torch.manual_seed(shared.getrandbits(40) + ctx.rank)  # the Gumbel noise
        batch = make_batch(rng, "train", pictures, listing=True)
        if view == "nest":
            figures = nested_step(model, batch)
        elif view == "pmod":
            figures = pmod_step(model, pmod, batch)
        elif view == "dynamic":
            late = max(0.0, step / steps - EARLY_PART) / (1 - EARLY_PART)
            figures = dynamic_step(objective, batch, temperature(late))
        else:
            figures = plain_step(model, batch, view, rng)
        return of_view(view, figures)

    run_stage(
        "join", ctx, model, steps, (params, optimizers), gradients,
        rate=lambda step: ramp(step, steps, 30, "linear"), save_every=50, extra=extra,
    )  # fmt: skip
    objective.remove()


def plain_step(model: Any, batch: Batch, view: str, rng: random.Random) -> Figures:
    """Gradients with whole pictures, or with a random part of them."""
    how = ("full", 1.0, 1.0) if view == "full" else choose_view("prune", rng)
    tokens, where, start = shorten(embed_pictures(model, batch, True), batch, how, rng)
    states = answer_states(model, tokens, where, batch.ids, batch.pos + start, batch.block)
    loss, figures = loss_of(model, states, batch)
    loss.backward()
    return figures | {"loss": loss.item()}


def nested_step(model: Any, batch: Batch) -> Figures:
    """Gradients of the mean of the scales' cross-entropies; tower and projector run once."""
    seen: Figures = {}

    def loss_at(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
        vision = at_scale(model, tiles, batch, tokens)
        where = torch.arange(1, vision.shape[1] + 1).expand(len(vision), -1)
        states = answer_states(model, vision, where, batch.ids, batch.pos + vision.shape[1] + 1, batch.block)
        loss, figures = loss_of(model, states, batch)
        seen.update({f"{name}{tokens}": value for name, value in figures.items()})
        return loss

    losses = backward_nested(project(model, batch.pixels), list(SCALES), loss_at)
    return seen | {"loss": sum(losses.values()) / len(losses)}


def pmod_step(model: Any, policy: PMoD, batch: Batch) -> Figures:
    """Gradients through p-MoD's layers."""
    vision = embed_pictures(model, batch, True)
    with routed(model, policy, 1, vision.shape[1] + 1):
        loss, figures = loss_of(model, whole_states(model, vision, batch), batch)
        loss.backward()
    return figures | {"loss": loss.item()}


def dynamic_step(objective: DynamicLLaVATraining, batch: Batch, tau: float) -> Figures:
    """Gradients of Dynamic-LLaVA's objective: cross-entropy and the squared distance of the kept shares.

    Long answers forget words if the policy forgets; short ones never do.
    """
    vision = embed_pictures(objective.model, batch, True)
    masking = masking_of(batch, vision.shape[1], tau, objective.policy.forget)
    loss, figures = loss_of(objective.model, whole_states(objective.model, vision, batch, vtr_masking=masking), batch)
    wanted = {
        "image": (masking.image_shares, objective.policy.keep),
        "text": (masking.text_shares, objective.text_keep),
    }
    penalty, kept = loss.new_zeros(()), {}
    for name, (shares, share) in wanted.items():
        if shares:
            penalty = penalty + (share - torch.stack(shares)).square().mean()
            kept[name] = torch.stack(shares).mean().item()
    (loss + objective.weight * penalty).backward()
    return figures | kept | {"loss": loss.item()}
