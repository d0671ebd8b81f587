"""``vtr eval``: how good the answers stay, and what they cost, policy by policy on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

WIDE, WIDE_ONLY = 120, ("interval", "gain", "gray gain", "p", "KV MiB", "selector ms")
"""What is left out of the printed table on a narrower terminal; the files have everything."""


def eval_command(
    context: typer.Context,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policies", "-p", help="`all`, or specs joined by `;`; may be given again", show_default="all"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many samples at most (pocket: 1280, video: 480)")] = None,
    data: Annotated[str, typer.Option(help="`pocket`, a JSON file, a folder, or `hf:NAME,split=test`")] = "pocket",
    task: Annotated[
        str | None,
        typer.Option(
            help="a pocket task, and the model that has learnt it: `questions`, `listing`, `video`, `canvases`",
            show_default="questions",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="of --task video: frames in a film", show_default="8")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="the folder of a JSONL's pictures", show_default="its own")
    ] = None,
    columns: Annotated[str, typer.Option(help="the data's names of things: `question=query,answers=label`")] = "",
    metric: Annotated[
        str, typer.Option(help="exact, vqa, relaxed, anls, choice, mmstar, listing; auto: choice or exact")
    ] = "auto",
    instruction: Annotated[str, typer.Option(help="how the question is put")] = "{question}",
    shots: Annotated[
        str | None,
        typer.Option(help="demonstrations in front of the question, like `0,4,8`: labels that they alone tell"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="folder, hub name, `pocket-joint`, `pocket-internvl`, `pocket-video`",
            show_default="pocket; the task's; of --shots pocket-shots",
        ),
    ] = None,
    base_lm: Annotated[
        str | None, typer.Option(help="the language model before it saw pictures, for MMStar's leakage")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for results.json, samples.jsonl, table.md, table.csv")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with what --out holds; --limit may be larger")
    ] = False,
    indispensable: Annotated[
        bool, typer.Option("--indispensable", help="show only samples that no run without the picture gets right")
    ] = False,
    budget: Annotated[
        float, typer.Option(help="of `all`: the mean share of vision tokens that enters a layer; 192: tokens of a tile")
    ] = 0.25,
    batch_size: Annotated[int, typer.Option(min=1, help="samples per call")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer", show_default="the model's own, or 32")
    ] = None,
    latency: Annotated[int, typer.Option(min=0, help="also time the prefill of so many prompts, in turns")] = 0,
    seed: Annotated[int, typer.Option(help="which pocket questions; also of the bootstrap")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="on this machine", show_default="pocket: one per core; else 1")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16", show_default="float32 on the CPU, else the model's")
    ] = None,
) -> None:
    """Evaluate policies side by side: accuracy, what needs the picture, tokens, FLOPs, KV bytes.

    Every sample is answered without reduction, by every policy (pictures are encoded once for all of them), without any
    picture (MMStar's S_wv) and with a gray one, so that nobody looks good on questions that need no picture. Samples
    that cannot be read are counted and named, with file and line. The table's intervals are 95 % bootstrap over
    pictures, p is McNemar's; gain is MMStar's, S_v − S_wv in points, gray gain the same over the gray picture.

    * `vtr eval --policies all --limit 2000 --out results/pocket` — one of each registered policy at one budget, and the
      baselines none, random, uniform, pool, downsample

    * `vtr eval -p "fastv:keep=0.25,layer=2;random:keep=0.25,layer=2" --limit 320 --latency 4`

    * `vtr eval --policies "none;evs:0.5;vidcom2:0.25;frames:0.5" --task video` — films whose questions need time;
      `frames:0.5` gives the processor every other frame

    * `vtr eval --out results/pocket --limit 2000 --resume` — after a crash: the same options and --resume

    * `vtr eval --data chart.jsonl --metric relaxed --model llava-hf/llava-1.5-7b-hf --base-lm lmsys/vicuna-7b-v1.5`
      with lines like `{"image": "a.png", "question": "…", "answer": "…", "choices": ["…", "…"]}` (choices if any); one
      array of such objects and LLaVA's `conversations` are read too

    * `vtr eval --data hf:lmms-lab/ChartQA,split=test --metric relaxed --model llava-hf/llava-v1.6-mistral-7b-hf`

    * `vtr eval --shots 0,1,2,4,8,16 --out results/shots` — demonstrations in front of each question, whose labels are
      permuted from prompt to prompt: unreduced, all coarse, demonstrations coarse, and `fewer` demonstrations

    * `torchrun --nproc-per-node 4 -m vtr.cli eval …` — every process its share, one table (accelerate launch too)

    * `vtr eval published --list` — tables of papers, run again by lmms-eval on the checkpoints they are about
    """
    import tempfile

    from vtr.commands._console import check_folder, console, fail

    try:
        if context.invoked_subcommand is not None:
            refuse_options(context)
            return
        check_folder(out)
        if resume and out is None:
            raise ValueError("--resume goes on with what --out holds: name that folder as well, --out FOLDER")
        if shots is not None:
            others = {
                "--data": data != "pocket", "--images": images is not None, "--columns": bool(columns),
                "--metric": metric not in ("auto", "exact"), "--instruction": instruction != "{question}",
                "--base-lm": base_lm is not None, "--indispensable": indispensable, "--latency": bool(latency),
                "--max-new-tokens": max_new_tokens is not None, "--task": task is not None,
                "--frames": frames is not None,
            }  # fmt: skip
            _many_shots(
                shots, [name for name, given in others.items() if given], out, resume, processes,
                policies=tuple(policies or ["all"]), limit=limit, model=model, seed=seed, batch_size=batch_size,
                device=device, dtype=dtype,
            )  # fmt: skip
            return
        from vtr.eval.accuracy.data import settings_of
        from vtr.eval.accuracy.run import Settings, evaluate

        data, model, metric = of_task(task, frames, data, model, metric)
        chosen = Settings(
            policies=tuple(policies or ["all"]), budget=budget, model=model, base_lm=base_lm, data=data,
            images=None if images is None else str(images), columns=settings_of(columns), limit=limit, seed=seed,
            metric=metric, instruction=instruction, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device,
            dtype=dtype,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            body = evaluate(
                chosen,
                out or Path(scratch),
                resume=resume,
                indispensable=indispensable,
                processes=processes,
                latency=latency,
            )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    if body is not None:
        show(body)
        if out is not None:
            console.print(
                f"written to [bold]{out}[/]: results.json, samples.jsonl, table.md, table.csv", highlight=False
            )


def refuse_options(context: typer.Context) -> None:
    """Raise unless a command behind ``vtr eval`` is given no options of ``vtr eval`` itself.

    Raises:
        ValueError: some stand in front of the command's name.
    """
    given = [
        "--" + name.replace("_", "-")
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)} in front of {context.invoked_subcommand} would be vtr eval's own: put the options of "
            f"vtr eval {context.invoked_subcommand} behind it"
        )


def _many_shots(
    shots: str, others: list[str], out: Path | None, resume: bool, processes: int | None, **settings: Any
) -> None:
    """``--shots``: other data, other options.

    Raises:
        ValueError: options that say nothing here, or settings that cannot work.
    """
    import tempfile

    from vtr.commands._console import console
    from vtr.eval.shots.run import Settings, evaluate, shots_of

    if others:
        raise ValueError(
            f"--shots draws pocket scenes with labels of its own, and counts exact answers: omit {', '.join(others)}"
        )
    chosen = Settings(shots=shots_of(shots), **{key: value for key, value in settings.items() if value is not None})
    with tempfile.TemporaryDirectory() as scratch:
        body = evaluate(chosen, out or Path(scratch), resume=resume, processes=processes)
    if body is not None:
        show_shots(body)
        if out is not None:
            files = "results.json, samples.jsonl, table.md, table.csv, shots.png"
            console.print(f"written to [bold]{out}[/]: {files}", highlight=False)


def show_shots(body: dict[str, Any]) -> None:
    """Print the table of many shots and what it was measured on."""
    from rich import box
    from rich.table import Table

    from vtr.commands._console import console
    from vtr.eval.shots.summary import COLUMNS, caption, cells

    left_out = ("interval", "p", "KV MiB") if console.width < WIDE else ()
    kept = [i for i, name in enumerate(COLUMNS) if name not in left_out]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for i in kept:
        policy = COLUMNS[i] == "policy"
        table.add_column(COLUMNS[i], justify="left" if policy else "right", no_wrap=not policy, overflow="fold")
    for line in cells(body):
        table.add_row(*[line[i].split(" [")[0] if left_out else line[i] for i in kept])
    console.print(table)
    console.print(caption(body), highlight=False, markup=False)


TASKS = {
    "questions": ("pocket", "auto"), "listing": ("pocket-joint", "listing"), "video": ("pocket-video", "auto"),
    "canvases": ("pocket-pretrained", "auto"),
}  # fmt: skip
"""The pocket tasks: the model that has learnt one, and what counts."""


def of_task(
    task: str | None, frames: int | None, data: str, model: str | None, metric: str
) -> tuple[str, str | None, str]:
    """``--task``, ``--frames`` and the three options they stand for → data, model and metric.

    Without a task, pocket-pretrained gets the one it has learnt.

    Raises:
        ValueError: no such task, other data beside it, or frames of a task without.
    """
    from vtr.limits import similar
    from vtr.pocket import data_of

    if task is None:
        if frames is not None:
            raise ValueError("--frames is for films: --task video")
        return data_of(model, data), model, metric
    if task not in TASKS:
        raise ValueError(f"task={task!r}{similar(task, TASKS)}: choose one of {', '.join(TASKS)}")
    if data.partition(":")[0] != "pocket" or "task=" in data:
        raise ValueError(f"--task {task} is a pocket task, and --data {data} other data: leave out one of the two")
    if frames is not None and task != "video":
        raise ValueError("--frames is for films: --task video")
    given = [data.partition(":")[2], f"task={task}", *([] if frames is None else [f"frames={frames}"])]
    known, counts = TASKS[task]
    chosen = "pocket:" + ",".join(filter(None, given)) if task != "questions" else data
    return chosen, model or known, counts if metric == "auto" else metric


def show(body: dict[str, Any]) -> None:
    """Print the table and what it was measured on."""
    from rich import box
    from rich.table import Table

    from vtr.commands._console import console
    from vtr.eval.accuracy.summary import caption, used_columns

    columns, lines = used_columns(body)
    if console.width < WIDE:
        kept = [i for i, name in enumerate(columns) if name not in WIDE_ONLY]
        columns = [columns[i] for i in kept]
        lines = [[line[i].split(" (")[0] for i in kept] for line in lines]  # medians without their ranges
    names = [row["name"] for row in body["policies"]]
    short = names if len(set(names)) == len(names) else [row["policy"] for row in body["policies"]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(columns[0], overflow="fold", min_width=min(max(map(len, short)), console.width // 4))
    for name in columns[1:]:
        table.add_column(name.replace(" ", "\n") if name != "− none" else name, justify="right", no_wrap=True)
    for name, line in zip(short, lines, strict=True):
        table.add_row(name, *line[1:])
    console.print(table)
    for row, name in zip(body["policies"], short, strict=True):
        if row["policy"] != name:
            console.print(row["policy"], highlight=False, markup=False)
    show_kinds(body, short)
    console.print(caption(body), highlight=False, markup=False)
    for name, reason in body["left_out"].items():
        console.print(f"left out of all: {name}: {reason}", highlight=False, markup=False)
    for bad in body["data"]["bad_examples"]:
        console.print(f"bad: {bad['id']}: {bad['reason']}", highlight=False, markup=False)


def show_kinds(body: dict[str, Any], names: list[str]) -> None:
    """Print accuracy by kind of question, where there are a few kinds."""
    from rich import box
    from rich.table import Table

    from vtr.commands._console import console
    from vtr.eval.accuracy.summary import by_kind

    columns, lines = by_kind(body)
    if not lines:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(columns[0], overflow="fold", min_width=min(max(map(len, names)), console.width // 4))
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        table.add_row(name, *[cell.split(" (")[0] for cell in line[1:]])
    console.print(table)
