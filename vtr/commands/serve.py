"""``vtr serve``: vLLM's OpenAI server with vtr's plugin, behind a gate; or the gate alone in front of a server."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import os
import sys
from typing import Annotated

import typer

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
FILES = 8192
"""Open files of the gate alone: two for each request under way, and some to spare."""
GATE = "vtr.integrations.vllm.gateway.Gateway"


def server_command(
    model: str, host: str, port: int, default: str | None, rest: list[str], inside: list[str] | None = None
) -> list[str]:
    """The command line of vLLM's server with the gate inside. inside: what starts policies in the decoder."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", _folder(model)]
    command += ["--served-model-name", model] if _folder(model) != model else []
    command += ["--host", host, "--port", str(port), "--middleware", GATE, "--trust-request-mm-kwargs"]
    command += ["--enable-prompt-tokens-details"]  # usage says how many image tokens a request had
    if default is not None:
        command += ["--hf-overrides", json.dumps({"vtr_default": default})]
    return [*command, *(inside or []), *rest]


def _folder(model: str) -> str:
    """Where a pocket model is; others are what they are called."""
    from vtr.pocket import NAMES, checkpoint

    return str(checkpoint(NAMES[model])) if model in NAMES else model


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="folder, hub name, `pocket` or `pocket-joint`")] = "pocket",
    policy: Annotated[str | None, typer.Option(help="what requests get that name none, e.g. `m3:tokens=144`")] = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen at")] = 8000,
    upstream: Annotated[str | None, typer.Option(help="no engine here: pass requests on to this vLLM server")] = None,
    decoder_policies: Annotated[
        bool, typer.Option("--decoder-policies", help="serve policies that act inside the decoder as well")
    ] = False,
    parts: Annotated[
        int | None, typer.Option(help="KV cache groups the decoder is divided into; as a rule the most of 1-8 that fit")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="weights that requests may name: `NAME=FOLDER`, as often as needed")
    ] = None,
) -> None:
    """Serve a model with a reduction policy per request: an OpenAI server on vLLM.

    A request names its policy in a field `vtr`: a spec string for all of its images, or a list with one for each. Other
    options of the processor are closed to clients. Policies that act inside the decoder (fastv, gsearch, pyramid, pmod,
    dynamic-llava, …) are served with `--decoder-policies`; else they are refused, with one before the decoder of equal
    mean budget in the message. `/health`, `/metrics` (Prometheus: `vtr_vision_tokens_saved_total`,
    `vtr_vision_tokens`) stand beside vLLM's own paths. What follows `--` goes to vLLM.

    * `vtr serve llava-hf/llava-v1.6-vicuna-7b-hf --policy m3:tokens=144 -- --tensor-parallel-size 2`

    * `curl localhost:8000/v1/chat/completions -d '{"model": …, "messages": […], "vtr": "m3:tokens=36"}'`

    * `vtr serve Qwen/Qwen2.5-VL-7B-Instruct --decoder-policies --policy fastv:keep=0.25,layer=2`

    * `vtr serve pocket --decoder-policies --weights mine=runs/pmod`, then `"vtr": "pmod:weights=mine"`

    * `vtr serve llava-hf/llava-1.5-7b-hf --upstream http://gpu-box:8000 --port 9000`
    """
    from transformers import AutoConfig

    from vtr.commands._console import console, fail
    from vtr.integrations.vllm.gateway import INSIDE_ENV, LAYERS_ENV
    from vtr.integrations.vllm.inside.asked import divided
    from vtr.integrations.vllm.inside.options import Options, server_args
    from vtr.integrations.vllm.specs import NONE, spec_of
    from vtr.models import check_name
    from vtr.pocket import UNSERVED, UNSERVED_BECAUSE

    try:
        if model in UNSERVED:
            raise ValueError(UNSERVED_BECAUSE)
        check_name(model)
        check_address(host, port)
        if upstream is not None:
            check_url(upstream)
        names = _weights(weights or [])
        if (names or parts is not None) and not decoder_policies:
            raise ValueError("--weights and --parts are for policies inside the decoder: add --decoder-policies")
        depth = int(AutoConfig.from_pretrained(_folder(model)).get_text_config().num_hidden_layers)
        default, within = divided(policy, depth, names) if decoder_policies else (policy, NONE)
        default = None if default is None else spec_of(default, depth)
        if upstream is not None:
            _gate_alone(upstream, depth, host, port, names if decoder_policies else None)
            return
        inside = None
        if decoder_policies:
            Options(parts, names).groups(depth)
            inside = server_args(parts, names, None if within == NONE else within)
        if importlib.util.find_spec("vllm") is None:
            raise OSError("vLLM is not installed here: see docs/serving.md, or name a server with --upstream")
    except (ValueError, OSError, ImportError) as error:
        raise fail(error) from error
    command = server_command(model, host, port, default, context.args, inside)
    console.print(" ".join(command), highlight=False, style="dim", soft_wrap=True)
    environment = {**os.environ, LAYERS_ENV: str(depth)}
    if decoder_policies:
        environment[INSIDE_ENV] = json.dumps(names)
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # whose steps are prepared where policies do not reach
    os.execve(sys.executable, command, environment)


def _weights(given: list[str]) -> dict[str, str]:
    """NAME=FOLDER, as often as it was said.

    Raises:
        ValueError: written otherwise. FileNotFoundError: no such folder.
    """
    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--weights {one}: write NAME=FOLDER, e.g. mine=runs/pmod")
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--weights {one}: there is no folder {folder}")
        found[name] = os.path.abspath(folder)
    return found


def check_address(host: str, port: int) -> None:
    """Raise OSError unless a server can listen there: asked before a model is loaded."""
    import socket

    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise OSError(f"--host {host}: no address of this machine, e.g. 127.0.0.1 or 0.0.0.0") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"--port {port}: another program listens there already: choose another port") from error
        raise OSError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error


def check_url(url: str) -> None:
    """Raise ValueError unless this is a server's address."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no server's address: write it like http://127.0.0.1:8000")


def _gate_alone(upstream: str, depth: int, host: str, port: int, inside: dict[str, str] | None = None) -> None:
    try:
        import uvicorn

        from vtr.integrations.vllm.proxy import proxy
        from vtr.integrations.vllm.timeouts import SWITCH, protocol

        _more_files()
        app = proxy(upstream, depth, inside=inside)
    except ImportError as error:
        wanted = "'h11>=0.14' 'httpx>=0.27' 'starlette>=1.3' 'uvicorn>=0.30' prometheus-client"  # the extra "serve"
        raise ImportError(f"the gate needs {error.name}: pip install {wanted}") from error
    gc.freeze()  # what was imported is looked through no more: with torch in it, that takes longer than a request
    sys.setswitchinterval(SWITCH)
    uvicorn.run(app, host=host, port=port, http=protocol())  # type: ignore[arg-type]


def _more_files() -> None:
    """Let this process have as many open files as it may and the gate can use: each request takes two."""
    try:
        import resource
    except ImportError:  # no such limit here
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
