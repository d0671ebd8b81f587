"""``vtr run``: one picture, one question, one or several policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import vtr
from vtr.accounting import Report
from vtr.chat import encode, encode_videos
from vtr.commands._console import check_file, console, fail
from vtr.data.pictures import upright
from vtr.data.videos import FRAMES, read_video
from vtr.limits import folded
from vtr.models import load
from vtr.picture import is_right, vision_tokens
from vtr.settings import policy_class
from vtr.shares import ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from vtr.data.videos import Video
    from vtr.visualize import Shot

VIDEO_MODEL = "pocket-video"
"""What answers questions about videos unless a model is named."""


def run_command(
    image: Annotated[str | None, typer.Argument(help="a picture file; leave out with --sample or --video")] = None,
    question: Annotated[str | None, typer.Argument(help="what to ask about it")] = None,
    policy: Annotated[str, typer.Option(help="how to reduce, e.g. `fastv:keep=0.25,layer=2` or `none`")] = "none",
    budget: Annotated[
        str | None,
        typer.Option(help="set the policy to a mean of so many vision tokens a layer (192), or a share (0.25)"),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="also run: no reduction, random, uniform grid")] = False,
    show: Annotated[
        Path | None,
        typer.Option(help="write the picture with the kept tokens here (PNG, PDF, …; .gif: layer by layer)"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="the pocket model"),
    ] = None,
    sample: Annotated[int | None, typer.Option(help="use shipped sample picture 0, 1 or 2")] = None,
    video: Annotated[
        Path | None, typer.Option(help="a film, an animated GIF or a folder of frames, instead of a picture")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="with --video: so many of its frames, evenly spread")] = FRAMES,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of the answer")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs; the median is shown")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
) -> None:
    """Ask a question about a picture or a video, with fewer vision tokens.

    Prints the answer, the vision tokens entering each decoder layer, prefill and decode time, FLOPs and KV bytes. A
    policy before the tower (`vtr list`) acts on the picture; join it with one in the model by +.

    * `vtr run --sample 0 --policy fastv:keep=0.1 --compare --show kept.png`

    * `vtr run --sample 1 --policy gsearch --show kept.png` — a bare name; on the pocket model with what ships for it

    * `vtr run --sample 0 --policy fastv --budget 192` — of this prompt's vision tokens, in the mean over layers

    * `vtr run --video film.gif "what shape moved" --policy evs:0.5 --show frames.png`

    * `vtr run cat.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf --policy fastv:keep=0.25`

    * `vtr run cat.jpg "What is this?" --model llava-hf/llava-v1.6-vicuna-7b-hf --policy fewer_crops+globalcom2:0.25`
    """
    try:
        check_show(show)
        mean = mean_of(budget, policy)
        if mean is None and model in (None, vtr.pocket.SHIPPED_NAMES[0]):
            policy = in_full(policy)
        before, _ = vtr.split(None if policy == "none" else policy)  # refused before a model is loaded
        if before is not None and video is not None:
            raise ValueError(
                f"{before.spec} acts on pictures, and a video is left as it is: name a policy of the model"
            )
        if video is not None:
            asked = prepare_video(video, " ".join(filter(None, (image, question))), sample, frames, model, device)
        else:
            asked = prepare(None if image is None else Path(image), question, sample, model, device)
        chosen_spec = policy if mean is None else at_budget(asked, policy, mean)
        rows = run_all(asked, chosen_spec, compare, max_new_tokens, repeats)
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise fail(error) from error
    console.print(f"[bold]{asked.question}[/]" + (f"   (expected: {asked.answer})" if asked.answer else ""))
    console.print(_table(rows))
    chosen = next(row for row in rows if row.spec == chosen_spec)
    (row,) = chosen.report.rows
    per_layer = " ".join(map(str, row.vision_tokens))
    console.print(f"vision tokens into each decoder layer with [bold]{chosen.spec}[/]: {per_layer}", highlight=False)
    if chosen.report.path == "padded":
        console.print("this model takes policies before the decoder only: `vtr list --model` says why", highlight=False)
    for word, counts in (("ask", row.asked), ("are seen", row.seen)):
        if counts != row.vision_tokens:
            console.print(f"of them {word} in its attention: {' '.join(map(str, counts))}", highlight=False)
    if chosen.report.selector_ms:
        console.print(f"choosing them took {chosen.report.selector_ms:.1f} ms of the prefill", highlight=False)
    if show is not None:
        try:
            save_picture(asked, chosen, show)
        except (ValueError, OSError) as error:
            raise fail(error) from error
        console.print(f"kept tokens drawn to [bold]{show}[/]")


NARROW = 18
"""Letters of a policy's name in a line, on a terminal of less than 100 columns."""
SIGNS = {True: " [bold green]✓[/]", False: " [bold red]✗[/]", None: ""}


