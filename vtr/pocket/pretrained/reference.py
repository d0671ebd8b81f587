"""The same tower and decoder once more, in plain NumPy on the packages' own numbers: what the rebuilt ones must give.

Written from the methods' formulas, not from transformers' code, and slow. Queries and keys of the decoder are turned as
llama.cpp turns them (neighbouring numbers), so the order of their rows is tested as well.
"""

from __future__ import annotations

import math

import numpy as np

from . import tower
from .gguf import Gguf


def _norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    away = x - x.mean(-1, keepdims=True)
    return away / np.sqrt((away**2).mean(-1, keepdims=True) + tower.EPS) * weight + bias


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def features(weights: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """What leaves the tower, [1 + patches, width], of one picture [3, side, side]."""
    kernel: np.ndarray = weights["embeddings.patch_embeddings.projection.weight"].astype(np.float64)
    width, _, patch, _ = kernel.shape
    side = pixels.shape[1] // patch
    cut = pixels.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4).reshape(side**2, -1)
    x = cut @ kernel.reshape(width, -1).T + weights["embeddings.patch_embeddings.projection.bias"]
    x = x + tower.resized(weights["positions"], side)[0].double().numpy()
    x = np.concatenate([(weights["embeddings.cls_token"] + weights["cls_position"])[0], x])
    for layer in range(tower.depth_of(weights)):
        part = {n.split(".", 3)[3]: w for n, w in weights.items() if n.startswith(f"encoder.layer.{layer}.")}
        x = x + part["layer_scale1.lambda1"] * _look(part, _norm(x, part["norm1.weight"], part["norm1.bias"]))
        y = _norm(x, part["norm2.weight"], part["norm2.bias"])
        y = _gelu(y @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"])
        x = x + part["layer_scale2.lambda1"] * (y @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"])
    return _norm(x, weights["layernorm.weight"], weights["layernorm.bias"])


def _look(part: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Attention of a block, everybody to everybody."""
    q, k, v = (
        (x @ part[f"attention.attention.{name}.weight"].T + part[f"attention.attention.{name}.bias"])
        .reshape(len(x), -1, tower.HEAD)
        .swapaxes(0, 1)
        for name in ("query", "key", "value")
    )
    seen = _softmax(q @ k.swapaxes(1, 2) / math.sqrt(tower.HEAD)) @ v
    out = part["attention.output.dense.weight"]
    return seen.swapaxes(0, 1).reshape(len(x), -1) @ out.T + part["attention.output.dense.bias"]


# -- decoder -----------------------------------------------------------------------------------------------------------
def logits(file: Gguf, ids: list[int]) -> np.ndarray:
    """float64 [tokens, vocabulary], of a text."""
    says, tensors = file.says, file.tensors
    words: np.ndarray = tensors["token_embd.weight"].astype(np.float64)
    x = words[ids]
    for layer in range(says["llama.block_count"]):
        part = {n.split(".")[2]: w for n, w in tensors.items() if n.startswith(f"blk.{layer}.")}
        x = x + _attend(file, part, _rms(file, x, part["attn_norm"]))
        y = _rms(file, x, part["ffn_norm"])
        gate = y @ part["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part["ffn_up"].T)) @ part["ffn_down"].T
    return _rms(file, x, tensors["output_norm.weight"]) @ words.T


def _rms(file: Gguf, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + file.says["llama.attention.layer_norm_rms_epsilon"]) * weight


def _turned(file: Gguf, x: np.ndarray) -> np.ndarray:
    """[heads, tokens, size], each pair of neighbours turned by its token's place."""
    half = x.shape[-1] // 2
    speed = file.says["llama.rope.freq_base"] ** (-np.arange(half) / half)
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * speed)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def _attend(file: Gguf, part: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Attention of a layer, everybody to those before."""
    heads, groups = file.says["llama.attention.head_count"], file.says["llama.attention.head_count_kv"]
    q = (x @ part["attn_q"].T).reshape(len(x), heads, -1).swapaxes(0, 1)
    k, v = ((x @ part[name].T).reshape(len(x), groups, -1).swapaxes(0, 1) for name in ("attn_k", "attn_v"))
    k, v = (np.repeat(one, heads // groups, 0) for one in (_turned(file, k), v))
    score = _turned(file, q) @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    score = np.where(np.tri(len(x), dtype=bool), score, -np.inf)
    return (_softmax(score) @ v).swapaxes(0, 1).reshape(len(x), -1) @ part["attn_output"].T
