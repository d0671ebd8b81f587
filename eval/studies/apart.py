"""One joint backbone, or one for each trained method: what joint training costs a method, on the pocket model.

``python -m vtr.eval.studies.apart --pmod DIR --dynamic DIR --out docs/results`` writes apart.md and apart.json. The
folders are what ``python -m vtr.pocket.train --joint --alone pmod --out DIR`` (and ``--alone dynamic``) wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from vtr.eval.report import results
from vtr.eval.studies import schedule_report as report
from vtr.eval.studies.trained import JOINT, LONGEST, examples, trained

import vtr
from vtr.search import Example

ALONE = {"p-MoD": "p-MoD alone", "Dynamic-LLaVA": "Dynamic-LLaVA alone"}


@dataclass
class Backbone:
    """One set of weights, and the trained policies that belong to it.

    Attributes:
        weights: folder of the model. policies: what :func:`vtr.eval.studies.trained.trained` takes. names: of those,
            which.
        lists: whether it has learnt to give long answers.
    """

    name: str
    weights: Path
    policies: str
    names: Sequence[str]
    lists: bool = True


def backbones(pmod: Path, dynamic: Path) -> list[Backbone]:
    """The joint one, both that learnt with one policy, and the pocket model, to which policies were fitted at last."""
    both = tuple(ALONE)
    return [
        Backbone("joint", vtr.pocket.MODELS["joint"], JOINT, both),
        Backbone(ALONE["p-MoD"], pmod / "weights", str(pmod / "policies"), both[:1]),
        Backbone(ALONE["Dynamic-LLaVA"], dynamic / "weights", str(dynamic / "policies"), both[1:]),
        Backbone("finished before", vtr.pocket.WEIGHTS, "pocket", both, lists=False),
    ]


def ask(one: Backbone, asked: Sequence[Example], listed: Sequence[Example]) -> dict[str, list[report.Line]]:
    """Both kinds of answers of one backbone: "short" and, if it lists, "long"."""
    model, processor = vtr.pocket.load(folder=one.weights)
    vtr.patch(model)
    learnt = trained(one.policies)
    policies: dict[str, vtr.Policy | None] = {"none": None, **{name: learnt[name] for name in one.names}}
    found = {"short": report.measure(model, processor, policies, asked)}
    if one.lists:
        found["long"] = report.measure(model, processor, policies, listed, 0, LONGEST, "listing")
    return found


def compared(found: Mapping[str, Mapping[str, list[report.Line]]], groups: Mapping[str, Sequence[int]]) -> list[Any]:
    """Joint − alone on the same questions, for each method and kind of answer."""
    out = []
    for method, alone in ALONE.items():
        for kind in ("short", "long"):
            ours, theirs = ({line.name: line for line in found[b][kind]}[method] for b in ("joint", alone))
            one = report.compare(ours, theirs, groups[kind])
            out.append({**one, "a": f"{method} joint", "b": alone, "kind": kind})
    return out


def markdown(body: Mapping[str, Any]) -> str:
    """Both tables."""
    rows = []
    for backbone, kinds in body["found"].items():
        long = {line["name"]: line["accuracy"] for line in kinds.get("long", [])}
        for line in kinds["short"]:
            f1 = f"{long[line['name']]:.1%}" if long else "–"
            rows.append(f"| {line['name']} | {backbone} | {line['accuracy']:.1%} | {f1} |")
    differences = [
        f"| {c['a']} − {c['b']} | {c['kind']} | {100 * c['difference']:+.1f} "
        f"[{100 * c['low']:+.1f}, {100 * c['high']:+.1f}] |"
        for c in body["compared"]
    ]
    return "\n".join(
        [
            "# Trained together or apart", "",
            f"{body['questions']} questions with one-word answers, {body['listings']} pictures whose objects are all "
            'listed (F1). "Alone": from the same start as the joint backbone, with one policy only, in as many steps '
            'as that policy has beside the others there. "Finished before": the pocket model as it is shipped, to '
            "which policies were fitted afterwards (it was not taught to list).", "",
            "| policy | backbone | accuracy | F1 |", "|---|---|--:|--:|", *rows, "",
            "| points | answers | difference |", "|---|---|--:|", *differences, "",
        ]
    )  # fmt: skip


def main(
    pmod: Annotated[Path, typer.Option(help="what training with p-MoD alone wrote")],
    dynamic: Annotated[Path, typer.Option(help="what training with Dynamic-LLaVA alone wrote")],
    out: Annotated[Path, typer.Option(help="folder for apart.md and apart.json")],
    questions: Annotated[int, typer.Option(help="with one-word answers", min=1)] = 480,
    listings: Annotated[int, typer.Option(help="pictures to list", min=1)] = 100,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Compare joint and separate training."""
    asked, listed = examples(questions, listings, seed)
    found = {one.name: ask(one, asked, listed) for one in backbones(pmod, dynamic)}
    groups = {"short": report.groups_of(asked), "long": report.groups_of(listed)}
    body = {
        "questions": questions, "listings": listings, "compared": compared(found, groups),
        "found": {name: {kind: report.to_json(x) for kind, x in kinds.items()} for name, kinds in found.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(body)
    (out / "apart.md").write_text(text)
    results.save(out / "apart.json", "apart", body, seed=seed)
    print(text)


if __name__ == "__main__":
    typer.run(main)
