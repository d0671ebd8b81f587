"""Reads of an ONNX file what weights need: its tensors, and which node takes which. Nothing is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

TYPES = {1: "<f4", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}
"""ONNX's number of a type → numpy's name of it."""
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operation."""

    kind: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class Graph:
    """Tensors by name (constants among them), and the nodes in order."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def fields(raw: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a protobuf message: an int, or bytes.

    Raises:
        ValueError: it is cut short, or no such message.
    """
    at = 0
    try:
        while at < len(raw):
            key, at = _varint(raw, at)
            if key & 7 == VARINT:
                value, at = _varint(raw, at)
                yield key >> 3, value
                continue
            size = {EIGHT: 8, FOUR: 4}.get(key & 7)
            if key & 7 == BYTES:
                size, at = _varint(raw, at)
            if size is None or at + size > len(raw):
                raise ValueError("this is no ONNX file, or one that was cut short")
            yield key >> 3, raw[at : at + size]
            at += size
    except IndexError:
        raise ValueError("this is no ONNX file, or one that was cut short") from None


def _inner(raw: memoryview, number: int) -> Iterator[memoryview]:
    return (value for key, value in fields(raw) if key == number and isinstance(value, memoryview))


def _texts(raw: memoryview, number: int) -> list[str]:
    return [bytes(value).decode() for value in _inner(raw, number)]


def _tensor(raw: memoryview) -> tuple[str, np.ndarray] | None:
    """Name and values; None where they are of a type or in a form that weights do not have."""
    shape: list[int] = []
    kind, name, values = 0, "", None
    for key, value in fields(raw):
        if key == 1 and isinstance(value, int):
            shape.append(value)
        elif key == 1 and isinstance(value, memoryview):  # packed
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                shape.append(size)
        elif key == 2 and isinstance(value, int):
            kind = value
        elif key == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif (key == 9 or (key == 4 and kind == 1)) and isinstance(value, memoryview):
            values = value
    if kind not in TYPES or values is None:
        return None
    flat = np.frombuffer(values, TYPES[kind])
    if flat.size != math.prod(shape):
        raise ValueError(f"tensor {name} has {flat.size} values, its shape {shape} needs {math.prod(shape)}")
    return name, flat.reshape(shape)


def read(raw: bytes) -> Graph:
    """The graph of an ONNX model.

    Raises:
        ValueError: this is none, or it was cut short.
    """
    found = Graph()
    for graph in _inner(memoryview(raw), 7):
        for key, value in fields(graph):
            if key == 5 and isinstance(value, memoryview) and (one := _tensor(value)) is not None:
                found.tensors[one[0]] = one[1]
            elif key == 1 and isinstance(value, memoryview):
                found.nodes.append(_node(value, found))
    if not found.nodes:
        raise ValueError("this is no ONNX file: it holds no graph")
    return found


def _node(raw: memoryview, graph: Graph) -> Node:
    node = Node("".join(_texts(raw, 4)), _texts(raw, 1), _texts(raw, 2))
    if node.kind == "Constant" and node.outputs:
        for attribute in _inner(raw, 5):
            for inside in _inner(attribute, 5):
                if (one := _tensor(inside)) is not None:
                    graph.tensors[node.outputs[0]] = one[1]
    return node
