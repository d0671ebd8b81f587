"""Tuning an :class:`vtr.AutoPolicy`: its estimates, and thresholds that keep a promise. ``vtr tune auto`` runs it.

Questions are asked once under every choice (:mod:`vtr.training.asked`). One part of them fits the estimate, chooses
which choices are worth a try, and lays a path of thresholds from careful to bold. The other part, of other pictures,
tests along that path how far the promise is kept (:mod:`vtr.training.promise`).

The loss of a question is max(0, score of the last choice − score of the one it got): in [0, 1], where the difference
itself may be negative. Its mean is at least the accuracy that is lost, so the promise is about that too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from vtr.auto_policy import AutoPolicy, attention, confidence, features, logit
from vtr.data.records import Sample
from vtr.learned import fingerprint
from vtr.training.asked import Asked
from vtr.training.costs import Costs as Costs
from vtr.training.costs import default_choices as default_choices
from vtr.training.costs import measure as measure
from vtr.training.promise import by_unit, kept_up_to, needed

FEWEST = 50
"""Pictures that fit the estimate, at least."""
TESTED = 0.7
"""The share of the pictures that test the promise: an estimate of two numbers a choice needs few."""
PROBED = 400
"""Questions from which on a probe of the hidden state is compared with the confidence alone."""
BOLD = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 80)])
"""How bold the thresholds of a path are, from careful to bold: see :func:`thresholds_at`."""
STRENGTHS = (0.001, 0.01, 0.1)
"""Of the probe's weights: scikit-learn's C."""
MATRICES = 12
"""Of the model, that tell whether a policy was tuned on it."""


@dataclass(eq=False)
class Outcome:
    """What one setting comes to on some questions.

    Attributes:
        chosen: int [n], the place of the choice each got. loss: float [n], see above. score: float [n].
        cost: float [n], tries counted. tokens: int [n], vision tokens that entered, tries counted.
    """

    chosen: np.ndarray
    loss: np.ndarray
    score: np.ndarray
    cost: np.ndarray
    tokens: np.ndarray


def outcome(asked: Asked, estimates: np.ndarray, thresholds: Sequence[float], costs: Costs) -> Outcome:
    """Take the first choice whose estimate reaches its threshold, else the last.

    Args:
        estimates: float [n, c - 1].
    """
    n, every = len(asked), np.arange(len(asked))
    enough = np.concatenate([estimates >= np.asarray(thresholds), np.ones((n, 1), bool)], 1)
    chosen = enough.argmax(1)
    tried = np.concatenate([[0.0], np.cumsum(costs.tried)])
    left = np.concatenate([np.zeros((n, 1), np.int64), asked.tokens.cumsum(1)], 1)[every, chosen]
    score = asked.score[every, chosen]
    return Outcome(
        chosen, np.maximum(asked.score[:, -1] - score, 0.0), score, np.asarray(costs.taken)[chosen] + tried[chosen],
        asked.tokens[every, chosen] + left,
    )  # fmt: skip


def thresholds_at(bold: float, costs: Costs) -> list[float]:
    """Every choice's threshold: 1 − bold · what going on to the next would cost more, as a share of the most there is.

    What may go wrong is spent where it saves most: a try whose next choice is cheap must be surer.
    """
    after = zip(costs.taken, costs.tried, costs.taken[1:], strict=False)
    more = [max(tried + then - taken, 0.0) for taken, tried, then in after]
    return [1.0 - bold * extra / max([*more, 1e-12]) for extra in more]


# -- estimates ---------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Estimate:
    """How an AutoPolicy estimates that a choice suffices, fitted.

    Attributes:
        lines: of the signal, (slope, intercept) of each choice but the last. probe: a probe's tensors. Or None.
        held_out: float [n, c - 1], for the questions it was fitted on, each by a fit without its picture.
        worth: their mean log likelihood. compared: signal → that, of every signal that was there to be taken.
    """

    signal: str
    tokens: int
    lines: list[tuple[float, float]] | None
    probe: dict[str, torch.Tensor] | None
    held_out: np.ndarray
    worth: float = field(default=0.0)
    compared: dict[str, float] = field(default_factory=dict)

    def policy(self, asked: Asked, thresholds: Sequence[float], promise: dict[str, Any] | None = None) -> AutoPolicy:
        """The policy that estimates so."""
        lines = None if self.lines is None else [list(line) for line in self.lines]
        made = AutoPolicy(asked.choices, list(thresholds), self.signal, self.tokens, lines, promise)
        made.probe = dict(self.probe or {})
        return made

    def at(self, mine: Asked, some: list[int]) -> Estimate:
        """Of some of the choices but the last, where each was fitted by itself. mine: the questions under these."""
        assert self.lines is not None
        held = self.held_out[:, some]
        lines = [self.lines[step] for step in some]
        return Estimate(self.signal, self.tokens, lines, None, held, log_likelihood(held, suffices(mine)))

    def of(self, asked: Asked) -> np.ndarray:
        """float [n, c - 1], as the policy itself estimates."""
        made = self.policy(asked, [0.5] * (len(asked.choices) - 1))
        return np.stack([made.estimate(s, asked.began(s)).numpy() for s in range(len(asked.choices) - 1)], 1)


def suffices(asked: Asked) -> np.ndarray:
    """bool [n, c - 1]: whether a choice loses nothing against the last."""
    return asked.score[:, :-1] >= asked.score[:, -1:]


def raw_of(asked: Asked, signal: str, tokens: int) -> np.ndarray:
    """float32 [n, c - 1]: a signal before it is calibrated."""
    began = asked.began(len(asked.choices) - 2)
    seen = [attention(one) if signal == "attention" else confidence(one, tokens) for one in began]
    return torch.stack(seen, 1).numpy()


def fit_lines(asked: Asked, signal: str, tokens: int, folds: np.ndarray) -> Estimate:
    """Platt's scaling of each choice's confidence, or attention.

    Args:
        signal: "confidence" or "attention". folds: int [n], which part each question is held out with.
    """
    raw = raw_of(asked, signal, tokens)
    good, held = suffices(asked), np.zeros_like(raw)
    for fold in np.unique(folds):
        rest = folds != fold
        for s in range(raw.shape[1]):
            held[~rest, s] = _sigmoid(line_of(raw[rest, s], good[rest, s]), raw[~rest, s])
    lines = [line_of(raw[:, s], good[:, s]) for s in range(raw.shape[1])]
    return Estimate(signal, tokens, lines, None, held, log_likelihood(held, good))


def line_of(raw: np.ndarray, good: np.ndarray) -> tuple[float, float]:
    """(Slope, intercept) that make the logit of a confidence that of sufficing: Platt's scaling.

    Held to (1, 0), the confidence as it is, by a normal prior of one: where nothing has gone wrong yet, a less
    confident answer is still the less probable one.
    """
    from scipy.optimize import minimize

    x, sign = logit(torch.from_numpy(raw)).double().numpy(), np.where(good, -1.0, 1.0)

    def worse(at: np.ndarray) -> float:
        return float(np.logaddexp(0.0, sign * (at[0] * x + at[1])).sum() + ((at[0] - 1) ** 2 + at[1] ** 2) / 2)

    found = minimize(worse, np.array([1.0, 0.0])).x
    return round(float(found[0]), 4), round(float(found[1]), 4)


def _sigmoid(line: tuple[float, float], raw: np.ndarray) -> np.ndarray:
    return (line[0] * logit(torch.from_numpy(raw)) + line[1]).sigmoid().numpy()


def log_likelihood(estimates: np.ndarray, good: np.ndarray) -> float:
    """Mean over questions and choices, nats."""
    p = estimates.astype(float).clip(1e-6, 1 - 1e-6)
    return float(np.where(good, np.log(p), np.log1p(-p)).mean())


def fit_probe(asked: Asked, tokens: int, folds: np.ndarray, strength: float) -> Estimate:
    """A linear probe of each choice's hidden state, its confidence, and whether it agrees with the one before."""
    steps = len(asked.choices) - 1
    seen = [features(asked.began(s), tokens).numpy().astype(np.float64) for s in range(steps)]
    mean, scale = np.mean(np.concatenate(seen), 0), np.std(np.concatenate(seen), 0) + 1e-3
    x, good = [(one - mean) / scale for one in seen], suffices(asked)
    held = np.zeros((len(asked), steps))
    for fold in np.unique(folds):
        rest = folds != fold
        for s in range(steps):
            weight, bias = _logistic(x[s][rest], good[rest, s], strength)
            held[~rest, s] = 1 / (1 + np.exp(-(x[s][~rest] @ weight + bias)))
    fitted = [_logistic(x[s], good[:, s], strength) for s in range(steps)]
    probe = {
        "mean": torch.from_numpy(mean).float(), "scale": torch.from_numpy(scale).float(),
        "weight": torch.from_numpy(np.stack([w for w, _ in fitted])).float(),
        "bias": torch.tensor([b for _, b in fitted]).float(),
    }  # fmt: skip
    return Estimate("probe", tokens, None, probe, held, log_likelihood(held, good))


