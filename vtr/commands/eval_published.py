"""``vtr eval published``: a paper's table, run again by lmms-eval with vtr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vtr.eval.published.cells import Cells
    from vtr.eval.published.choose import Chosen
    from vtr.eval.published.cost import Rate
    from vtr.eval.published.kit import Job, Launch
    from vtr.eval.published.tables import Book

WIDE, WIDE_ONLY = 100, ("95 %",)
"""What is left out of the printed tables on a narrower terminal; the files have everything."""


def published_command(
    model: Annotated[str | None, typer.Option(help="a hub name or a folder: the checkpoint of the table")] = None,
    table: Annotated[
        str,
        typer.Option("--table", help="columns: `gqa,pope,textvqa,mme,mmb,sqa`", show_default="all that can be scored"),
    ] = "",
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policies",
            "-p",
            help="rows, joined by `;`: `VisionZip`, `VisionZip 64`, or a spec of the table",
            show_default="all that vtr can be",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="the table, by name", show_default="chosen by model and rows")
    ] = None,
    tables: Annotated[
        list[Path] | None, typer.Option(help="a folder of tables of your own; may be given again")
    ] = None,
    list_tables: Annotated[bool, typer.Option("--list", help="show the tables that there are")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, run nothing; needs no lmms-eval")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="print only the command lines of lmms-eval that are still to be run")
    ] = False,
    out: Annotated[Path, typer.Option(help="the folder of what has been run, and of the results")] = Path("published"),
    markdown: Annotated[bool, typer.Option("--markdown", help="print the comparison as Markdown")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="a trial: so many questions of each task")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions per call")] = 8,
    processes: Annotated[int, typer.Option(min=1, help="GPUs, through accelerate; each has the whole model")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, …", show_default="what there is")] = None,
    dtype: Annotated[str, typer.Option(help="auto (of the checkpoint), float32, bfloat16, float16")] = "auto",
    include_path: Annotated[Path | None, typer.Option(help="a folder of lmms-eval tasks of your own")] = None,
    gpu: Annotated[str, typer.Option(help="for the estimate: A100, H100, H200, A6000, L40S, L4, V100, 4090")] = "A100",
    rate: Annotated[
        float | None, typer.Option(help="for the estimate: TFLOP/s that are reached, instead of --gpu")
    ] = None,
) -> None:
    """Run the rows of a published table again, and print ours beside the paper's.

    lmms-eval asks the questions and scores the answers, vtr reduces; `pip install -e '.[eval]'`. A comparison stays
    within one table of one source, with that table's own unreduced row. What has been run is kept in --out: a second
    call runs what is missing, and one that was broken off goes on.

    * `vtr eval published --list` — the tables, and the models they are about

    * `vtr eval published --model llava-hf/llava-1.5-7b-hf --table gqa,pope,textvqa,mme,mmb,sqa --dry-run` — what would
      be run, and how many GPU hours that is

    * the same without `--dry-run` — run it; then ours, the paper's, the difference, a 95 % interval, and a word

    * `vtr eval published --model llava-hf/llava-1.5-7b-hf --table pope -p "VisionZip 64" --limit 100` — a trial

    * `vtr eval published … --processes 8` — on eight GPUs; `--commands` prints lines for a scheduler of your own

    The words: `agrees` where the paper's number lies in our interval, else `above` or `below`; also for the share of
    the unreduced row, since levels depend on the prompt and the picture's preparation.
    """
    from vtr.commands._console import check_folder, console, fail
    from vtr.eval.published import cells, choose, cost, kit
    from vtr.eval.published import tables as published

    try:
        book = published.read(tables or [])
        if list_tables:
            show_tables(book, model)
            return
        if model is None:
            raise ValueError("--model names the checkpoint, e.g. llava-hf/llava-1.5-7b-hf; --list shows the tables")
        check_folder(out)
        asked = [name.strip() for text in policies or [] for name in text.split(";") if name.strip()]
        columns = [name.strip() for name in table.split(",") if name.strip()]
        chosen = choose.choose(book, model, source, columns, asked)
        speed = cost.rate_of(gpu, rate)
        launch = kit.Launch(model, out, batch_size, processes, device, dtype, limit, include_path)
        kit.check(launch, choose.tasks_of(book, chosen))
        store = cells.Cells(out, cells.Fixed(model, dtype, limit))
        jobs = jobs_of(book, chosen, store)
        if jobs and not (dry_run or commands):
            kit.check_installed()
            store.begin()
            for job in jobs:
                collect(launch, store, job)
            jobs = jobs_of(book, chosen, store)
        if commands:
            for line in kit.commands(launch, jobs):
                print(line)
            return
        show_plan(book, chosen, store, launch, jobs, speed)
        if dry_run:
            return
        failed = run_all(launch, jobs, store)
        finish(book, chosen, store, out, markdown)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(f"written to [bold]{out}[/]: results.json, table.md", highlight=False)
    if failed:
        for name, why in failed.items():
            console.print(f"failed: {name}: {why}", highlight=False, markup=False)
        raise typer.Exit(1)


def jobs_of(book: Book, chosen: Chosen, store: Cells) -> list[Job]:
    """What is still to be run: a policy with its missing tasks, the unreduced model first."""
    from vtr.eval.published.choose import tasks_of
    from vtr.eval.published.kit import Job

    tasks, found = tasks_of(book, chosen), []
    for policy in dict.fromkeys(["none", *(row.policy or "none" for row in chosen.rows)]):
        if missing := store.missing(policy, tasks):
            found.append(Job(policy, tuple(missing)))
    return found


def collect(launch: Launch, store: Cells, job: Job) -> None:
    """Keep what runs of a job have left, whoever started them."""
    from vtr.eval.published import kit

    for task, (results, samples) in kit.found(launch, job.policy, job.tasks).items():
        store.keep(job.policy, task, results, samples)


def run_all(launch: Launch, jobs: list[Job], store: Cells) -> dict[str, str]:
    """Run the jobs, keep what each gives; policies that failed, with the reason.

    Raises:
        RuntimeError: the first one failed: so would the others.
    """
    from vtr.commands._bench import say
    from vtr.eval.published import kit

    failed: dict[str, str] = {}
    for at, job in enumerate(jobs, 1):
        log = kit.folder_of(launch, job) / "log.txt"
        say([f"{at} of {len(jobs)}: {job.policy}: {', '.join(job.tasks)} (log: {log})"])
        try:
            kit.run(launch, job)
            collect(launch, store, job)
            if missing := store.missing(job.policy, job.tasks):
                raise RuntimeError(f"lmms-eval wrote no results of {', '.join(missing)}; its log: {log}")
        except RuntimeError as error:
            if at == 1:
                raise
            failed[job.policy] = str(error)
    return failed


def finish(book: Book, chosen: Chosen, store: Cells, out: Path, markdown: bool) -> None:
    """Compare, write, print."""
    from vtr.eval.published import compare, report
    from vtr.eval.report import results

    body = compare.compare(book, chosen, store)
    said = compare.tally(body)
    results.save(out / "results.json", "published", body, seed=0)
    text = report.markdown(body, said)
    (out / "table.md").write_text(text, encoding="utf-8")
    if markdown:
        print(text)
    else:
        show(body, said)


def show(body: dict[str, Any], said: dict[str, dict[str, int]]) -> None:
    """Print a table for each column, and the caption."""
    from vtr.commands._bench import show as show_table
    from vtr.commands._console import console
    from vtr.eval.published.report import HEADS, caption, lines

    kept = [i for i, name in enumerate(HEADS) if console.width >= WIDE or name not in WIDE_ONLY]
    for column, one in body["columns"].items():
        console.print(f"[bold]{column}[/] {one['title']}", highlight=False)
        rows = [[line[i] for i in kept] for line in lines(body, column)]
        heads = [HEADS[i] for i in kept]
        show_table(heads[:1], heads[1:], rows, right=True)
    for text in caption(body, said):
        console.print(text, highlight=False, markup=False)


def show_tables(book: Book, model: str | None) -> None:
    """Print the tables that there are, or those about a model."""
    from vtr.commands._bench import show as show_table
    from vtr.commands._console import console

    rows = []
    for table in sorted(book.tables.values(), key=lambda one: (one.model, one.name)):
        names = book.models[table.model].checkpoints
        if model is None or model.lower() in map(str.lower, names):
            mark = "" if table.certain else " (?)"
            scored = ", ".join(book.scored(table)) + ("" if table.unreduced else "; no unreduced row")
            rows.append([f"{table.name}{mark}", f"{len(table.runnable())} of {len(table.rows)}", scored])
    show_table(["--source"], ["rows", "columns that can be scored"], rows)
    about = {table.model: book.models[table.model].checkpoints[0] for table in book.tables.values()}
    for name, checkpoint in sorted(about.items()):
        console.print(f"{name}: --model {checkpoint}", highlight=False)
    console.print("rows: how many of them vtr can be; (?): not read off the paper or a copy of it", highlight=False)


def show_plan(book: Book, chosen: Chosen, store: Cells, launch: Launch, jobs: list[Job], speed: Rate) -> None:
    """Print what is compared, what is still to be run, what it takes, and the first command line."""
    from vtr.commands._bench import show as show_table
    from vtr.commands._console import console
    from vtr.eval.published import cost, kit
    from vtr.eval.published.choose import tasks_of

    def say(*texts: str, soft_wrap: bool = False) -> None:
        for text in texts or ("",):
            console.print(text, highlight=False, markup=False, soft_wrap=soft_wrap)

    table, model, tasks = chosen.table, book.models[chosen.table.model], tasks_of(book, chosen)
    say(f"Table: {table.name}: {table.source}; read {table.read}", f"Chosen: {chosen.because}")
    say(*(f"Note: {note}" for note in [*table.notes, model.note] if note))
    show_table(
        ["column", "questions"], ["what is compared, and how lmms-eval asks it"], columns_of_plan(book, chosen, launch)
    )
    rows, total, known = rows_of_plan(book, chosen, launch, jobs, speed)
    show_table(["row"], ["policy", "tokens a layer", "tasks to run", "GPU hours"], rows)
    if not known:
        say("~ how many tokens enter depends on picture and question: what the table says is taken")
    wall = f", {spelled(total / launch.processes)} hours on {launch.processes} GPUs" if launch.processes > 1 else ""
    say(
        f"GPU hours: {spelled(total)}{wall}, at {speed.said}. {cost.FORMULA}. Loading, choosing tokens and waiting "
        f"for memory are not in it. Sizes: {model.source}.",
        f"Counts of questions: {'; '.join(f'{task}: {one.counted}' for task, one in tasks.items())}.",
    )
    for why, names in by_reason(chosen.left_out).items():
        say(f"Left out: {', '.join(names)}: {why}")
    if jobs:
        say("", f"{len(jobs)} runs of lmms-eval, one a policy (--commands prints all the lines). The first:")
        say(f"  {kit.spelled(launch, jobs[0])}", soft_wrap=True)
    say(f"Kept in {launch.folder}: cells/TASK/POLICY.json, which later calls read; runs/POLICY: lmms-eval's own files.")


def columns_of_plan(book: Book, chosen: Chosen, launch: Launch) -> list[list[str]]:
    out = []
    for column in chosen.columns:
        one = book.benchmark(chosen.table, column)
        note = f"\n{one.note}" if one.note else ""
        about = f"{one.title}\ntask {one.task}, metric {' + '.join(one.metrics)}{note}"
        out.append([column, f"{min(one.questions, launch.limit or one.questions):,}", about])
    return out


def rows_of_plan(
    book: Book, chosen: Chosen, launch: Launch, jobs: list[Job], speed: Rate
) -> tuple[list[list[str]], float, bool]:
    """Lines, GPU hours of all that is still to be run, and whether all tokens are known from sizes."""
    from vtr.eval.published import cost
    from vtr.eval.published.choose import NONE, tasks_of
    from vtr.limits import folded

    model, tasks = book.models[chosen.table.model], tasks_of(book, chosen)
    todo = {job.policy: job.tasks for job in jobs}
    out, total, all_known = [], 0.0, True
    for row in (NONE, *chosen.rows):
        policy = row.policy or "none"
        missing = {task: tasks[task] for task in todo.get(policy, ())}
        hours, known = cost.hours(model, row, missing, speed, launch.limit)
        vision, _ = cost.entering(row, model)
        tokens = f"{'' if known else '~'}{sum(vision) / len(vision):.0f}"
        out.append([row.label, folded(policy, 20), tokens, f"{len(missing)} of {len(tasks)}", spelled(hours)])
        total, all_known = total + hours, all_known and known
    return out, total, all_known


def spelled(hours: float) -> str:
    return "under 0.1" if 0 < hours < 0.05 else f"{hours:.1f}"


def by_reason(left_out: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in left_out.items():
        found.setdefault(why, []).append(name)
    return found
