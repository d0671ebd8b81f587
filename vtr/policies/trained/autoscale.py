"""AutoScale: which of M3's nested scales a request needs, chosen without knowing the answer.

M3's paper finds a large gap between every fixed scale and an oracle that takes the smallest sufficient one per
question, and leaves choosing open. The two choosers here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vtr.base import Answer, Policy, Tries
from vtr.checks import check_count, check_number
from vtr.image import Layout, scales
from vtr.policies.trained import _router as router
from vtr.settings import build, register_policy

MOST_TOKENS = 2**20
"""Tokens per tile that a scale may have."""
MOST_TRIED = 1024
"""Tokens of an answer that a try may look at."""


def confidence(answer: Answer) -> float:
    """The smallest probability that a token of the answer was given."""
    chosen = answer.logits.float().softmax(-1).gather(1, answer.ids[:, None])
    return float(chosen.min())


def calibrated(raw: float, line: Sequence[float]) -> float:
    """Platt's scaling: the sigmoid of a line of the confidence's logit. line: (slope, intercept)."""
    raw = min(max(raw, 1e-6), 1 - 1e-6)
    there = line[0] * math.log(raw / (1 - raw)) + line[1]
    return 1 / (1 + math.exp(min(max(-there, -700.0), 700.0)))


@register_policy("autoscale")
@dataclass
class AutoScale(Policy):
    """Each request at the smallest of M3's scales that will do, by its own estimate.

    ``cascade`` tries: the coarsest scale answers first; as long as the confidence of its first tokens, calibrated, is
    below the threshold, the next finer one does (the finest is taken without trying). All tries are counted in the
    report (``rows[b].tries``, ``flops``, ``selector_ms``). ``router`` looks at the thumbnail's tokens and the question
    and chooses at once, by a small network with an estimate per scale that it suffices; it needs trained weights
    (``vtr.training.autoscale``), which are saved and loaded with the policy. Weights for the embedded model:
    ``vtr.pocket.autoscale("cascade")``, ``("router")``.

    Chosen around ``generate``: not for a direct forward, beams, streamers, or a conversation that goes on.

    Args:
        method: "cascade" or "router".
        threshold: a scale is taken if the estimate that it suffices is at least this, in (0, 1].
        scales: tokens per tile, coarsest first; the last one is taken if no other suffices. None: all the grid has.
        calibration: for the cascade, (slope, intercept) of every scale but the last (see :func:`calibrated`); None
            takes the probability as it is.
        answer_tokens: how many tokens of the answer a try looks at.

    Raises:
        TypeError, ValueError: settings out of range; when the grid is known, a scale it does not have.
    """

    method: Literal["cascade", "router"] = "cascade"
    threshold: float = 0.9
    scales: Sequence[int] | None = None
    calibration: Sequence[Sequence[float]] | None = None
    answer_tokens: int = 1

    def __post_init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        if self.method not in ("cascade", "router"):
            raise ValueError(f"method={self.method!r}: choose 'cascade' or 'router'")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, float) or not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r}: a probability, a float above 0 and at most 1.0")
        whole = isinstance(self.answer_tokens, int) and not isinstance(self.answer_tokens, bool)
        if not whole or not 1 <= self.answer_tokens <= MOST_TRIED:
            raise ValueError(
                f"answer_tokens={self.answer_tokens!r}: a try looks at 1 token at least, at {MOST_TRIED} at most"
            )
        if self.scales is not None:
            if isinstance(self.scales, str):
                raise TypeError(f"scales={self.scales!r}: a list of tokens per tile, e.g. [9, 36]")
            self.scales = list(self.scales)
            for count in self.scales:
                check_count(count, "scales", 1, MOST_TOKENS)
            if len(self.scales) < 2 or self.scales != sorted(set(self.scales)):
                raise ValueError(f"scales={self.scales}: name at least two, from the coarsest to the finest")
        if self.calibration is not None:
            self.calibration = [[check_number(number, "calibration") for number in line] for line in self.calibration]
            if self.scales is None or len(self.calibration) != len(self.scales) - 1:
                raise ValueError("calibration has one (slope, intercept) per scale but the last: name scales as well")
            if any(len(line) != 2 for line in self.calibration):
                raise ValueError(f"calibration={self.calibration}: every entry is (slope, intercept)")

    # -- weights ---------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.weights)

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Take a router's weights.

        Raises:
            ValueError: other tensors than a router's, of shapes that do not fit each other or the scales, or not
                finite.
        """
        self.expect(tensors, about)
        self.weights = router.checked(tensors)

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        """Raise ValueError unless ``tensors`` have the names of a router's, and shapes that fit each other."""
        if self.method != "router" or self.scales is None or about is not None:
            raise ValueError("only AutoScale(method='router', scales=[…]) has weights, and nothing is said about them")
        router.expect(tensors, len(self.scales) - 1)

    def estimates(self, x: torch.Tensor) -> torch.Tensor:
        """The router's estimates that each scale but the last suffices: float32 [rows, scales - 1].

        Args:
            x: [rows, 3 · hidden_size], of :func:`vtr.policies.trained._router.router_input`.
        """
        return router.estimates(self.weights, x)

    # -- choosing --------------------------------------------------------------------------------------------------
    def resolve(self, tries: Tries) -> list[Policy | None]:
        ladders = [self._ladder(layouts) for layouts in tries.layouts]
        if self.method == "router":
            return self._routed(tries, ladders)
        chosen, open_ = [0] * len(ladders), [row for row, ladder in enumerate(ladders) if len(ladder) > 1]
        for step in range(max(map(len, ladders), default=0) - 1):
            open_ = [row for row in open_ if step < len(ladders[row]) - 1]
            if not open_:
                break
            answers = tries.answer({row: self._at(ladders, row, step, tries) for row in open_}, self.answer_tokens)
            line = (1.0, 0.0) if self.calibration is None else self.calibration[step]
            doubtful = [row for row in open_ if calibrated(confidence(answers[row]), line) < self.threshold]
            for row in doubtful:
                chosen[row] = step + 1
            open_ = doubtful
        return [self._at(ladders, row, step, tries) for row, step in enumerate(chosen)]

    def _routed(self, tries: Tries, ladders: list[list[int]]) -> list[Policy | None]:
        if not self.weights:
            raise ValueError(
                "this router has no weights: vtr.training.autoscale trains one, AutoScale.from_pretrained(folder) "
                'loads it, vtr.pocket.autoscale("router") is that of the embedded model'
            )
        rows = [row for row, ladder in enumerate(ladders) if ladder]
        chosen = [0] * len(ladders)
        if rows:
            images, questions = tries.images(), tries.questions()
            sure = self.estimates(torch.stack([router.router_input(images[row], questions[row]) for row in rows]))
            for row, estimates in zip(rows, sure.tolist(), strict=True):
                enough = (step for step, estimate in enumerate(estimates) if estimate >= self.threshold)
                chosen[row] = next(enough, len(ladders[row]) - 1)
        return [self._at(ladders, row, step, tries) for row, step in enumerate(chosen)]

    def _ladder(self, layouts: Sequence[Layout]) -> list[int]:
        """The scales to choose from for a row's images; none for a row without."""
        if not layouts:
            return []
        ladder = sorted(scales(layouts[0].grid)) if self.scales is None else list(self.scales)
        for layout in layouts:
            known = scales(layout.grid)
            if wrong := [count for count in ladder if count not in known]:
                height, width = layout.grid
                raise ValueError(
                    f"scale {wrong[0]} is none of tiles of {height} × {width} tokens: choose among "
                    f"{', '.join(map(str, known))}"
                )
        return ladder

    @staticmethod
    def _at(ladders: list[list[int]], row: int, step: int, tries: Tries) -> Policy | None:
        """The policy of a step; None where nothing is pooled."""
        if not ladders[row]:
            return None
        count = ladders[row][step]
        whole = all(count == layout.grid[0] * layout.grid[1] for layout in tries.layouts[row])
        return None if whole else build("m3", {"tokens": count})
