"""From rows to the table: accuracy with its interval, what needs the picture, tokens, cost, wins and losses."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vtr.eval.accuracy.answers import REFERENCES
from vtr.eval.accuracy.contenders import NONE, Contender
from vtr.eval.accuracy.metrics import RIGHT, Metric, gain, leakage
from vtr.eval.accuracy.stats import interval, outcomes, paired

from vtr.data.choices import LETTERS, picked

Row = Mapping[str, Any]
FEW_KINDS = 8
"""So many kinds of questions get a table of their own."""
EXAMPLES = 10
"""How many bad records are named in the results; all are in the rows."""
NAMED = 8
"""How many of the questions that a policy wins or loses are named; all are in the rows."""


def summarize(
    rows: Sequence[Row], contenders: Sequence[Contender], metric: Metric, *, indispensable: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The body of an ``eval`` result without model and settings.

    References, ``gain`` (S_v − S_wv, with S_wv the model without an image), ``gray_gain`` (the same over an even gray
    picture) and ``leakage`` (None without a base language model) are of all samples; the rest too, unless
    ``indispensable`` restricts it to those that :func:`needs_picture`.

    Args:
        rows: of :meth:`vtr.eval.accuracy.answers.Bench.rows`. seed: of the bootstrap.

    Raises:
        ValueError: no row is good, or none is left that needs the picture.
    """
    good = [row for row in rows if "bad" not in row]
    if not good:
        reason = f"; the first: {rows[0]['bad']}" if rows else ""
        raise ValueError(f"none of {len(rows)} samples can be used{reason}")
    shown = [row for row in good if needs_picture(row)] if indispensable else good
    if not shown:
        raise ValueError(f"none of {len(good)} samples needs its picture: each is answered right without it")
    references = {name: _mean(good, name) if name in good[0] else None for name in REFERENCES}
    kinds = sorted({row["kind"] for row in good})
    bad = [row for row in rows if "bad" in row]
    return {
        "data": {
            "samples": len(good), "bad": len(bad), "kinds": kinds, "shown": len(shown),
            "indispensable": sum(map(needs_picture, good)), "only_indispensable": indispensable,
            "bad_examples": [{"id": row["id"], "reason": row["bad"]} for row in bad[:EXAMPLES]],
        },
        "reference": {
            NONE: float(np.mean([row["policies"][NONE]["score"] for row in good])),
            **references, "majority": majority(good, metric),
        },
        "policies": [_policy(one, shown, good, references, seed) for one in contenders],
    }  # fmt: skip


def needs_picture(row: Row) -> bool:
    """Whether none of the runs without the picture is right.

    After MMStar's idea of vision-indispensable samples. There eight language models and people judged; here the model
    itself does, and its base language model where that was asked.
    """
    return all(row[name]["score"] < RIGHT for name in REFERENCES if name in row)


def majority(rows: Sequence[Row], metric: Metric) -> float:
    """The score of always giving the most frequent answer of the kind of question (of equal ones the first met)."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    scores = []
    for members in by_kind.values():
        guess = Counter(map(_said_as, members)).most_common(1)[0][0]
        scores += [metric.score(guess, row["answers"], row.get("choices")) for row in members]
    return float(np.mean(scores))


def _said_as(row: Row) -> str:
    """A row's first right answer; of a multiple-choice question its letter."""
    answer, choices = row["answers"][0], row.get("choices")
    index = picked(answer, choices) if choices is not None else None
    return answer if index is None else LETTERS[index]


def _mean(rows: Sequence[Row], what: str) -> float:
    return float(np.mean([row[what]["score"] for row in rows]))


