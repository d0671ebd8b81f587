"""``vtr encode``: pictures become the embeddings an engine takes as ``image_embeds``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def encode_command(
    pictures: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    out: Annotated[Path, typer.Option(help="the folder to write NAME.safetensors into")],
    policy: Annotated[
        str, typer.Option(help="what acts before the decoder, e.g. `globalcom2:retention=0.25`")
    ] = "none",
    model: Annotated[
        str | None,
        typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="the pocket model"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's")] = None,
) -> None:
    """Encode pictures under a policy, for engines that take finished embeddings and know nothing of vtr.

    Any policy that compresses will do, also one whose count depends on the picture. Each file holds `image_embeds`
    [tokens, hidden_size]; `examples/embeds_client.py` sends them to a vLLM server started with `--enable-mm-embeds`.

    * `vtr encode photos/ --policy globalcom2:retention=0.25 --model llava-hf/llava-v1.6-vicuna-7b-hf --out embeds`
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    import vtr
    from vtr.commands._console import check_folder, console, fail
    from vtr.data.pictures import upright
    from vtr.encode import encode
    from vtr.models import load

    try:
        check_folder(out)
        files = found_in(pictures)
        if policy != "none":
            vtr.policy(policy)  # refused before a model is loaded
        loaded, processor = load(model, device, dtype)
        out.mkdir(parents=True, exist_ok=True)
        total = 0
        for file in tqdm(files, desc="encode", unit="picture"):
            embeds = encode(loaded, processor, upright(file), policy)
            total += len(embeds)
            about = {"policy": policy, "picture": file.name, "model": model or "pocket"}
            save_file({"image_embeds": embeds.contiguous()}, out / f"{file.stem}.safetensors", about)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(f"{len(files)} pictures → {total} tokens, in [bold]{out}[/]", highlight=False)


def found_in(paths: list[Path]) -> list[Path]:
    """Files, and the picture files in folders, sorted.

    Raises:
        FileNotFoundError: a path that is not there, or no picture at all.
        ValueError: two files of one name, whose embeddings would overwrite each other.
    """
    from PIL import Image

    known = set(Image.registered_extensions())
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        files += sorted(p for p in path.iterdir() if p.suffix.lower() in known) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no pictures in {', '.join(map(str, paths))}")
    stems = [file.stem for file in files]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"two pictures are called {twice}: their embeddings would overwrite each other, rename one")
    return files
