"""JSON bodies of requests, read and written anew at a cost that is bounded and that nobody else has to wait for.

Python reads and writes JSON in calls that no other thread can interrupt. So what is read in such a call is small: long
strings (pictures) are taken out before and put back after, and how much else there is has a limit.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

LONG = 2**16
"""Bytes from which on a string is taken out, and a body looked at before it is read."""
QUICK_BYTES, QUICK_QUOTES, QUICK_REST = 2**18, 160, 2**12
"""Bytes, quotation marks, and bytes outside of strings, up to which a body is read in about a millisecond."""
MOST_TEXT = 4 * 2**20
"""Bytes of a body without its long strings."""
MOST_QUOTES, MOST_COMMAS, MOST_BRACKETS = 2**19, 2**18, 2**15
"""Quotation marks; commas and opening brackets outside of strings."""
DEEPEST = 100
"""Lists and objects within each other."""
TOO_DEEP = f"lists and objects in each other, more than {DEEPEST} deep"
PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
"""Characters that stand for themselves in a string of JSON."""
MARK = re.compile(rb'"([0-9a-f]{32})-(\d+)"')
STEP = 2**20
Bytes = bytes | bytearray


class TooLarge(ValueError):
    """More than any request needs."""


class Taken:
    """Long strings that were taken out of a body, quotation marks and all. Each left a mark that nobody can guess."""

    def __init__(self) -> None:
        self.strings: list[Bytes] = []
        self.name = secrets.token_hex(16).encode()

    def take(self, string: Bytes) -> bytes:
        """Keep a string; what stands in its place."""
        self.strings.append(string)
        return b'"%s-%d"' % (self.name, len(self.strings) - 1)

    def put_back(self, body: bytes) -> bytes:
        """The body with its strings again."""
        if not self.strings:
            return body
        return MARK.sub(lambda mark: self.strings[int(mark[2])] if mark[1] == self.name else mark[0], body)


def quick(body: Bytes) -> bool:
    """Whether reading this body takes so little time that handing it to another thread takes more."""
    if len(body) > QUICK_BYTES or (b"\\" in body and b'\\"' in body):
        return False
    quotes = outside = begun = 0
    while (end := body.find(b'"', begun)) >= 0 and quotes <= QUICK_QUOTES:
        outside += 0 if quotes % 2 else end - begun
        quotes, begun = quotes + 1, end + 1
    return quotes <= QUICK_QUOTES and outside + (0 if quotes % 2 else len(body) - begun) <= QUICK_REST


def read(body: Bytes) -> tuple[Any, Taken]:
    """What a body says, marks for its long strings, and these strings.

    Raises:
        TooLarge: too much of it. ValueError: no JSON (NaN and infinities are none either), or too deep.
    """
    taken = Taken()
    small = _shortened(body, taken) if len(body) > LONG else body
    try:
        request = json.loads(small, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if _too_deep(request):
        raise ValueError(TOO_DEEP)
    return request, taken


def write(request: Any, taken: Taken) -> bytes:
    """The body that says ``request``, in ASCII.

    Raises:
        ValueError: a number that JSON has not.
    """
    return taken.put_back(json.dumps(request, allow_nan=False).encode())


def _shortened(body: Bytes, taken: Taken) -> bytes:
    """The body without its long plain strings."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in body[:4]:
        raise TooLarge(f"more than {LONG} bytes, and not in UTF-8: write it in UTF-8")
    if len(body) > MOST_QUOTES and body.count(b'"') > MOST_QUOTES:
        raise TooLarge(f"more than {MOST_QUOTES} quotation marks")
    parts: list[Bytes] = []
    left = commas = brackets = gap = 0
    while True:
        start = body.find(b'"', gap)
        between = body[gap : start if start >= 0 else len(body)]
        commas, brackets = commas + between.count(b","), brackets + between.count(b"[") + between.count(b"{")
        end = _end_of_string(body, start + 1) if start >= 0 else -1
        if end < 0:
            break
        if end - start > LONG and _plain(body, start + 1, end):
            parts += [body[left:start], taken.take(body[start : end + 1])]
            left = end + 1
        gap = end + 1
    if commas > MOST_COMMAS or brackets > MOST_BRACKETS:
        raise TooLarge(f"more than {MOST_COMMAS} commas or {MOST_BRACKETS} opening brackets outside of strings")
    parts.append(body[left:])
    if sum(map(len, parts)) > MOST_TEXT:
        raise TooLarge(f"more than {MOST_TEXT} bytes without its pictures")
    return b"".join(parts)


def _end_of_string(body: Bytes, at: int) -> int:
    """Where the string that begins at ``at`` has its closing quotation mark; -1: nowhere."""
    while (end := body.find(b'"', at)) >= 0:
        first = end
        while first > at and body[first - 1] == 0x5C:
            first -= 1
        if (end - first) % 2 == 0:
            return end
        at = end + 1
    return -1


def _plain(body: Bytes, start: int, end: int) -> bool:
    return not any(body[at : min(at + STEP, end)].translate(None, PLAIN) for at in range(start, end, STEP))


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _too_deep(request: Any) -> bool:
    here = [request]
    for _ in range(DEEPEST + 1):
        here = [one for one in here if isinstance(one, (dict, list))]
        if not here:
            return False
        here = [part for one in here for part in (one.values() if isinstance(one, dict) else one)]
    return True
