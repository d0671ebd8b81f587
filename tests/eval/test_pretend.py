"""The pretended CUDA device: known calls have known counts, what a GPU refuses raises, results are the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtr.eval.cost.pretend import Counts, Place, move, plain, pretended

import vtr
from tests import learned, tiny
from tests.tiny import IMAGE


@pytest.fixture
def counts() -> Iterator[Counts]:
    with pretended() as found:
        yield found


def on_device() -> dict[str, Any]:
    """Tensors on the device: floats, three rows more, indices, a mask."""
    return {
        "x": torch.arange(24.0).reshape(4, 6).to("cuda"),
        "y": torch.full((3, 6), 7.0).to("cuda"),
        "i": torch.tensor([1, 2], device="cuda"),
        "mask": torch.tensor([True, False, True, True]).to("cuda"),
    }


def written(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


# -- what is counted ---------------------------------------------------------------------------------------------------
LAUNCHES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "arithmetic": (lambda x, **_: x * 2 + 1, ["mul", "add"]),
    "views": (lambda x, **_: x[1:, None].transpose(0, 2).expand(6, 1, 3).unbind(0), []),
    "a layer": (lambda x, **_: F.linear(x, x, x[:, 0]), ["addmm"]),
    "a copy in another order": (lambda x, **_: x.T.contiguous(), ["clone"]),
    "another type": (lambda x, **_: x.to(torch.bfloat16), ["to(dtype)"]),
    "the same type": (lambda x, **_: x.to(torch.float32).to(x.device).to("cuda:0"), []),
    "made there": (lambda x, **_: torch.zeros(3, device=x.device) + x.new_ones(3), ["zeros", "new_ones", "add"]),
    "storage alone": (lambda x, **_: torch.empty_like(x), []),
    "nothing in it": (lambda x, **_: x[:0] + x.new_zeros(0, 6), []),
    "in place": (lambda x, **_: written(x.clamp_(min=3), (0, slice(2)), 1.0), ["clamp_", "fill_"]),
    "gathered": (lambda x, i, **_: x[i] + x.index_select(0, i), ["index", "index_select", "add"]),
    "written at indices": (lambda x, y, i, **_: written(x, i, y[:2]), ["index_put_"]),
    "a number under a mask": (lambda x, mask, **_: written(x, mask, 0.0), ["index_put_"]),
    "a number beside tensors": (lambda x, **_: torch.where(x > 1, x, 0.0), ["gt", "where", "where"]),
    "attention": (lambda x, **_: F.scaled_dot_product_attention(x[None], x[None], x[None]), [
        "scaled_dot_product_attention"]),
    "repeated, so many known": (lambda i, **_: i.repeat_interleave(i, output_size=3), [
        "repeat_interleave", "index_select"]),
    "a copy that is not waited for": (lambda **_: torch.ones(3).to("cuda", non_blocking=True), []),
}  # fmt: skip

WAITS: dict[str, tuple[Callable[..., Any], str, int]] = {  # call, what it waits for, copies
    "item": (lambda x, **_: x.sum().item(), "item", 0),
    "int": (lambda i, **_: int(i[0]), "item", 0),
    "if": (lambda mask, **_: bool(mask.all()), "item", 0),
    "as an index of its own": (lambda x, i, **_: x[i[0]], "item", 0),
    "in": (lambda i, **_: 2 in i, "item", 0),
    "tolist": (lambda i, **_: i.tolist(), "tolist", 0),
    "nonzero": (lambda mask, **_: mask.nonzero(), "nonzero", 0),
    "where": (lambda mask, **_: torch.where(mask), "nonzero", 0),
    "equal": (lambda x, **_: torch.equal(x, x), "equal", 0),
    "unique": (lambda i, **_: i.unique(), "_unique2", 0),
    "repeated": (lambda i, **_: i.repeat_interleave(i), "repeat_interleave", 0),
    "mask": (lambda x, mask, **_: x[mask], "index by a mask", 0),
    "masked_select": (lambda x, **_: x.masked_select(x > 3), "masked_select", 0),
    "written under a mask": (lambda x, y, mask, **_: written(x, mask, y), "index by a mask", 0),
    "a list": (lambda x, **_: x[[0, 2]], "index from the host", 1),
    "written at a list": (lambda x, y, **_: written(x, [0, 2], y[:2]), "index from the host", 1),
    "an index of the CPU": (lambda x, **_: x[torch.tensor([0, 2])], "index from the host", 1),
    "a number at indices": (lambda x, i, **_: written(x, i, 1.0), "index from the host", 1),
    "cpu": (lambda x, **_: x.cpu(), "to(cpu)", 0),
    "to": (lambda x, **_: x.to("cpu"), "to(cpu)", 0),
    "into the CPU": (lambda x, **_: torch.zeros(4, 6).copy_(x), "copy_ to the host", 0),
    "from the CPU": (lambda x, **_: x.copy_(torch.zeros(4, 6)), "copy_", 1),
    "a list as tensor": (lambda x, **_: torch.tensor([1, 2], device=x.device), "tensor(…, device=cuda)", 1),
    "a new tensor": (lambda x, **_: x.new_tensor([1.0]), "new_tensor(…, device=cuda)", 1),
    "to the device": (lambda x, **_: torch.ones(3).to(x), "to(cuda)", 1),
    "synchronize": (lambda **_: torch.cuda.synchronize(), "synchronize", 0),
    "an event": (lambda **_: torch.cuda.Event(enable_timing=True).synchronize(), "synchronize", 0),
}


def run(call: Callable[..., Any], counts: Counts) -> Any:
    given = on_device()
    counts.reset()
    return call(**given)


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name: str, counts: Counts) -> None:
    call, wanted = LAUNCHES[name]
    run(call, counts)
    assert sorted(place.what for place in counts.launches.elements()) == sorted(wanted)
    assert not counts.waits


@pytest.mark.parametrize("name", WAITS)
def test_waits_name_their_line(name: str, counts: Counts) -> None:
    call, what, copies = WAITS[name]
    run(call, counts)
    line = f"tests/eval/test_pretend.py:{call.__code__.co_firstlineno}"
    if name.startswith(("written", "a number")):
        line = f"tests/eval/test_pretend.py:{written.__code__.co_firstlineno + 1}"
    assert counts.waits == {Place(line, what): 1}
    assert counts.copies.total() == copies


@pytest.mark.parametrize("name", [name for name in (*LAUNCHES, *WAITS) if name != "storage alone"])
def test_results_are_the_cpus(name: str, counts: Counts) -> None:
    call: Callable[..., Any] = {**LAUNCHES, **WAITS}[name][0]
    on = plain(run(call, counts))
    off = call(**plain(on_device()))
    for one, other in zip(*(v if isinstance(v, (tuple, list)) else [v] for v in (on, off)), strict=True):
        assert type(plain(one)) is type(plain(other))
        torch.testing.assert_close(plain(one), plain(other), equal_nan=True)


def test_figures_of_a_block_are_its_own(counts: Counts) -> None:
    x = torch.ones(3).to("cuda")
    counts.reset()
    with pretended() as inner:
        x + 1
    assert inner.totals() == {"launches": 1, "waits": 0, "copies": 0} and not counts.launches
    before = counts.snapshot()
    x + 1
    assert counts.launches.total() == 1 and not before.launches
    counts.reset()
    assert counts == Counts()


# -- what it says it is ------------------------------------------------------------------------------------------------
def test_a_tensor_says_where_it_is(counts: Counts) -> None:
    x = torch.ones(3, device="cuda:1", dtype=torch.bfloat16)
    assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (torch.device("cuda", 1), True, False, 1)
    for other in (x + 1, x.float(), x[None].expand(2, 3), torch.zeros_like(x), nn.Parameter(x, requires_grad=False)):
        assert other.device == x.device and other.is_cuda
    assert x.to("cuda:0").device.index == torch.ones(3).cuda().device.index == 0
    assert (x.cpu().device.type, x.new_zeros(2, device="cpu").is_cuda) == ("cpu", False)
    with torch.device("cuda:1"):
        assert torch.arange(3).device == x.device
    assert torch.cuda.get_device_capability(x.device) == (9, 0)


def test_modules_move(counts: Counts) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 3)
    want = module(x)
    there = move(copy.deepcopy(module), "cuda:1")
    assert not counts.copies and {t.device.index for t in there.state_dict().values()} == {1}
    torch.testing.assert_close(plain(there(x.to("cuda:1"))), want)
    assert copy.deepcopy(there)[0].weight.device == torch.device("cuda:1")
    assert module.to(there[0].weight)[0].bias.device == torch.device("cuda:1")


MIXED: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, other: x + other,
    lambda x, other: other @ x,
    lambda x, other: torch.cat([x, other]),
    lambda x, other: F.scaled_dot_product_attention(x, x, other),
    lambda x, other: x.index_select(0, other[0].long()),
    lambda x, other: other[x[0].long()],
    lambda x, other: torch.where(other > 0, x, x),
    lambda x, other: x.add_(other),
]


@pytest.mark.parametrize("call", MIXED)
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_do_not_mix(call: Callable[[Tensor, Tensor], Any], other: str, counts: Counts) -> None:
    here, there = torch.ones(2, 2).to("cuda"), torch.ones(2, 2).to(other)
    with pytest.raises(RuntimeError, match=f"same device, but found at least two devices, .*{other}"):
        call(here, there)


def test_a_number_of_the_cpu_may_stand_beside(counts: Counts) -> None:
    x = torch.ones(2).to("cuda")
    assert (plain(x * torch.tensor(3.0)) == 3).all() and not x.masked_fill(x > 0, torch.tensor(2.0)).is_cpu
    with pytest.raises(RuntimeError, match="same device"):
        torch.dot(x, torch.tensor(3.0))


def test_a_gpu_gives_nothing_to_numpy(counts: Counts) -> None:
    with pytest.raises(TypeError, match="to numpy"):
        torch.ones(2).to("cuda").numpy()


def test_outside_nothing_has_changed() -> None:
    before = torch.cuda.Event, torch.cuda.synchronize, nn.Module.to, torch.is_grad_enabled()
    with pytest.raises(KeyError), pretended():
        raise KeyError
    assert (torch.cuda.Event, torch.cuda.synchronize, nn.Module.to, torch.is_grad_enabled()) == before
    assert not torch.__future__.get_overwrite_module_params_on_conversion()


# -- the packed kernel -------------------------------------------------------------------------------------------------
varlen = pytest.importorskip("torch.nn.attention.varlen")


def packed(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(9, n, width, generator=draw).to("cuda", dtype) for n in (heads, kv_heads, kv_heads)]


def test_the_packed_kernel_is_one_launch_and_each_row_alone(counts: Counts) -> None:
    q, k, v = packed(4, 2, 8, torch.bfloat16)
    ends = torch.tensor([0, 2, 9], dtype=torch.int32).to("cuda")
    counts.reset()
    out = plain(varlen.varlen_attn(q, k, v, ends, ends, 7, 7, window_size=(-1, 0), enable_gqa=True))
    assert [place.what for place in counts.launches] == ["_varlen_attn"] and counts.launches.total() == 1
    assert not counts.waits
    for row in (slice(0, 2), slice(2, 9)):
        alone = [plain(t)[row].transpose(0, 1).float() for t in (q, k, v)]
        want = F.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[row].float(), want.transpose(0, 1), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("width", "dtype", "ends", "said"),
    [
        (8, torch.float32, torch.int32, "fp16 and bf16"),
        (12, torch.bfloat16, torch.int32, "multiples of 8"),
        (264, torch.bfloat16, torch.int32, "at most 256"),
        (8, torch.bfloat16, torch.int64, "int32"),
    ],
)
def test_the_packed_kernel_refuses(
    width: int, dtype: torch.dtype, ends: torch.dtype, said: str, counts: Counts
) -> None:
    q, k, v = packed(2, 2, width, dtype)
    lengths = torch.tensor([0, 9], dtype=ends).to("cuda")
    with pytest.raises(RuntimeError, match=said):
        varlen.varlen_attn(q, k, v, lengths, lengths, 9, 9)


# -- a model on it -----------------------------------------------------------------------------------------------------
ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]
POLICIES: list[Any] = [
    None,
    [vtr.FastV(0.5, layer=2), None, vtr.Random(0.5), vtr.GSearch([1.0, 0.8, 0.5, 0.3, 0.2])],
    [vtr.Pyramid(), learned.pmod(), None, learned.dynamic()],
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_says_the_same_tokens(family: str, policy: Any, counts: Counts) -> None:
    model = vtr.patch(getattr(tiny, family)())
    there = vtr.patch(move(copy.deepcopy(vtr.unpatch(model))))
    inputs = tiny.batch(model, ROWS)
    vtr.patch(model)
    want = tiny.generate(model, inputs, policy=policy, max_new_tokens=4)
    got = tiny.generate(there, {name: t.to("cuda") for name, t in inputs.items()}, policy=policy, max_new_tokens=4)
    assert got.is_cuda and torch.equal(plain(got), want)
    assert any(place.line.startswith("transformers/models/") for place in counts.launches)
    assert policy is None or any(place.line.startswith("vtr/engine/") for place in counts.launches)
    report, on_cpu = vtr.report(there), vtr.report(model)
    assert [row.vision_tokens for row in report.rows] == [row.vision_tokens for row in on_cpu.rows]
