"""How cost grows: ``vtr bench scale``. With vision tokens (video frames), batch size and answer length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vtr.eval.cost import midsize
from vtr.eval.cost.batch import facts
from vtr.eval.cost.engine import prefill
from vtr.eval.cost.interleave import decode_in_turns, in_turns, keep_freed_memory
from vtr.eval.cost.midsize import LLAVA_7B, Size
from vtr.eval.cost.timing import milliseconds, now

import vtr
from vtr.budget import at_share

NAMES = ("random", "pool", "fastv")
BUDGET = 0.25
LONG = 5.0
"""A prefill of so many seconds needs no run to warm up."""


Runs = dict[str, list[list[float]]]
"""Policy → the seconds of every run at each size."""


@dataclass(frozen=True)
class Ladder:
    """The sizes that are run, one axis at a time.

    Attributes:
        size: the model, and the prompt where it does not grow: one picture and text.
        pictures: in a row, each of ``size.side`` squared tokens. batches: rows. answers: tokens decoded at batch 1.
        answer: tokens decoded where rows grow. repeats: timed runs.
    """

    size: Size
    pictures: tuple[int, ...]
    batches: tuple[int, ...]
    answers: tuple[int, ...]
    answer: int = 16
    repeats: int = 3


NARROW = Size(6, 256, 704, 4, side=24, text_tokens=32)
SMALL = Ladder(NARROW, (1, 2, 4, 8), (1, 2, 4, 8, 16), (16, 32, 64, 128, 256))
CPU = Ladder(NARROW, (1, 2, 4, 8, 16, 32, 52), (1, 2, 4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512, 1024, 2048))
CUDA = Ladder(LLAVA_7B, CPU.pictures, CPU.batches, CPU.answers)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares on log-log axes: cost grows as x to this power."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def policies(size: Size) -> dict[str, vtr.Policy | None]:
    """No reduction, and a few policies at one mean budget."""
    made = [at_share(name, BUDGET, size.layers, size.side) for name in NAMES]
    return {"none": None} | {policy.spec: policy for policy in made}


@dataclass(eq=False)
class Growth:
    """A patched model, and what it is run under."""

    ladder: Ladder
    model: Any
    field: Mapping[str, vtr.Policy | None]
    seed: int
    done: Callable[[], Any]

    def prompts(self, pictures: int, rows: int = 1) -> dict[str, torch.Tensor]:
        size = self.ladder.size
        return midsize.prompts(self.model, size, [(pictures, size.text_tokens)] * rows, self.seed)

    def generate(self, inputs: Mapping[str, Any], policy: vtr.Policy | None, tokens: int, criteria: Any = None) -> None:
        """A greedy answer of exactly so many tokens."""
        self.model.generate(
            **inputs, policy=policy, max_new_tokens=tokens, do_sample=False, suppress_tokens=[midsize.IMAGE_ID],
            stopping_criteria=criteria,
        )  # fmt: skip

    def prefill(self, inputs: Mapping[str, Any], policy: vtr.Policy | None) -> float:
        """Seconds of the text model on the prompt."""
        return prefill(self.model, inputs, policy=policy)

    def serve(self, inputs: Mapping[str, Any], policy: vtr.Policy | None) -> float:
        """Seconds of a prompt batch and a short answer."""
        start = now(self.model.device)
        self.generate(inputs, policy, self.ladder.answer)
        return now(self.model.device) - start

    def climb(
        self, sizes: Sequence[int], prompts: Callable[[int], Any], run: Callable[[Any, vtr.Policy | None], float]
    ) -> Runs:
        """Time ``run`` on the prompts of one size after the other, policies in turns."""
        found: Runs = {name: [] for name in self.field}
        warmup = True
        for size in sizes:
            inputs = prompts(size)
            runs = {name: partial(run, inputs, policy) for name, policy in self.field.items()}
            times = in_turns(runs, self.ladder.repeats, self.done, warmup)
            for name, seconds in times.items():
                found[name].append(seconds)
            warmup = max(map(max, times.values())) < LONG
        return found

    def vision_tokens(self) -> tuple[list[int], Runs]:
        """Prefill of one row of more and more pictures."""
        return [n * self.ladder.size.vision_tokens for n in self.ladder.pictures], self.climb(
            self.ladder.pictures, self.prompts, self.prefill
        )

    def batch(self) -> tuple[list[int], Runs]:
        """Prompt and short answer of more and more equal rows."""
        return [*self.ladder.batches], self.climb(self.ladder.batches, partial(self.prompts, 1), self.serve)

    def answer(self) -> tuple[list[int], Runs]:
        """One row and longer and longer answers, prompt included: points of one long answer each."""
        inputs, longest = self.prompts(1), max(self.ladder.answers)
        found: Runs = {name: [[] for _ in self.ladder.answers] for name in self.field}
        asks = {name: partial(self.prefill, inputs, policy) for name, policy in self.field.items()}
        prompt = in_turns(asks, self.ladder.repeats, self.done)
        for repeat in range(self.ladder.repeats):
            starts = {name: partial(self.generate, inputs, policy, longest) for name, policy in self.field.items()}
            for name, tokens in decode_in_turns(starts, self.model.device, self.done).items():
                so_far = list(accumulate(tokens, initial=prompt[name][repeat]))  # the prefill gives the first token
                for at, length in enumerate(self.ladder.answers):
                    found[name][at].append(so_far[length - 1])
        return [*self.ladder.answers], found


def steps(ladder: Ladder, contenders: int) -> int:
    """Runs and decoded tokens, for the progress bar (fewer where a warm-up is not needed)."""
    points = len(ladder.pictures) + len(ladder.batches) + 1
    return contenders * ((ladder.repeats + 1) * points + ladder.repeats * max(ladder.answers))


@torch.no_grad()
def measure(
    ladder: Ladder, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The body of a result of kind "scale"."""
    keep_freed_memory()
    ladder = replace(ladder, repeats=repeats or ladder.repeats)
    model = vtr.patch(midsize.build(ladder.size, device, dtype, seed=seed))
    field, series = policies(ladder.size), []
    with tqdm(total=steps(ladder, len(field)), unit="run", desc="vtr bench scale") as bar:
        growth = Growth(ladder, model, field, seed, bar.update)
        for axis in ("vision_tokens", "batch", "answer"):
            x, found = getattr(growth, axis)()
            for name, runs in found.items():
                ms = [milliseconds(seconds) for seconds in runs]
                fitted = slope(x, [point["median"] for point in ms])
                series.append({"axis": axis, "policy": name, "x": x, "ms": ms, "slope": fitted})
    return {
        "model": facts(ladder.size),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": ladder.repeats,
        "budget": BUDGET,
        "measured": {
            "vision_tokens": "prefill of the text model, one row, pictures of "
            f"{ladder.size.vision_tokens} tokens (a video's frames) and {ladder.size.text_tokens} text tokens",
            "batch": f"generate of {ladder.answer} tokens behind one picture and text, equal rows",
            "answer": "prefill of one picture and text, and the decoding of so many tokens, one row",
        },
        "series": series,
    }


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A measured result as table rows: axis, policy, first and last point, slope."""
    out = []
    for line in result["series"]:
        ends = [f"{line['x'][i]}: {line['ms'][i]['median']:.0f} ms" for i in (0, -1)]
        out.append((line["axis"], line["policy"], *ends, f"{line['slope']:.2f}"))
    return out
