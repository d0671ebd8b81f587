"""Pictures of policies: what they show, pixel by pixel where that can be said, and what they refuse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from typer.testing import CliRunner

import vtr
from vtr import visualize
from vtr.cli import app
from vtr.picture import DIM, RIGHT, WRONG

STAIRS = "gsearch:schedule=[1.0,0.6,0.36,0.22,0.13,0.08,0.05,0.03,0.02,0.01]"
SPECS = [None, "fastv:keep=0.05,layer=2", STAIRS, "m3:tokens=36"]


@pytest.fixture(scope="module")
def pocket() -> Any:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor, *vtr.pocket.sample(2)[:2]


@pytest.fixture(scope="module")
def shots(pocket: Any) -> list[visualize.Shot]:
    return visualize.ask(*pocket, SPECS, max_new_tokens=2, expected="two")


def test_a_shot_says_what_was_asked_and_kept(pocket: Any, shots: list[visualize.Shot]) -> None:
    assert [shot.label for shot in shots] == ["none", "fastv:keep=0.05", STAIRS, "m3:tokens=36"]
    assert shots[0].answer == "two" and shots[0].row.vision_tokens == [744] * 10
    assert shots[1].row.vision_tokens == [744, 744] + [37] * 8 and shots[1].flops < shots[0].flops / 3
    assert shots[0].tiles == ["thumbnail", "crops"]
    model, processor, picture, question = pocket
    inputs = vtr.chat.encode(processor, [question], [picture])
    with torch.inference_mode():
        model.generate(**inputs, policy=SPECS[1], max_new_tokens=2, do_sample=False)
    mine = visualize.last(model, inputs, picture)
    np.testing.assert_array_equal(mine.pixels(5), shots[1].pixels(5))
    assert mine.flops == shots[1].flops


@pytest.mark.parametrize("tiles", ["thumbnail", "crops"])
def test_pixels_outside_of_kept_patches_are_faded(shots: list[visualize.Shot], tiles: str) -> None:
    """Patch by patch: as many shine as tokens of these tiles are reported, each where the layout puts it."""
    shot, layer = shots[1], 4
    plain = np.asarray(shot.picture.convert("RGB"), float) / 255
    faded = plain * (1 - DIM)
    shown, layout = shot.pixels(layer, tiles), shot.layout
    mine = [slot - shot.first_slot for slot in shot.row.kept(layer)]
    of_crops = tiles == "crops"
    at = [(int(layout.tile[i]), int(layout.y[i]), int(layout.x[i])) for i in mine if not layout.newline[i]]
    wanted = {(y + (t - 1) // 2 * 12, x + (t - 1) % 2 * 12) if of_crops else (y, x) for t, y, x in at
              if (t > 0) == of_crops}  # fmt: skip
    side = 24 if of_crops else 12
    assert layout.crops == (2, 2) and wanted
    height, width = plain.shape[:2]
    bright = set()
    for y in range(side):
        for x in range(side):
            block = (slice(-(-y * height // side), -(-(y + 1) * height // side)),
                     slice(-(-x * width // side), -(-(x + 1) * width // side)))  # fmt: skip
            if (y, x) in wanted:
                bright.add((y, x))
                np.testing.assert_allclose(shown[block], plain[block])
            else:
                np.testing.assert_allclose(shown[block], faded[block])
    assert bright == wanted
    np.testing.assert_allclose(shots[0].pixels(9, tiles), plain)


def test_the_figures_say_what_they_show(shots: list[visualize.Shot]) -> None:
    kept = visualize.kept(shots[2], layers=[0, 3, -1])
    assert [a.get_title() for a in kept.axes[:4]] == [
        "picture", "into layer 0: 744 of 744", "into layer 3: 163 of 744", "into layer 9: 7 of 744",
    ]  # fmt: skip
    assert kept._suptitle.get_text().endswith("\nhow many shapes are pink")
    assert kept._supxlabel.get_text() == f"✗ {shots[2].answer}  (right: two)"
    side = visualize.side_by_side(shots)
    above, below = side.axes[:3] + side.axes[6:7], side.axes[3:6] + side.axes[9:10]  # three in a line, then one
    titles = [axis.get_title() for axis in above]
    assert titles[0].startswith("none\n744 of 744 tokens\nmean 100%") and "7 of 744" in titles[2]
    marks = [f"✓ {shot.answer}" if shot.answer == "two" else f"✗ {shot.answer}\n(right: two)" for shot in shots]
    assert [axis.get_xlabel() for axis in below] == marks and "✓ two" in marks and "✗ three\n(right: two)" in marks
    assert side._suptitle.get_text() == "how many shapes are pink"
    unknown = visualize.Shot(shots[0].picture, shots[0].layout, shots[0].first_slot, shots[0].row, "two")
    assert visualize.side_by_side([unknown]).axes[1].get_xlabel() == "→ two"
    with pytest.raises(ValueError, match="at least one policy stands in a line"):
        visualize.side_by_side(shots, columns=0)
    for axis, shot in zip(below, shots, strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), shot.pixels(-1, "crops"))
        assert len(axis.lines) == 2, "one line across and one down where crops meet"


def test_forgotten_words_are_struck_out() -> None:
    model, processor = vtr.pocket.load("joint")
    (sample,), _ = vtr.pocket.listings(1), vtr.patch(model)
    inputs = vtr.chat.encode(processor, [sample["question"]], [sample["image"]])
    policy = vtr.policy("dynamic-llava:weights=pocket-joint")
    with torch.inference_mode():
        out = model.generate(**inputs, policy=[policy], max_new_tokens=30, min_new_tokens=30)
    row, said = vtr.report(model).rows[0], processor.tokenizer.convert_ids_to_tokens(out[0, -30:])
    stays = row.remembered(-1)
    assert len(stays) == 29 and 0 < sum(stays) < 29 and row.remembered(1) == [True] * 29
    assert all(row.remembered(layer) == stays for layer in range(2, 10))
    figure = visualize.words(said, stays, title=policy.spec)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[1:] == said and texts[0].endswith(f"{29 - sum(stays)} of 30 words forgotten")
    assert len(figure.axes[0].lines) == 29 - sum(stays)
    with torch.inference_mode():
        model.generate(**inputs, policy=[None], max_new_tokens=3)
    assert vtr.report(model).rows[0].remembered(2) == []
    with pytest.raises(ValueError, match="the answer has no words"):
        visualize.words([], [])


def test_the_staircase_has_every_step(shots: list[visualize.Shot]) -> None:
    figure = visualize.staircase(shots)
    lines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert [list(line.get_data().values) for line in lines] == [shot.row.vision_tokens for shot in shots]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == "none · mean 100%" and words[1] == "fastv:keep=0.05 · mean 24%"
    named = visualize.staircase({"mine": shots[1].row})
    assert named.legends[0].get_texts()[0].get_text() == "mine · mean 24%"
    assert len(visualize.staircase(shots[1]).axes[0].patches) == 2


def test_the_ranking_is_the_one_that_policies_see(pocket: Any, shots: list[visualize.Shot]) -> None:
    """The 37 best by the last query's attention in layer 1 are those that FastV keeps on entering layer 2."""
    model, processor, picture, question = pocket
    inputs = vtr.chat.encode(processor, [question], [picture])
    ranks = visualize.rankings(model, inputs, queries="last")
    assert ranks.shape == (9, 744)
    for line in ranks:
        np.testing.assert_allclose(np.sort(line), np.arange(744) / 743)
    kept = [slot - shots[1].first_slot for slot in shots[1].row.kept(2)]
    assert sorted(np.argsort(-ranks[1])[:37].tolist()) == kept
    figure = visualize.ranking(model, inputs, picture, layers=[1, 8], queries="last")
    assert [axis.get_title() for axis in figure.axes[:3]] == ["", "attention of layer 1", "attention of layer 8"]
    hot = figure.axes[1].images[0].get_array()
    gray = np.repeat(np.asarray(picture.convert("L"), float)[..., None] / 255, 3, 2)
    assert hot.shape == gray.shape and np.abs(hot - gray).max() > 0.2
    assert vtr.list_policies() == sorted(vtr.list_policies()) and "" not in vtr.list_policies()


