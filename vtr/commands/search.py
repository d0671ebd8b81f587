"""``vtr search``: find a keep-schedule for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr.commands._options import shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtr.search import Example, Found, Recipe, Split, Withdrawal

search = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

POCKET = "pocket:split=val"


@dataclass(frozen=True)
class Asked:
    """What every search is told: of which model, on which questions."""

    out: Annotated[Path, typer.Option(help="the folder for what is found")] = Path("schedule")
    model: Annotated[
        str | None, typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="pocket")
    ] = None
    data: Annotated[
        str,
        typer.Option(help="`pocket:split=val`, a JSON file (lines, array, conversations), a folder, `hf:NAME,split=…`"),
    ] = POCKET
    images: Annotated[Path | None, typer.Option(help="the folder of a JSONL's pictures", show_default="its own")] = None
    columns: Annotated[str, typer.Option(help="the data's names of things: `question=query,answers=label`")] = ""
    calibration: Annotated[int, typer.Option(min=1, help="questions to search on")] = 32
    seed: Annotated[int, typer.Option(help="of the split and of the search")] = 0
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto"
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16", show_default="float32 on the CPU")] = (
        None
    )

    @property
    def source(self) -> str:
        """The data; by default the questions that the model has learnt to answer."""
        from vtr.pocket import data_of

        return data_of(self.model, self.data)


@dataclass(frozen=True)
class Search(Asked):
    """What the searches for a schedule are told."""

    evaluation: Annotated[
        int, typer.Option(min=0, help="other questions (other pictures) to measure on; 0: no report")
    ] = 64
    objective: Annotated[str, typer.Option(help="kl, agreement (both need no answers), accuracy, likelihood")] = "kl"
    start: Annotated[int, typer.Option(min=1, help="the first layer that may cut, from 0")] = 2
    queries: Annotated[str, typer.Option(help="whose attention ranks: text, last, text-max, last-max")] = "text"
    batch_size: Annotated[int, typer.Option(min=1, help="rows (questions × candidates) a call")] = 32
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 16
    latency: Annotated[int, typer.Option(min=0, help="time the prefill of so many held-out prompts, in turns")] = 2

    def settings(self) -> dict[str, Any]:
        """As the search functions take them."""
        names = ("objective", "start", "queries", "batch_size", "seed", "max_new_tokens")
        return {**{name: getattr(self, name) for name in names}, "state": self.out / "state.json"}


@search.callback()
def search_main() -> None:
    """Find how many vision tokens each decoder layer of a model needs.

    * `vtr search gsearch --out schedule` — the cheapest schedule that loses (almost) nothing

    * `vtr search psigmoid --budget 0.2 --measure flops --out schedule20` — the best for a budget

    * `vtr search vtw --out vtw` — the layer behind which the picture can go

    * `vtr search fitprune --reduction 0.6 --out fitprune` — FitPrune's recipe for a budget
    """


@search.command("gsearch")
@shared(Search)
def gsearch_command(
    given: Search,
    tolerance: Annotated[float, typer.Option(min=0, help="how far the mean score may fall")] = 0.01,
    method: Annotated[str, typer.Option(help="bisect (hard tolerance), or bayes (the paper's kind)")] = "bisect",
    trials: Annotated[int, typer.Option(min=1, help="of bayes: keeps to try in each layer")] = 8,
) -> None:
    """Find the cheapest schedule that loses (almost) nothing: G-Search.

    Layer by layer, from shallow to deep, the smallest share of vision tokens that stays within the tolerance. What lies
    before a layer is computed once; candidates share batches. Ctrl-C is safe: the same command goes on where it was
    (`state.json` in --out), and with more `--trials` it goes on from a search that is over.

    Records that cannot be used are counted and named, with file and line, and nothing is searched.

    Writes vtr_policy.json (`vtr.GSearch.from_pretrained(out)`), schedule.json, search.json (all that was tried),
    curve.png, ranks.png (do layers rank tokens alike?), report.md and report.json: accuracy, FLOPs, KV and latency on
    held-out questions, beside no reduction and FastV, Pyramid and uniform choice at equal FLOPs.

    * `vtr search gsearch --out schedule` — the pocket model, offline, a minute or two

    * `vtr search gsearch --model llava-hf/llava-1.5-7b-hf --data textvqa.jsonl --images pics --tolerance 0.02`

    * `vtr search gsearch --objective accuracy --tolerance 0 --calibration 256 --method bayes`
    """
    from vtr.search import gsearch

    def find(loaded: Any, processor: Any, examples: list[Example]) -> Found:
        how = {"tolerance": tolerance, "method": method, "trials": trials}
        return gsearch(loaded, processor, examples, **how, **given.settings())  # type: ignore[arg-type]

    _run(find, given)


@search.command("psigmoid")
@shared(Search)
def psigmoid_command(
    given: Search,
    budget: Annotated[float, typer.Option(help="what may be spent, as a ratio to no reduction")] = 0.3,
    measure: Annotated[str, typer.Option(help="of: keep (mean share of tokens), flops, kv")] = "flops",
    trials: Annotated[int, typer.Option(min=1, help="schedules to try")] = 16,
    curve: Annotated[Path | None, typer.Option(help="a schedule whose fitted sigmoid is tried first")] = None,
) -> None:
    """Find the best sigmoid schedule for a budget: P-Sigmoid.

    Steepness and middle of a sigmoid over layers by Bayesian optimisation; its height is what makes it cost the budget.
    Ctrl-C is safe: the same command goes on where it was, and with more `--trials` after it is over. Writes what
    `vtr search gsearch` writes.

    * `vtr search psigmoid --budget 0.2 --measure flops --out schedule20`

    * `vtr search psigmoid --budget 0.25 --measure keep --curve schedule` — begins with the fit of a G-Search curve
    """
    from vtr import Schedule
    from vtr.commands._console import fail
    from vtr.search import psigmoid

    try:
        first = None if curve is None else list(Schedule.named(curve))
    except (ValueError, TypeError, OSError) as error:
        raise fail(error) from error

    def find(loaded: Any, processor: Any, examples: list[Example]) -> Found:
        how = {"budget": budget, "measure": measure, "trials": trials, "curve": first}
        return psigmoid(loaded, processor, examples, **how, **given.settings())  # type: ignore[arg-type]

    _run(find, given)


@search.command("vtw")
@shared(Asked)
def vtw_command(
    given: Asked,
    threshold: Annotated[
        float, typer.Option(help="of the KL divergence from the unreduced model, nats a token")
    ] = 0.01,
    first: Annotated[int, typer.Option(min=0, help="no layer before this one, from 0")] = 1,
    positions: Annotated[str, typer.Option(help="of the text behind: keep, reindex")] = "keep",
    batch_size: Annotated[int, typer.Option(min=1, help="questions a call")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer; 1: the first token alone")] = 16,
) -> None:
    """Find the first layer that no vision token needs to enter: VTW.

    Writes vtr_policy.json (`vtr.VTW.from_pretrained(out)`) and search.json, with the divergence of every layer.

    * `vtr search vtw --out vtw` — the pocket model, offline

    * `vtr search vtw --model llava-hf/llava-1.5-7b-hf --data textvqa.jsonl --images pics --threshold 0.003`
    """
    from vtr.search import vtw

    def find(model: Any, processor: Any, examples: list[Example]) -> Withdrawal:
        how = {"threshold": threshold, "first": first, "positions": positions}
        return vtw(model, processor, examples, batch_size=batch_size, max_new_tokens=max_new_tokens, **how)  # type: ignore[arg-type]

    _find(find, given)


@search.command("fitprune")
@shared(Asked)
def fitprune_command(
    given: Asked,
    reduction: Annotated[float, typer.Option(help="share of the decoder's prefill FLOPs to save")] = 0.6,
) -> None:
    """Find how many vision tokens may go after each layer, for a budget: FitPrune's recipe.

    Looks at the unreduced model's attention alone, once for each question. Writes vtr_policy.json
    (`vtr.FitPrune.from_pretrained(out)`) and search.json.

    * `vtr search fitprune --reduction 0.4 --out fitprune40` — the pocket model, offline
    """
    from vtr.search import fitprune

    def find(model: Any, processor: Any, examples: list[Example]) -> Recipe:
        return fitprune(model, processor, examples, reduction=reduction)

    _find(find, given)


def _find(find: Callable[..., Withdrawal | Recipe], given: Asked) -> None:
    """Load, search, save, show."""
    from vtr.commands._console import check_folder, console, fail
    from vtr.models import check_name, find_device, load

    try:
        check_folder(given.out)
        check_name(given.model)
        find_device(given.device)
        sides = _sides((given.source, given.images, given.columns), (given.calibration, 0), given.seed)
        model, processor = load(given.model, given.device, given.dtype)
        found = find(model, processor, list(sides.calibration))
        found.save_pretrained(given.out)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    console.print(f"found: {found.policy().spec}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to [bold]{given.out}[/]", highlight=False)


def _run(find: Callable[..., Found], given: Search) -> None:
    """Load, split, search, save, measure, show."""
    from vtr.commands._console import check_folder, console, fail
    from vtr.models import check_name, find_device, load
    from vtr.search.metrics import objective_of
    from vtr.search.prefix import Spent

    out = given.out
    try:
        check_folder(out)
        check_name(given.model)
        find_device(given.device)
        objective_of(given.objective)
        sides = _sides((given.source, given.images, given.columns), (given.calibration, given.evaluation), given.seed)
        model, processor = load(given.model, given.device, given.dtype)
        found = find(model, processor, list(sides.calibration))
        found.save_pretrained(out)
        _draw_ranks(found, out)
        console.print(Spent(**found.record["spent"]).table(), highlight=False)
        console.print(f"schedule: {list(found)}", highlight=False)
        if given.evaluation:
            console.print(_report(model, processor, found, sides, given), highlight=False, markup=False, soft_wrap=True)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    console.print(f"written to [bold]{out}[/]; use it: vtr.GSearch.from_pretrained({str(out)!r})", highlight=False)


def _sides(source: tuple[str, Path | None, str], sizes: tuple[int, int], seed: int) -> Split:
    """Calibration and evaluation examples of the data, with no picture on both sides.

    Raises:
        ValueError: records that cannot be used, or too few.
    """
    from vtr.data.sources import open_data, settings_of, usable
    from vtr.search import Split, split
    from vtr.search.data import as_examples

    data, images, columns = source
    limit = sum(sizes) if sizes[1] else sizes[0] + 8  # some more for another side, since a split has two
    found = open_data(
        data, limit=limit, seed=seed, columns=settings_of(columns), images=images, answers_needed=bool(sizes[1])
    )
    sides = split(as_examples(usable(found, data)), sizes[0], seed)
    return Split(sides.calibration, sides.evaluation[: sizes[1] or None])


def _draw_ranks(found: Found, out: Path) -> None:
    """How much layers agree, as a picture."""
    import numpy as np

    from vtr.search import Ranks

    if (told := found.record["ranks"]) is not None:
        ranks = Ranks(np.array(told["tau"]), np.array(told["within"]), told["questions"], told["queries"])
        ranks.plot().savefig(out / "ranks.png", dpi=110)


def _report(model: Any, processor: Any, found: Found, sides: Split, given: Search) -> str:
    from vtr.eval.studies import equal_flops, schedule_report
    from vtr.search import Cost
    from vtr.search.data import refuse_overlap

    refuse_overlap(found.record["pictures"], sides.evaluation)
    cost = Cost.from_model(model, found.record["sizes"])
    others = equal_flops.baselines(found.record["ratios"]["flops"], cost)
    policies = {"none": None, found.record["method"]: found.policy(), **others}
    tokens = found.record["max_new_tokens"]
    lines = schedule_report.measure(model, processor, policies, sides.evaluation, given.latency, tokens)
    return schedule_report.write(given.out, found, found.record, lines, sides.evaluation)
