"""Average pooling before the decoder: against means by hand, alone and in mixed batches, with a pruner behind it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from vtr.integrations.llava import tile_layout
from vtr.integrations.llava_next import anyres_layout
from vtr.integrations.llava_onevision import anyres_max_layout

import vtr
from tests import oracle, pooling, tiny
from tests.tiny import IMAGE, VIDEO
from vtr import picture
from vtr.accounting import RowReport
from vtr.image import Image, Layout
from vtr.policies.blind.pool import cells_of

NOISE = 1e-5
KEEP: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "which"], ["abcdef"], [IMAGE, "cde"], ["abc", IMAGE, "de"]]
GRIDS = [2, 3, (3, 1), (1, 2)]
POLICIES = [vtr.Pool(2), vtr.FastV(0.3), None, vtr.Random(0.4, 1), vtr.Pool((2, 3)) + vtr.FastV(0.5)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=NOISE, rtol=0)


def forward(model: Any, inputs: dict[str, Tensor], policy: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, policy=policy).logits


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The stock model and its patched copy."""
    stock = getattr(tiny, request.param)()
    return stock, vtr.patch(copy.deepcopy(stock))


def sides(grid: Any) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else grid


# --------------------------------------------------------------------------------------------- against means by hand
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("row", [0, 1, 3])
def test_pooling_equals_a_shorter_prompt(models: tuple[Any, Any], row: int, grid: Any) -> None:
    """The prompt with the pooled tokens in the images' places, run by the untouched model."""
    stock, patched = models
    inputs = tiny.single(tiny.batch(stock, ROWS), row, stock)
    full = oracle.row(stock, inputs)
    short, made_of = pooling.pooled(full, pooling.images(stock, inputs), sides(grid))
    got = tiny.generate(patched, inputs, policy=vtr.Pool(grid), **KEEP)
    report = vtr.report(patched).rows[0]
    assert report.sources(0) == made_of and report.sources(4) == made_of
    assert report.vision_tokens == [len(made_of)] * 5 and report.total == len(full.slots)
    want = tiny.generate(stock, {"inputs_embeds": short.embeds[None]}, **KEEP)
    close(torch.stack(got.logits), torch.stack(want.logits))
    logits = forward(patched, inputs, vtr.Pool(grid))[0]
    close(logits[~full.vision], oracle.run(stock, short).logits[~short.vision])


@pytest.mark.parametrize("grid", [1, 2, (3, 2)])
def test_video_frames_are_pooled_each(grid: Any) -> None:
    stock = tiny.llava_onevision()
    patched = vtr.patch(copy.deepcopy(stock))
    inputs = tiny.batch(stock, [["ab", VIDEO, "what"]])
    full = oracle.row(stock, inputs)
    short, made_of = pooling.pooled(full, [pooling.video()], sides(grid))
    logits = forward(patched, inputs, vtr.Pool(grid))[0]
    assert vtr.report(patched).rows[0].sources(0) == made_of
    assert len(made_of) == tiny.FRAMES * sides(grid)[0] * sides(grid)[1] + 1  # one newline stays
    close(logits[~full.vision], oracle.run(stock, short).logits[~short.vision])


def test_a_full_canvas_is_torchs_average_pooling() -> None:
    layout = anyres_layout((48, 48), ((48, 48),), 24, 6)
    features = torch.randn(len(layout), 8)
    pooled = vtr.Pool(3).compress(Image(features, layout, 0, 1))
    assert pooled is not None
    thumbnail = adaptive_avg_pool2d(features[:36].view(6, 6, 8).permute(2, 0, 1), 3).flatten(1).T
    close(pooled.features[:9], thumbnail)
    body = features[36:].view(12, 13, 8)
    canvas = adaptive_avg_pool2d(body[:, :12].permute(2, 0, 1), 6).permute(1, 2, 0)
    newlines = body[:, 12:].view(6, 2, 1, 8).mean(1)
    close(pooled.features[9:], torch.cat([canvas, newlines], 1).flatten(0, 1))


LAYOUTS = [
    tile_layout(24, 24),
    anyres_layout((600, 700), ((672, 672), (336, 672)), 336, 24),
    anyres_layout((1000, 9), ((672, 672), (336, 672)), 336, 24),  # a sliver
    anyres_layout((4000, 3), ((48, 48),), 24, 4),  # so thin that only its newlines are left
    anyres_max_layout((2000, 1500), tuple((384 * r, 384 * c) for r in range(1, 7) for c in range(1, 7)), 384, 27, 9),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=len)
