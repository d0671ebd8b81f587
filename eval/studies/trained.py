"""p-MoD and Dynamic-LLaVA, trained into a pocket model, beside training-free policies of equal cost.

``python -m vtr.eval.studies.trained --out docs/results`` writes trained.md, trained.json and trained.png: accuracy of
short answers and F1 of long ones, prefill FLOPs and time, what a decoded token costs behind 50, 500 and 2,000 others,
and how the KV cache grows with the answer; the papers' own figures beside ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from vtr.eval.cost.interleave import decode_in_turns
from vtr.eval.cost.timing import milliseconds
from vtr.eval.report import results
from vtr.eval.report.plots import figure
from vtr.eval.studies import equal_flops
from vtr.eval.studies import schedule_report as report

import vtr
from vtr.chat import encode
from vtr.pocket.listing import QUESTION
from vtr.search import Cost, Example

JOINT = "pocket-joint"
LONGEST = 96
"""Tokens that a list of all objects may have."""
LENGTHS = (50, 500, 2000)
WINDOW = 48
"""Decoded tokens timed before each length."""
CLAIMS = {
    "p-MoD": {"prefill FLOPs": "55.6 % of TFLOPs", "KV": "53.8 %"},
    "Dynamic-LLaVA": {
        "prefill FLOPs": "about 25 %",
        "decode FLOPs without cache": "about 50 %",
        "KV growth": "about 50 %",
        "words kept": "about 50 %",
    },
}
"""arXiv 2412.04449 (LLaVA-1.5/NeXT-7B) and 2412.00876 (abstract): what remains."""


def trained(weights: str) -> dict[str, vtr.Policy]:
    """A pocket model's, by name; Dynamic-LLaVA also without forgetting (the paper's "I"), if it forgets.

    weights: a name of ``vtr.pocket.POLICIES``, or a folder that holds one for each method.
    """
    named = weights in vtr.pocket.POLICIES
    given = {name: f"{name}:weights={weights if named else Path(weights) / name}" for name in ("pmod", "dynamic-llava")}
    found = {"p-MoD": vtr.policy(given["pmod"]), "Dynamic-LLaVA": vtr.policy(given["dynamic-llava"])}
    if found["Dynamic-LLaVA"].asks("remember"):
        found["Dynamic-LLaVA (I)"] = vtr.policy(f"{given['dynamic-llava']},forget=false")
    return found


def examples(questions: int, listings: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Held-out questions with one-word answers, and pictures to list."""
    drawn = vtr.pocket.samples(questions, "test", seed), vtr.pocket.listings(listings, "test", seed)
    asked, listed = ([Example(s["image"], s["question"], s["answer"]) for s in some] for some in drawn)
    return asked, listed


# -- policies of equal cost --------------------------------------------------------------------------------------------
def prompt_sizes(model: Any, processor: Any, examples: Sequence[Example]) -> list[tuple[int, int]]:
    """(vision tokens, text tokens) of every prompt."""
    found = []
    for one in examples:
        inputs = encode(processor, [one.question], [one.image])
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)
        vision = vtr.report(model).rows[0].total
        found.append((vision, inputs["input_ids"].shape[1] - vision))
    return found


def keeps_of(policy: vtr.Policy, depth: int) -> list[float]:
    """The share of vision tokens that enters each layer under a trained policy."""
    if isinstance(policy, vtr.PMoD):
        return [1.0 if ratio is None else ratio for ratio in policy.layers(depth)]
    assert isinstance(policy, vtr.DynamicLLaVA)
    return [1.0 if layer < policy.layer else float(policy.keep) for layer in range(depth)]


