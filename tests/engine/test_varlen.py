"""The packed kernel: whatever torch or flash-attn is installed, it is called as that release wants to be called."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE
from vtr.engine import varlen
from vtr.engine.once import Once

LENGTHS = (5, 1, 8)


def reference(q: Any, k: Any, v: Any, ends: Any, scale: float | None, causal: bool) -> torch.Tensor:
    """Attention of every row by itself. q: [T, heads, d]; k, v: [T, kv_heads, d], as many heads or a divisor."""
    assert ends.dtype == torch.int32
    outs = []
    for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        rows = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def torch_2_10(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False,
    return_aux: Any = None,
) -> Any:  # fmt: skip
    assert query.shape[1] == key.shape[1] and max_q == max_k == max(LENGTHS)
    return reference(query, key, value, cu_seq_q, None, is_causal)


def torch_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    assert query.shape[1] == key.shape[1]
    return reference(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def torch_2_12(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> Any:  # fmt: skip
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    return reference(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def flash_2(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Any:  # fmt: skip
    assert dropout_p == softcap == 0.0 and not return_attn_probs
    return reference(q, k, v, cu_seqlens_q, softmax_scale, causal)


def flash_3(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0,
) -> Any:  # fmt: skip
    assert seqused_q is None and seqused_k is None and qv is None
    return reference(q, k, v, cu_seqlens_q, softmax_scale, causal), torch.zeros(q.shape[1], len(q))


HERE = {"torch.nn.attention.varlen": "varlen_attn", "flash_attn": "flash_attn_varlen_func"}
FLASH_3 = "flash_attn_interface"


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    varlen.find_kernel.cache_clear()
    yield
    varlen.find_kernel.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Nothing is installed but these: ``torch=``, ``flash=``, ``flash3=``."""
    names = {"torch": "torch.nn.attention.varlen", "flash": "flash_attn", "flash3": FLASH_3}
    for kind, module in names.items():
        made = None
        if kind in functions:
            made = ModuleType(module)
            setattr(made, HERE.get(module, "flash_attn_varlen_func"), functions[kind])
        monkeypatch.setitem(sys.modules, module, made)  # None: importing it raises ImportError


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=0: capabilities[getattr(device, "index", device)]
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 16**-0.5, 0.1])
@pytest.mark.parametrize(
    "function",
    [{"torch": torch_2_10}, {"torch": torch_2_11}, {"torch": torch_2_12}, {"flash": flash_2}, {"flash3": flash_3}],
)
def test_every_release_is_called_as_it_wants(
    monkeypatch: pytest.MonkeyPatch, function: dict[str, Any], scaling: float | None, kv_heads: int
) -> None:
    installed(monkeypatch, **function)
    gpus(monkeypatch, (9, 0))
    made = torch.Generator().manual_seed(0)
    q = torch.randn(sum(LENGTHS), 4, 16, generator=made)
    k, v = (torch.randn(sum(LENGTHS), kv_heads, 16, generator=made) for _ in range(2))
    ends = varlen._ends(LENGTHS, q.device)
    kernel = varlen.find_kernel()
    assert kernel is not None
    out = kernel(q, k, v, ends, max(LENGTHS), scaling)
    torch.testing.assert_close(out, reference(q, k, v, ends, scaling, causal=True), atol=1e-5, rtol=1e-5)


def test_what_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(name: str) -> Any:
        def function(q: Any, k: Any, v: Any, *args: Any, **more: Any) -> Any:
            asked.append(name)
            return q

        return function

    everything = {name: noted(name) for name in ("torch", "flash", "flash3")}
    for gone, first in (("", "torch"), ("torch", "flash"), ("flash", "flash3")):
        everything.pop(gone, None)
        varlen.find_kernel.cache_clear()
        installed(monkeypatch, **everything)
        gpus(monkeypatch, (9, 0), (9, 0))
        kernel, q = varlen.find_kernel(), torch.zeros(1, 1, 8)
        assert kernel is not None
        kernel(q, q, q, torch.tensor([0, 1]), 1, None)
        assert asked[-1] == first
    for card in ((8, 0), (10, 0)):  # flash-attn 3 alone, and a card among them that it is not built for
        varlen.find_kernel.cache_clear()
        gpus(monkeypatch, (9, 0), card)
        assert varlen.find_kernel() is None
    varlen.find_kernel.cache_clear()
    installed(monkeypatch)
    assert varlen.find_kernel() is None


def heads(dtype: torch.dtype = torch.bfloat16, size: int = 16, count: int = 4, learns: bool = False) -> Any:
    """What the conditions look at of a tensor on a GPU."""
    return SimpleNamespace(
        shape=(1, count, 14, size), dtype=dtype, is_cuda=True, device=torch.device("cuda", 0), requires_grad=learns
    )


