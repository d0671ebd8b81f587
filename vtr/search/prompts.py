"""Calibration questions as batches: left-padded prompts, each with its answer's tokens behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr import chat
from vtr.engine.install import patch_of
from vtr.engine.midway import Midway, enter
from vtr.policies.decoder.gsearch import GSearch
from vtr.search.data import Example, examples
from vtr.search.metrics import Objective, objective_of

QUESTIONS = 8
"""Questions in one call at most; more rows are more candidates."""


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

    def values(self, objective: Objective, logits: Sequence[torch.Tensor]) -> list[float]:
        """The score of each piece of logits; they belong to the rows in turn, as often as there are pieces."""
        rows = [i % len(self) for i in range(len(logits))]
        scores = [
            objective.score(one, self.targets[row], self.full[row] if self.full else None)
            for one, row in zip(logits, rows, strict=True)
        ]
        return torch.stack(scores).tolist()


class Prepared:
    """Calibration questions encoded and run unreduced once: what every search on them begins with.

    Several searches on the same questions can share one: give it as their ``data``.

    Args:
        model: patched. data: see :func:`vtr.search.examples`. objective: of :data:`vtr.search.OBJECTIVES`.
        batch_size: rows (questions × candidates) in one call at most. max_new_tokens: of the model's own answers.
        tick: called with the number of questions done.

    Attributes:
        base: the unreduced model's score on each question. sizes: (vision, text) tokens of each prompt.
        starts: each batch's rows on entering layer 0.

    Raises:
        ValueError, TypeError: settings out of range, data that cannot be used, a model that is not patched or trains;
            no question that the unreduced model answers as the data does, if right answers are counted.
    """

    def __init__(
        self, model: Any, processor: Any, data: Any, objective: str = "kl", batch_size: int = 32,
        max_new_tokens: int = 16, tick: Callable[[int], Any] = lambda count: None,
    ) -> None:  # fmt: skip
        model = patch_of(model).model
        if model.training:
            raise ValueError("a search needs the model as it is used: call model.eval() first")
        if batch_size < 1 or max_new_tokens < 1:
            raise ValueError(f"batch_size={batch_size}, max_new_tokens={max_new_tokens}: both must be at least 1")
        self.model, self.processor, self.objective = model, processor, objective_of(objective)
        self.examples: list[Example] = examples(data)
        self.depth = len(model.get_decoder().layers)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.together = min(QUESTIONS, batch_size)
        self.batches: list[Prompts] = []
        self.starts: list[Midway] = []
        self.base: list[float] = []
        self.sizes: list[tuple[int, int]] = []
        for start in range(0, len(self.examples), self.together):
            self._add(self.examples[start : start + self.together])
            tick(len(self.batches[-1]))
        if self.objective.best == 1.0 and not any(self.base):
            raise ValueError(
                f"the unreduced model answers none of {len(self.base)} questions as the data does, so nothing can be "
                'lost: use objective="agreement" or "kl", which need no answers'
            )

    @torch.inference_mode()
    def _add(self, part: Sequence[Example]) -> None:
        batch = prompts_of(self.model, self.processor, part, self.objective, self.max_new_tokens)
        state = enter(self.model, batch.inputs, GSearch([1.0] * self.depth), batch.length)
        end = state.go([(row, None) for row in range(len(batch))], self.depth)
        logits = answer_logits(self.model, end, batch.counts)
        if self.objective.compares:
            batch.full = [one.log_softmax(-1) for one in logits]
        self.base += batch.values(self.objective, logits)
        self.sizes += state.sizes
        self.starts.append(state)
        self.batches.append(batch)


def answer_logits(model: Any, end: Midway, counts: Sequence[int]) -> list[torch.Tensor]:
    """Float32 logits [m, vocab] that predict each row's last m tokens-to-come, after all layers."""
    return list(model.get_output_embeddings()(end.last(counts)).float().split(list(counts)))


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