def equals(policy: vtr.Policy, cost: Cost) -> dict[str, vtr.Policy]:
    """Training-free policies whose prefill costs as many decoder FLOPs as ``policy``'s; by name."""
    depth = cost.geometry.num_hidden_layers
    ratio = cost.ratio(keeps_of(policy, depth), "flops")
    keep, layer = equal_flops.one_cut(ratio, cost)
    found: dict[str, vtr.Policy] = {"FastV": vtr.FastV(keep, layer), "Random": vtr.Random(keep, layer)}

    def falling(share: float) -> list[float]:
        return [max(share**step, 1e-4) for step in range(depth)]

    share = equal_flops.dearest(falling, ratio, cost)
    if share is not None:
        found["GSearch"] = vtr.GSearch([round(one, 4) for one in falling(share)])
    return found


def contestants(
    model: Any, processor: Any, examples: Sequence[Example], learnt: Mapping[str, vtr.Policy]
) -> dict[str, vtr.Policy | None]:
    """No reduction, the trained policies, and behind each of the two the others at its cost."""
    cost = Cost.from_model(model, prompt_sizes(model, processor, examples[:16]))
    out: dict[str, vtr.Policy | None] = {"none": None}
    for name, policy in learnt.items():
        out[name] = policy
        if not name.endswith("(I)"):
            out |= {f"{other} = {name}": one for other, one in equals(policy, cost).items()}
    return out


