"""The ragged cache layer by itself, against plain lists of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtr.base import UnsupportedError
from vtr.engine import cache
from vtr.engine.attention import Plan
from vtr.engine.bucket import SPARE, grouped
from vtr.engine.cache import CacheState, RaggedLayer

HEADS, DIM = 2, 3


def make(rows: int) -> RaggedLayer:
    return RaggedLayer(CacheState([None] * rows, [0] * rows), 0)


def prefill(layer: RaggedLayer, lengths: list[int]) -> list[torch.Tensor]:
    """Store packed random keys; returns each row's own."""
    packed = torch.randn(1, HEADS, sum(lengths), DIM)
    layer.staged = Plan(decode=False, lengths=tuple(lengths), layers=[layer])
    layer.update(packed, packed + 1)
    layer.state.logical = max(lengths)
    return list(packed[0].split(lengths, 1))


def step(layer: RaggedLayer, rows: list[torch.Tensor], remember: torch.Tensor | None = None) -> None:
    """Decode one token in every row, on the layer and on the lists."""
    new = torch.randn(len(rows), HEADS, 1, DIM)
    layer.staged = Plan(decode=True, layers=[layer])
    layer.update(new, new + 1)
    layer.attend_done(remember)
    layer.state.logical += 1
    layer.state.tail += 1
    for i in range(len(rows)):
        if remember is None or bool(remember[i]):
            rows[i] = torch.cat([rows[i], new[i]], 1)


def check(layer: RaggedLayer, rows: list[torch.Tensor]) -> None:
    assert layer.lengths() == [r.shape[1] for r in rows]
    assert int(layer.live()) == sum(r.shape[1] for r in rows)
    for i, row in enumerate(rows):
        keys, values = layer.row(i, row.shape[1])
        assert torch.equal(keys[0], row) and torch.equal(values[0], row + 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 30), st.randoms(use_true_random=False))
def test_rows_keep_their_own_tokens(lengths: list[int], steps: int, rng) -> None:
    layer = make(len(lengths))
    rows = prefill(layer, lengths)
    for _ in range(steps):
        step(layer, rows)
    check(layer, rows)
    order = [rng.randrange(len(rows)) for _ in rows]
    layer.reorder_cache(torch.tensor(order))
    rows = [rows[i] for i in order]
    for _ in range(3):
        step(layer, rows, torch.tensor([rng.random() < 0.5 for _ in rows]))
    check(layer, rows)
    layer.batch_repeat_interleave(2)
    rows = [r for r in rows for _ in range(2)]
    check(layer, rows)
    layer.batch_select_indices(torch.tensor([len(rows) - 1]))
    check(layer, rows[-1:])


@pytest.mark.parametrize("lengths", [[100], [700, 180, 160, 400], [744, 110, 112, 90], [300] * 4 + [100]])
def test_allocation_stays_near_what_is_live(lengths: list[int]) -> None:
    layer = make(len(lengths))
    rows = prefill(layer, lengths)
    for _ in range(40):
        live = 2 * HEADS * DIM * 4 * int(layer.live())
        assert layer.allocated() <= 1.25 * live
        step(layer, rows)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "token_bytes", "expected"),
    [
        ([100, 95, 40], 1 << 20, [[0, 1], [2]]),  # what is similar is together, at whatever price
        ([116, 109, 102, 95, 88, 81, 74, 67], 1280, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([116, 109, 102, 95, 88, 81, 74, 67], 1 << 20, [[0, 1], [2, 3], [4, 5], [6], [7]]),  # reading costs more
        ([30, 300], 1, [[1], [0]]),  # it would take too much memory
        ([7, 7, 7], 1, [[0, 1, 2]]),
    ],
)
def test_rows_share_a_bucket_where_a_call_of_their_own_costs_more(
    lengths: list[int], token_bytes: int, expected: list[list[int]]
) -> None:
    assert grouped(lengths, token_bytes, CPU) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(100, 2000), min_size=1, max_size=12), st.sampled_from(["cpu", "cuda"]))
def test_shared_buckets_waste_little(lengths: list[int], device: str) -> None:
    groups = grouped(lengths, 1280, torch.device(device))
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    assert sum(len(rows) * lengths[rows[0]] for rows in groups) <= (1 + SPARE) * sum(lengths)
    assert all(lengths[rows[0]] == max(lengths[row] for row in rows) for rows in groups)


@pytest.mark.parametrize("lengths", [[9, 9], [5, 90, 9]], ids=["equal", "ragged"])
def test_a_head_reads_its_tokens_in_one_piece(lengths: list[int]) -> None:
    layer = make(len(lengths))
    rows = prefill(layer, lengths)
    for _ in range(20):  # also after it has grown
        for row, n in enumerate(layer.lengths()):
            assert all(t.stride()[2:] == (DIM, 1) for t in layer.row(row, n))
        step(layer, rows)


