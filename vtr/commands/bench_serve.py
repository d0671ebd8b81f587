"""``vtr bench serve``: what policies change for a server under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.commands._bench import check_targets, medians, show, write

WAITS = ["policy", "req/s", "÷ none", "TTFT ms", "p90", "TPOT ms", "prompt"]
TAKEN = ["policy", "KV", "KV/req", "running", "lost", "CPU ms", "none ÷"]


def bench_serve(
    url: Annotated[str, typer.Option(help="the server, started by `vtr serve`")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="its name there; default: the first the server lists")] = None,
    inside: Annotated[
        bool, typer.Option("--inside", help="compare policies inside the decoder: `vtr serve --decoder-policies`")
    ] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="compare these: SPEC, NAME=SPEC or NAME=SPEC;SPEC…; may be given again"),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="another server: compare the two without reduction, this one as `here`")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="8x128: at a time, tokens answered; 8x128x40: of so many requests")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="decoder layers, for --inside where the model is on another machine")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="small loads: done in minutes")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the result here, and its plot beside it")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="write result and plot into this folder")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds of each, after one that warms up")] = 3,
    side: Annotated[int, typer.Option(help="side of the pictures in pixels")] = 192,
    seed: Annotated[int, typer.Option(help="of the pictures")] = 0,
) -> None:
    """Show what policies change for a server under load: none, one fixed policy, and requests that choose.

    Requests with a fresh picture each, 1, 8 and 32 under way at a time with answers of 16 tokens, then 8 with 128; the
    contenders take turns. `req/s` — finished requests; `÷ none` — how many times as many as without reduction in the
    same round (median, smallest–largest); TTFT — until the first token; TPOT — for each further token. Of vLLM's
    `/metrics`: `KV` — most cache blocks in use, `KV/req` — blocks a running request (mean), `running` — most requests
    running at a time, `lost` — how often one lost its blocks and was computed again. Of a server on this machine also
    `CPU ms` — the processor's time a request, and without reduction ÷ with.

    With `--inside` the contenders are `before`, a policy before the decoder, `fastv` and `gsearch`, which act inside it
    (these three have one mean budget), `pyramid` as its paper has it, and `mixed`: of all but pyramid in turn.

    Examples:

    * `vtr serve pocket -- --dtype float32 --no-enable-prefix-caching` — first the server, in vLLM's environment

    * `vtr bench serve --small --json serve.json`

    * `vtr serve pocket --decoder-policies -- …`, then `vtr bench serve --inside`

    * `vtr bench serve -p "mine=none;fastv:keep=0.5,layer=2" -p pool:grid=6 --load 16x64` — contenders and load of your
      own: every other request of `mine` is not reduced

    * `vtr bench serve --against http://127.0.0.1:8001 --load 8x16` — what a server for policies inside the decoder
      costs those who ask for none: the same load on it and on one without
    """
    from tqdm import tqdm

    from vtr.commands._console import console, fail
    from vtr.commands.serve import check_url
    from vtr.eval.cost import serve as measure
    from vtr.eval.cost import serve_tables

    try:
        check_targets(json_file, out)
        check_url(url)
        steps = [measure.load_of(one) for one in load] if load else measure.loads(small, inside)
        if against is not None:
            check_url(against)
        contenders = _contenders(url, model, inside, policy or [], against is not None, layers)
        name = model or measure.first_model(url)
        with tqdm(total=len(steps) * len(contenders) * (rounds + 1), desc="bench serve", unit="round") as bar:
            body = measure.measure(url, name, steps, rounds, side, seed, lambda: bar.update(), contenders, against)
        write(body, "serve", json_file, out, seed, "cpu")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(error) from error
    show(["at a time × tokens"], WAITS, medians(serve_tables.table(body)), right=True)
    show(["at a time × tokens"], TAKEN, medians(serve_tables.taken(body)), right=True)
    for one, specs in contenders.items():
        console.print(f"{one}: {', '.join(specs)}", highlight=False, markup=False, soft_wrap=True)


def _contenders(
    url: str, model: str | None, inside: bool, given: list[str], against: bool, layers: int | None
) -> dict[str, list[str]]:
    """What is compared.

    Raises:
        ValueError: options that exclude each other, no policies, or a depth that nobody knows.
        OSError: no server is there.
    """
    from vtr.eval.cost import serve_contenders as known
    from vtr.eval.cost.serve import model_of

    ways: dict[str, Any] = {"--inside": inside, "--policy": given, "--against": against}
    if len(both := [name for name, chosen in ways.items() if chosen]) > 1:
        raise ValueError(f"{' and '.join(both)} say who is compared: give one of them")
    if against:
        return {known.NONE: [known.NONE], "here": [known.NONE]}
    if given:
        return known.named(given)
    return known.inside(layers or _depth(model_of(url, model))) if inside else known.CONTENDERS


def _depth(model: str) -> int:
    """Decoder layers of a model by folder or hub name.

    Raises:
        ValueError: its config is not here.
    """
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)
    except (OSError, ValueError) as error:
        raise ValueError(f"the config of {model} is not here: say --layers, of its decoder") from error