def _logistic(x: np.ndarray, good: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    if good.all() or not good.any():  # nothing to tell apart: the share itself
        share = (good.sum() + 0.5) / (len(good) + 1)
        return np.zeros(x.shape[1]), float(np.log(share / (1 - share)))
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(x, good)
    return fitted.coef_[0], float(fitted.intercept_[0])


def fit_estimate(
    asked: Asked, tokens: int = 1, seed: int = 0, signal: str | None = None, plain: Sequence[Estimate] | None = None
) -> Estimate:
    """The estimate that says most of questions it has not seen.

    Args:
        tokens: of the answer that are heard. signal: "confidence", "attention" or "probe"; None: the best one.
        plain: what :func:`fit_plain` has found, where that is known.

    Raises:
        ValueError: attention that says nothing of some choice.
    """
    found = [*(fit_plain(asked, tokens, seed, signal) if plain is None else plain)]
    if signal == "probe" or (signal is None and len(asked) >= PROBED):
        folds = folds_of(asked, seed)
        found += [fit_probe(asked, tokens, folds, strength) for strength in STRENGTHS]
    best = max(found, key=lambda one: one.worth)
    for one in sorted(found, key=lambda one: one.worth):
        best.compared[one.signal] = one.worth
    return best


def fit_plain(asked: Asked, tokens: int, seed: int, signal: str | None) -> list[Estimate]:
    """The estimates without a probe that are to be compared; see :func:`fit_estimate`."""
    if signal == "attention" and asked.stayed is None:
        raise ValueError(
            "signal='attention' says nothing of some of these choices: name some that drop tokens inside the decoder "
            "(fastv, gsearch) and ask anew, or take another signal"
        )
    signals = [signal] if signal else ["confidence"] + ["attention"] * (asked.stayed is not None)
    return [fit_lines(asked, one, tokens, folds_of(asked, seed)) for one in signals if one != "probe"]


def folds_of(asked: Asked, seed: int) -> np.ndarray:
    """int [n]: which of five parts each question is held out with; questions about a picture together."""
    _, units = np.unique(asked.group, return_inverse=True)
    return np.random.default_rng(seed).integers(0, 5, units.max() + 1)[units]


# -- the path, and the promise -----------------------------------------------------------------------------------------
@dataclass(eq=False)
class Path:
    """Thresholds from careful to bold, of some of the choices.

    Attributes:
        steps: which choices. estimate: fitted for these. settings: thresholds of each point.
    """

    steps: list[int]
    estimate: Estimate
    settings: list[list[float]]


def lay_path(
    asked: Asked, costs: Costs, loss: float, confidence: float, pictures: int, *, tokens: int = 1, seed: int = 0,
    signal: str | None = None,
) -> Path:  # fmt: skip
    """The path that is likely to end cheapest, by questions that the estimate has not seen.

    All subsets of the choices that hold the last one are compared: a choice that seldom suffices costs a try for
    nothing. How far along a path the promise will be kept depends on how many ``pictures`` test it.
    """
    last = len(asked.choices) - 1
    whole = fit_plain(asked, tokens, seed, signal)
    found: list[tuple[float, Path]] = []
    for size in range(1, last + 1):
        for some in combinations(range(last), size):
            steps = [*some, last]
            mine, cost = asked.of(steps), costs.of(steps)
            plain = [one.at(mine, list(some)) for one in whole]
            estimate = fit_estimate(mine, tokens, seed, signal, plain)
            settings = [thresholds_at(bold, cost) for bold in BOLD]
            points = [outcome(mine, estimate.held_out, one, cost) for one in settings]
            losses = np.array([(one.loss.sum() + 0.5) / (len(mine) + 1) for one in points])
            spent = np.array([one.cost.mean() for one in points])
            found.append(
                (_expected(losses, spent, cost.taken[-1], loss, confidence, pictures), Path(steps, estimate, settings))
            )
    return min(found, key=lambda one: one[0])[1]


def _expected(
    losses: np.ndarray, spent: np.ndarray, last: float, most: float, confidence: float, pictures: int
) -> float:  # fmt: skip
    """What a path is likely to cost when it has been tested on so many pictures. last: where nothing is kept."""
    from scipy.stats import binom

    allowed = int(binom.ppf(1 - confidence, pictures, most)) - 1
    passes = binom.cdf(allowed, pictures, np.maximum.accumulate(losses))
    ends = passes - np.append(passes[1:], 0.0)
    return float((ends * np.minimum(np.minimum.accumulate(spent), last)).sum() + (1 - passes[0]) * last)


class TooFewError(ValueError):
    """Too few questions for the promise; the message says how many more are needed."""


class NoneKeptError(ValueError):
    """Nothing cheaper than the last choice keeps the promise, as far as these questions tell."""


def check_enough(pictures: int, loss: float, confidence: float) -> int:
    """How many pictures test the promise, at least.

    Raises:
        ValueError: loss or confidence out of range. TooFewError: there are fewer, with those that fit the estimate.
    """
    if not 0 < loss < 1 or not 0 < confidence < 1:
        raise ValueError(f"loss={loss} and confidence={confidence}: both lie between 0 and 1")
    least = needed(loss, confidence)
    if pictures < least + FEWEST:
        raise TooFewError(
            f"a loss of at most {loss:g} with confidence {confidence:g} takes {least + FEWEST} pictures with questions "
            f"({least} to test the promise, {FEWEST} to fit the estimate), and there are {pictures}: give "
            f"{least + FEWEST - pictures} more (--limit, --data), or ask for a larger loss"
        )
    return least


def tune(
    asked: Asked, costs: Costs, *, loss: float = 0.01, confidence: float = 0.95, tokens: int = 1, seed: int = 0,
    signal: str | None = None, binary: bool = False, about: dict[str, Any] | None = None,
) -> AutoPolicy:  # fmt: skip
    """An AutoPolicy whose mean loss is at most ``loss`` on questions like these, with this confidence.

    Args:
        asked: every question under every choice, cheapest first; pictures (``group``) are the units that are alike.
        binary: whether a score can only be 0 or 1. about: what else the promise is to say (data, model).

    Raises:
        ValueError: loss or confidence out of range. TooFewError: too few pictures. NoneKeptError: nothing cheaper than
            the last choice keeps the promise.
    """
    names, units = np.unique(asked.group, return_inverse=True)
    least = check_enough(len(names), loss, confidence)
    order = np.random.default_rng(seed).permutation(len(names))
    count = max(least, int(TESTED * len(names)))
    tested = np.isin(units, order[:count])
    path = lay_path(asked.part(~tested), costs, loss, confidence, count, tokens=tokens, seed=seed, signal=signal)
    mine, cost = asked.part(tested).of(path.steps), costs.of(path.steps)
    estimates = path.estimate.of(mine)
    found = [outcome(mine, estimates, one, cost) for one in path.settings]
    single = len(np.unique(mine.group)) == len(mine)
    losses = (by_unit(one.loss, mine.group) for one in found)
    kept = kept_up_to(losses, loss, confidence, binary and single)
    at = min(range(kept), key=lambda i: float(found[i].cost.mean()), default=None)  # they keep it all together
    if at is None or found[at].cost.mean() >= cost.taken[-1]:
        raise NoneKeptError(
            f"no try pays: on {count} pictures a loss of at most {loss:g} with confidence {confidence:g} is kept only "
            f"where nearly every question goes on to {mine.choices[-1]!r}. Give more questions (--limit, --data), or "
            "ask for a larger loss"
        )
    taken = found[at]
    promise = {
        "loss": loss, "confidence": confidence, "pictures": len(np.unique(mine.group)), "questions": len(mine),
        "seen_loss": round(float(taken.loss.mean()), 6), "seen_score": round(float(taken.score.mean()), 6),
        "seen_last": round(float(mine.score[:, -1].mean()), 6),
        "p_values": "binomial" if binary and single else "Hoeffding-Bentkus", "fitted_on": int((~tested).sum()),
        "cost": round(float(taken.cost.mean() / cost.taken[-1]), 6), "cost_unit": cost.unit, "seed": seed,
        "signals": {name: round(-worth, 4) for name, worth in path.estimate.compared.items()}, **(about or {}),
    }  # fmt: skip
    return path.estimate.policy(mine, path.settings[at], promise)


def words(promise: dict[str, Any]) -> str:
    """A promise as a sentence."""
    return (
        f"on questions like these, accuracy falls by at most {promise['loss']:.2%} against the last choice, with "
        f"confidence {promise['confidence']:.0%} (tested on {promise['questions']} questions about "
        f"{promise['pictures']} pictures, {promise['p_values']} p-values; there it fell by {promise['seen_loss']:.2%} "
        f"where it fell, at {promise['cost']:.0%} of the last choice's {promise['cost_unit']})"
    )


def sample_of(model: Any) -> dict[str, list[float]]:
    """Some of a model's fingerprint, which tells whether a policy was tuned on it."""
    whole = {name: values for name, values in fingerprint(model).items() if "embed_tokens" not in name}
    names = list(whole)[:: max(1, len(whole) // MATRICES)][:MATRICES]
    return {name: whole[name] for name in names}


def digest(samples: Iterable[Sample]) -> str:
    """Of questions, answers and which pictures they are about."""
    found = hashlib.sha256()
    for one in samples:
        found.update(repr((one.id, one.group, one.question, one.answers)).encode())
    return f"sha256:{found.hexdigest()[:16]}"
