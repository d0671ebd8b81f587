"""A pretended CUDA device for machines without one: tensors that say ``cuda:0`` and hold their data on the CPU.

    with pretended() as counts:
        model = vtr.patch(move(model))
        model.generate(**{name: t.to("cuda") for name, t in inputs.items()}, policy=policy)
    print(counts.totals(), counts.waits)

Every operation on such tensors runs on the CPU and is counted, with the line it comes from: launches of kernels, waits
of the host, copies from the host. What a GPU would refuse raises: tensors of several devices in one operation, a packed
kernel's wrong types. There may be any number of devices (``cuda:0``, ``cuda:1``, …). Nothing of it says how long
anything takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from vtr.eval.cost import pretend_rules as rules
from vtr.eval.cost.counts import Counts, Place

__all__ = ["Counts", "Place", "Pretended", "move", "plain", "pretended"]

HOST, CAPABILITY = torch.device("cpu"), (9, 0)
Module = TypeVar("Module", bound=nn.Module)
aten = torch.ops.aten
_counting: list[Counts] = []
"""Of the blocks that are open, the innermost last."""


def _counts() -> Counts:
    return _counting[-1] if _counting else Counts()


def _cuda(device: Any) -> torch.device:
    """A device as it was given, with an index if it is a pretended one."""
    found = torch.device("cuda", device) if type(device) is int else torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


class Pretended(torch.Tensor):
    """A tensor on a pretended device; torch's C++ takes it for one on the CPU, so it needs no CUDA."""

    _data: torch.Tensor
    _at: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: torch.Tensor, device: torch.device) -> Pretended:
        out: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=HOST, requires_grad=False,
        )  # fmt: skip
        out._data, out._at = data, device
        return out  # type: ignore[no-any-return]

    device = property(lambda self: self._at)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return int(self._at.index)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self._data!r} at {self._at}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


def plain(values: Any) -> Any:
    """A tensor's data on the CPU, or those of all tensors in a structure; nothing is counted or copied."""
    return tree_map_only(Pretended, lambda t: t._data, values)


def _plain(values: Any) -> Any:
    """:func:`plain` for arguments of operations, which are called thousands of times."""
    if isinstance(values, Pretended):
        return values._data
    kind = type(values)
    return kind([_plain(value) for value in values]) if kind is list or kind is tuple else values


def _wrapped(values: Any, device: torch.device, same: dict[int, Pretended]) -> Any:
    """Results on their device; what was changed in place (``same``, by the id of its data) is given back."""
    if isinstance(values, torch.Tensor):
        return same[id(values)] if id(values) in same else Pretended(values, device)
    kind = type(values)
    return kind([_wrapped(value, device, same) for value in values]) if kind is list or kind is tuple else values


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


# -- operations --------------------------------------------------------------------------------------------------------
def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One aten operation with at least one pretended tensor."""
    if torch.is_inference_mode_enabled() and func._can_decompose():
        return func.decompose(*args, **kwargs)
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    tensors = list(_tensors((*args, *kwargs.values())))
    mine = [t for t in tensors if isinstance(t, Pretended)]
    hosts = [t for t in tensors if not isinstance(t, Pretended)]
    device = rules.check_devices(func, args, mine, hosts)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    if func._schema.name == "torch_attn::_varlen_attn":
        run: Callable[..., Any] = rules.packed_attention
    else:
        run = func
    out = run(*_plain(tuple(args)), **{name: _plain(value) for name, value in kwargs.items()})
    _note(func, args, kwargs, hosts, out)
    if func is aten._local_scalar_dense.default:
        return out
    for t in mine:
        if t._data.shape != t.shape:
            raise NotImplementedError(f"{func} changes a pretended tensor's shape in place")
    return _wrapped(out, device, {id(t._data): t for t in mine})


def _copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``into.copy_(source)``, from wherever to wherever."""
    plain(into).copy_(plain(source))
    if not isinstance(into, Pretended):
        _counts().wait("copy_ to the host")
    elif isinstance(source, Pretended):
        _counts().launch("copy_")
    else:
        _counts().copy("copy_", non_blocking)
    return into


def _note(func: Any, args: Sequence[Any], kwargs: dict[str, Any], hosts: Sequence[torch.Tensor], out: Any) -> None:
    """Count what an operation asks of the device."""
    counts, name = _counts(), func._schema.name.partition("::")[2]
    if func is aten._local_scalar_dense.default:
        return counts.wait("item")
    made = list(_tensors([out]))
    if rules.is_view(func) or name in rules.NEVER_LAUNCHED or (made and not any(t.numel() for t in made)):
        return None
    times = 1
    if rules.is_index(func):
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        filled = name.startswith("index_put") and len(masks) == len(args[1]) == 1 and any(args[2] is t for t in hosts)
        if masks and not filled:  # of a mask its indices are found first
            counts.wait("index by a mask")
            times += len(masks)
        for _ in [] if filled else hosts:  # on the device a list is a tensor that is copied there
            counts.copy("index from the host")
    elif name == "where":
        times += len(hosts)  # a number is filled into a tensor first
    if func in rules.WAITS and kwargs.get("output_size") is None:
        counts.wait(name)
    counts.launch(name, times)


