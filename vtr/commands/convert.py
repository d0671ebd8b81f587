"""``vtr convert``: official checkpoints of trained methods become a transformers model and a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    method: Annotated[str, typer.Argument(help="`pmod`, `dynamic-llava` or `m3`")],
    checkpoint: Annotated[
        Path, typer.Argument(help="the folder of an official checkpoint: config.json and weights, or a LoRA adapter's")
    ],
    out: Annotated[Path, typer.Argument(help="where to write `model/` (transformers) and `policy/` (vtr)")],
    vision_tower: Annotated[
        Path | None, typer.Option(help="a folder with the CLIP tower's config.json (and weights)", show_default=False)
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="of an adapter: the folder of the model that it was trained on", show_default=False),
    ] = None,
) -> None:
    """Convert an official LLaVA checkpoint trained with p-MoD, Dynamic-LLaVA or M3.

    Reads sharded safetensors and .bin files (as weights alone, nothing in them is executed). Every tensor is accounted
    for: missing and unknown ones are listed, and nothing is written then. What LLaVA's LoRA training saves
    (`adapter_config.json`, `adapter_model.*`, `non_lora_trainables.bin`) is merged into its `--base`.

    * `vtr convert pmod p-MoD-LLaVA-v1.5-7B out --vision-tower clip-vit-large-patch14-336`

    * `vtr convert m3 llava-v1.5-7b-m3-lora out --base vicuna-7b-v1.5 --vision-tower clip-vit-large-patch14-336`

    * `vtr run cat.jpg "What is this?" --model out/model --policy pmod:weights=out/policy`
    """
    from vtr.commands._console import check_folder, console, fail

    try:
        check_folder(out, "OUT")
        from vtr.convert import convert_checkpoint

        made = convert_checkpoint(method, checkpoint, out, vision_tower, base)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(
        f"{made.tensors} tensors → [bold]{made.kind}[/] in {made.model}, policy in {made.policy}", soft_wrap=True
    )
    if made.ignored:
        console.print(f"not needed: {', '.join(made.ignored)}", soft_wrap=True, highlight=False)
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(f"use it as: --model {made.model} --policy {made.spec}", soft_wrap=True, highlight=False)
