"""``vtr play``: the playground, in a browser."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Where nobody but this machine's users can reach a server."""


def play_command(
    model: Annotated[
        str | None,
        typer.Option(help="folder, hub name, `pocket-joint`, `pocket-video`", show_default="the pocket model"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = LOCAL[0],
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen at")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="also a public address, by Gradio's tunnel")] = False,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="of one picture or video")] = 20,
    time_limit: Annotated[float, typer.Option(min=1, help="seconds for all answers to a question")] = 120,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16", show_default="float32 on the CPU, else the model's")
    ] = None,
) -> None:
    """A playground in the browser: one picture, one question, two to six policies side by side.

    Upload a picture, take one with the camera, or choose a sample; each policy has a slider for its budget. Answers are
    streamed; then there are the kept tokens layer by layer, times, FLOPs and bytes of keys and values, how the text
    ranked the picture, and each policy as a spec string, in Python and as a request. Nothing is sent anywhere, unless
    with `--share`; a spec may name files of this machine only where nobody else can reach the page. Needs `gradio`.

    * `vtr play`

    * `vtr play --model llava-hf/llava-v1.6-vicuna-7b-hf --device cuda`

    * `vtr play --model pocket-video`

    * `vtr play --host 0.0.0.0 --max-upload-mb 5 --time-limit 30`
    """
    from vtr.commands._console import console, fail
    from vtr.commands.serve import check_address

    try:
        if importlib.util.find_spec("gradio") is None:
            raise ImportError("the playground needs gradio: pip install 'gradio>=6,<7'")
        check_address(host, port)
        from vtr.play.ask import Player

        player = Player(model, device, dtype, time_limit, files=host in LOCAL and not share)
        from vtr.play.page import build, launch

        page = build(player)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(error) from error
    console.print(f"{player.name} answers at [bold]http://{host}:{port}[/]; Ctrl+C stops", highlight=False)
    launch(page, host, port, share, max_upload_mb, quiet=not share)
