"""One batch of samples under every contender: what was said, how right it is, what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from vtr.eval.accuracy.contenders import Contender
from vtr.eval.accuracy.data import Bad, BadPictureError, Sample
from vtr.eval.accuracy.metrics import Metric

import vtr
from vtr import chat
from vtr.data.choices import with_choices
from vtr.data.videos import Video

GRAY = (128, 128, 128)
REFERENCES = ("no_image", "gray", "base_lm")
"""The runs without the picture, never reduced: the model gets the question alone, or with an even gray picture of the
same size; the base language model, where there is one, gets the question alone."""
TOKENS = 32
"""The longest answer, where neither the caller nor the model's generation config says."""


def question_of(sample: Sample, instruction: str = "{question}") -> str:
    """The text put to the model: the question in the instruction's place for it, then its choices, if any."""
    asked = instruction.replace("{question}", sample.question)
    return with_choices(asked, sample.choices)


@dataclass
class Batch:
    """Samples that can be used, their pictures or videos and encoded prompts (None without samples); the others."""

    samples: list[Sample]
    pictures: list[Any]
    inputs: Any
    bad: list[Bad]


@dataclass
class Bench:
    """A patched model with all that stays the same from batch to batch.

    Attributes:
        base: (the language model before it saw pictures, its tokenizer), or None.
        tick: called with the number of samples done for one contender.
    """

    model: Any
    processor: Any
    contenders: Sequence[Contender]
    metric: Metric
    instruction: str = "{question}"
    max_new_tokens: int = TOKENS
    base: tuple[Any, Any] | None = None
    tick: Callable[[int], Any] = lambda count: None

    @property
    def references(self) -> tuple[str, ...]:
        """Those of :data:`REFERENCES` that are made."""
        return REFERENCES if self.base is not None else REFERENCES[:-1]

    def encode(
        self,
        samples: Sequence[Sample],
        pictures: Sequence[Any] | None,
        before: vtr.Policy | None = None,
    ) -> Any:
        """The samples' prompts, one picture or video each (or none), on the model's device; pixels in its dtype.

        Args:
            pictures: PIL pictures, or all of them a Video. before: what acts on the pictures, or None.

        Raises:
            UnsupportedError: a policy that acts on pictures, and videos.
        """
        questions = [question_of(sample, self.instruction) for sample in samples]
        if pictures and isinstance(pictures[0], Video):
            if before is not None:
                raise vtr.UnsupportedError(
                    f"{before.spec} acts on pictures: of videos, frames:keep=0.5 takes fewer frames"
                )
            return _to(chat.encode_videos(self.processor, questions, pictures), self.model)
        return _to(chat.encode(self.processor, questions, pictures, before), self.model)

    def rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """One row a sample, in order; a picture that cannot be read or encoded makes a bad one.

        The tower encodes every picture once: all contenders share what it gives.
        """
        batch = self.prepare(samples)
        rows = [_head(sample) for sample in batch.samples]
        if rows:
            with torch.inference_mode(), vtr.shared_features(self.model):
                self._contend(batch, rows)
                self._refer(batch, rows)
        return sorted(rows + [bad_row(one) for one in batch.bad], key=lambda row: row["index"])

    def _contend(self, batch: Batch, rows: list[dict[str, Any]]) -> None:
        for one in self.contenders:
            said = self.say(self.inputs_for(one, batch), one.policy)
            for row, cost in zip(rows, costs(self.model), strict=True):
                row["policies"][one.spec] = cost
            self._score(batch.samples, said, [row["policies"][one.spec] for row in rows])

    def _refer(self, batch: Batch, rows: list[dict[str, Any]]) -> None:
        """What is answered without the picture: what policies are read against."""
        gray = [gray_of(picture) for picture in batch.pictures]
        said = {
            "no_image": self.say(self.encode(batch.samples, None), None),
            "gray": self.say(self.encode(batch.samples, gray), None),
        }
        if self.base is not None:
            said["base_lm"] = self._base_says(*self.base, batch.samples)
        for name in self.references:
            cells: list[dict[str, Any]] = [row.setdefault(name, {}) for row in rows]
            self._score(batch.samples, said[name], cells)

    def inputs_for(self, one: Contender, batch: Batch) -> Any:
        """The batch as a contender gets it: encoded anew where it acts on pictures, or takes fewer frames."""
        if one.frames is not None:
            return self.encode(batch.samples, [one.frames(video) for video in batch.pictures], one.before)
        if one.before is None:
            return batch.inputs
        return self.encode(batch.samples, batch.pictures, one.before)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Decode the pictures and encode the prompts of those samples that can be used."""
        batch = Batch([], [], None, [])
        for sample in samples:
            problem = self.metric.problem(sample.answers, sample.choices)
            try:
                if problem is not None:
                    raise BadPictureError(problem)
                picture = sample.seen()
            except BadPictureError as error:
                batch.bad.append(Bad(sample.index, sample.id, str(error)))
                continue
            batch.samples.append(sample)
            batch.pictures.append(picture)
        if batch.samples:
            try:
                batch.inputs = self.encode(batch.samples, batch.pictures)
            except Exception as error:  # some picture the processor cannot take, e.g. too flat: find which
                self._drop_refused(batch, error)
        return batch

    def _drop_refused(self, batch: Batch, error: Exception) -> None:
        good, before = [], len(batch.bad)
        for sample, picture in zip(batch.samples, batch.pictures, strict=True):
            try:
                self.encode([sample], [picture])
                good.append((sample, picture))
            except Exception as refused:
                reason = f"processor: {type(refused).__name__}: {refused}"
                batch.bad.append(Bad(sample.index, sample.id, reason[:200]))
        if len(batch.bad) == before:
            raise error
        batch.samples, batch.pictures = [one[0] for one in good], [one[1] for one in good]
        if good:
            batch.inputs = self.encode(batch.samples, batch.pictures)

    def say(self, inputs: Any, policy: vtr.Policy | None) -> list[str]:
        """Greedy answers to encoded prompts."""
        length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
        out = self.model.generate(**inputs, policy=policy, **self._how(self.model, self.processor.tokenizer))
        self.tick(rows)
        return chat.decode(self.processor, out, length)

    def _base_says(self, model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
        inputs = _text_only(tokenizer, [question_of(sample, self.instruction) for sample in samples]).to(model.device)
        out = model.generate(**inputs, **self._how(model, tokenizer))
        self.tick(len(samples))
        return chat.decode(tokenizer, out, inputs["input_ids"].shape[1])

    def _how(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        how = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if model.generation_config.pad_token_id is None:
            how["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return how

    def _score(self, samples: Sequence[Sample], said: Sequence[str], cells: Sequence[dict[str, Any]]) -> None:
        for sample, text, cell in zip(samples, said, cells, strict=True):
            cell.update(said=text, score=self.metric.score(text, sample.answers, sample.choices))


def gray_of(seen: Image.Image | Video) -> Image.Image | Video:
    """An even gray picture of the same size, or as many of them as a video has frames."""
    if isinstance(seen, Video):
        return replace(seen, frames=[Image.new("RGB", frame.size, GRAY) for frame in seen.frames])
    return Image.new("RGB", seen.size, GRAY)


def costs(model: Any) -> list[dict[str, Any]]:
    """What the model's last call cost, a dict a row.

    ``tokens``: vision tokens that entered each layer; ``total``: before any reduction; ``flops``, ``kv_bytes``,
    ``selector_ms``: the row's equal part of the batch's.
    """
    report = vtr.report(model)
    n = len(report.rows)
    shared = {"flops": report.flops / n, "kv_bytes": report.kv_bytes / n, "selector_ms": report.selector_ms / n}
    return [{"tokens": row.vision_tokens, "total": row.total, **shared} for row in report.rows]


def refused(bench: Bench, samples: Sequence[Sample], doubtful: Sequence[Contender]) -> dict[str, str]:
    """Those of the doubtful contenders that cannot work on this model: their names, and why."""
    batch, reasons = bench.prepare(samples), {}
    for one in doubtful if batch.samples else []:
        try:
            with torch.inference_mode():
                bench.say(bench.inputs_for(one, batch), one.policy)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            reasons[one.name] = f"{type(error).__name__}: {error}"
    return reasons


def bad_row(bad: Bad) -> dict[str, Any]:
    """The line of a record that cannot be used."""
    return {"index": bad.index, "id": bad.id, "bad": bad.reason}


def _head(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": sample.index,
        "id": sample.id,
        "kind": sample.kind,
        "group": sample.group,
        "question": sample.question,
        "answers": list(sample.answers),
    }
    if sample.choices is not None:
        row["choices"] = list(sample.choices)
    return {**row, "policies": {}}


def _to(inputs: Any, model: Any) -> Any:
    """On the model's device; pixels in its dtype."""
    return inputs.to(model.device, model.dtype)


def _text_only(tokenizer: Any, questions: list[str]) -> Any:
    """A left-padded batch for a language model: its chat template where it has one, else as LLaVA-1.5 asks."""
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer([chat.prompt(tokenizer, question, picture=False) for question in questions], **how)
    turns = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False, **how)