# -- answers of many lengths -------------------------------------------------------------------------------------------
def longest(model: Any, processor: Any, image: Any, tokens: int) -> Any:
    """A ``generate`` that answers with exactly so many tokens; takes further arguments."""
    inputs = encode(processor, [QUESTION], [image])
    return partial(model.generate, **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def decode_times(
    model: Any, processor: Any, image: Any, policies: Mapping[str, vtr.Policy | None], lengths: Sequence[int]
) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds of a decoded token just before each length, policies taking turns at every token."""
    say = longest(model, processor, image, max(lengths) + 1)
    with torch.inference_mode(), tqdm(total=len(policies) * max(lengths), desc="decoding") as bar:

        def run(policy: vtr.Policy | None, turns: Any) -> Any:
            with torch.inference_mode():
                return say(policy=policy, stopping_criteria=turns)

        seconds = decode_in_turns({n: partial(run, p) for n, p in policies.items()}, model.device, bar.update)
    out: dict[str, dict[int, dict[str, float]]] = {}
    for name, times in seconds.items():
        parts = {length: times[max(0, length - WINDOW) : length] for length in lengths}
        out[name] = {length: milliseconds(part) for length, part in parts.items()}
    return out


def cache_growth(
    model: Any, processor: Any, image: Any, policies: Mapping[str, vtr.Policy | None], lengths: Sequence[int]
) -> dict[str, list[int]]:
    """Bytes of live keys and values behind answers of each length."""
    out: dict[str, list[int]] = {name: [] for name in policies}
    with torch.inference_mode(), tqdm(total=len(policies) * len(lengths), desc="cache growth") as bar:
        for length in lengths:
            say = longest(model, processor, image, length)
            for name, policy in policies.items():
                say(policy=policy)
                out[name].append(vtr.report(model).kv_bytes)
                bar.update()
    return out


def without_cache(
    model: Any, processor: Any, pictures: Sequence[Any], policies: Mapping[str, vtr.Policy | None], tokens: int
) -> dict[str, float]:
    """Decode FLOPs of answers of so many tokens when every step runs the whole sequence again; means of a picture."""
    out = dict.fromkeys(policies, 0.0)
    with torch.inference_mode():
        for image in tqdm(pictures, desc="without cache"):
            say = longest(model, processor, image, tokens)
            for name, policy in policies.items():
                say(policy=policy, use_cache=False)
                out[name] += vtr.report(model).decode_flops / len(pictures)
    return out


def words_kept(model: Any, processor: Any, pictures: Sequence[Any], policy: vtr.Policy) -> float:
    """The share of the words of unforced long answers that the last layer's cache remembers."""
    kept: list[bool] = []
    with torch.inference_mode():
        for image in tqdm(pictures, desc="words kept"):
            model.generate(**encode(processor, [QUESTION], [image]), policy=policy, max_new_tokens=LONGEST)
            kept += vtr.report(model).rows[0].remembered(-1)
    return sum(kept) / len(kept)


# -- what is written ---------------------------------------------------------------------------------------------------
def claims(short: Sequence[report.Line], long: Mapping[str, Any]) -> list[dict[str, str]]:
    """The papers' figures beside ours: what remains, as shares of no reduction."""
    line = {one.name: one for one in short}
    grown = {name: (kv[-1] - kv[0]) for name, kv in long["kv_bytes"].items()}
    ours = {
        "prefill FLOPs": lambda name: line[name].flops / line["none"].flops,
        "KV": lambda name: line[name].kv_bytes / line["none"].kv_bytes,
        "decode FLOPs without cache": lambda name: long["without_cache"][name] / long["without_cache"]["none"],
        "KV growth": lambda name: grown[name] / grown["none"],
        "words kept": lambda name: long["words_kept"],
    }
    return [
        {"policy": name, "measure": measure, "paper": said, "here": f"{ours[measure](name):.1%}"}
        for name, papers in CLAIMS.items()
        for measure, said in papers.items()
        if measure not in ("KV growth", "words kept") or f"{name} (I)" in grown  # where something is forgotten
    ]


def markdown(body: Mapping[str, Any], short: Sequence[report.Line], listed: Sequence[report.Line]) -> str:
    """Everything as tables."""
    groups = [body["groups"]["short"], body["groups"]["long"]]
    long = body["long"]
    listings = [
        f"{body['listings']} held-out pictures whose objects are all listed (accuracy: order-free F1 of objects "
        "with every property right; FLOPs and KV with the answer):", "",
        report.table(listed, groups[1]), "",
    ] if listed else []  # fmt: skip
    head = " | ".join(f"{n} tokens" for n in long["lengths"])
    times = [
        f"| {name} | " + " | ".join(f"{found[n]['median']:.2f}" for n in long["lengths"]) + " |"
        for name, found in long["decode_ms"].items()
    ]
    return "\n".join(
        [
            f"# p-MoD and Dynamic-LLaVA, trained into the pocket model (`{body['model']}`)", "",
            f"{body['questions']} held-out questions with one-word answers; after ` = ` stands whose decoder prefill "
            "FLOPs a policy was set to:", "",
            report.table(short, groups[0]), "",
            *listings,
            "Milliseconds of a decoded token behind so many others (the answer is forced to go on), batch 1:", "",
            f"| policy | {head} |", "|---" + "|--:" * len(long["lengths"]) + "|", *times, "",
            "What remains, in the papers (their models) and here:", "",
            "| policy | what | paper | here |", "|---|---|--:|--:|",
            *[f"| {c['policy']} | {c['measure']} | {c['paper']} | {c['here']} |" for c in body["claims"]], "",
        ]
    )  # fmt: skip


def plot(body: Mapping[str, Any], short: Sequence[report.Line], listed: Sequence[report.Line]) -> Any:
    """Accuracy and F1 against FLOPs, decode times, and the cache over the answer's length."""
    made, panels = figure(2, 2, width=5.0, height=3.8)
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(line.name.split(" = ")[0] for line in short))}
    shown = [(panels[0], short, "accuracy (%)"), (panels[1], listed, "F1 of long answers (%)")]
    for panel, lines, what in shown:
        for line in lines:
            name, _, like = line.name.partition(" = ")
            shape = {"": "*", "p-MoD": "o"}.get(like, "s")
            share = 100 * line.flops / lines[0].flops
            panel.plot(share, 100 * line.accuracy, shape, ms=7 if like else 12, color=colors[name], label=line.name)
        panel.set(xlabel="decoder FLOPs (% of none)", ylabel=what)
    if listed:
        panels[1].legend(fontsize=6)
    else:
        panels[1].set_axis_off()
        panels[1].legend(*panels[0].get_legend_handles_labels(), loc="center left", fontsize=9)
    long = body["long"]
    styles = {name: {"color": colors[name.split(" = ")[0]], "ls": "--" if "Dyn" in name.partition(" = ")[2] else "-"}
              for name in long["decode_ms"]}  # fmt: skip
    for name, found in long["decode_ms"].items():
        times = [found[n]["median"] for n in long["lengths"]]
        panels[2].plot(long["lengths"], times, marker="o", ms=4, label=name, **styles[name])
    panels[2].set(xscale="log", xlabel="tokens decoded before", ylabel="ms per token")
    for name, kv in long["kv_bytes"].items():
        panels[3].plot(long["grown_at"], [n / 2**20 for n in kv], marker="o", ms=4, label=name, **styles[name])
    panels[3].set(xlabel="tokens of the answer", ylabel="KV cache (MiB)")
    panels[3].legend(fontsize=7)
    return made