@pytest.mark.parametrize("grid", [1, 4, 5, 6])
def test_every_token_is_in_one_cell(layout: Layout, grid: int) -> None:
    cells = cells_of(layout, grid, grid)
    assert sorted(i for cell in cells.sources for i in cell) == list(range(len(layout)))
    assert all(cells.cell[i] == number for number, cell in enumerate(cells.sources) for i in cell)
    assert cells.sizes.tolist() == [*map(len, cells.sources)]
    newline, rows = layout.newline.bool(), []
    for cell in cells.sources:
        (kind,) = set(newline[cell].tolist())
        if kind:
            crop_rows, down = (layout.tile[cell] - 1) // layout.crops[1], layout.y[cell] * grid // layout.grid[0]
            (row,) = set(zip(crop_rows.tolist(), down.tolist(), strict=True))
            rows.append(row)
        else:
            assert len(set(layout.tile[cell].tolist())) == 1
    assert len(set(rows)) == len(rows) and rows == sorted(rows)


def test_the_finest_grid_changes_nothing(models: tuple[Any, Any]) -> None:
    stock, patched = models
    inputs = tiny.batch(stock, ROWS[:1])
    side = 3 if stock.config.model_type == "internvl" else 6
    close(forward(patched, inputs, vtr.Pool(side)), forward(patched, inputs, None))
    row = vtr.report(patched).rows[0]
    assert row.vision_tokens == [row.total] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """A cell of 576 values near 100: float16 would overflow at 65504, bfloat16 stop growing at 256 times a value."""
    layout = tile_layout(24, 24)
    features = (100 + torch.randn(576, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    pooled = vtr.Pool(1).compress(Image(features, layout, 0, 1))
    assert pooled is not None and pooled.features.dtype == dtype
    assert torch.equal(pooled.features[0], features.double().mean(0).to(dtype))


def test_gradients_are_shared_evenly() -> None:
    layout = anyres_layout((40, 30), ((48, 48),), 24, 6)
    features = torch.randn(len(layout), 3, dtype=torch.float64, requires_grad=True)
    cells = cells_of(layout, 4, 4)

    def pool(x: Tensor) -> Tensor:
        pooled = vtr.Pool(4).compress(Image(x, layout, 0, 1))
        assert pooled is not None
        return pooled.features

    assert torch.autograd.gradcheck(pool, features)
    (grad,) = torch.autograd.grad(pool(features).sum(), features)
    close(grad, (1 / cells.sizes.double())[cells.cell][:, None].expand_as(grad))


def test_a_loss_reaches_the_projector(models: tuple[Any, Any]) -> None:
    patched = models[1]
    inputs = tiny.batch(patched, ROWS[:1])
    projector = patched.model.multi_modal_projector
    patched(**inputs, policy=vtr.Pool(2), labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector.parameters())
    patched.zero_grad()


# ------------------------------------------------------------------------------------------------------ in the engine
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_row_is_the_same_in_any_batch(models: tuple[Any, Any], padding: str) -> None:
    stock, patched = models
    inputs = tiny.batch(stock, ROWS, padding)
    logits = forward(patched, inputs, POLICIES)
    rows = vtr.report(patched).rows
    for b, policy in enumerate(POLICIES):
        alone = tiny.single(inputs, b, stock)
        close(logits[b, tiny.real(inputs, b)], forward(patched, alone, policy)[0])
        assert vtr.report(patched).rows[0].vision_tokens == rows[b].vision_tokens
    if padding == "left":
        together = tiny.generate(patched, inputs, policy=POLICIES, **KEEP)
        for b, policy in enumerate(POLICIES):
            alone = tiny.generate(patched, tiny.single(inputs, b, stock), policy=policy, **KEEP)
            close(torch.stack([step[b] for step in together.logits]), torch.cat(alone.logits))


def test_decoding_without_a_cache_is_the_same(models: tuple[Any, Any]) -> None:
    stock, patched = models
    inputs = tiny.batch(stock, ROWS)
    cached = tiny.generate(patched, inputs, policy=POLICIES, **KEEP)
    plain = tiny.generate(patched, inputs, policy=POLICIES, use_cache=False, **KEEP)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))


def test_off_is_off(models: tuple[Any, Any]) -> None:
    stock, patched = models
    inputs = tiny.batch(stock, ROWS)
    with torch.no_grad():
        want = stock(**inputs).logits
    forward(patched, inputs, POLICIES)
    assert torch.equal(forward(patched, inputs, None), want)


