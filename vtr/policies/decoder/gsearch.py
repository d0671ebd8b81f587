"""G-Search's way of reducing (Zhao et al., CVPR 2025, arXiv 2412.00556): a cut at every layer, by a keep-schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vtr.base import SCORES, Best, Policy, Scores, Tokens
from vtr.checks import check_on_continue, check_sharing
from vtr.keep import Keep, keep_count
from vtr.schedule import Schedule, presets
from vtr.score import Share, best
from vtr.settings import register_policy
from vtr.shares import LEAST, equal_steps, ratio


@register_policy("gsearch")
@dataclass
class GSearch(Policy):
    """A cut before every decoder layer, as a schedule says: the best vision tokens stay, dropped ones stay gone.

    Tokens are ranked by the attention they got in the layer before (paper, Fig. 2). Which queries and heads the paper
    takes is not published; ``queries="text"`` is our choice. :func:`vtr.search.gsearch` and :func:`vtr.search.psigmoid`
    find a schedule for a model; those read off the paper's figures are presets (:func:`vtr.schedule.presets`).

    Args:
        schedule: one keep per decoder layer (:class:`~vtr.Schedule` or a list), the name of a preset
            (``"llava-1.5-7b"``), or the path of a saved schedule or of a folder with a ``schedule.json``.
            ``schedule[0]`` must be 1.0: layer 0 has no layer before it to rank by.
        queries: "text", the mean over all text tokens after the image; "last", the last text token alone, as FastV;
            both mean over heads. "text-max", "last-max": of each text token the strongest head instead.
        layers: decoder layers of the model the schedule is to be used on; resampled to it, with a warning, if it was
            made for another depth. None: as it is.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".
        share: who competes: "row", all vision tokens of the row together; "image", those of each image among
            themselves, the budget divided by how many tokens the images have.

    Raises:
        TypeError, ValueError: settings out of range.
        FileNotFoundError: neither a preset nor a file.
    """

    schedule: Sequence[Keep] = field(default_factory=lambda: Schedule([1.0]))
    queries: Scores = "text"
    layers: int | None = None
    on_continue: str = "warn"
    share: Share = field(default="row", kw_only=True)

    question_guided: ClassVar[bool] = True

    @classmethod
    def example(cls) -> str:
        return f"{cls.name}:schedule=pocket"

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        schedule = settings.get("schedule")
        return isinstance(schedule, str) and schedule.lower() not in presets()

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """A keep at every layer, each the same share of the one before."""
        depth = num_hidden_layers
        if share * depth < 1 + LEAST:
            raise ValueError(f"layer 0 takes all tokens, so the mean over {depth} layers is at least {1 / depth:.3f}")
        step = equal_steps([1] * depth, share)
        return {"schedule": [1.0, *(ratio(step**layer) for layer in range(1, depth))]}

    if TYPE_CHECKING:  # the name of a schedule is taken too; the attribute is always a schedule

        def __init__(
            self, schedule: Sequence[Keep] | str | Path = ..., queries: Scores = ..., layers: int | None = None,
            on_continue: str = ..., *, share: Share = ...,
        ) -> None: ...  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.schedule, (str, Path)):
            self.schedule = Schedule.named(self.schedule)
        elif not isinstance(self.schedule, Schedule):
            self.schedule = Schedule(self.schedule)
        if self.layers is not None:
            self.schedule, self.layers = self.schedule.resample(self.layers), None
        if repr(self.schedule[0]) != "1.0":
            raise ValueError(
                f"schedule[0]={self.schedule[0]!r} must be 1.0: layer 0 has no attention before it to rank tokens by"
            )
        if self.queries not in SCORES:
            raise ValueError(f"queries={self.queries!r}: choose one of {', '.join(map(repr, SCORES))}")
        check_on_continue(self.on_continue)
        check_sharing(self.share)

    def check(self, num_hidden_layers: int) -> None:
        if len(self.schedule) != num_hidden_layers:
            raise ValueError(
                f"the schedule has {len(self.schedule)} entries, but the model has {num_hidden_layers} decoder layers: "
                f"give one keep per layer, or GSearch(…, layers={num_hidden_layers}) to stretch this one (a schedule "
                "searched for this very model is better: vtr search gsearch)"
            )

    def needs(self, layer: int) -> Scores | None:
        cuts = layer > 0 and repr(self.schedule[layer]) != repr(self.schedule[layer - 1])
        return self.queries if cuts else None

    def prune(self, layer: int, tokens: Tokens) -> Best | None:
        keep = keep_count(self.schedule[layer], tokens.total)
        if keep >= len(tokens) or tokens.scores is None:
            return None
        return best(tokens, tokens.scores, keep, self.share)