def _policy(
    one: Contender, shown: Sequence[Row], good: Sequence[Row], references: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    mine, theirs = ([row["policies"][spec]["score"] for row in shown] for spec in (one.spec, NONE))
    groups = _numbered([row["group"] for row in shown])
    low, high = interval(mine, groups, seed=seed)
    cells = [row["policies"][one.spec] for row in shown]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for row, score in zip(shown, mine, strict=True):
        by_kind[row["kind"]].append(score)
    needing = [row["policies"][one.spec]["score"] for row in good if needs_picture(row)]
    everywhere = float(np.mean([row["policies"][one.spec]["score"] for row in good]))
    versus = paired(mine, theirs, groups, seed=seed)
    won, lost = outcomes(mine, theirs, [row["id"] for row in shown])
    return {
        "policy": one.spec, "name": one.name, "accuracy": float(np.mean(mine)), "low": low, "high": high,
        "indispensable": float(np.mean(needing)) if needing else None,
        "by_kind": {kind: float(np.mean(by_kind[kind])) for kind in sorted(by_kind)},
        "kind_intervals": _kind_intervals(shown, mine, groups, seed),
        "gain": gain(everywhere, references["no_image"]), "gray_gain": gain(everywhere, references["gray"]),
        "leakage": leakage(references["no_image"], references["base_lm"]),
        "vision_tokens": np.mean([cell["tokens"] for cell in cells], axis=0).tolist(),
        "mean_keep": float(np.mean([_kept(row, one.spec) for row in shown])),
        "gflops": float(np.mean([cell["flops"] for cell in cells]) / 1e9),
        "kv_mib": float(np.mean([cell["kv_bytes"] for cell in cells]) / 2**20),
        "prefill_ms": None,
        "selector_ms": float(np.mean([cell["selector_ms"] for cell in cells])),
        "versus_none": {**versus.figures(), "won": won[:NAMED], "lost": lost[:NAMED]},
    }  # fmt: skip


def _kind_intervals(
    rows: Sequence[Row], scores: Sequence[float], groups: Sequence[int], seed: int
) -> dict[str, tuple[float, float]]:
    """The interval of each kind's accuracy, where there are at most FEW_KINDS."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[row["kind"]].append(i)
    if len(members) > FEW_KINDS:
        return {}
    return {
        kind: interval([scores[i] for i in at], [groups[i] for i in at], seed=seed)
        for kind, at in sorted(members.items())
    }


def _kept(row: Row, spec: str) -> float:
    """Mean over layers of the share of the whole picture's tokens that entered (a smaller picture has fewer)."""
    total, tokens = row["policies"][NONE]["total"], row["policies"][spec]["tokens"]
    return sum(tokens) / (len(tokens) * total) if total else 1.0


def _numbered(names: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


# -- as a table --------------------------------------------------------------------------------------------------------
COLUMNS = (
    "policy", "accuracy", "interval", "needs picture", "gain", "gray gain", "− none", "p", "mean keep", "GFLOPs",
    "KV MiB", "selector ms", "prefill ms",
)  # fmt: skip


def cells(body: Mapping[str, Any]) -> list[list[str]]:
    """One line a policy, as :data:`COLUMNS`; prefill only where it was measured."""
    lines = []
    for row in body["policies"]:
        versus, needing, ms = row["versus_none"], row["indispensable"], row["prefill_ms"]
        reference = row["policy"] == NONE
        lines.append(
            [
                row["policy"],
                f"{row['accuracy']:.1%}",
                f"{100 * row['low']:.1f}–{100 * row['high']:.1f}",
                "–" if needing is None else f"{needing:.1%}",
                f"{100 * row['gain']:+.1f}",
                f"{100 * row['gray_gain']:+.1f}",
                "" if reference else "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                    *(100 * versus[key] for key in ("difference", "low", "high"))
                ),
                "" if reference else f"{versus['p_mcnemar']:.2g}",
                f"{row['mean_keep']:.1%}",
                f"{row['gflops']:.3g}",
                f"{row['kv_mib']:.3g}",
                f"{row['selector_ms']:.1f}",
                "" if ms is None else f"{ms['median']:.1f} ({ms['low']:.1f}–{ms['high']:.1f})",
            ]
        )  # fmt: skip
    return lines


def caption(body: Mapping[str, Any]) -> str:
    """What was measured, in a few sentences."""
    data, reference = body["data"], body["reference"]
    restricted = f" The table shows the {data['shown']} that need it." if data["only_indispensable"] else ""
    seen, no_image, gray, base = (reference[name] for name in (NONE, *REFERENCES))
    text = (
        f"{body['model']} on {data['name']}: {data['samples']} samples, {data['bad']} bad; {data['indispensable']} "
        f"need the picture (no run without it is right).{restricted} No reduction {seen:.1%}, no image {no_image:.1%}, "
        f"gray picture {gray:.1%}, most frequent answer {reference['majority']:.1%}. Multi-modal gain without "
        f"reduction {100 * gain(seen, no_image):+.1f} points (over gray {100 * gain(seen, gray):+.1f})"
    )
    leaked = leakage(no_image, base)
    if leaked is None:
        return f"{text}; multi-modal leakage –: it needs the base language model's answers, --base-lm."
    return f"{text}; multi-modal leakage {100 * leaked:.1f} ({body['base_lm']}, text only: {base:.1%})."


def by_kind(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and lines of the table by kind of question: FLOPs as a share of no reduction's, and accuracy.

    Of data with one kind, or with more than FEW_KINDS, there is no line.
    """
    kinds = body["data"]["kinds"]
    if not 1 < len(kinds) <= FEW_KINDS:
        return [], []
    whole = next(row["gflops"] for row in body["policies"] if row["policy"] == NONE)

    def cell(row: Mapping[str, Any], kind: str) -> str:
        if kind not in row["by_kind"]:  # none of it is shown
            return "–"
        low, high = row.get("kind_intervals", {}).get(kind, (None, None))
        between = "" if low is None else f" ({100 * low:.0f}–{100 * high:.0f})"
        return f"{row['by_kind'][kind]:.1%}{between}"

    lines = [
        [row["policy"], f"{row['gflops'] / whole:.0%}", *(cell(row, kind) for kind in kinds)]
        for row in body["policies"]
    ]
    return ["policy", "FLOPs", *kinds], lines


def markdown(body: Mapping[str, Any]) -> str:
    """The caption and the tables in Markdown."""
    out = [caption(body)]
    for columns, lines in (used_columns(body), by_kind(body)):
        if lines:
            out += ["", *markdown_table(columns, lines)]
    return "\n".join(out) + "\n"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]], words: int = 0) -> list[str]:
    """The lines of a table in Markdown; column ``words`` is of words, the others of figures."""
    rule = "".join("|---" if i == words else "|--:" for i in range(len(columns))) + "|"
    head, *rows = ("| " + " | ".join(line) + " |" for line in (columns, *lines))
    return [head, rule, *rows]


def used_columns(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and lines, without columns that are empty throughout."""
    lines = cells(body)
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    return [COLUMNS[i] for i in used], [[line[i] for i in used] for line in lines]


def table_csv(body: Mapping[str, Any]) -> str:
    """The figures, unrounded: one line a row of the table, one column a figure and kind of question."""
    flat = []
    for row in body["policies"]:
        line = {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
        line.update({f"accuracy {kind}": value for kind, value in row.get("by_kind", {}).items()})
        versus = (row.get("versus_none") or {}).items()
        line.update({f"minus_none_{k}": v for k, v in versus if not isinstance(v, list)})
        line.update({f"prefill_ms_{k}": v for k, v in (row.get("prefill_ms") or {}).items()})
        line.pop("prefill_ms", None)
        flat.append(line)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()