def test_the_animation_has_a_frame_a_layer(shots: list[visualize.Shot], tmp_path: Path) -> None:
    made = visualize.animate(shots[2], tmp_path / "kept.gif", seconds=0.2)
    assert len(made.frames) == 10 and len({frame.size for frame in made.frames}) == 1
    assert (np.asarray(made.frames[0]) != np.asarray(made.frames[5])).any()
    with Image.open(tmp_path / "kept.gif") as gif:
        assert gif.n_frames == 10 and gif.info["loop"] == 0 and gif.info["duration"] == 200
        gif.seek(9)
        assert gif.info["duration"] == 600
    bundle = made._repr_mimebundle_()
    assert bundle["text/plain"] == "10 frames" and '<img src="data:image/gif;base64,' in bundle["text/html"]
    assert Image.open(io.BytesIO(made.gif())).format == "GIF"
    with pytest.raises(ValueError, match=r"written as a GIF, e.g. kept.gif"):
        made.save(tmp_path / "kept.png")
    with pytest.raises(ValueError, match="how long a layer is shown"):
        visualize.animate(shots[2], seconds=0)


def test_rows_and_images_of_a_batch(pocket: Any) -> None:
    model, processor, picture, question = pocket
    other = vtr.pocket.sample(0)[0]
    inputs = vtr.chat.encode(processor, [question, question], [other, picture])
    with torch.inference_mode():
        model(**inputs, policy=["random:keep=0.5", "uniform:keep=0.1"])
    shot = visualize.last(model, inputs, picture, row=1)
    assert shot.label == "uniform:keep=0.1" and shot.row.vision_tokens[0] == 74
    assert (shot.pixels(0) != np.asarray(picture.convert("RGB"), float) / 255).any(-1).mean() > 0.8
    with pytest.raises(ValueError, match="row=2, but the call had 2"):
        visualize.last(model, inputs, picture, row=2)
    with pytest.raises(ValueError, match=r"image=1 of row 0: it has 1 image\(s\)"):
        visualize.last(model, inputs, picture, image=1)