def _send(
    tensor: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool, copy: bool
) -> torch.Tensor:
    """``tensor.to``, where it or where it goes to is pretended."""
    here, counts = tensor.device, _counts()
    there, dtype = here if device is None else device, dtype or tensor.dtype
    if here == there and dtype == tensor.dtype and not copy:
        return tensor
    data = plain(tensor).to(dtype=dtype, copy=True)
    if not data.numel():
        return Pretended(data, there) if there.type == "cuda" else cast(torch.Tensor, data)
    if there.type != "cuda":
        if dtype != tensor.dtype:
            counts.launch("to(dtype)")
        if not non_blocking:  # else it goes into pinned memory, and an event says when it is there
            counts.wait(f"to({there.type})")
        return cast(torch.Tensor, data)
    if here.type == "cuda":
        counts.launch("to(dtype)" if here == there else "to(another device)")
    else:
        counts.copy("to(cuda)", non_blocking)
    return Pretended(data, there)


class _Calls(TorchFunctionMode):
    """What torch's C++ would decide by a tensor's device is decided here: factories, ``to`` and its like, sdpa."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, counts = kwargs or {}, _counts()
        first: Any = args[0] if args else None
        mine = isinstance(first, Pretended)
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            device, *rest = rules.asked(func, args[1:], kwargs)
            device = None if device is None else _cuda(device)
            if mine or (device is not None and device.type == "cuda"):
                return _send(first, device, *rest)
        elif kwargs.get("device") is not None:
            return _made(func, args, kwargs, _cuda(kwargs["device"]))
        elif func is torch.Tensor.type_as:
            return _send(first, args[1].device, args[1].dtype, False, False)
        elif mine and func is torch.Tensor.new_tensor:
            return _made(func, args, kwargs, first.device)
        elif mine and func is torch.Tensor.tolist:
            counts.wait("tolist")
            return first._data.tolist()
        elif mine and func is torch.Tensor.numpy:
            raise TypeError(f"can't convert {first.device} device type tensor to numpy. Use Tensor.cpu() first.")
        elif mine and func is nn.functional.scaled_dot_product_attention:
            tensors = list(_tensors((*args, *kwargs.values())))
            hosts = [t for t in tensors if not isinstance(t, Pretended)]
            device = rules.check_devices(func, args, [t for t in tensors if isinstance(t, Pretended)], hosts)
            counts.launch("scaled_dot_product_attention")
            return Pretended(func(*plain(args), **plain(kwargs)), device)
        elif func is torch.Tensor.pin_memory:
            return first.clone()
        return func(*args, **kwargs)


def _made(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """A tensor that is made on a device named by the caller: ``torch.arange(…, device=…)``."""
    leaves = list(_tensors((*args, *kwargs.values())))
    if device.type != "cuda" and not any(isinstance(t, Pretended) for t in leaves):
        return func(*args, **kwargs)
    here = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    out = func(*plain(args), **plain(here), device=HOST)
    if device.type != "cuda":
        return out
    counts, name = _counts(), func.__name__
    if not out.numel():
        pass
    elif name in ("tensor", "as_tensor", "asarray", "new_tensor"):
        if name == "new_tensor" or not any(isinstance(t, Pretended) for t in leaves):
            counts.copy(f"{name}(…, device=cuda)")
    elif name not in rules.NEVER_LAUNCHED:
        counts.launch(name)
    return Pretended(out, device)


# -- the device --------------------------------------------------------------------------------------------------------
class _Event:
    """What the host records costs nothing here, and takes no time."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _counts().wait("synchronize")


def _module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``nn.Module.to``, which asks C++ for the device of a tensor that it is given."""
    if args and isinstance(args[0], Pretended):
        args = (args[0].device, args[0].dtype, *args[1:])
    return _TO(module, *args, **kwargs)


_TO = nn.Module.to


@contextlib.contextmanager
def pretended() -> Iterator[Counts]:
    """In this block (of this thread, without gradients) there are pretended devices; yields what is asked of them.

    ``tensor.to("cuda")``, ``module.to("cuda")``, ``torch.zeros(3, device="cuda:1")`` and the like make pretended
    tensors; ``torch.cuda``'s events, ``synchronize`` and ``get_device_capability`` (9.0) answer. Blocks may lie in each
    other: what is asked counts for the innermost.
    """
    counts = Counts()
    answers: dict[str, Any] = {
        "Event": _Event,
        "synchronize": lambda device=None: _counts().wait("synchronize"),
        "current_stream": _Event,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: CAPABILITY,
    }
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    _counting.append(counts)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with rules.Replaced(torch.cuda, **answers), rules.Replaced(nn.Module, to=_module_to), torch.no_grad(), _Calls():
            yield counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        _counting.pop()


def move(module: Module, device: str = "cuda:0") -> Module:
    """The module, its parameters and buffers on a pretended device; nothing is counted. It runs in :func:`pretended`.

    Args:
        module: is changed: hand over a copy of what is needed on the CPU too.
    """
    with pretended():
        return module.to(device).requires_grad_(False)
