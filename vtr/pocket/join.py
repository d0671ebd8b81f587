"""Stages `list` and `join`: long answers, and one set of weights for every policy, the trained ones included.

Each step draws how the pictures are shown. In `list` mostly at M3's smallest scales, where the long answers of
`listing` are learnt within minutes; in `join` whole, at all scales, randomly pruned, through p-MoD's routers, or masked
by Dynamic-LLaVA's predictors, whose weights learn beside the model's. Every picture has short questions as well.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vtr.policies.trained.dynamic_llava import DynamicLLaVA
from vtr.policies.trained.pmod import PMoD, Routers
from vtr.training.dynamic_llava import DynamicLLaVATraining, Masking, temperature
from vtr.training.m3 import backward_nested

from .language import LISTING, Batch, choose_view, embed_pictures, make_batch, project, shorten, students
from .model import BOS, answer_states, pack
from .nest import SCALES, at_scale
from .optim import ramp
from .stage import Figures, of_view, run_stage

VIEWS = {
    "list": {"at9": 0.5, "at36": 0.28, "prune": 0.12, "full": 0.1},
    "join": {"full": 0.1, "nest": 0.22, "prune": 0.1, "pmod": 0.26, "dynamic": 0.32},
}
SMALL = 3  # so many times as many pictures in a step that shows them at 9 or 36 tokens a tile
SHORT = {"list": 6, "join": 12}  # questions with short answers about a picture
IMAGE_KEEP, TEXT_KEEP = 0.25, 0.5
ROUTER_LR, PREDICTOR_LR = 2e-3, 1e-3  # a router's is divided by how large the hidden states are that it reads


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
        best = mine.detach().topk(policy.count(ratio, mine.shape[1]), 1).indices
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


# -- the stages --------------------------------------------------------------------------------------------------------
def train_join(
    model: Any, ctx: Any, steps: int, lr: float, pictures: int, mode: str, views: Mapping[str, float] | None = None
) -> None:
    """Runs the stage ``mode``. The vision tower stays as it is. views: other odds than those of VIEWS."""
    odds = views or VIEWS[mode]
    params, optimizers = students(model, lr, 0.0)
    learners = Learners(model) if mode == "join" else None
    extra = None
    if learners is not None:
        optimizers.append(learners.optimizer(ROUTER_LR, PREDICTOR_LR))
        extra = learners.weights
        params += list(extra.parameters())

    def gradients(step: int, rng: random.Random) -> Figures:
        shared = random.Random(f"{mode}-{ctx.seed}-{step}")  # the same for all workers
        view = shared.choices(list(odds), list(odds.values()))[0]
        torch.manual_seed(shared.getrandbits(40) + ctx.rank)  # the Gumbel noise
        count = pictures * (SMALL if view.startswith("at") else 1)
        batch = make_batch(rng, "train", count, listing=True, questions=SHORT[mode])
        if learners is not None and view in ("pmod", "dynamic"):
            figures = learners.step(view, batch, step / steps)
        elif view == "nest":
            figures = nested_step(model, batch)
        else:
            figures = plain_step(model, batch, view, rng)
        return of_view(view, figures)

    run_stage(
        mode, ctx, model, steps, (params, optimizers), gradients,
        rate=lambda step: ramp(step, steps, 30, "linear"), save_every=50, extra=extra,
    )  # fmt: skip
    if learners is not None:
        learners.objective.remove()


def alone(stage: Mapping[str, Any], view: str) -> dict[str, Any]:
    """The options of stage `join` for one policy alone: as many steps as it has beside the others, all its own."""
    return {**stage, "steps": round(stage["steps"] * VIEWS["join"][view]), "views": {view: 1.0}}


def export_policies(model: Any, checkpoint: Path, folder: Path) -> None:
    """What stage `join` left in its checkpoint, as policies of ``model`` under ``folder``."""
    learners = Learners(model)
    learners.weights.load_state_dict(torch.load(checkpoint, weights_only=True)["extra"])
    learners.save(model, folder)


class Learners:
    """p-MoD and Dynamic-LLaVA while they learn on a model.

    Attributes:
        pmod, dynamic: the policies. weights: of both, as one module. objective: Dynamic-LLaVA's, to be removed at last.
    """

    def __init__(self, model: Any, forget: bool = True) -> None:
        self.model, (self.pmod, self.dynamic) = model, new_policies(model)
        self.dynamic.forget = forget
        self.objective = DynamicLLaVATraining(model, self.dynamic, TEXT_KEEP)
        modules: dict[str, Any] = {"pmod": self.pmod.module, "dynamic": self.dynamic.module}
        self.weights = torch.nn.ModuleDict(modules).requires_grad_(True)

    def optimizer(self, routers: float, predictors: float) -> torch.optim.Optimizer:
        """Adam for both, with their learning rates."""
        assert isinstance(self.pmod.module, Routers) and self.dynamic.module is not None
        loud = loudness(self.model)
        own = self.pmod.module.routers.items()
        groups = [{"params": list(router.parameters()), "lr": routers / loud[int(layer)]} for layer, router in own]
        groups.append({"params": list(self.dynamic.module.parameters()), "lr": predictors})
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, view: str, batch: Batch, done: float) -> Figures:
        """Gradients of one policy, when the share ``done`` of the steps is over."""
        if view == "pmod":
            return pmod_step(self.model, self.pmod, batch)
        return dynamic_step(self.objective, batch, temperature(done))

    def save(self, model: Any, folder: Path) -> None:
        """Both policies in half precision under ``folder``, as those of ``model``."""
        self.objective.remove()
        for policy in (self.pmod, self.dynamic):
            assert policy.module is not None
            policy.module.half()
            policy.fit(model).save_pretrained(folder / policy.name)
            for path in (folder / policy.name).iterdir():
                path.chmod(0o644)


@torch.no_grad()
def loudness(model: Any) -> list[float]:
    """Root mean square of the vision tokens' hidden states that enter each decoder layer."""
    batch, found = make_batch(random.Random("loudness"), "train", 2, questions=1), []
    vision = embed_pictures(model, batch, False)
    part = slice(1, vision.shape[1] + 1)
    handles = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0][:, part].square().mean().sqrt().item()))
        for layer in model.model.language_model.layers
    ]
    whole_states(model, vision, batch)
    for handle in handles:
        handle.remove()
    return found


