"""What a decoder does with a picture's tokens, in numbers: ``python -m vtr.eval.studies.statistics MODEL … --out DIR``.

For each model (a folder or a name, as ``--model`` takes it): how much attention the first token, the picture and its
largest tokens get in every layer; whether layers rank the picture's tokens alike (Kendall's tau), which G-Search builds
on, and how much of a layer's attention on the picture an early cut leaves; how large the hidden states are; how the
tower's CLS token looks at the patches. Nothing is trained and no answer is read, so it also tells something of a model
whose projector is not trained. Writes statistics.json and statistics.png.

Attention is that of all text tokens behind the picture, or of the last one (``--queries last``), mean over heads.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vtr.eval.report import results
from vtr.eval.studies.statistics_seen import Seen, look

import vtr
from vtr import models
from vtr.chat import encode
from vtr.search.ranking import taus

SHARES = ("first", "picture", "best_tenth", "best_quarter", "early_quarter", "largest")
LIKE = 0.5
"""A tau from which on two rankings are called alike; the paper's figure shows 0.68 to 0.85."""
EARLY = 1
"""The layer whose attention an early cut goes by (FastV's, before layer 2)."""
SHOWN = {
    "first": "first token",
    "picture": "picture",
    "best_quarter": "of it: its best quarter",
    "early_quarter": f"of it: layer {EARLY}'s best quarter",
}
MODELS = ["pocket", "pocket-internvl"]


def summary(found: list[Seen]) -> dict[str, Any]:
    """Means over questions: curves over the layers, and the tau of every two."""
    tau = np.mean([taus(one.picture) for one in found], 0)
    share = {
        "first": [one.first for one in found],
        "picture": [one.picture.sum(1) for one in found],
        "picture_tokens": [one.picture.shape[1] / one.tokens for one in found],
        "largest": [one.picture.max(1) / one.picture.sum(1) for one in found],
        "best_tenth": [held(one.picture, one.picture, 0.1) for one in found],
        "best_quarter": [held(one.picture, one.picture, 0.25) for one in found],
        "early_quarter": [held(one.picture, one.picture[[EARLY]], 0.25) for one in found],
        "norm_first": [one.norms[0] for one in found],
        "norm_picture": [one.norms[1] for one in found],
        "norm_text": [one.norms[2] for one in found],
    }
    out: dict[str, Any] = {name: np.mean(values, 0).round(4).tolist() for name, values in share.items()}
    towers = [one.tower for one in found if one.tower is not None]
    out["tower"] = {
        key: np.mean([one[key] for one in towers], 0).round(4).tolist() for key in (towers[0] if towers else {})
    }
    return {**out, "tau": tau.round(4).tolist(), **agreement(tau)}


def held(weights: np.ndarray, by: np.ndarray, share: float) -> np.ndarray:
    """Share of the attention on the picture that the best tokens hold, by layer.

    Args:
        by: whose best: ``weights`` themselves, or those of one layer, [1, tokens]. share: of the tokens.
    """
    count = max(1, int(weights.shape[1] * share))
    best = np.broadcast_to(np.argsort(by, 1)[:, -count:], (len(weights), count))
    return np.take_along_axis(weights, best, 1).sum(1) / weights.sum(1)


def agreement(tau: np.ndarray) -> dict[str, Any]:
    """What of the tau of every two layers decides whether early cuts are safe."""
    depth = len(tau)
    pairs = tau[np.triu_indices(depth, 1)]
    later = tau[1:, 1:][np.triu_indices(depth - 1, 1)]
    neighbours = np.diagonal(tau, 1)
    return {
        "tau_all": round(float(pairs.mean()), 4),
        "tau_but_first": round(float(later.mean()), 4),
        "tau_lowest_but_first": round(float(later.min()), 4),
        "tau_first": round(float(tau[0, 1:].mean()), 4),
        "tau_neighbours": neighbours.round(4).tolist(),
        "alike_but_first": round(float((later >= LIKE).mean()), 4),
    }


