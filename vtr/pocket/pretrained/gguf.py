"""Reads GGUF, the file format of llama.cpp: what the file says, and its tensors as float32."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC, VERSION = b"GGUF", 3
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
BLOCK = 32
"""Weights that share a scale."""


@dataclass(frozen=True)
class Gguf:
    """A file's contents: ``says`` by key, ``tensors`` by name, each of its usual shape (rows first)."""

    says: dict[str, Any]
    tensors: dict[str, np.ndarray]


class _Reader:
    """Takes one value after the other from the file's head."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.raw, self.at)
        self.at += struct.calcsize(kind)
        return value

    def text(self) -> str:
        length = self.take("Q")
        if length > len(self.raw) - self.at:
            raise ValueError("a text is longer than the file")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, count = self.take("I"), self.take("Q")
            if count > len(self.raw) - self.at:
                raise ValueError("a list is longer than the file")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])


# -- kinds of tensors --------------------------------------------------------------------------------------------------
def _plain(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4")


def _half(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f2").astype(np.float32)


def _scale(blocks: np.ndarray, at: int) -> np.ndarray:
    """float32 [blocks, 1], a half-precision number of every block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _four_bits(raw: np.ndarray) -> np.ndarray:
    """Q4_1: a scale, a minimum, then the low halves of 16 bytes and their high halves."""
    blocks = raw.reshape(-1, 20)
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    return numbers * _scale(blocks, 0) + _scale(blocks, 2)


def _eight_bits(raw: np.ndarray) -> np.ndarray:
    """Q8_0: a scale, then 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * _scale(blocks, 0)


KINDS: dict[int, tuple[str, int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: ("F32", 1, 4, _plain), 1: ("F16", 1, 2, _half), 3: ("Q4_1", BLOCK, 20, _four_bits),
    8: ("Q8_0", BLOCK, 34, _eight_bits),
}  # fmt: skip
"""Number in the file → name, weights of a block, bytes of a block, reader."""


def read(raw: bytes) -> Gguf:
    """A GGUF file of version 3.

    Raises:
        ValueError: it is something else, cut short, or its tensors are of a kind that is not read here.
    """
    if raw[:4] != MAGIC:
        raise ValueError("this is no GGUF file")
    head = _Reader(raw)
    head.at = 4
    try:
        if (version := head.take("I")) != VERSION:
            raise ValueError(f"GGUF version {version}: only {VERSION} is read here")
        tensors, entries = head.take("Q"), head.take("Q")
        says = {}
        for _ in range(entries):
            key = head.text()
            says[key] = head.value(head.take("I"))
        listed = [_listed(head) for _ in range(tensors)]
    except (struct.error, KeyError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the GGUF file's head cannot be read: {error}") from error
    align = int(says.get("general.alignment", 32))
    start = math.ceil(head.at / align) * align
    return Gguf(says, {name: _tensor(raw, start + at, name, shape, kind) for name, shape, kind, at in listed})


def _listed(head: _Reader) -> tuple[str, list[int], int, int]:
    """Name, shape, kind and place of a tensor; the file counts dimensions from the innermost."""
    name = head.text()
    shape = [head.take("Q") for _ in range(head.take("I"))][::-1]
    return name, shape, head.take("I"), head.take("Q")


def _tensor(raw: bytes, at: int, name: str, shape: list[int], kind: int) -> np.ndarray:
    if kind not in KINDS:
        known = ", ".join(one[0] for one in KINDS.values())
        raise ValueError(f"{name} is a GGUF tensor of kind {kind}: read here are {known}")
    label, block, size, reader = KINDS[kind]
    count = math.prod(shape)
    if count % block or at + count // block * size > len(raw):
        raise ValueError(f"{name} ({label}, {shape}) does not fit into the file")
    return reader(np.frombuffer(raw, np.uint8, count // block * size, at)).reshape(shape)