@pytest.mark.slow
def test_vtr_run_writes_an_animation(tmp_path: Path) -> None:
    args = [
        "run",
        "--sample",
        "2",
        "--policy",
        "fastv:keep=0.05",
        "--repeats",
        "1",
        "--show",
        str(tmp_path / "kept.gif"),
    ]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "kept.gif") as gif:
        assert gif.n_frames == 10


def test_what_cannot_be_drawn_is_refused(pocket: Any, shots: list[visualize.Shot]) -> None:
    model, processor, picture, question = pocket
    with pytest.raises(ValueError, match="layer=10, but the model has 10 decoder layers: choose 0…9"):
        shots[1].pixels(10)
    with pytest.raises(ValueError, match="layer=-11"):
        visualize.kept(shots[1], layers=[-11])
    with pytest.raises(ValueError, match="tiles='left': this image has thumbnail and crops"):
        shots[1].pixels(0, "left")
    with pytest.raises(ValueError, match="nothing to draw"):
        visualize.staircase([])
    with pytest.raises(ValueError, match="nothing to draw"):
        visualize.side_by_side([])
    smaller = visualize.Shot(picture.resize((100, 90)), shots[0].layout, 0, shots[0].row)
    with pytest.raises(ValueError, match="of different pictures"):
        visualize.side_by_side([shots[0], smaller])
    inputs = vtr.chat.encode(processor, [question], [picture])
    with pytest.raises(ValueError, match="queries='mean': choose one of 'last', 'text'"):
        visualize.ranking(model, inputs, picture, queries="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers=\[9\]: the attention of layers 0…8"):
        visualize.ranking(model, inputs, picture, layers=[9])
    text = vtr.chat.encode(processor, [question], None)
    with torch.inference_mode():
        model(**text)
    with pytest.raises(ValueError, match="no image: choose a row with one"):
        visualize.last(model, text, picture)
    with pytest.raises(ValueError, match="row 0 has no vision tokens to rank"):
        visualize.rankings(model, text)


def test_right_and_wrong_answers_are_marked_by_color_and_sign(pocket: Any) -> None:
    right, wrong = visualize.ask(*pocket, [None, "uniform:keep=14,layer=2"], max_new_tokens=2, expected="Two.")
    assert (right.answer, wrong.answer) == ("two", "one")
    for shot, said, color in ((right, "✓ two", RIGHT), (wrong, "✗ one  (right: Two.)", WRONG)):
        figure = visualize.kept(shot)
        assert (figure._supxlabel.get_text(), figure._supxlabel.get_color()) == (said, color)
        assert shot.question in figure._suptitle.get_text()
    side = visualize.side_by_side([right, wrong])
    assert [(a.get_xlabel()[0], a.xaxis.label.get_color()) for a in side.axes[2:]] == [("✓", RIGHT), ("✗", WRONG)]
    assert side._suptitle.get_text() == right.question
    nobody_knows = visualize.ask(*pocket, [None], max_new_tokens=2)[0]
    assert nobody_knows.verdict == ("→ two", "black")


@pytest.mark.parametrize("spec", [None, "fastv:keep=0.05,layer=2", STAIRS])
def test_labels_can_be_read_where_a_figure_is_shown_700_pixels_wide(pocket: Any, spec: str | None) -> None:
    """No label is smaller than eleven pixels there, and none lies outside of the figure or over its neighbour."""
    shots = visualize.ask(*pocket, [spec, "m3:tokens=36"], max_new_tokens=2, expected="two")
    for figure in (visualize.kept(shots[0]), visualize.side_by_side(shots)):
        FigureCanvasAgg(figure).draw()
        width = figure.get_figwidth()
        labels = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert labels and all(text.get_fontsize() * 700 / 72 / width >= 11 for text in labels)
        boxes = [text.get_window_extent() for text in labels]
        assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[n + 1 :])
