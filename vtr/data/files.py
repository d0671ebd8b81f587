"""JSON files of records: one object a line, or one array of objects; what is no record is named with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = 65536
ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\]|$)")
SPACE = re.compile(r"[ \t\n\r]*")
BOM = "\ufeff"


def check(path: Path) -> bool:
    """Whether a file that is there begins as JSON does (an empty one does not).

    Raises:
        ValueError: it is UTF-16 or UTF-32.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if b"\0" in head[:4]:
        raise ValueError(f"{path} is not UTF-8 (it looks like UTF-16): save it as UTF-8")
    return head.removeprefix(BOM.encode()).lstrip()[:1] in (b"{", b"[")


def read(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, record) one by one, blank lines left out; where there is no record, what is wrong there in words.

    A byte-order mark is skipped. A file that begins with ``[{`` is one array, and is held in memory while it is read.
    """
    with path.open("rb") as file:
        is_array = ARRAY.match(file.read(HEAD)) is not None
    return _array(path) if is_array else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # bytes: at \n alone, not at what Unicode calls a line's end
            try:
                text = line.decode().removeprefix(BOM)
                if text.strip():
                    yield number, _record(json.loads(text))
            except UnicodeDecodeError as error:
                yield number, f"is not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, _problem(error)


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # records say what in them is not UTF-8
    decode = json.JSONDecoder().raw_decode
    at, line, counted = text.index("[") + 1, 1, 0
    ready = True  # for a record: behind "[" or a comma
    while True:
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        here = text[at : at + 1]
        if here == "," and not ready:
            at, ready = at + 1, True
            continue
        if here == "]":
            if text[at + 1 :].strip():
                yield line, "is not JSON: something stands behind the array's end"
            return
        if not here or not ready:
            told = "a comma is missing" if here else "the array has no end, the file is cut short"
            yield line, f"is not JSON: {told}"
            return
        try:
            found, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, f"{_problem(error)}; the array cannot be read from here on"
            return
        ready = False
        yield line, _record(found)


def _record(found: Any) -> dict[str, Any] | str:
    return found if isinstance(found, dict) else "is no JSON object"


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is not JSON that can be read: it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} (column {error.colno})"
    return f"is not JSON: {error}"[:200]