def plain_step(model: Any, batch: Batch, view: str, rng: random.Random) -> Figures:
    """Gradients with pictures whole ("full"), in random part ("prune"), or at one of M3's scales ("at36")."""
    tiles = project(model, batch.pixels, False)
    if view.startswith("at"):
        loss, figures = scale_loss(model, tiles, batch, int(view[2:]))
    else:
        how = ("full", 1.0, 1.0) if view == "full" else choose_view("prune", rng)
        tokens, where, start = shorten(pack(model, tiles, batch.rows, batch.cols), batch, how, rng)
        states = answer_states(model, tokens, where, batch.ids, batch.pos + start, batch.block)
        loss, figures = loss_of(model, states, batch)
    loss.backward()
    return figures | {"loss": loss.item()}


def scale_loss(model: Any, tiles: torch.Tensor, batch: Batch, tokens: int) -> tuple[torch.Tensor, Figures]:
    """:func:`loss_of` with the pictures at one of M3's scales."""
    vision = at_scale(model, tiles, batch, tokens)
    where = torch.arange(1, vision.shape[1] + 1).expand(len(vision), -1)
    return loss_of(
        model, answer_states(model, vision, where, batch.ids, batch.pos + vision.shape[1] + 1, batch.block), batch
    )


def nested_step(model: Any, batch: Batch) -> Figures:
    """Gradients of the mean of the scales' cross-entropies; the projector runs once."""
    seen: Figures = {}

    def loss_at(tiles: torch.Tensor, tokens: int) -> torch.Tensor:
        loss, figures = scale_loss(model, tiles, batch, tokens)
        seen.update({f"{name}{tokens}": value for name, value in figures.items()})
        return loss

    losses = backward_nested(project(model, batch.pixels, False), list(SCALES), loss_at)
    return seen | {"loss": sum(losses.values()) / len(losses)}


def pmod_step(model: Any, policy: PMoD, batch: Batch) -> Figures:
    """Gradients through p-MoD's layers."""
    vision = embed_pictures(model, batch, False)
    with routed(model, policy, 1, vision.shape[1] + 1):
        loss, figures = loss_of(model, whole_states(model, vision, batch), batch)
        loss.backward()
    return figures | {"loss": loss.item()}


def dynamic_step(objective: DynamicLLaVATraining, batch: Batch, tau: float) -> Figures:
    """Gradients of Dynamic-LLaVA's objective: cross-entropy and the squared distance of the kept shares.

    Long answers forget words if the policy forgets; short ones never do.
    """
    vision = embed_pictures(objective.model, batch, False)
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
