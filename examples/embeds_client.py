"""Ask a vLLM server about pictures that ``vtr encode`` has encoded and reduced (no plugin needed there).

    vtr encode photos/ --policy globalcom2:retention=0.25 --model MODEL --out embeds
    vllm serve MODEL --enable-mm-embeds
    python examples/embeds_client.py embeds/cat.safetensors "what is this?" --model MODEL

Embeddings are tensors that the server unpickles: only for clients it trusts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI
from safetensors.torch import load_file

from vtr.encode import messages


def main(
    embeds: Annotated[Path, typer.Argument(help="what vtr encode wrote")],
    question: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[str, typer.Option(help="the model's name on the server")],
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000/v1",
    max_tokens: Annotated[int, typer.Option(help="length of the answer")] = 64,
) -> None:
    """Ask about one picture's embeddings."""
    picture = load_file(embeds)["image_embeds"]
    client = OpenAI(base_url=url, api_key="none")
    said = client.chat.completions.create(
        model=model, messages=messages([picture], question), max_tokens=max_tokens, temperature=0
    )
    typer.echo(said.choices[0].message.content)


if __name__ == "__main__":
    typer.run(main)
