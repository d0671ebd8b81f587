"""The slow dense reference that ships in ``vtr.testing``, and what the shipped policies ask of it."""

from __future__ import annotations

from typing import Any

from vtr.testing.dense import *  # noqa: F403
from vtr.testing.dense import Given, Rank, Rule
from vtr.testing.watched import Watched as Watched


def rule(policy: Any, kept: list[list[int]]) -> Rule:
    """What a policy that only cuts asks for; ``kept`` are the reported slots, for those that cannot be derived again.

    What others answer is written down by :class:`Watched`.
    """
    if policy is None:
        return None
    settings = policy.config()
    if policy.name == "fastv":
        return Rank({settings["layer"]: settings["keep"]}, "last")
    if policy.name == "gsearch":
        return Rank(dict(enumerate(settings["schedule"])), settings["queries"])
    if policy.name == "pyramid":
        stages = settings["layers"] or [len(kept) * (i + 1) // (len(settings["keeps"]) + 1) for i in range(99)]
        return Rank(dict(zip(stages, settings["keeps"], strict=False)), "ahead", settings["positions"] == "reindex")
    return Given(kept)
