"""AutoScale's two choosers, fitted on questions with answers: ``python -m vtr.training.autoscale --out FOLDER``.

Every question is asked once at every scale (:func:`ask_all`); the cascade's calibration (:func:`fit_cascade`) and the
router (:func:`fit_router`) are fitted on that table. The threshold is the one with the fewest tokens, tries counted,
among those whose accuracy is at most ``tolerance`` below the best scale's on the half that was not fitted on.
Use questions the model was not trained on: on those it is surer than it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.functional import binary_cross_entropy_with_logits, gelu
from tqdm import tqdm

import vtr
from vtr.base import Policy
from vtr.chat import decode, encode
from vtr.engine.resolve import Answer, answers_in
from vtr.policies.autoscale import AutoScale, calibrated, confidence, router_input

if TYPE_CHECKING:
    from vtr.engine.resolve import Tries

THRESHOLDS = [round(0.3 + 0.01 * i, 2) for i in range(70)] + [0.995, 0.999]
TOLERANCE = 0.002


@dataclass
class Table:
    """Every question at every scale. n questions, s scales, coarsest first.

    Attributes:
        scales: tokens per tile. right: bool [n, s]. sure: float [n, s], the raw confidence. tokens: int [n, s], vision
            tokens that entered the text model. inputs: float32 [n, 3 · hidden_size], what the router sees.
    """

    scales: list[int]
    right: np.ndarray
    sure: np.ndarray
    tokens: np.ndarray
    inputs: torch.Tensor

    def part(self, rows: slice) -> Table:
        """Some of the questions."""
        return Table(self.scales, self.right[rows], self.sure[rows], self.tokens[rows], self.inputs[rows])


class _Look(Policy):
    """Keeps what a router would see; every row gets the same policy."""

    def __init__(self, chosen: Policy) -> None:
        self.chosen, self.inputs = chosen, list[torch.Tensor]()

    def resolve(self, tries: Tries) -> list[Policy | None]:
        images, questions = tries.images(), tries.questions()
        self.inputs += [router_input(*row).cpu() for row in zip(images, questions, strict=True)]
        return [self.chosen] * len(images)


@torch.inference_mode()
def ask_all(
    model: Any, processor: Any, data: Iterable[tuple[Any, str, str]], scales: Sequence[int], *, tokens: int = 1,
    batch_size: int = 8, max_new_tokens: int | None = None, right: Callable[[str, str], bool] | None = None,
    total: int | None = None,
) -> Table:  # fmt: skip
    """Ask every question at every scale. ``model`` is patched.

    Args:
        data: (picture, question, answer). scales: tokens per tile, coarsest first. tokens: AutoScale's answer_tokens.
        right: whether what was said (first) is the answer; None compares the strings without regard to case.

    Raises:
        ValueError: no data, or fewer than two scales.
    """
    if len(scales) < 2:
        raise ValueError(f"scales={list(scales)}: there is nothing to choose from")
    same = right or (lambda said, answer: said.lower() == answer.lower())
    policies: list[Policy] = [vtr.Matryoshka(count) for count in scales]
    look = _Look(policies[0])
    hits: list[list[bool]] = []
    counts: list[list[int]] = []
    sure: list[list[float]] = []
    more = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    ends = model.generation_config.eos_token_id
    with tqdm(total=total, desc="questions at every scale", unit="") as bar:
        records = iter(data)
        while rows := list(islice(records, batch_size)):
            pictures, questions, answers = zip(*rows, strict=True)
            inputs = encode(processor, questions, pictures).to(model.device)
            start, columns = inputs["input_ids"].shape[1], []
            with vtr.shared_features(model):
                for policy in [look, *policies[1:]]:
                    out = model.generate(
                        **inputs, policy=policy, do_sample=False, return_dict_in_generate=True, output_logits=True,
                        **more,
                    )  # fmt: skip
                    said = answers_in(out, start, ends)
                    columns.append(
                        (
                            [same(t, a) for t, a in zip(decode(processor, out.sequences, start), answers, strict=True)],
                            [confidence(Answer(one.ids[:tokens], one.logits[:tokens])) for one in said],
                            [row.vision_tokens[0] for row in vtr.report(model).rows],
                        )
                    )
            right_at, sure_at, tokens_at = zip(*columns, strict=True)
            hits += map(list, zip(*right_at, strict=True))
            sure += map(list, zip(*sure_at, strict=True))
            counts += map(list, zip(*tokens_at, strict=True))
            bar.update(len(rows))
    if not hits:
        raise ValueError("no data: give (picture, question, answer) tuples")
    return Table(list(scales), np.array(hits), np.array(sure), np.array(counts), torch.stack(look.inputs))


# -- what a threshold gives --------------------------------------------------------------------------------------------
def outcome(table: Table, estimates: np.ndarray, threshold: float, tried: bool) -> tuple[float, float]:
    """(Accuracy, mean vision tokens) of taking the first scale whose estimate reaches the threshold, else the last.

    Args:
        estimates: float [n, s - 1]. tried: whether every scale before the chosen one was run, the chosen one (but for
            the last) twice: once as a try.
    """
    enough = np.concatenate([estimates >= threshold, np.ones((len(estimates), 1), bool)], 1)
    chosen, every = enough.argmax(1), np.arange(len(enough))
    tokens = table.tokens[every, chosen].astype(float)
    if tried:
        before = np.concatenate([np.zeros((len(enough), 1)), table.tokens.cumsum(1)], 1)
        last = len(table.scales) - 1
        tokens += before[every, np.minimum(chosen + 1, last)]
    return float(table.right[every, chosen].mean()), float(tokens.mean())


def best_threshold(table: Table, estimates: np.ndarray, tried: bool, tolerance: float = TOLERANCE) -> float:
    """The threshold with the fewest tokens among those at most ``tolerance`` below the best fixed scale's accuracy."""
    needed = table.right.mean(0).max() - tolerance
    found = [(threshold, *outcome(table, estimates, threshold, tried)) for threshold in THRESHOLDS]
    good = [(tokens, threshold) for threshold, accuracy, tokens in found if accuracy >= needed]
    return min(good)[1] if good else max(found, key=lambda one: (one[1], -one[2]))[0]


