"""Questions about pictures with their answers, as batches to learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtr.chat import prompt

FIELDS = ("image", "question", "answer")


def read_samples(path: str | Path) -> list[dict[str, str]]:
    """A JSON-lines file: {"image": file (relative to this one), "question": …, "answer": …} a line.

    Raises:
        FileNotFoundError: the file, or a picture that it names, is not there.
        ValueError: a line is no such object, or there is none.
    """
    source, samples = Path(path), []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            made = {name: str(sample[name]) for name in FIELDS}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{source}, line {number}: it needs {', '.join(FIELDS)} as a JSON object") from error
        picture = source.parent / made["image"]
        if not picture.is_file():
            raise FileNotFoundError(f"{source}, line {number}: there is no picture {picture}")
        samples.append(made | {"image": str(picture)})
    if not samples:
        raise ValueError(f"{source} holds no samples: it needs {', '.join(FIELDS)} as a JSON object a line")
    return samples


def as_sample(image: Any, question: str, answer: str) -> dict[str, Any]:
    """One sample as :class:`Collate` takes it. image: a picture, or the path of one."""
    return dict(zip(FIELDS, (image, question, answer), strict=True))


class Collate:
    """Samples (see :func:`as_sample`) → a right-padded batch whose labels are the answers and the token that ends them.

    Args:
        processor: of the model; its chat template (or LLaVA-1.5's form) puts the question.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ValueError for an answer that is not tokens of its own behind the question's."""
        from PIL import Image

        found = [one["image"] for one in samples]
        pictures = [[(p if isinstance(p, Image.Image) else Image.open(p)).convert("RGB")] for p in found]
        asked = [prompt(self.processor, one["question"]) for one in samples]
        end = self.processor.tokenizer.eos_token or ""
        whole = [
            f"{text}{'' if text.endswith((' ', chr(10))) else ' '}{one['answer']}{end}"
            for text, one in zip(asked, samples, strict=True)
        ]
        batch = dict(
            self.processor(text=whole, images=pictures, padding=True, padding_side="right", return_tensors="pt")
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, (text, picture) in enumerate(zip(asked, pictures, strict=True)):
            before = self.processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0]
            same = batch["input_ids"][row, : len(before)] == before
            n = len(before) if bool(same.all()) else int(same.int().argmin())  # a tokenizer may join over the edge
            labels[row, :n] = -100
            if not bool((labels[row] != -100).any()):
                raise ValueError(f"the answer {samples[row]['answer']!r} leaves no token to learn")
        return {**batch, "labels": labels}
