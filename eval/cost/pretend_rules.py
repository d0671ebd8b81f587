"""What torch does on CUDA: which operations launch, which wait, which devices and types they take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch

aten = torch.ops.aten
WAITS = {
    aten.nonzero.default, aten.equal.default, aten.masked_select.default, aten.repeat_interleave.Tensor,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.allclose.default,
}  # fmt: skip
"""The host needs to know how many there are (or whether): it reads them."""
NEVER_LAUNCHED = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "set_", "resize_",
    "lift_fresh",
}  # fmt: skip
INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
NUMBERS = ("where", "masked_fill", "masked_fill_", "fill", "fill_")
"""Beside pointwise operations these take a tensor of one number from the CPU."""


@cache
def is_view(func: Any) -> bool:
    """Whether an operation gives another view of its argument's memory."""
    infos = [value.alias_info for value in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@cache
def is_index(func: Any) -> bool:
    return func._schema.name.partition("::")[2] in INDEX


@cache
def takes_numbers(func: Any) -> bool:
    """Whether an operation on the device takes a 0-d tensor of the CPU."""
    return torch.Tag.pointwise in func.tags or func._schema.name.partition("::")[2] in NUMBERS


def check_devices(
    func: Any, args: Sequence[Any], mine: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]
) -> torch.device:
    """The device on which an operation runs.

    Args:
        args: its arguments. mine: the tensors among them on pretended devices. hosts: those on the CPU.

    Raises:
        RuntimeError: they are not on one device, as CUDA says it.
    """
    device = mine[0].device
    found = {str(t.device) for t in mine}
    if isinstance(func, torch._ops.OpOverload):
        if is_index(func) and any(args[0] is t for t in mine):
            hosts = []  # indices may come from the CPU
        elif takes_numbers(func):
            hosts = [t for t in hosts if t.dim()]
    if hosts or len(found) > 1:
        names = " and ".join(sorted(found | {"cpu" for _ in hosts}))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names}! ({func})"
        )
    return device


def asked(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, torch.dtype | None, bool, bool]:  # fmt: skip
    """What a call of ``Tensor.to``, ``cuda`` or ``cpu`` asks for: device (or None), dtype, non_blocking, copy."""
    device: Any = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: "cuda"}.get(func)
    device = device if kwargs.get("device") is None else kwargs["device"]
    dtype, flags = kwargs.get("dtype"), []
    for value in (*args, *([kwargs["other"]] if "other" in kwargs else [])):
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif isinstance(value, (str, int, torch.device)):
            device = value
    non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
    copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
    return device, dtype, non_blocking, copy


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None,
    max_q: int, max_k: int, is_causal: bool = False, scale: float | None = None,
    window_size: Sequence[int] | None = None, enable_gqa: bool = False, seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None, num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """torch's packed kernel on the CPU, sequence by sequence; ends of sequences as the kernel is given them.

    Raises:
        RuntimeError: what the kernel refuses on a GPU.
        NotImplementedError: what it can and this cannot: paged keys, sliding windows.
    """
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError(f"FlashAttention takes heads of at most 256, multiples of 8, not {query.shape[-1]}")
    for ends in (cu_seq_q, cu_seq_k, seqused_k):
        if ends is not None and ends.dtype != torch.int32:
            raise RuntimeError(f"FlashAttention takes lengths of int32, not {ends.dtype}")
    if block_table is not None or cu_seq_k is None or list(window_size or (-1, -1)) not in ([-1, -1], [-1, 0]):
        raise NotImplementedError("the pretended kernel has no pages and no sliding windows")
    causal = is_causal or list(window_size or ()) == [-1, 0]
    outs, (of_q, of_k) = [], (cu_seq_q.tolist(), cu_seq_k.tolist())
    lengths = [b - a for a, b in pairwise(of_k)] if seqused_k is None else seqused_k.tolist()
    for (start, end), first, n in zip(pairwise(of_q), of_k[:-1], lengths, strict=True):
        q, k, v = (
            t.transpose(0, 1)[None].float()
            for t in (query[start:end], key[first : first + n], value[first : first + n])
        )
        seen = torch.ones(end - start, n, dtype=torch.bool).tril(n - (end - start)) if causal else None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1).to(query.dtype))
    none = query.new_empty(0)  # the log-sum-exp and the random state, which nobody asks for
    return torch.cat(outs), none, none


class Replaced:
    """Attributes of ``owner`` are others in this block."""

    def __init__(self, owner: Any, **others: Any) -> None:
        self.owner, self.others = owner, others

    def __enter__(self) -> None:
        self.before = {name: getattr(self.owner, name) for name in self.others}
        for name, other in self.others.items():
            setattr(self.owner, name, other)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, other in self.before.items():
            setattr(self.owner, name, other)
