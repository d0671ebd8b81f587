"""Calibration questions as batches: left-padded prompts, each with its answer's tokens behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr import chat
from vtr.search.data import Example
from vtr.search.metrics import Objective


@dataclass(eq=False)
class Prompts:
    """Some questions, encoded.

    Attributes:
        inputs: what the model is called with; behind column ``length`` stand all tokens of the answers but the last.
        targets: int64 [m] of each row, the answer's tokens (with the end token, where the model has one).
        full: of each row the unreduced model's log-probabilities [m, vocab], if the objective needs them.
    """

    inputs: dict[str, Any]
    length: int
    targets: list[torch.Tensor]
    full: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def counts(self) -> list[int]:
        """Tokens in each answer."""
        return [len(one) for one in self.targets]


def prompts_of(
    model: Any, processor: Any, part: Sequence[Example], objective: Objective, max_new_tokens: int
) -> Prompts:
    """Encode some questions with the answers that the objective scores.

    Raises:
        ValueError: an example lacks the answer that the objective needs; an answer without tokens.
    """
    inputs = chat.encode(processor, [one.question for one in part], [one.image for one in part])
    inputs = inputs.to(model.device, model.dtype)
    ends = _ends(model, processor)
    if objective.labels:
        answers = [_label(processor.tokenizer, one, objective, ends) for one in part]
    else:
        answers = _own(model, processor, inputs, ends, max_new_tokens)
    length = inputs["input_ids"].shape[1]
    targets = [torch.tensor(answer, device=model.device) for answer in answers]
    return Prompts(_with_answers(dict(inputs), answers), length, targets)


def _ends(model: Any, processor: Any) -> list[int]:
    """The tokens that end an answer, the usual one first."""
    known = model.generation_config.eos_token_id
    known = processor.tokenizer.eos_token_id if known is None else known
    return [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]


def _label(tokenizer: Any, one: Example, objective: Objective, ends: list[int]) -> list[int]:
    if one.answer is None:
        raise ValueError(
            f"objective={objective.name!r} scores the data's answers, but {one.question!r} has none: give answers, or "
            'use "agreement" or "kl"'
        )
    ids = tokenizer(one.answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the answer {one.answer!r} has no tokens")
    return [*ids, *ends[:1]]


def _own(model: Any, processor: Any, inputs: Any, ends: list[int], max_new_tokens: int) -> list[list[int]]:
    """What the unreduced model says, up to and with its end token."""
    pad = processor.tokenizer.pad_token_id
    pad = ends[0] if pad is None and ends else pad
    out = model.generate(**inputs, policy=None, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    answers = []
    for said in out[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(said) if token in ends), len(said) - 1)
        answers.append(said[: stop + 1])
    return answers


def _with_answers(inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The last token of an answer predicts nothing that is scored, so it is left out; shorter answers are padded."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    width = max(map(len, answers)) - 1
    tail, seen = ids.new_zeros(len(ids), width), mask.new_zeros(len(ids), width)
    for row, answer in enumerate(answers):
        tail[row, : len(answer) - 1] = ids.new_tensor(answer[:-1])
        seen[row, : len(answer) - 1] = 1
    made = dict(inputs)
    for name, value in inputs.items():  # e.g. token_type_ids: text is type 0
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            made[name] = torch.cat([value, value.new_zeros(tail.shape)], 1)
    made["input_ids"], made["attention_mask"] = torch.cat([ids, tail], 1), torch.cat([mask, seen], 1)
    made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp_(min=0)  # as generate counts
    return made