def measure(
    questions: int, listings: int, timed: int, lengths: Sequence[int], seed: int, name: str = JOINT
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Run everything; returns (body, lines of short answers, lines of long ones)."""
    model, processor = vtr.pocket.load(vtr.pocket.NAMES[name])
    vtr.patch(model)
    learnt = trained(name)
    asked, listed = examples(questions, listings, seed)
    policies = contestants(model, processor, asked, learnt)
    short = report.measure(model, processor, policies, asked, timed, 4)
    long = report.measure(model, processor, policies, listed, 0, LONGEST, "listing") if listed else []
    few = {name: p for name, p in policies.items() if name in ("none", *learnt) or name.startswith("FastV")}
    image, last = asked[0].image, max(lengths)
    at = sorted({1, last, *[n for n in (50, 100, 200, 500, 1000, 2000) if n <= last]})
    body = {
        "model": name, "questions": questions, "listings": listings,
        "short": report.to_json(short), "listed": report.to_json(long),
        "groups": {"short": report.groups_of(asked), "long": report.groups_of(listed)},
        "long": {
            "lengths": list(lengths), "grown_at": at,
            "decode_ms": decode_times(model, processor, image, few, lengths),
            "kv_bytes": cache_growth(model, processor, image, few, at),
            "without_cache": without_cache(
                model, processor, [image],
                {name: one for name, one in few.items() if name.startswith(("none", "Dynamic-LLaVA"))}, 50,
            ),
        },
    }  # fmt: skip
    if "Dynamic-LLaVA (I)" in learnt:
        pictures = [one.image for one in listed or asked[:2]][:40]
        body["long"]["words_kept"] = words_kept(model, processor, pictures, learnt["Dynamic-LLaVA"])
    body["claims"] = claims(short, body["long"])
    return body, short, long


def main(
    out: Annotated[Path, typer.Option(help="folder for trained.md, trained.json and trained.png")],
    questions: Annotated[int, typer.Option(help="with one-word answers", min=16)] = 480,
    listings: Annotated[int, typer.Option(help="pictures to list, 0 for none", min=0)] = 100,
    timed: Annotated[int, typer.Option(help="questions whose prefill is timed", min=1)] = 24,
    model: Annotated[str, typer.Option(help="a pocket model with trained policies")] = JOINT,
    longest_answer: Annotated[int, typer.Option(help="tokens of the longest timed answer", min=50)] = 2000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure the trained policies on a pocket model."""
    if model not in vtr.pocket.POLICIES:
        raise typer.BadParameter(f"{model!r} has no trained policies: choose {' or '.join(vtr.pocket.POLICIES)}")
    lengths = [n for n in LENGTHS if n <= longest_answer]
    body, short, listed = measure(questions, listings, timed, lengths, seed, model)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(body, short, listed)
    (out / "trained.md").write_text(text)
    plot(body, short, listed).savefig(out / "trained.png", dpi=120)
    body.pop("groups")
    results.save(out / "trained.json", "trained", body, seed=seed)
    print(text)


if __name__ == "__main__":
    typer.run(main)