def test_pool_and_fastv(models: tuple[Any, Any]) -> None:
    """FastV's ratio is of the pooled tokens, and the tokens kept are named by what they were made from."""
    stock, patched = models
    inputs = tiny.single(tiny.batch(stock, ROWS), 1, stock)
    full = oracle.row(stock, inputs)
    short, made_of = pooling.pooled(full, pooling.images(stock, inputs), (3, 2))
    logits = forward(patched, inputs, "pool:grid=[3,2]+fastv:keep=0.5,layer=2")[0]
    report = vtr.report(patched).rows[0]
    kept = [[short.slots[made_of.index(made)] for made in report.sources(layer)] for layer in range(5)]
    want = oracle.run(stock, short, oracle.rule(vtr.FastV(0.5, layer=2), kept), kept)
    assert kept == want.kept and len(kept[1]) == len(made_of) and len(kept[2]) == len(made_of) // 2
    close(logits[~full.vision], want.logits[~short.vision])


def test_pooled_tokens_stand_where_their_cell_begins() -> None:
    seen: dict[str, list[int]] = {}

    class Looking(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> None:
            seen.update({name: getattr(tokens, name).tolist() for name in ("tile", "y", "x", "newline")})

    model = vtr.patch(tiny.llava_next())
    inputs = tiny.batch(model, [["ab", IMAGE, "cd"]])
    forward(model, inputs, vtr.Pool(2) + Looking())
    (layout,) = [layout for _, _, layout in picture.image_spans(model, inputs)]
    first = [cell[0] for cell in cells_of(layout, 2, 2).sources]
    assert seen == {name: getattr(layout, name)[first].tolist() for name in seen}
    assert seen["tile"][:4] == [0] * 4 and seen["y"][:4] == [0, 0, 3, 3] and seen["x"][:4] == [0, 3, 0, 3]
    assert seen["newline"][-1] == 1


# ---------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (0, ValueError, "at least 1"),
        (-2, ValueError, "at least 1"),
        ((3, 0), ValueError, "at least 1"),
        (True, TypeError, "an int or two"),
        (2.0, TypeError, "an int or two"),
        ("4", TypeError, "an int or two"),
        ("44", TypeError, "an int or two"),
        ((1, 2, 3), TypeError, "an int or two"),
        ((2, True), TypeError, "an int or two"),
        (None, TypeError, "an int or two"),
    ],
)
def test_bad_grids(grid: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtr.Pool(grid)


@pytest.mark.parametrize(
    ("grid", "spec"), [(4, "pool:grid=4"), ((2, 3), "pool:grid=[2,3]"), ([2, 3], "pool:grid=[2,3]")]
)
def test_settings_survive(grid: Any, spec: str, tmp_path: Any) -> None:
    policy = vtr.Pool(grid)
    assert policy.spec == spec and vtr.policy(spec) == policy
    policy.save_pretrained(tmp_path)
    assert vtr.Policy.from_pretrained(tmp_path) == policy


@pytest.mark.parametrize("grid", [7, (2, 7), (7, 2)])
def test_a_grid_finer_than_the_tile(grid: Any) -> None:
    """The message names the tile's grid; nothing has changed, and the model goes on."""
    model = vtr.patch(tiny.llava_next())
    inputs = tiny.batch(model, ROWS[:2])
    before = forward(model, inputs, vtr.Pool(2))
    with pytest.raises(ValueError, match=r"image 0, which has 6 × 6 tokens: choose at most \(6, 6\)"):
        model(**inputs, policy=[None, vtr.Pool(grid)])
    assert torch.equal(forward(model, inputs, vtr.Pool(2)), before)


# ----------------------------------------------------------------------------------------------------------- drawing
def test_pooled_cells_are_drawn_in_their_mean_colour() -> None:
    """A picture of 4 × 4 patches of 2 pixels: one cell pooled, one patch kept as it is, the rest dropped."""
    pixels = np.random.default_rng(0).integers(100, 256, (8, 8, 3), dtype=np.uint8)
    layout, made_of = tile_layout(4, 4), [[0, 1, 4, 5], [15]]
    cells = picture._cells(layout, made_of, "thumbnail")
    drawn = picture._painted(Picture.fromarray(pixels), cells, np.array([True, False]))
    full = pixels / 255
    np.testing.assert_allclose(drawn[:4, :4], np.broadcast_to(full[:4, :4].mean((0, 1)), (4, 4, 3)))
    np.testing.assert_allclose(drawn[6:, 6:], full[6:, 6:])
    np.testing.assert_allclose(drawn[:4, 4:], full[:4, 4:] * (1 - picture.DIM))


def test_only_the_images_own_tokens_are_drawn() -> None:
    """A row of two images: sources of the other one lie outside."""
    layout = tile_layout(2, 2)
    made_of = [[0, 1, 2, 3], [4, 5, 6, 7]]
    row = RowReport("pool:grid=1", [2], 8, [[]], [made_of])
    figure = picture.show_kept(Picture.new("RGB", (4, 4), "red"), layout, 4, row)
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), np.broadcast_to([1.0, 0, 0], (4, 4, 3)))