@pytest.mark.parametrize(
    ("q", "k", "capability", "taken"),
    [
        (heads(), heads(), (8, 0), True),
        (heads(torch.float16), heads(torch.float16), (9, 0), True),
        (heads(size=128, count=32), heads(size=128, count=8), (12, 0), True),
        (heads(size=256), heads(size=256), (8, 6), True),
        (heads(), heads(), (7, 5), False),
        (heads(torch.float16), heads(torch.float16), (7, 0), False),
        (heads(size=12), heads(size=12), (9, 0), False),
        (heads(size=264), heads(size=264), (9, 0), False),
        (heads(torch.float32), heads(torch.float32), (9, 0), False),
        (heads(), heads(torch.float32), (9, 0), False),
        (heads(size=192, learns=True), heads(size=192), (8, 6), True),
        (heads(size=256, learns=True), heads(size=256), (8, 6), False),
        (heads(count=4), heads(count=3), (9, 0), False),
    ],
)  # fmt: skip
def test_what_the_kernels_take(
    monkeypatch: pytest.MonkeyPatch, q: Any, k: Any, capability: tuple[int, int], taken: bool
) -> None:
    gpus(monkeypatch, capability)
    monkeypatch.setattr(varlen, "find_kernel", lambda: reference)
    monkeypatch.setattr(varlen, "_ends", lambda *_: None)
    plan: Any = SimpleNamespace(lengths=LENGTHS, past=(), once=Once())
    assert (varlen.packed_attention("sdpa", q, k, k, plan, None, {}) is not None) is taken


@pytest.mark.parametrize(
    ("base", "changes", "window", "kwargs"),
    [
        ("eager", {}, None, {}),
        ("sdpa", {"lengths": (14,)}, None, {}),
        ("sdpa", {"past": (3, 0, 0)}, None, {}),
        ("sdpa", {}, 4, {}),
        ("sdpa", {}, None, {"dropout": 0.1}),
        ("flash_attention_2", {}, None, {"softcap": 50.0}),
        ("flash_attention_3", {}, None, {"s_aux": torch.zeros(4)}),
    ],
)
def test_what_goes_row_by_row(
    monkeypatch: pytest.MonkeyPatch, base: str, changes: dict[str, Any], window: int | None, kwargs: dict[str, Any]
) -> None:
    gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(varlen, "find_kernel", lambda: reference)
    plan: Any = SimpleNamespace(**{"lengths": LENGTHS, "past": (), "once": Once(), **changes})
    assert varlen.packed_attention(base, heads(), heads(), heads(), plan, window, kwargs) is None


def test_no_kernel_and_no_gpu_go_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, (9, 0))
    plan: Any = SimpleNamespace(lengths=LENGTHS, past=(), once=Once())
    monkeypatch.setattr(varlen, "find_kernel", lambda: None)
    assert varlen.packed_attention("sdpa", heads(), heads(), heads(), plan, None, {}) is None
    on_cpu = torch.zeros(1, 4, 14, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(varlen, "find_kernel", lambda: reference)
    assert varlen.packed_attention("sdpa", on_cpu, on_cpu, on_cpu, plan, None, {}) is None


@pytest.mark.parametrize("family", ["llava_next", "internvl"])
def test_one_kernel_says_what_row_by_row_says(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = vtr.patch(getattr(tiny, family)(head_dim=16))
    inputs = tiny.batch(model, [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "which"]])
    policies = [vtr.FastV(0.5, layer=2), None, vtr.Pyramid()]
    want = model(**inputs, policy=policies).logits
    calls = []

    def kernel(q: Any, k: Any, v: Any, ends: Any, longest: int, scaling: Any) -> Any:
        calls.append(ends)
        return reference(q, k, v, ends, scaling, causal=True)

    monkeypatch.setattr(varlen, "takes", lambda *_: True)
    monkeypatch.setattr(varlen, "find_kernel", lambda: kernel)
    got = model(**inputs, policy=policies).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert len(calls) == 5 and len({id(ends) for ends in calls}) < 5  # layers of the same lengths share the table


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("policy", [vtr.FastV(0.5, layer=2), learned.dynamic()], ids=["fastv", "forgetting"])
def test_flash_attention_never_gets_a_mask(version: int, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one it would copy the whole cache to leave out what the mask hides: unequal rows go to sdpa."""
    name, calls = f"flash_attention_{version}", []

    def flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        assert attention_mask is None, "transformers unpads"
        calls.append(query.shape[2])
        n, m = query.shape[2], key.shape[2]
        causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, causal[None, None], **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, flash)
    stock = tiny.llava()
    inputs = tiny.batch(
        stock, [["ab", IMAGE, "what"], ["abc", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "b", IMAGE, "c"]]
    )
    want = tiny.generate(vtr.patch(copy.deepcopy(stock)), inputs, policy=policy, max_new_tokens=5)
    model = vtr.patch(copy.deepcopy(stock))
    model.get_decoder().config._attn_implementation = name
    got = tiny.generate(model, inputs, policy=policy, max_new_tokens=5)
    assert torch.equal(got, want) and {1} < set(calls)