def test_parts_of_buckets_come_back_in_order() -> None:
    layer = make(5)
    prefill(layer, [10, 300, 11, 290, 100])
    given_rows = torch.arange(5)
    parts = layer.parted(given_rows)
    assert [part.tolist() for part in parts] == [bucket.rows for bucket in layer.buckets] and len(parts) > 1
    assert torch.equal(layer.in_order(parts), given_rows)


def test_growing_copies_in_blocks() -> None:
    layer = make(1)
    rows = prefill(layer, [200])
    buffers = set()
    for _ in range(100):
        step(layer, rows)
        buffers.add(layer.buckets[0].keys.data_ptr())
    assert len(buffers) <= 6


@pytest.mark.parametrize("readable", [("cpu",), ()])
@pytest.mark.parametrize("lengths", [[5, 9], [9, 9]], ids=["two buckets", "one bucket"])
def test_a_forgotten_token_is_overwritten(
    lengths: list[int], readable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "READABLE", readable)
    layer = make(2)
    rows = prefill(layer, lengths)
    for remember in ([False, False], [True, True], [True, False], [False, False], [True, True]):
        step(layer, rows, torch.tensor(remember))
        alike = len(layer.buckets) == 2 or remember[0] == remember[1]
        first = layer.buckets[0]
        if readable and alike and first.equal:
            assert first.upper == layer.lengths()[first.rows[0]]  # no gap at its end
    check(layer, rows)
    assert layer.lengths() == [lengths[0] + 3, lengths[1] + 2]
    assert [bucket.equal for bucket in layer.buckets] == [bool(readable)] * 2 if len(layer.buckets) == 2 else [False]


def test_crop_takes_back_decoded_tokens_only() -> None:
    layer = make(2)
    rows = prefill(layer, [5, 9])
    for _ in range(3):
        step(layer, rows)
    layer.crop(-2)
    check(layer, [r[:, :-2] for r in rows])
    assert layer.get_seq_length() == 9 + 1
    with pytest.raises(UnsupportedError, match="cannot crop 2 tokens"):
        layer.crop(-2)


def test_an_update_without_a_plan_says_whose_cache_it_is() -> None:
    layer = make(1)
    prefill(layer, [4])
    with pytest.raises(UnsupportedError, match=r"vtr\.patch"):
        layer.update(torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, DIM))


def stepped(layer: RaggedLayer, at: int) -> None:
    """One token at position ``at`` in each row."""
    new = torch.full((len(layer.place), HEADS, 1, DIM), float(at))
    layer.staged = Plan(decode=True, layers=[layer], positions=torch.full((len(layer.place),), at))
    layer.update(new, new)
    layer.attend_done(None)
    layer.state.logical += 1
    layer.state.tail += 1


@pytest.mark.parametrize("readable", [("cpu",), ()])
@pytest.mark.parametrize("recording", [False, True])
def test_what_is_behind_a_window_goes(readable: tuple[str, ...], recording: bool, monkeypatch: Any) -> None:
    """Two rows, one with gaps; whatever is dropped, the next token finds all that it can see."""
    monkeypatch.setattr(cache, "READABLE", readable)
    layer, buffers = RaggedLayer(CacheState([None] * 2, [0] * 2), 0, window=20), set()
    where = [list(range(50)), list(range(0, 50, 3))]
    packed = torch.tensor(where[0] + where[1]).float()[None, None, :, None].expand(1, HEADS, -1, DIM)
    layer.staged = Plan(
        decode=False, lengths=tuple(map(len, where)), layers=[layer], positions=packed[0, 0, :, 0].long()
    )
    layer.update(packed, packed)
    layer.state.logical = 50
    most = [19, 17] if not readable else [19, 7]
    assert layer.lengths() == most and layer.allocated() <= 2 * 2 * 19 * HEADS * DIM * 4
    if recording:
        layer.activate_past_recording()
    for at in range(50, 110):
        stepped(layer, at)
        where = [[*row, at] for row in where]
        for b, n in enumerate(layer.lengths()):
            held = layer.row(b, n)[0][0, 0, :, 0].tolist()
            assert held[-min(n, 19) :] == where[b][-min(n, 19) :]
            assert {p for p in where[b] if p > at + 1 - 20} <= set(held)
            assert layer.positions(b, n).tolist() == held
            assert recording or n <= 20 + 8
        buffers.add(layer.buckets[0].keys.data_ptr())
    if recording:
        layer.crop(-7)
        assert layer.positions(0, layer.lengths()[0]).tolist()[-19:] == list(range(84, 103))
    layer.drop_unseen()
    assert layer.lengths() == [19, 19]
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        layer.crop(-1)
    assert len(buffers) <= 20


def test_buckets_that_swap_their_rows_are_put_in_order() -> None:
    layer = make(2)
    prefill(layer, [5, 9])  # the longer row's bucket comes first
    assert [bucket.rows for bucket in layer.buckets] == [[1], [0]]
    parts = [torch.full((1, 2), float(row)) for bucket in layer.buckets for row in bucket.rows]
    assert layer.in_order(parts)[:, 0].tolist() == [0.0, 1.0]