def fit_cascade(table: Table, tolerance: float = TOLERANCE, tokens: int = 1) -> AutoScale:
    """A cascade: Platt's scaling of every scale's confidence on the first half, the threshold on the second."""
    from sklearn.linear_model import LogisticRegression

    half = len(table.right) // 2
    lines = []
    for s in range(len(table.scales) - 1):
        raw, right = table.sure[:half, s].clip(1e-6, 1 - 1e-6), table.right[:half, s]
        if right.all() or not right.any():  # nothing to tell apart: the share itself, whatever the confidence
            share = (right.sum() + 0.5) / (half + 1)
            lines.append((0.0, float(np.log(share / (1 - share)))))
            continue
        fitted = LogisticRegression(C=10.0).fit(np.log(raw / (1 - raw))[:, None], right)
        lines.append((round(float(fitted.coef_[0, 0]), 4), round(float(fitted.intercept_[0]), 4)))
    rest = table.part(slice(half, None))
    threshold = best_threshold(rest, cascade_estimates(rest, lines), True, tolerance)
    return AutoScale("cascade", threshold, table.scales, [list(line) for line in lines], tokens)


def cascade_estimates(table: Table, lines: Sequence[Sequence[float]]) -> np.ndarray:
    """float [n, s - 1]: the calibrated confidence of every scale but the last."""
    return np.array([[calibrated(sure, line) for sure, line in zip(row, lines, strict=False)] for row in table.sure])


def fit_router(
    table: Table, tolerance: float = TOLERANCE, *, hidden: int = 64, steps: int = 400, seed: int = 0
) -> AutoScale:
    """A router, trained on the first half (decoupled weight decay, full batches), its threshold on the second."""
    half = len(table.right) // 2
    x, y = table.inputs[:half], torch.from_numpy(table.right[:half, :-1]).float()
    mean, std = x.mean(0), x.std(0) + 1e-4
    x = (x - mean) / std
    draw = torch.Generator().manual_seed(seed)
    first = (torch.randn(hidden, x.shape[1], generator=draw) / x.shape[1] ** 0.5).requires_grad_()
    last = torch.zeros(y.shape[1], hidden, requires_grad=True)
    biases = torch.zeros(hidden, requires_grad=True), torch.zeros(y.shape[1], requires_grad=True)
    params = [first, last, *biases]
    optimizer = torch.optim.AdamW(params, 3e-3, weight_decay=0.3)
    for _ in range(steps):
        noisy = x + 0.1 * torch.randn(x.shape, generator=draw)
        loss = binary_cross_entropy_with_logits(gelu(noisy @ first.T + biases[0]) @ last.T + biases[1], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = AutoScale("router", 0.9, table.scales)
    made.load_tensors(
        {"mean": mean, "std": std, "hidden.weight": first, "hidden.bias": biases[0], "out.weight": last,
         "out.bias": biases[1]}
    )  # fmt: skip
    rest = table.part(slice(half, None))
    made.threshold = best_threshold(rest, made.estimates(rest.inputs).numpy(), False, tolerance)
    return made


def main(
    out: Annotated[Path, typer.Option(help="folders `cascade` and `router` are written here")],
    questions: Annotated[int, typer.Option(min=8, help="of the pocket model's validation questions")] = 2000,
    scales: Annotated[str, typer.Option(help="tokens per tile, coarsest first")] = "1,9,36,144",
    tolerance: Annotated[float, typer.Option(help="accuracy that may be lost to the best fixed scale")] = TOLERANCE,
    seed: Annotated[int, typer.Option(help="which questions; also the router's")] = 0,
) -> None:
    """Fit both choosers for the pocket model, on validation questions."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    rows = vtr.pocket.samples(questions, split="val", seed=seed)
    data = ((row["image"], row["question"], row["answer"]) for row in rows)
    table = ask_all(model, processor, data, [int(s) for s in scales.split(",")], max_new_tokens=2, total=questions)
    for made in (fit_cascade(table, tolerance), fit_router(table, tolerance, seed=seed)):
        made.save_pretrained(out / made.method)
        print(made.spec)


if __name__ == "__main__":
    typer.run(main)
