"""Answers of a long run, written down as they come: a run that was broken off goes on where it was.

A folder with a file for each process, a JSON object a line. The first says what the answers are of; the others are
answers by a key of the question. The files of all processes are read, so that a run may go on with more or fewer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from vtr.integrations.chat import Answer


class KeptAnswers:
    """Answers in a folder, read when it is opened; new ones are appended to this process's file.

    Args:
        about: what the answers are of: model, policy, …
        rank: of this process.

    Raises:
        ValueError: the folder holds answers of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int = 0) -> None:
        self._found: dict[str, Answer] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path, dict(about))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{rank}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        fresh = not path.exists() or not path.stat().st_size
        self._file: TextIO = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        if fresh:
            self._write({"about": dict(about)})

    def _read(self, path: Path, about: dict[str, Any]) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the process ended
                continue
            if "about" in entry and entry["about"] != about:
                changed = [name for name in about if entry["about"].get(name) != about[name]]
                raise ValueError(
                    f"{path} holds answers of another run ({', '.join(changed)} changed): name another folder, or "
                    "delete it"
                )
            if "key" in entry:
                self._found[entry["key"]] = Answer(**entry["answer"])

    def get(self, key: str) -> Answer | None:
        return self._found.get(key)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Write answers down; they are in the file when this returns."""
        for key, answer in answers.items():
            self._write({"key": key, "answer": asdict(answer)})
        self._file.flush()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


def key_of(*parts: Any) -> str:
    """A short name of a question: of its task, number, text and generation settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
