"""One question about every picture of a folder, by vLLM in this process, each picture under a policy.

    python examples/offline_folder.py photos/ "what is this?" --model MODEL --policy m3:tokens=36 --out answers.jsonl

vLLM batches by itself; the bar counts finished answers. With Ray Data (``pip install ray``) the same plugin runs in
every worker: rows that the preprocessing of ``ray.data.llm`` returns have ``mm_processor_kwargs={"vtr": …}``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoProcessor
from vllm import LLM, SamplingParams

from vtr.chat import prompt
from vtr.commands.encode import found_in
from vtr.data.pictures import upright


def main(
    folder: Annotated[Path, typer.Argument(help="a folder of pictures")],
    question: Annotated[str, typer.Argument(help="what to ask about each")],
    model: Annotated[str, typer.Option(help="a folder or hub name")],
    out: Annotated[Path, typer.Option(help="answers, a JSON object a line")],
    policy: Annotated[str, typer.Option(help="of every picture; `none` for no reduction")] = "m3:tokens=36",
    max_tokens: Annotated[int, typer.Option(help="length of an answer")] = 64,
    max_model_len: Annotated[int, typer.Option(help="longest prompt and answer")] = 4096,
) -> None:
    """Ask about all pictures, and write the answers."""
    files = found_in([folder])
    text = prompt(AutoProcessor.from_pretrained(model), question)
    asked: list[Any] = [
        {
            "prompt": text,
            "multi_modal_data": {"image": upright(file)},
            "mm_processor_kwargs": {"vtr": policy},
        }
        for file in files
    ]
    llm = LLM(model, max_model_len=max_model_len)
    said = llm.generate(asked, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=True)
    with out.open("w", encoding="utf-8") as lines:
        for file, one in zip(files, said, strict=True):
            row = {"picture": file.name, "answer": one.outputs[0].text, "prompt_tokens": len(one.prompt_token_ids)}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    typer.echo(f"{len(files)} answers in {out}")


if __name__ == "__main__":
    typer.run(main)
