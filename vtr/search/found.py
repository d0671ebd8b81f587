"""What a search gives: a schedule that remembers how it was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtr.keep import Keep
from vtr.policies.decoder.gsearch import GSearch
from vtr.schedule import SCHEDULE_NAME, Schedule
from vtr.search.curve import fit, plot

RECORD_NAME, CURVE_NAME = "search.json", "curve.png"


class Found(Schedule):
    """A :class:`~vtr.Schedule` (use it as one) with the record of its search.

    Attributes:
        record: JSON data. ``method``, ``objective``, ``queries``; ``base`` and ``score``: of the unreduced model and of
            this schedule on the calibration questions; ``ratios``: its cost to no reduction (flops, kv, keep);
            ``sizes``: (vision, text) tokens of the prompts; ``spent``: layer-forwards of the search and of a naive one;
            ``ranks``: rank agreement between layers;
            ``warnings``; ``pictures``: digests of those that were searched on; ``trials``: what was tried, in order.
    """

    def __init__(self, keeps: Sequence[Keep], record: dict[str, Any]) -> None:
        super().__init__(keeps)
        self.record = record

    @property
    def schedule(self) -> Schedule:
        """The schedule alone."""
        return Schedule(list(self))

    def policy(self) -> GSearch:
        """The policy it was searched for: this schedule under the search's ranking."""
        return GSearch(self.schedule, queries=self.record["queries"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write policy, schedule, record and curve; ``vtr.GSearch.from_pretrained(folder)`` reads the policy back."""
        folder = Path(folder)
        self.policy().save_pretrained(folder)
        self.schedule.save(folder / SCHEDULE_NAME)
        (folder / RECORD_NAME).write_text(json.dumps(self.record, indent=1) + "\n")
        start = self.record["start"]
        figure = plot({self.record["method"]: self.schedule}, fitted=fit(self.schedule, start), start=start)
        figure.savefig(folder / CURVE_NAME, dpi=120)
