"""Questions about pictures with their answers, as batches to learn from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtr.chat import prompt
from vtr.data.pictures import BadPictureError, check, one_line, upright
from vtr.data.records import Sample, at
from vtr.data.sources import open_data, refuse, usable

FIELDS = ("image", "question", "answer")


def read_samples(
    data: str | Path, images: Path | None = None, columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Samples to learn from, read as ``vtr eval`` does (:func:`vtr.data.sources.open_data`): JSON files, folders, hf:….

    The answer is the most frequent one of several; choices are put behind the question, and the answer is then the
    right one's letter. Each question and answer of a conversation is a sample of its own, without the turns before.

    Args:
        images: the folder that file names of pictures are relative to; the file's own by default. columns: the data's
            own names.

    Returns:
        As :func:`as_sample` makes them, and ``where`` (file and line).

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: records that cannot be used, counted, the first named with file and line; or there are none.
            Every picture is decoded once to see that it can be.
    """
    source = open_data(str(data), images=images, columns=columns)
    found = usable(source, source.name)
    if not found:
        raise ValueError(f"{data} holds no samples: it needs {', '.join(FIELDS)} as a JSON object a line")
    broken, samples, problems = _broken(found), [], []
    for one in found:
        try:
            if (told := broken.get(_key(one.source))) is not None:
                raise BadPictureError(at(one.where, told))
            image = str(one.source) if isinstance(one.source, Path) else one.source
            where = one.where or f"record {one.id} of {data}"
            samples.append(as_sample(image, one.asked, str(one.answer)) | {"where": where})
        except ValueError as error:
            problems.append(str(error))
    refuse(problems, len(found))
    return samples


def _key(source: Any) -> Any:
    return source if isinstance(source, Path) else id(source)


def _broken(samples: Sequence[Sample]) -> dict[Any, str]:
    """What is wrong with which pictures; each is decoded once, on all cores."""
    sources = {_key(one.source): one.source for one in samples}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        told = pool.map(_problem, sources.values())
        checked = tqdm(zip(sources, told, strict=True), "checking pictures", len(sources), leave=False)
        return {key: problem for key, problem in checked if problem is not None}


def _problem(source: Any) -> str | None:
    try:
        check(source)
    except (ValueError, OSError) as error:
        return str(error) if isinstance(error, BadPictureError) else f"picture: {one_line(error)}"
    return None


def as_sample(image: Any, question: str, answer: str) -> dict[str, Any]:
    """One sample as :class:`Collate` takes it. image: a picture, the path of one, or its encoded bytes."""
    return dict(zip(FIELDS, (image, question, answer), strict=True))


class Collate:
    """Samples (see :func:`as_sample`) → a right-padded batch whose labels are the answers and the token that ends them.

    Args:
        processor: of the model; its chat template (or LLaVA-1.5's form) puts the question.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ValueError for an answer that is not tokens of its own behind the question's, a broken picture, and
        what the processor refuses; samples with a ``where`` are named."""
        pictures = [[_picture(one)] for one in samples]
        asked = [prompt(self.processor, one["question"]) for one in samples]
        end = self.processor.tokenizer.eos_token or ""
        whole = [
            f"{text}{'' if text.endswith((' ', chr(10))) else ' '}{one['answer']}{end}"
            for text, one in zip(asked, samples, strict=True)
        ]
        try:
            batch = dict(
                self.processor(text=whole, images=pictures, padding=True, padding_side="right", return_tensors="pt")
            )
        except Exception as error:  # a picture too flat, a mark of a picture in the text: processors differ
            where = "; ".join(one.get("where", "a sample") for one in samples)
            raise ValueError(f"the processor refuses one of {where}: {one_line(error)}") from error
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, (text, picture) in enumerate(zip(asked, pictures, strict=True)):
            before = self.processor(text=[text], images=[picture], return_tensors="pt")["input_ids"][0]
            same = batch["input_ids"][row, : len(before)] == before
            n = len(before) if bool(same.all()) else int(same.int().argmin())  # a tokenizer may join over the edge
            labels[row, :n] = -100
            if not bool((labels[row] != -100).any()):
                told = f"the answer {samples[row]['answer']!r} leaves no token to learn"
                raise ValueError(at(samples[row].get("where", ""), told))
        return {**batch, "labels": labels}


def _picture(sample: Mapping[str, Any]) -> Any:
    try:
        return upright(sample["image"])
    except (ValueError, OSError) as error:
        raise BadPictureError(at(sample.get("where", ""), str(error))) from error
