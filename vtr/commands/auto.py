"""``python -m vtr.auto``: run somebody else's script with every supported model patched."""

from __future__ import annotations

import logging
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = """Run a script, or a module, unedited: every model of a family vtr knows is patched when it is built or loaded.

What stands behind the script's name is the script's: its options, its --help. `VTR_POLICY`, or --policy, names the
policy of all calls that name none; `vtr list` shows the policies and the families.

* `python -m vtr.auto --policy fastv:keep=0.25,layer=2 eval_vqa.py --model llava-hf/llava-1.5-7b-hf --limit 100`

* `VTR_POLICY=m3:tokens=36 python -m vtr.auto -m lmms_eval --model llava_hf --tasks pope`

* `torchrun --nproc-per-node 2 -m vtr.auto eval.py` (likewise `accelerate launch -m vtr.auto eval.py`)

Processes that the script starts itself are not concerned, unless they are forked or import vtr.auto. In a script of
your own one line does the same: `import vtr.auto`; `vtr.auto.disable()` undoes it."""


@dataclass
class Job:
    """What is to be run."""

    target: str
    args: list[str]
    module: bool
    policy: str | None
    quiet: bool


def parse(
    target: Annotated[str, typer.Argument(help="a script; with -m a module", metavar="SCRIPT")],
    args: Annotated[list[str] | None, typer.Argument(help="its arguments", metavar="ARGS")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as in python -m")] = False,
    policy: Annotated[
        str | None, typer.Option(help="the default policy; default: what VTR_POLICY says, or none")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="say nothing on stderr but warnings")] = False,
) -> Job:
    """Filled in below."""
    return Job(target, args or [], module, policy, quiet)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run the script as ``__main__`` in this process, say at the end what was reduced."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(
        help=HELP, context_settings={"allow_interspersed_args": False}, no_args_is_help=True, name="python -m vtr.auto"
    )(parse)
    made = _parsed(app, sys.argv[1:] if argv is None else argv)
    if made.policy is not None:
        os.environ["VTR_POLICY"] = made.policy  # processes that import vtr.auto have the same
    if not made.module and not Path(made.target).exists():
        _stop(f"there is no script {made.target!r}; to run a module put -m in front of it")
    from vtr import autopatch

    try:
        autopatch.enable_from_environment()
    except ValueError as error:
        _stop(str(error))
    log = _talk(made.quiet)
    if "VTR_POLICY" not in os.environ:
        log.warning("no default policy (VTR_POLICY, or --policy): nothing is reduced unless the script names one")
    finished = False
    try:
        _run(made)
        finished = True
    except SystemExit as done:
        finished = not done.code and not {"-h", "--help"} & set(made.args)
        raise
    finally:
        _conclude(log, autopatch.history, finished)


def _parsed(app: typer.Typer, argv: list[str]) -> Job:
    command = typer.main.get_command(app)
    found: list[Job] = []
    callback = command.callback
    assert callback is not None
    command.callback = lambda **kwargs: found.append(callback(**kwargs))
    try:
        command.main(argv, prog_name="python -m vtr.auto")  # exits after --help and on wrong usage
    except SystemExit as done:
        if not found:
            sys.exit(done.code)
    return found[0]


def _stop(why: str) -> None:
    print(f"vtr.auto: {why}", file=sys.stderr)
    sys.exit(2)


def _talk(quiet: bool) -> logging.Logger:
    """The logger of vtr.auto, heard on stderr whatever the script does about logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vtr.auto: %(message)s"))
    log = logging.getLogger("vtr.auto")
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    return log


def _run(job: Job) -> None:
    """As ``python SCRIPT ARGS`` and ``python -m MODULE ARGS`` do."""
    sys.argv = [job.target, *job.args]
    if job.module:
        runpy.run_module(job.target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(job.target).resolve().parent)
        runpy.run_path(job.target, run_name="__main__")


def _conclude(log: logging.Logger, models: list[tuple[str, Any]], finished: bool) -> None:
    """Say what the last call of each model kept: proof that the script ran reduced, or that it did not."""
    from vtr.accounting import report_of
    from vtr.engine.call import last_traces

    if finished and not models:
        log.warning("no model of a known family was built: nothing was reduced (`vtr list` shows the families)")
    for name, key in models:
        trace = last_traces.get().get(key)
        if trace is None:
            log.info("%s was not called in the main thread", name)
            continue
        rows = report_of(trace).rows
        kept = sum(row.mean_keep for row in rows) / len(rows)
        spec = ", ".join(sorted({row.policy or "none" for row in rows}))
        log.info("the last call of %s kept %.1f %% of its vision tokens (%s)", name, 100 * kept, spec)
