"""How policies fare over data sets and wordings of the question: MM-BigBench's four figures.

``python -m vtr.eval.accuracy.instructions a/results.json b/results.json …`` reads results of ``vtr eval`` (each with
its data and its ``--instruction``) and prints them. After Yang et al., arXiv 2310.09036 (MM-InstructEval, arXiv
2405.07229), and their published code, whose tables the tests reproduce; where the paper says model, read policy. Scores
are float [policies, data sets, instructions] in percent (their scale matters to :data:`NEVER_ZERO` alone).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from vtr.eval.report import results

NEVER_ZERO = 1e-6
"""What the published code adds to a mean before it divides by it, in percent."""


def best_performance(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best score of each policy on each data set over the instructions, and which instruction gave it.

    Returns:
        float [policies, data sets] and int64 of the same shape (the first of equal ones).
    """
    return scores.max(-1), scores.argmax(-1)


def mean_relative_gain(scores: np.ndarray, over: Literal["policies", "instructions"] = "policies") -> np.ndarray:
    """By how many percent a policy (an instruction) is above the mean of all policies (instructions), on average.

    ``MRG[p, d] = mean_i 100 · (s[p,d,i] − m[d,i]) / m[d,i]`` with ``m[d,i] = mean_p s[p,d,i] + 1e-6``; for instructions
    the roles of p and i are swapped. As published, also where all that is averaged is 0: it counts as −100 there.

    Returns:
        float [policies, data sets], or [instructions, data sets].
    """
    axis, other = (0, -1) if over == "policies" else (-1, 0)
    mean = scores.mean(axis, keepdims=True) + NEVER_ZERO
    gains = (100 * (scores - mean) / mean).mean(other)
    return gains if over == "policies" else gains.T


def stability(scores: np.ndarray, over: Literal["policies", "instructions"] = "instructions") -> np.ndarray:
    """The (population) standard deviation of a policy's scores over the instructions: less is more stable.

    Returns:
        float [policies, data sets]; ``over="policies"`` gives that of each instruction: [instructions, data sets].
    """
    return scores.std(-1) if over == "instructions" else scores.std(0).T


def adaptability(scores: np.ndarray, k: int = 3) -> np.ndarray:
    """The global top-K hit ratio: how often each instruction is among a policy's K best, over the data sets.

    ``GHR@K[p, i] = #{d : i in top-K of s[p,d,:]} / (K · D)``; a policy's row sums to 1. K = 3 in the paper. Of equal
    scores the later instruction counts, as in the published code (the paper does not say).

    Returns:
        float [policies, instructions], from 0 to 1.

    Raises:
        ValueError: fewer than K instructions.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"the top {k} of {scores.shape[-1]} instructions are not a choice: k must be from 1 to that")
    top = np.argsort(scores, axis=-1, kind="stable")[..., -k:]
    hits = (top[..., None] == np.arange(scores.shape[-1])).sum((1, 2))
    return hits / (k * scores.shape[1])


def collect(files: list[dict[str, Any]], by_kind: bool = False) -> tuple[np.ndarray, list[str], list[str], list[str]]:
    """Scores of evaluation results in percent: [policies, data sets, instructions], and the names along each axis.

    Args:
        by_kind: the kinds of question of the data are the data sets.

    Raises:
        ValueError: no results of ``vtr eval``, a combination that is missing or there twice.
    """
    cells: dict[tuple[str, str, str], float] = {}
    for data in files:
        if data.get("kind") != "eval":
            raise ValueError(f"a result of kind {data.get('kind')!r} was not written by vtr eval")
        instruction, name = data["instruction"], data["data"]["name"]
        for row in data["policies"]:
            parts = {f"{name} {kind}": x for kind, x in row["by_kind"].items()} if by_kind else {name: row["accuracy"]}
            for where, score in parts.items():
                key = (row["policy"], where, instruction)
                if key in cells:
                    raise ValueError(f"{key} is there twice: give each data set and instruction once")
                cells[key] = score
    names = [list(dict.fromkeys(key[axis] for key in cells)) for axis in range(3)]
    missing = [(p, d, i) for p in names[0] for d in names[1] for i in names[2] if (p, d, i) not in cells]
    if missing or not cells:
        raise ValueError(f"every policy needs every data set and instruction; missing: {missing[:3] or 'everything'}")
    scores = np.array([[[100 * cells[p, d, i] for i in names[2]] for d in names[1]] for p in names[0]])
    return scores, names[0], names[1], names[2]


def markdown(files: list[dict[str, Any]], by_kind: bool = False, k: int = 3) -> str:
    """Two tables of means over data sets: a row a policy, with the wordings that suit it best, and a row a wording."""
    scores, policies, data_sets, wordings = collect(files, by_kind)
    k = min(k, len(wordings))
    best, gain, spread, hits = (
        best_performance(scores)[0], mean_relative_gain(scores), stability(scores), adaptability(scores, k),
    )  # fmt: skip
    lines = [
        f"{len(data_sets)} data sets × {len(wordings)} instructions; means over data sets. Stability is a standard "
        f"deviation in points (less is steadier); adaptability: the instruction most often in the top {k}.",
        "",
        "| policy | best | mean relative gain | stability | adaptability |",
        "|---|--:|--:|--:|---|",
    ]
    for p, name in enumerate(policies):
        favourites = " and ".join(repr(wordings[i]) for i in np.flatnonzero(hits[p] == hits[p].max()))
        lines.append(
            f"| {name} | {best[p].mean():.1f}% | {gain[p].mean():+.1f}% | {spread[p].mean():.1f} | "
            f"{favourites} ({hits[p].max():.0%}) |"
        )
    gain, spread = mean_relative_gain(scores, "instructions"), stability(scores, "policies")
    lines += ["", "| instruction | mean relative gain | stability over policies |", "|---|--:|--:|"]
    lines += [f"| {one!r} | {gain[i].mean():+.1f}% | {spread[i].mean():.1f} |" for i, one in enumerate(wordings)]
    return "\n".join(lines) + "\n"


def main(
    files: Annotated[list[Path], typer.Argument(help="results.json of vtr eval, one per data set and instruction")],
    by_kind: Annotated[bool, typer.Option("--by-kind", help="take each kind of question as a data set")] = False,
    k: Annotated[int, typer.Option(min=1, help="K of the top-K hit ratio")] = 3,
) -> None:
    """Best performance, mean relative gain, stability and adaptability of policies over data sets and instructions."""
    print(markdown([results.load(path) for path in files], by_kind, k), end="")


if __name__ == "__main__":
    typer.run(main)
