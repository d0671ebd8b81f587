"""p-MoD's routers and Dynamic-LLaVA's predictors for a pocket model as it is: `python -m vtr.pocket.fit --out DIR`.

The model does not learn, so every other policy keeps its figures. Writes DIR/pmod and DIR/dynamic-llava (half
precision), which the package ships in vtr/pocket/policies; an interrupted run goes on where its checkpoint left off.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from .join import ROUTER_LR, SHORT, Learners
from .language import QUESTIONS, make_batch
from .optim import ramp
from .stage import Figures, of_view, run_stage


def fit(model: Any, ctx: Any, steps: int, pictures: int, lr: float, long: bool) -> Learners:
    """Trains both policies beside each other; three of four steps are Dynamic-LLaVA's. Returns them.

    Args:
        ctx: a :class:`vtr.pocket.train.Context`. lr: of the predictors. long: with long answers, whose words are
            forgotten; without, Dynamic-LLaVA forgets nothing.
    """
    model.requires_grad_(False)
    learners = Learners(model, forget=long)
    optimizers = [learners.optimizer(ROUTER_LR, lr)]

    def gradients(step: int, rng: random.Random) -> Figures:
        torch.manual_seed(step * 1009 + ctx.seed)  # the Gumbel noise
        batch = make_batch(rng, "train", pictures, listing=long, questions=SHORT["list"] if long else QUESTIONS)
        view = "dynamic" if step % 4 else "pmod"
        return of_view(view, learners.step(view, batch, step / steps))

    run_stage(
        "fit", ctx, model, steps, (list(learners.weights.parameters()), optimizers), gradients,
        rate=lambda step: ramp(step, steps, 10, "cosine"), save_every=40, every=20, extra=learners.weights,
    )  # fmt: skip
    return learners


def main() -> None:
    from . import WEIGHTS, load
    from .train import Context

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="folder of the pocket model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=2, help="a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="of the predictors")
    parser.add_argument("--long", action="store_true", help="with long answers, whose words are forgotten")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load(folder=args.model)[0]
    ctx = Context(args.out, 0, 1, args.seed)
    fit(model, ctx, args.steps, args.pictures, args.lr, args.long).save(model, args.out)


if __name__ == "__main__":
    main()
