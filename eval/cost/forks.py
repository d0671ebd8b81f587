"""Many questions on one picture: forks of one prefill beside a prefill for each question, in turns, in CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from vtr.eval.cost.interleave import in_turns, keep_freed_memory, median_ratio

import vtr
from vtr.engine.compat import cache_name

WAYS = ("prefills", "forks", "batch of prefills", "batch of forks")
POLICIES = ("none", "m3:tokens=36", "globalcom2:retention=0.25")


@dataclass
class Bench:
    """The prompts of one picture.

    Attributes:
        whole: each question's inputs as the processor gives them, one row each. batch: all of them, padded on the left.
        shared: how many tokens they all begin with, the picture among them. tokens: that are decoded, at most.
    """

    model: Any
    processor: Any
    whole: list[Any]
    batch: Any
    shared: int
    tokens: int

    @classmethod
    def on_pocket(cls, questions: int, tokens: int) -> Bench:
        """The pocket model's first picture, and questions that were drawn for several.

        Raises:
            ValueError: no question, or no token.
        """
        if questions < 2 or tokens < 1:
            raise ValueError(f"questions={questions}, tokens={tokens}: ask at least two questions, decode a token")
        model, processor = vtr.pocket.load()
        picture, _, _ = vtr.pocket.sample(0)
        asked = [sample["question"] for sample in vtr.pocket.samples(questions)]
        whole = [vtr.chat.encode(processor, [question], [picture]) for question in asked]
        batch = vtr.chat.encode(processor, asked, [picture] * questions)
        return cls(vtr.patch(model), processor, whole, batch, shared([one["input_ids"][0] for one in whole]), tokens)

    @property
    def cache(self) -> str:
        """What the installed transformers calls it."""
        made: Any = type(self.model)
        return cache_name(made)

    def prefix(self, policy: str | None) -> Any:
        """The cache of what all questions share."""
        first, n = self.whole[0], self.shared
        cut = {**first, "input_ids": first["input_ids"][:, :n], "attention_mask": first["attention_mask"][:, :n]}
        return self.model(**cut, policy=policy, use_cache=True, logits_to_keep=1)[self.cache]

    def answers(self, inputs: Mapping[str, Any], **more: Any) -> list[str]:
        out = self.model.generate(**inputs, **more, max_new_tokens=self.tokens, do_sample=False)
        return vtr.chat.decode(self.processor, out, inputs["input_ids"].shape[1])

    def prefills(self, policy: str | None) -> list[str]:
        return [self.answers(one, policy=policy)[0] for one in self.whole]

    def forks(self, policy: str | None) -> list[str]:
        cache, names = self.prefix(policy), ("input_ids", "attention_mask")
        asked = [{name: one[name] for name in names} for one in self.whole]
        return [self.answers(one, policy=None, **{self.cache: vtr.fork(cache)})[0] for one in asked]

    def batch_of_prefills(self, policy: str | None) -> list[str]:
        return self.answers(self.batch, policy=policy)

    def batch_of_forks(self, policy: str | None) -> list[str]:
        """Questions padded behind what they share."""
        n, width = self.shared, max(one["input_ids"].shape[1] for one in self.whole)
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": []}
        for one in self.whole:
            less = width - one["input_ids"].shape[1]
            for name, padded in rows.items():
                padded.append(torch.cat([one[name][:, :n], pad(one[name][:, n:], (less, 0))], 1))
        cache = vtr.fork(self.prefix(policy), len(self.whole))
        together = {name: torch.cat(padded) for name, padded in rows.items()}
        return self.answers(together, policy=None, **{self.cache: cache})


def shared(prompts: Sequence[torch.Tensor]) -> int:
    """How many tokens all prompts begin with; each int64 [n]."""
    least = min(map(len, prompts))
    alike = torch.stack([prompt[:least] for prompt in prompts])
    return int((alike == alike[0]).all(0).cumprod(0).sum())


@torch.inference_mode()
def measure(
    questions: int = 16, policies: Sequence[str] = POLICIES, rounds: int = 7, tokens: int = 4,
    done: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """CPU seconds of all questions, four ways that take turns in each round, on one thread.

    Args:
        policies: specs; "none": no reduction. rounds: timed ones. done: called after each run.

    Returns:
        questions, tokens, shared (tokens that all prompts begin with), and rows: per policy the seconds of each way and
        round, how many of the answers are the same, and the other ways' ratios to a prefill each.

    Raises:
        ValueError: too few questions, tokens or rounds, or a spec that is none.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: measure at least one")
    for spec in policies:
        if spec != "none":
            vtr.policy(spec)
    torch.set_num_threads(1)
    keep_freed_memory()
    bench, rows = Bench.on_pocket(questions, tokens), []
    ways = dict(zip(WAYS, (bench.prefills, bench.forks, bench.batch_of_prefills, bench.batch_of_forks), strict=True))
    for spec in policies:
        said: dict[str, list[str]] = {}
        runs = {name: partial(_timed, way, None if spec == "none" else spec, said, name) for name, way in ways.items()}
        seconds = in_turns(runs, rounds, done)
        ratios = {name: median_ratio(spent, seconds["prefills"]) for name, spent in seconds.items()}
        same = {name: sum(a == b for a, b in zip(one, said["prefills"], strict=True)) for name, one in said.items()}
        row = {"policy": spec, "seconds": seconds, "same": same}
        rows.append({**row, "ratios": {name: [r.value, r.low, r.high] for name, r in ratios.items()}})
    return {"questions": questions, "tokens": tokens, "shared": bench.shared, "clock": "CPU time", "rows": rows}


def _timed(way: Callable[[Any], list[str]], policy: str | None, said: dict[str, list[str]], name: str) -> float:
    start = time.process_time()
    said[name] = way(policy)
    return time.process_time() - start
