"""Results as they come, safe against a crash: one JSON line a sample, appended a batch at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtr.eval.accuracy.processes import Rank

from vtr.files import read_json

ROWS, SETTINGS = "samples.jsonl", "settings.json"
PART = re.compile(r"samples(\.\d+)?\.jsonl")


class Journal:
    """A folder's rows, by their ``index``. Every process appends to a file of its own.

    Args:
        folder: made if it is not there. rank: which process this is; 0 writes ``samples.jsonl``.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.path = folder, folder / (ROWS if rank == 0 else f"samples.{rank}.jsonl")
        self.rows: dict[int, dict[str, Any]] = {}
        self.redone = 0
        """Lines that were torn by a crash, to be made again."""

    @classmethod
    def opened(cls, folder: Path, rank: Rank, settings: Mapping[str, Any], resume: bool) -> Journal:
        """This process's part of a run: the first process claims the folder (:meth:`begin`), then all read."""
        made = cls(folder, rank.index)
        if rank.index == 0:
            made.begin(settings, resume)
        rank.wait()
        made.read()
        rank.wait()  # nobody appends before all have read
        return made

    def begin(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Claim the folder for a run with these settings. Rank 0 does it, before the others :meth:`read`.

        Raises:
            FileExistsError: rows of another run are there, and ``resume`` is False.
            ValueError: they were made with other settings, but for a ``limit`` that is larger now.
        """
        path, wanted = self.folder / SETTINGS, json.loads(json.dumps(settings))
        if self._files():
            if not resume:
                raise FileExistsError(
                    f"{self.folder} already holds results: --resume goes on with them; else give another folder"
                )
            known = read_json(path, "the settings of a run") if path.exists() else {}
            if not isinstance(known, dict):
                raise ValueError(f"{path} is not the settings of a run: give another folder")
            for key in sorted({*known, *wanted}):
                if not _goes_on(key, known.get(key), wanted.get(key)):
                    raise ValueError(
                        f"cannot go on with {self.folder}: {key} was {known.get(key)!r} and is now "
                        f"{wanted.get(key)!r}; give what was given then, or another folder"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(wanted, indent=1) + "\n")

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("samples*.jsonl")) if PART.fullmatch(path.name)]

    def read(self) -> None:
        """Load what is there; lines that do not parse (torn by a crash) are taken out of this process's file."""
        for path in self._files():
            good, torn = _parse(path.read_bytes())
            self.rows.update({row["index"]: row for row in good})
            self.redone += torn
            if torn and path == self.path:
                _replace(path, "".join(map(_line, good)))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows and wait until they are on the disk."""
        rows = list(rows)
        with self.path.open("ab") as file:
            file.write("".join(map(_line, rows)).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.update({row["index"]: row for row in rows})

    def merge(self) -> list[dict[str, Any]]:
        """All processes' rows in order; they become one ``samples.jsonl``. For rank 0, once the others are done."""
        self.read()
        rows = [self.rows[index] for index in sorted(self.rows)]
        _replace(self.folder / ROWS, "".join(map(_line, rows)))
        for path in self._files():
            if path.name != ROWS:
                path.unlink()
        return rows


def _goes_on(key: str, before: Any, now: Any) -> bool:
    """Whether a run with this setting contains one with that before: it is the same, or a limit that is larger (None:
    none)."""
    return before == now or (key == "limit" and before is not None and (now is None or now > before))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows of whole lines, and how many lines are not whole."""
    good, torn = [], 0
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(row, dict) and type(row.get("index")) is int
        except (ValueError, RecursionError):
            whole = False
        if whole:
            good.append(row)
        else:
            torn += 1
    return good, torn


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".part")  # a reader never sees half a file
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
