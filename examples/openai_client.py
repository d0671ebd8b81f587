"""Ask a server that ``vtr serve`` started about a picture, under a policy of this request.

vtr serve MODEL
python examples/openai_client.py cat.jpg "what is this?" --model MODEL --policy m3:tokens=36
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI

from vtr.data.pictures import upright


def main(
    picture: Annotated[Path, typer.Argument(help="a picture file")],
    question: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[str, typer.Option(help="the model's name on the server")],
    policy: Annotated[str, typer.Option(help="of this request; `none` for no reduction")] = "m3:tokens=36",
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000/v1",
    max_tokens: Annotated[int, typer.Option(help="length of the answer")] = 64,
) -> None:
    """Ask, and say how many tokens the picture had."""
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}]
    client = OpenAI(base_url=url, api_key="none")
    said = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"vtr": policy},
    )
    typer.echo(said.choices[0].message.content)
    typer.echo(f"{policy}: a prompt of {said.usage.prompt_tokens} tokens")


def data_url(picture: Path) -> str:
    """The picture as PNG, upright: servers need not follow a photo's EXIF orientation."""
    raw = io.BytesIO()
    upright(picture).save(raw, "PNG")
    return f"data:image/png;base64,{base64.b64encode(raw.getvalue()).decode()}"


if __name__ == "__main__":
    typer.run(main)
