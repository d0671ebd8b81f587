"""What a search has tried so far, written after every round, so that an interrupted one goes on where it was.

The search itself is deterministic: it is run again from its beginning, and what was scored before is looked up. Floats
are written so that they are read back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vtr.files import read_json
from vtr.keep import Keep
from vtr.search.data import Example
from vtr.search.prefix import Spent

VERSION = 1
LONGEST = 2**28
"""Bytes of a search's state: a line for each schedule that was tried."""


class Trials:
    """Schedule → mean score (None: dropped before it was known), of one search.

    Args:
        path: where they are kept; None keeps them in memory. identity: all that scores depend on.

    Raises:
        ValueError: the file is no search state, is damaged, or is another search's. It is left as it is.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.scores: dict[str, float | None] = {}
        self.spent = Spent()
        self.resumed = 0
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self) -> None:
        assert self.path is not None
        away = f"move {self.path} away to begin anew, or name another state file; nothing was overwritten"
        try:
            data = read_json(self.path, "the state of a search", LONGEST)
            body, version, digest = data["body"], data["version"], data["sha256"]
            identity, scores, spent = body["identity"], body["scores"], Spent(**body["spent"])
            if not isinstance(identity, dict) or not isinstance(scores, dict):
                raise TypeError("identity and scores are no objects")
            if strange := [k for k, v in scores.items() if v is not None and not _finite(v)]:
                raise ValueError(f"scores that are no numbers: {', '.join(strange)[:200]}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not the state of a search, or is damaged ({error!r}): {away}") from error
        if version != VERSION:
            raise ValueError(f"{self.path} was written by another version of vtr ({version!r}): {away}")
        if digest != _digest(body):
            raise ValueError(f"{self.path} is damaged (its checksum does not fit): {away}")
        if isinstance(identity, dict) and isinstance(identity.get("settings"), dict):
            identity["settings"].pop("trials", None)  # noted once; no score depends on it
        if identity != self.identity:
            other = sorted(key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key))
            raise ValueError(f"{self.path} is of another search (not the same: {', '.join(other)}): {away}")
        self.scores, self.spent, self.resumed = scores, spent, len(scores)

    def save(self) -> None:
        """Write the file whole: a crash leaves the old one or the new one."""
        if self.path is None:
            return
        body = {"identity": self.identity, "scores": self.scores, "spent": self.spent.to_json()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".part")
        fresh.write_text(json.dumps({"version": VERSION, "sha256": _digest(body), "body": body}, indent=1) + "\n")
        os.replace(fresh, self.path)


def _finite(score: Any) -> bool:
    return type(score) in (int, float) and math.isfinite(score)


def key_of(keeps: Sequence[Keep]) -> str:
    """A schedule's name in the file."""
    return json.dumps(list(keeps))


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def data_digest(data: Iterable[Example]) -> str:
    """Of pictures, questions and answers, in order."""
    parts = [f"{one.picture}\n{one.question}\n{one.answer}" for one in data]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@torch.no_grad()
def model_digest(model: Any) -> str:
    """Of a model's class and of a few values of every weight."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 16)][:16].float().cpu()
        found.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]
