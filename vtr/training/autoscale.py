"""AutoScale's two choosers, fitted on questions with answers: ``python -m vtr.training.autoscale --out FOLDER``.

Every question is asked once at every scale (:func:`ask_all`); the cascade's calibration (:func:`fit_cascade`) and the
router (:func:`fit_router`) are fitted on that table. The threshold is the one with the fewest tokens, tries counted,
among those whose accuracy is at most ``tolerance`` below the best scale's on the half that was not fitted on.
Use questions the model was not trained on: on those it is surer than it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.nn.functional import binary_cross_entropy_with_logits, gelu
from tqdm import tqdm

from vtr import pocket
from vtr.accounting import Report
from vtr.accounting import report as last_report
from vtr.base import Answer, Policy, Tries
from vtr.chat import decode, encode
from vtr.engine.install import patch
from vtr.engine.resolve import answers_in, shared_features
from vtr.policies import Matryoshka
from vtr.policies.trained._router import router_input
from vtr.policies.trained.autoscale import AutoScale, calibrated, confidence

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

    def at(self, steps: Sequence[int]) -> Table:
        """Some of the scales, by their place."""
        chosen = list(steps)
        right, sure, tokens = (whole[:, chosen] for whole in (self.right, self.sure, self.tokens))
        return Table([self.scales[step] for step in chosen], right, sure, tokens, self.inputs)

    def save(self, path: Path) -> None:
        """Write it, so that other choosers can be fitted without asking again (``.safetensors``)."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"right": self.right, "sure": self.sure, "tokens": self.tokens, "scales": np.array(self.scales)}
        save_file({**{n: torch.from_numpy(a) for n, a in arrays.items()}, "inputs": self.inputs}, str(path))

    @staticmethod
    def load(path: Path) -> Table:
        """Read what :meth:`save` wrote."""
        from safetensors.torch import load_file

        found = load_file(str(path))
        right, sure, tokens = (found[name].numpy() for name in ("right", "sure", "tokens"))
        return Table(found["scales"].tolist(), right, sure, tokens, found["inputs"])


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
    total: int | None = None, note: Callable[[int, Report], None] | None = None,
) -> Table:  # fmt: skip
    """Ask every question at every scale. ``model`` is patched.

    Args:
        data: (picture, question, answer). scales: tokens per tile, coarsest first. tokens: AutoScale's answer_tokens.
        right: whether what was said (first) is the answer; None compares the strings without regard to case.
        note: is told of every call at which scale (its place) it was, and its report.

    Raises:
        ValueError: no data, or fewer than two scales.
    """
    if len(scales) < 2:
        raise ValueError(f"scales={list(scales)}: there is nothing to choose from")
    same = right or (lambda said, answer: said.lower() == answer.lower())
    policies: list[Policy] = [Matryoshka(count) for count in scales]
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
            with shared_features(model):
                for step, policy in enumerate([look, *policies[1:]]):
                    out = model.generate(
                        **inputs, policy=policy, do_sample=False, return_dict_in_generate=True, output_logits=True,
                        **more,
                    )  # fmt: skip
                    said, report = answers_in(out, start, ends), last_report(model)
                    if note is not None:
                        note(step, report)
                    columns.append(
                        (
                            [same(t, a) for t, a in zip(decode(processor, out.sequences, start), answers, strict=True)],
                            [confidence(Answer(one.ids[:tokens], one.logits[:tokens])) for one in said],
                            [row.vision_tokens[0] for row in report.rows],
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


def best_threshold(
    table: Table, estimates: np.ndarray, tried: bool, needed: float
) -> tuple[float, float, float]:  # fmt: skip
    """(Threshold, accuracy, tokens) with the fewest tokens among those that reach the accuracy ``needed``.

    If none does, the most accurate one.
    """
    found = [(threshold, *outcome(table, estimates, threshold, tried)) for threshold in THRESHOLDS]
    good = [one for one in found if one[1] >= needed]
    return min(good, key=lambda one: one[2]) if good else max(found, key=lambda one: (one[1], -one[2]))


def fit_cascade(table: Table, tolerance: float = TOLERANCE, tokens: int = 1) -> AutoScale:
    """A cascade: Platt's scaling of every scale's confidence on the first half, scales and threshold on the second.

    A scale that is seldom enough costs a try for nothing: all subsets of the scales that hold the finest are compared.
    """
    half, last = len(table.right) // 2, len(table.scales) - 1
    lines = [platt(table.sure[:half, step], table.right[:half, step]) for step in range(last)]
    rest = table.part(slice(half, None))
    needed = rest.right.mean(0).max() - tolerance
    found = []
    for size in range(1, last + 1):
        for steps in combinations(range(last), size):
            part, mine = rest.at([*steps, last]), [lines[step] for step in steps]
            threshold, accuracy, cost = best_threshold(part, cascade_estimates(part, mine), True, needed)
            found.append((accuracy < needed, cost if accuracy >= needed else -accuracy, threshold, part.scales, mine))
    _, _, threshold, scales, mine = min(found, key=lambda one: one[:2])
    return AutoScale("cascade", threshold, scales, [list(line) for line in mine], tokens)


def platt(raw: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """(Slope, intercept) of the line that makes the logit of a confidence that of being right."""
    from sklearn.linear_model import LogisticRegression

    raw = raw.clip(1e-6, 1 - 1e-6)
    if right.all() or not right.any():  # nothing to tell apart: the share itself, whatever the confidence
        share = (right.sum() + 0.5) / (len(right) + 1)
        return 0.0, float(np.log(share / (1 - share)))
    fitted = LogisticRegression(C=10.0).fit(np.log(raw / (1 - raw))[:, None], right)
    return round(float(fitted.coef_[0, 0]), 4), round(float(fitted.intercept_[0]), 4)


def cascade_estimates(table: Table, lines: Sequence[Sequence[float]]) -> np.ndarray:
    """float [n, s - 1]: the calibrated confidence of every scale but the last."""
    return np.array([[calibrated(sure, line) for sure, line in zip(row, lines, strict=False)] for row in table.sure])


def fit_router(
    table: Table, tolerance: float = TOLERANCE, *, hidden: int = 64, steps: int = 300, seed: int = 0
) -> AutoScale:
    """A router: trained on the first half until it no longer gets better on the third quarter, threshold on the last.

    Decoupled weight decay, a fifth of the inputs dropped at random, full batches.
    """
    half, late = len(table.right) // 2, len(table.right) * 3 // 4
    mean, std = table.inputs[:half].mean(0), table.inputs[:half].std(0) + 1e-4
    x, y = (table.inputs - mean) / std, torch.from_numpy(table.right[:, :-1]).float()
    draw = torch.Generator().manual_seed(seed)
    weights = {
        "hidden.weight": torch.randn(hidden, x.shape[1], generator=draw) / x.shape[1] ** 0.5,
        "hidden.bias": torch.zeros(hidden),
        "out.weight": torch.zeros(y.shape[1], hidden),
        "out.bias": torch.zeros(y.shape[1]),
    }
    optimizer = torch.optim.AdamW([w.requires_grad_() for w in weights.values()], 1e-3, weight_decay=0.3)

    def loss(rows: slice, drop: bool) -> torch.Tensor:
        seen = x[rows] * ((torch.rand(x[rows].shape, generator=draw) > 0.2) / 0.8 if drop else 1.0)
        inner = gelu(seen @ weights["hidden.weight"].T + weights["hidden.bias"])
        return binary_cross_entropy_with_logits(inner @ weights["out.weight"].T + weights["out.bias"], y[rows])

    best, kept = math.inf, weights
    for _ in range(steps):
        optimizer.zero_grad()
        loss(slice(half), True).backward()
        optimizer.step()
        with torch.no_grad():
            now = loss(slice(half, late), False).item()
        if now < best:
            best, kept = now, {name: w.detach().clone() for name, w in weights.items()}
    made = AutoScale("router", 0.9, table.scales)
    made.load_tensors({"mean": mean, "std": std, **kept})
    rest = table.part(slice(late, None))
    needed = rest.right.mean(0).max() - tolerance
    made.threshold = best_threshold(rest, made.estimates(rest.inputs).numpy(), False, needed)[0]
    return made


def main(
    out: Annotated[Path, typer.Option(help="folders `cascade` and `router` are written here")],
    questions: Annotated[int, typer.Option(min=8, help="of the pocket model's validation questions")] = 2000,
    scales: Annotated[str, typer.Option(help="tokens per tile, coarsest first")] = "1,9,36,144",
    tolerance: Annotated[float, typer.Option(help="accuracy that may be lost to the best fixed scale")] = TOLERANCE,
    seed: Annotated[int, typer.Option(help="which questions; also the router's")] = 0,
    answers: Annotated[
        Path | None, typer.Option(help="keep what was said at every scale in this .safetensors, or fit on it again")
    ] = None,
) -> None:
    """Fit both choosers for the pocket model, on validation questions."""
    if answers is not None and answers.is_file():
        table = Table.load(answers)
    else:
        model, processor = pocket.load()
        patch(model)
        rows = pocket.samples(questions, split="val", seed=seed)
        data = ((row["image"], row["question"], row["answer"]) for row in rows)
        ladder = [int(s) for s in scales.split(",")]
        table = ask_all(model, processor, data, ladder, max_new_tokens=2, total=questions)
        if answers is not None:
            table.save(answers)
    for made in (fit_cascade(table, tolerance), fit_router(table, tolerance, seed=seed)):
        made.save_pretrained(out / made.method)
        print(made.spec)


if __name__ == "__main__":
    typer.run(main)