def _table(rows: list[Any]) -> Table:
    from rich import box
    from rich.markup import escape

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    wide = console.width >= 100
    specs = [row.spec if wide else folded(row.spec, NARROW) for row in rows]
    table.add_column("policy", overflow="fold", min_width=min(NARROW, max(map(_longest_line, specs))))
    table.add_column("answer", overflow="fold", min_width=6)
    names = ["kept", "prefill\nms", "speed-\nup", *["1st token\nms"] * wide, "decode\nms/token", "GFLOPs", "KV\nKiB"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    base = rows[0]
    for row, spec in zip(rows, specs, strict=True):
        r, t = row.report, row.timing
        table.add_row(
            escape(spec),
            escape(row.answer) + SIGNS[row.right],
            f"{row.share:.0%}",
            f"{t.prefill_ms:.1f}",
            f"{base.timing.prefill_ms / t.prefill_ms:.2f}×",
            *[f"{t.first_token_ms:.1f}"] * wide,
            "–" if t.decode_ms is None else f"{t.decode_ms:.1f}",
            f"{r.flops / 1e9:.3g}",
            f"{r.kv_bytes / 1024:.0f}",
        )
    return table


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def check_show(path: Path | None) -> None:
    """Raise unless a picture can be written there: asked before anything is loaded or run.

    Raises:
        ValueError: no file can be written there, or not in the format that its name says.
    """
    if path is None:
        return
    check_file(path, "--show")
    import io

    from matplotlib.figure import Figure

    kinds = sorted({*Figure().canvas.get_supported_filetypes(), "gif"} - {"pgf", "raw", "rgba"})
    kind = path.suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise ValueError(f"--show {path}: a picture's name ends in one of .{', .'.join(kinds)}")
    try:
        Figure(figsize=(1, 1)).savefig(io.BytesIO(), format=kind)  # some formats need more than matplotlib
    except Exception as error:
        raise ValueError(f"--show {path}: .{kind} cannot be written here ({error}); .png can") from error


@dataclass
class Asked:
    """A patched model, its processor and one question about one picture (or the first frame of a video), tokenized."""

    model: Any
    processor: Any
    picture: Image.Image
    question: str
    answer: str | None
    inputs: Any
    video: Video | None = None


@dataclass
class Outcome:
    """One policy's run.

    Attributes:
        inputs: what the model got. share: mean over layers of the vision tokens that entered, of all that the prompt
            has without a policy.
    """

    spec: str
    answer: str
    report: Report
    timing: Any
    inputs: Any
    share: float
    right: bool | None = None
    """Whether the answer is the right one; None where nobody knows."""


def in_full(policy: str) -> str:
    """A policy's bare name as its example on the pocket model, where it says nothing by itself: G-Search needs a
    schedule, trained policies their weights. All else as it is."""
    if policy not in vtr.list_policies():
        return policy
    example = policy_class(policy).example()
    try:
        return policy if vtr.policy(policy).spec == example else example
    except (TypeError, ValueError):  # a setting without a default
        return example


def prepare(image: Path | None, question: str | None, sample: int | None, name: str | None, device: str) -> Asked:
    """Load the model and tokenize the question.

    Raises:
        ValueError: neither a picture with a question nor a sample; not a picture.
    """
    if (image is None) == (sample is None):
        raise ValueError('give a picture and a question (vtr run cat.png "what …"), or --sample 0')
    answer = None
    if sample is not None:
        picture, asked, answer = vtr.pocket.sample(sample, name)
        question, answer = (asked, answer) if question is None else (question, None)
    else:
        picture = upright(image)  # type: ignore[arg-type]
    if not question:
        raise ValueError(f'ask something: vtr run {image} "what color is the star"')
    model, processor = load(name, device)
    return Asked(model, processor, picture, question, answer, tokenize(processor, picture, question, model.device))


def prepare_video(path: Path, question: str, sample: int | None, frames: int, name: str | None, device: str) -> Asked:
    """Load the model, read the video's frames and tokenize the question.

    Raises:
        ValueError: no question, a sample picture beside it, or no video.
    """
    if sample is not None:
        raise ValueError("--video and --sample name two things to look at: choose one")
    if not question:
        raise ValueError(f'ask something: vtr run --video {path} "what moved"')
    video = read_video(path, frames)
    model, processor = load(name or VIDEO_MODEL, device)
    inputs = encode_videos(processor, [question], [video]).to(model.device)
    return Asked(model, processor, video.frames[0], question, None, inputs, video)


def tokenize(processor: Any, picture: Image.Image, question: str, device: Any, before: Any = None) -> Any:
    """One picture and one question, as :func:`vtr.chat.encode` puts them, on the device.

    before: what acts on the picture, or None.
    """
    return encode(processor, [question], [picture], before).to(device)


def same_budget(report: Report, total: int | None = None) -> list[str]:
    """The baselines that let as many vision tokens into the same layers as the reported policy did, in the mean.

    They cut once, where the policy first cuts. total: the prompt's vision tokens without a policy, where that has
    acted on the picture.
    """
    row = report.rows[0]
    total = row.total if total is None else total
    first = next((n for n, count in enumerate(row.vision_tokens) if count < total), None)
    if first is None:
        return []
    after = row.vision_tokens[first:]
    if report.path == "padded":  # nothing is cut in that decoder
        share = ratio(sum(after) / len(after) / total)
        return [f"{name}:keep={share},before_decoder=true" for name in ("random", "uniform")]
    keep = round(sum(after) / len(after))
    return [f"random:keep={keep},layer={first}", f"uniform:keep={keep},layer={first}"]


def mean_of(budget: str | None, policy: str) -> int | float | None:
    """``--budget`` as a number: a count of tokens ("192") or a share of them ("0.25"); None where there is none.

    Raises:
        ValueError: neither, or no policy that could be set to it.
    """
    if budget is None:
        return None
    if policy == "none":
        raise ValueError("--budget sets a policy: name one as well, e.g. --policy fastv")
    try:
        mean: int | float = float(budget) if set(budget) & set(".e") else int(budget)
    except ValueError as error:
        raise ValueError(f"--budget {budget}: give a count of tokens (192) or a share (0.25)") from error
    if mean < 1 if isinstance(mean, int) else not 0 < mean <= 1:
        raise ValueError(f"--budget {budget}: give a count of tokens, at least 1, or a share above 0 and at most 1.0")
    return mean


def at_budget(asked: Asked, policy: str, mean: int | float) -> str:
    """The spec of a policy set to a mean of vision tokens of this prompt: a count, or a share of them.

    Raises:
        ValueError: more tokens than the prompt has, or what :func:`vtr.at_budget` refuses.
    """
    total = total_of(asked)
    if isinstance(mean, int) and mean > total > 0:
        raise ValueError(f"--budget {mean}: this prompt has {total} vision tokens: give fewer, or a share (0.25)")
    return vtr.at_budget(policy, asked.model, mean, total=total or None).spec


def total_of(asked: Asked) -> int:
    """How many vision tokens the prompt has without a policy."""
    return vision_tokens(asked.model, asked.inputs)


def answer_with(asked: Asked, policy: str, max_new_tokens: int, repeats: int) -> Outcome:
    """Run one policy: answer, report, timing."""
    from vtr.eval.cost.timing import time_call

    before, chosen = vtr.split(None if policy == "none" else policy)
    model, inputs = asked.model, asked.inputs
    if before is not None:
        inputs = tokenize(asked.processor, asked.picture, asked.question, model.device, before)
    out = model.generate(**inputs, policy=chosen, max_new_tokens=max_new_tokens, do_sample=False)
    report = vtr.report(model)
    text = asked.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    chooses = chosen is not None and (chosen.asks("resolve") or chosen.asks("accept"))
    timed: Any = report.rows[0].policy if chooses else chosen  # a forward by itself does not choose
    timing = time_call(model, inputs, timed, repeats=repeats, new_tokens=8)
    entering, total = report.rows[0].vision_tokens, total_of(asked)
    share = sum(entering) / len(entering) / total if total else 1.0
    return Outcome(policy, text.strip(), report, timing, inputs, share, is_right(text, asked.answer))


def run_all(asked: Asked, policy: str, with_baselines: bool, max_new_tokens: int, repeats: int) -> list[Outcome]:
    """No reduction first, then the policy, then (if asked for) the baselines at its budget."""
    from tqdm import tqdm

    specs = ["none"] if policy == "none" else ["none", policy] if with_baselines else [policy]
    for spec in specs:
        if spec != "none":
            vtr.policy(spec).check(len(asked.model.get_decoder().layers))
    rows: list[Outcome] = []
    with tqdm(total=len(specs) + 2 * (with_baselines and policy != "none"), desc="policies", leave=False) as bar:
        while specs:
            spec = specs.pop(0)
            bar.set_description(spec[:40])
            rows.append(answer_with(asked, spec, max_new_tokens, repeats))
            if spec == policy and with_baselines and spec != "none":
                specs = same_budget(rows[-1].report, total_of(asked))
            bar.update()
    return rows


def draw(asked: Asked, outcome: Outcome) -> Figure:
    """The kept tokens of ``outcome`` on the picture, with the question and whether the answer is right."""
    from vtr import visualize

    if asked.video is not None:
        return visualize.film(_film(asked, outcome), asked.video.times)
    return visualize.kept(_shot(asked, outcome))


def save_picture(asked: Asked, outcome: Outcome, path: Path) -> None:
    """Write what :func:`draw` draws; a ``.gif`` shows it layer by layer."""
    if path.suffix.lower() != ".gif" or asked.video is not None:
        draw(asked, outcome).savefig(path, dpi=150)
        return
    from vtr import visualize

    visualize.animate(_shot(asked, outcome), path)


def _film(asked: Asked, outcome: Outcome) -> list[Shot]:
    """A shot of each frame."""
    from vtr.picture import frame_spans
    from vtr.visualize import Shot

    assert asked.video is not None
    about = outcome.report.rows[0], outcome.answer, outcome.report.flops, asked.question, asked.answer
    spans = frame_spans(asked.model, asked.inputs)
    return [
        Shot(picture, layout, slot, *about) for picture, (slot, layout) in zip(asked.video.frames, spans, strict=True)
    ]


def _shot(asked: Asked, outcome: Outcome) -> Shot:
    from vtr.picture import image_spans
    from vtr.visualize import Shot

    _, first_slot, layout = image_spans(asked.model, outcome.inputs)[0]
    return Shot(
        asked.picture, layout, first_slot, outcome.report.rows[0], outcome.answer, outcome.report.flops,
        asked.question, asked.answer,
    )  # fmt: skip
