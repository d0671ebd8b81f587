"""A search under way: candidates are scored round by round, looked up if they were scored before, saved after each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from vtr.base import SCORES, Scores
from vtr.engine.install import patch_of
from vtr.keep import Keep
from vtr.search.cost import Cost
from vtr.search.found import Found
from vtr.search.prefix import Reuse, Scorer
from vtr.search.prompts import Prepared
from vtr.search.ranking import Ranks, rank_agreement
from vtr.search.state import Trials, data_digest, key_of, model_digest

RANKED = 8
"""Questions on which the paper's assumption is checked."""


class Search:
    """What both searches need. Use as a context manager; Ctrl-C leaves the state of the last full round behind.

    Args:
        settings: what else the result depends on. The others: as for :func:`vtr.search.gsearch`.
        trials: how long it searches. No score depends on it, so a search that is over goes on with more.
    """

    def __init__(
        self, model: Any, processor: Any, data: Any, *, method: str, objective: str, start: int, queries: Scores,
        batch_size: int, max_new_tokens: int, seed: int, state: str | Path | None, reuse: Reuse, progress: bool,
        settings: dict[str, Any], trials: int | None = None,
    ) -> None:  # fmt: skip
        model = patch_of(model).model
        self.depth = patch_of(model).decoder.depth
        if isinstance(start, bool) or not isinstance(start, int) or not 1 <= start < self.depth:
            raise ValueError(f"start={start!r}: the first layer that may cut is one of 1…{self.depth - 1}")
        if queries not in SCORES:
            raise ValueError(f"queries={queries!r}: choose one of {', '.join(map(repr, SCORES))}")
        self.bar = tqdm(desc=method, unit=" prompts", disable=not progress)
        if not isinstance(data, Prepared):
            data = Prepared(model, processor, data, objective, batch_size, max_new_tokens, self.bar.update)
        elif data.model is not model or data.objective.name != objective:
            raise ValueError(
                f"the prepared questions are of another model or objective ({data.objective.name!r}): prepare them "
                f"with vtr.search.Prepared(model, processor, data, objective={objective!r})"
            )
        self.model, self.processor, self.data = model, processor, data.examples
        self.method, self.start, self.queries, self.seed = method, start, queries, seed
        identity = {
            "method": method, "objective": objective, "start": start, "queries": queries,
            "batch_size": data.batch_size, "max_new_tokens": data.max_new_tokens, "seed": seed,
            "reuse": reuse, "settings": settings,
            "data": data_digest(self.data), "model": model_digest(model), "dtype": str(model.dtype),
            "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        }  # fmt: skip
        self.trials, self.asked_for = Trials(state, identity), trials
        self.scorer = Scorer(data, queries, reuse, self.bar.update)
        self.scorer.spent = self.trials.spent
        self.cost = Cost.from_model(model, self.scorer.sizes)
        self.tried: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def __enter__(self) -> Search:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt and self.trials.path is not None:
            tqdm.write(
                f"stopped; {len(self.trials.scores)} candidates are kept in {self.trials.path}: the same call goes on"
            )

    def means(
        self, prefix: Sequence[Keep], candidates: Sequence[Sequence[Keep]], floor: float | None = None
    ) -> list[float | None]:
        """The mean score of each candidate; see :meth:`Scorer.means`. A round: scored and saved together."""
        names = [key_of(one) for one in candidates]
        new = {name: one for name, one in zip(names, candidates, strict=True) if name not in self.trials.scores}
        if new:
            scores = self.scorer.means(prefix, list(new.values()), floor)
            self.trials.scores.update(zip(new, scores, strict=True))
            self.trials.save()
        out = [self.trials.scores[name] for name in names]
        for one, score in zip(candidates, out, strict=True):
            self.tried.append({"schedule": list(one), "score": score})
        return out

    def say(self, **what: Any) -> None:
        """Show on the bar where the search is."""
        self.bar.set_postfix(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in what.items()}
        )

    def ranks(self) -> Ranks:
        """Rank agreement between layers on some of the questions; warns where the paper's assumption does not hold."""
        ranks = rank_agreement(self.model, self.processor, self.data[:RANKED], queries=self.queries)
        if (told := ranks.warning(self.start)) is not None:
            self.warnings.append(told)
        return ranks

    def found(self, keeps: Sequence[Keep], score: float, ranks: Ranks | None, **more: Any) -> Found:
        """The result with its record."""
        settings = {**self.trials.identity["settings"], "trials": self.asked_for}
        record = {
            **self.trials.identity, "settings": settings, **more, "base": self.scorer.base_mean, "score": score,
            "ratios": self.cost.ratios(keeps), "sizes": self.scorer.sizes,
            "questions": len(self.data), "spent": self.scorer.spent.to_json(), "resumed": self.trials.resumed,
            "ranks": None if ranks is None else ranks.to_json(),
            "warnings": self.warnings, "pictures": sorted({one.picture for one in self.data}), "trials": self.tried,
        }  # fmt: skip
        return Found(keeps, record)
