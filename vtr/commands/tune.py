"""``vtr tune``: set a policy on questions with answers, such that something is promised of it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtr.commands._options import shared

if TYPE_CHECKING:
    from vtr.base import Policy
    from vtr.data.records import Sample

tune = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
POCKET = "pocket:split=val,per_scene=1"
TIMED = 6
"""Prompts that choices are timed on."""


@tune.callback()
def tune_main() -> None:
    """Set a policy on questions with answers, with a promise about what it may lose.

    * `vtr tune auto --loss 0.01 --confidence 0.95 --limit 400 --out auto`
    """


@dataclass(frozen=True)
class Asked:
    """What is asked, of which model."""

    out: Annotated[Path, typer.Option(help="the folder for the policy")] = Path("auto")
    model: Annotated[
        str | None, typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="pocket")
    ] = None
    data: Annotated[
        str, typer.Option(help="`pocket:split=val,per_scene=1`, a JSON file, a folder, `hf:NAME,split=…`")
    ] = POCKET
    images: Annotated[Path | None, typer.Option(help="the folder of a JSONL's pictures", show_default="its own")] = None
    columns: Annotated[str, typer.Option(help="the data's names of things: `question=query,answers=label`")] = ""
    limit: Annotated[int | None, typer.Option(min=1, help="so many questions at most")] = None
    metric: Annotated[str, typer.Option(help="exact, vqa, relaxed, anls, choice, mmstar; auto: choice or exact")] = (
        "auto"
    )
    batch_size: Annotated[int, typer.Option(min=1, help="questions a call")] = 8
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 16
    seed: Annotated[int, typer.Option(help="of the data's draw, and of which pictures test the promise")] = 0
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto"
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16", show_default="float32 on the CPU")] = (
        None
    )


BINARY = ("exact", "choice", "mmstar", "relaxed", "auto")
"""Metrics whose score is 0 or 1."""


@tune.command("auto")
@shared(Asked)
def auto_command(
    given: Asked,
    loss: Annotated[float, typer.Option(help="what accuracy may fall by at most, 0.01 is one point")] = 0.01,
    confidence: Annotated[float, typer.Option(help="of the promise")] = 0.95,
    choices: Annotated[
        str, typer.Option(help="specs joined by `;`", show_default="m3 at every scale of the grid; none")
    ] = "",
    signal: Annotated[
        str,
        typer.Option(help="confidence, attention (on what is dropped), probe (of the hidden state); auto: the best"),
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="of the answer that are heard before it is judged")] = 1,
    cost: Annotated[str, typer.Option(help="what is to be saved: time, flops")] = "time",
    answers: Annotated[
        Path | None, typer.Option(help="keep what every choice said in this .npz, or tune on it again")
    ] = None,
) -> None:
    """Tune `auto`: each request at the cheapest of several policies whose answer will do, with a promise.

    Every question is asked once under every choice. One part of the questions fits the estimate that a choice suffices;
    the other, about other pictures, tests which thresholds keep the promise: on questions like these, accuracy falls by
    at most `--loss` against the last choice, with confidence `--confidence` (Learn then Test). With too few questions
    it says how many more are needed, and tunes nothing.

    Writes vtr_policy.json (and the probe's weights): `--policy auto:weights=FOLDER`. Another model is refused.

    * `vtr tune auto --loss 0.01 --confidence 0.95 --limit 400 --out auto`, then
      `vtr eval -p "none;auto:weights=auto" --limit 480`

    * `vtr tune auto --choices "visionzip:64;visionzip:128;none" --data mine.jsonl --model llava-hf/llava-1.5-7b-hf`
    """
    from vtr.commands._console import check_folder, console, fail

    try:
        check_folder(given.out)
        made, told = _tuned(given, loss, confidence, choices, signal, tokens, cost, answers)
        made.save_pretrained(given.out)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to [bold]{given.out}[/]: --policy auto:weights={given.out}", highlight=False)


def _tuned(
    given: Asked, loss: float, confidence: float, choices: str, signal: str, tokens: int, cost: str,
    answers: Path | None,
) -> tuple[Any, list[str]]:  # fmt: skip
    """The policy, and what to say of it."""
    from vtr import AutoPolicy, patch
    from vtr.data.sources import open_data, settings_of, usable
    from vtr.engine.install import patch_of
    from vtr.eval.accuracy.metrics import metric
    from vtr.models import check_name, find_device, load
    from vtr.pocket import data_of
    from vtr.training import auto
    from vtr.training.asked import Asked as Answers
    from vtr.training.asked import ask

    if signal not in ("auto", "confidence", "attention", "probe"):
        raise ValueError(f"signal={signal!r}: choose auto, confidence, attention or probe")
    if cost not in ("time", "flops"):
        raise ValueError(f"cost={cost!r}: choose time or flops")
    check_name(given.model)
    find_device(given.device)
    scored = metric(given.metric)
    data = data_of(given.model, given.data)
    source = open_data(
        data, limit=given.limit, seed=given.seed, columns=settings_of(given.columns), images=given.images
    )
    samples = usable(source, source.name)
    auto.check_enough(len({one.group for one in samples}), loss, confidence)
    model, processor = load(given.model, given.device, given.dtype)
    patch(model)
    named = _choices(choices, model, processor, samples[0])
    if signal == "attention":
        AutoPolicy([one for _, one in named], signal=signal).check(patch_of(model).decoder.depth)
    costs = auto.measure(
        model, processor, samples[:TIMED], named, unit=cost, tokens=tokens, max_new_tokens=given.max_new_tokens
    )
    order = [*sorted(range(len(named) - 1), key=costs.taken.__getitem__), len(named) - 1]
    named, costs = [named[i] for i in order], costs.of(order)
    about = {"data": data, "digest": auto.digest(samples), "metric": scored.name, "model": auto.sample_of(model)}
    if answers is not None and answers.is_file():
        found = _same(Answers.load(answers), named, samples, answers)
    else:
        found = ask(
            model, processor, samples, named, lambda reply, one: scored.score(reply, one.answers, one.choices),
            max_new_tokens=given.max_new_tokens, batch_size=given.batch_size, total=len(samples),
        )  # fmt: skip
        if answers is not None:
            found.save(answers)
    made = auto.tune(
        found, costs, loss=loss, confidence=confidence, tokens=tokens, seed=given.seed,
        signal=None if signal == "auto" else signal, binary=scored.name in BINARY, about=about,
    )  # fmt: skip
    return made, _told(made, found, costs)


def _choices(text: str, model: Any, processor: Any, sample: Sample) -> list[tuple[str, Policy | None]]:
    """The choices by name, the last of which is what the others are held against."""
    import vtr
    from vtr.training.auto import default_choices

    names = [one.strip() for one in text.split(";") if one.strip()] or default_choices(model, processor, sample)
    if len(names) < 2:
        raise ValueError(f"choices={text!r}: name two or more, joined by `;`, the one to compare with last")
    made = [None if name.lower() == "none" else vtr.policy(name) for name in names]
    return [("none" if one is None else one.spec, one) for one in made]


def _same(found: Any, named: list[tuple[str, Any]], samples: list[Sample], path: Path) -> Any:
    """Answers from a file, in the order of the choices; ValueError unless they are about these and these questions."""
    names = [name for name, _ in named]
    other = sorted(found.choices) != sorted(names) or found.choices[-1] != names[-1]
    if other or found.group.tolist() != [one.group for one in samples]:
        raise ValueError(f"{path} holds answers to other questions, or under other choices: name another file")
    return found.of([found.choices.index(name) for name in names])


def _told(made: Any, found: Any, costs: Any) -> list[str]:
    from vtr.training.auto import words

    lines = [f"{'choice':<24} {'score':>7} {'tokens':>7} {'cost of an answer':>18}"]
    for name, score, tokens, cost in zip(
        found.choices, found.score.mean(0), found.tokens.mean(0), costs.taken, strict=True
    ):
        lines.append(f"{name:<24} {score:>7.1%} {tokens:>7.0f} {cost / costs.taken[-1]:>18.0%}")
    thresholds = ", ".join(f"{one:.4f}" for one in made.thresholds)
    losses = ", ".join(f"{name} {one:.4f}" for name, one in sorted(made.promise["signals"].items(), key=itemgetter(1)))
    return [
        *lines,
        f"taken: {', '.join(made.names)}; thresholds {thresholds} of its {made.signal}",
        f"log loss of each signal on questions it has not seen: {losses}",
        f"promised: {words(made.promise)}",
    ]