@torch.inference_mode()
def study(name: str, limit: int, seed: int, queries: str) -> dict[str, Any]:
    """One model on the first questions of the pocket task that it has learnt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what an untrained projector cannot do is not asked for here
        model, processor = models.load(name, "cpu")
    vtr.unpatch(model)
    model.set_attn_implementation("eager")
    drawn = vtr.pocket.samples(limit, split="test", seed=seed)
    if vtr.pocket.task_of(name) == "canvases":
        drawn = vtr.pocket.canvases(limit, seed=seed, per_canvas=1)
    found = []
    for sample in tqdm(drawn, total=limit, desc=name):
        inputs = encode(processor, [sample["question"]], [sample["image"]]).to(model.device, model.dtype)
        found.append(look(model, inputs, queries))
    return {"model": name, **summary(found)}


# -- shown -------------------------------------------------------------------------------------------------------------
def tables(body: dict[str, Any]) -> list[Table]:
    """One of all models, and one by layer of each."""
    whole = Table(
        "model", "layers", "tau, all pairs", "without layer 0", "lowest", "layer 0 with others", f"pairs ≥ {LIKE}",
        title="do layers rank the picture's tokens alike?",
    )  # fmt: skip
    out = [whole]
    for one in body["models"]:
        keys = ("tau_all", "tau_but_first", "tau_lowest_but_first", "tau_first")
        alike = f"{one['alike_but_first']:.0%}"
        whole.add_row(one["model"], str(len(one["tau"])), *(f"{one[key]:.2f}" for key in keys), alike)
        table = Table(
            "layer", "first token", "picture", "its best tenth", "quarter", f"layer {EARLY}'s quarter", "largest",
            "tau, next", "norm: first", "picture", "text", title=f"{one['model']}: shares of attention, norms",
        )  # fmt: skip
        for layer, tau in enumerate([*one["tau_neighbours"], None]):
            shares = (f"{one[key][layer]:.1%}" for key in SHARES)
            norms = (f"{one[key][layer]:.3g}" for key in ("norm_first", "norm_picture", "norm_text"))
            table.add_row(str(layer), *shares, "–" if tau is None else f"{tau:.2f}", *norms)
        out.append(table)
    return out


def plot(body: dict[str, Any]) -> Any:
    """A row of panels for each model."""
    from vtr.eval.report.plots import figure

    made, panels = figure(4, len(body["models"]), width=3.8, height=3.2)
    for at, one in enumerate(body["models"]):
        share, tau, norm, tower = panels[4 * at : 4 * at + 4]
        layers = np.arange(len(one["tau"]))
        for key, label in SHOWN.items():
            share.plot(layers, 100 * np.array(one[key]), "--" if "quarter" in key else "-", label=label)
        share.set(title=f"{one['model']}: attention", xlabel="decoder layer", ylabel="%", ylim=(0, 102))
        drawn = tau.imshow(one["tau"], vmin=0, vmax=1)
        tau.grid(False)
        tau.set(title="Kendall tau of rankings", xlabel="decoder layer", ylabel="decoder layer")
        made.colorbar(drawn, ax=tau)
        for key in ("first", "picture", "text"):
            norm.plot(layers, one[f"norm_{key}"], label=key)
        norm.set(title="norms entering a layer", xlabel="decoder layer", yscale="log")
        if one["tower"]:
            tower.plot(100 * np.array(one["tower"]["best_tenth"]), label="best tenth of the patches")
            tower.plot(100 * np.array(one["tower"]["itself"]), label="itself")
            tower.set(title="the tower's CLS attention", xlabel="tower layer", ylabel="%", ylim=(0, 102))
        else:
            tower.set_axis_off()
            tower.set_title("tower without a CLS token")
        for panel in (share, norm, *([tower] if one["tower"] else [])):
            panel.legend(fontsize=7)
    return made


def main(
    names: Annotated[list[str] | None, typer.Argument(help="models", show_default="pocket pocket-internvl")] = None,
    out: Annotated[Path, typer.Option(help="folder for statistics.json and statistics.png")] = Path("docs/results"),
    limit: Annotated[int, typer.Option(min=1, help="questions")] = 16,
    queries: Annotated[str, typer.Option(help="whose attention: text (all of it behind the picture) or last")] = "text",
    seed: Annotated[int, typer.Option(help="which pocket questions")] = 0,
) -> None:
    """Measure attention, rankings and norms of models that nobody trained for it."""
    try:
        for name in names or MODELS:
            models.check_name(name)
        if queries not in ("text", "last"):
            raise ValueError(f"queries={queries!r}: choose text or last")
        found = [study(name, limit, seed, queries) for name in names or MODELS]
    except (ValueError, RuntimeError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    body = {"questions": limit, "queries": queries, "models": found}
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "statistics.json", "statistics", body, seed=seed)
    plot(body).savefig(out / "statistics.png", dpi=110)
    for table in tables(body):
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
