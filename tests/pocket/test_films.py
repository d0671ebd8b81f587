"""Films: what happens in them is what is asked, a single frame does not tell, and training reads them right."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from vtr.chat import encode_videos
from vtr.data.sources import open_data
from vtr.data.videos import Video
from vtr.pocket.model import BOS
from vtr.pocket.scenes import COLORS, NUMBERS, TILE
from vtr.pocket.video import films, watch
from vtr.pocket.video.__main__ import STAGES, work
from vtr.pocket.video.films import FRAMES, SIDE, TYPES, WAYS, all_questions, film_stream, make_film
from vtr.pocket.video.model import IDS, TOKENS, WORDS, build, make_processor, marks, prefix, see


@pytest.fixture(scope="module")
def drawn() -> list[films.Film]:
    stream = film_stream("test", 5)
    return [next(stream)[0] for _ in range(12)]


@pytest.fixture(scope="module")
def untrained() -> Any:
    return build(vtr.pocket.load("internvl")[0]).eval()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Films without pixels, for statistics over many."""
    monkeypatch.setattr(films, "_frame", lambda canvas, actors, frame: None)


# -- films -------------------------------------------------------------------------------------------------------------
def test_seeds_and_splits() -> None:
    first, again, other = (next(film_stream(split, 3))[0] for split in ("val", "val", "test"))
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, again.frames, strict=True))
    assert not np.array_equal(first.frames[0], other.frames[0])
    assert len(first.frames) == FRAMES and first.frames[0].size == (TILE, TILE)


def test_shapes_are_there_when_the_film_says_so(drawn: list[films.Film]) -> None:
    """The pixel at a full shape's middle has its colour in the frames it is in, and none of it before or after."""
    seen = Counter[bool]()
    for film in drawn:
        for actor in film.actors:
            if actor.way or actor.shape in ("ring", "star", "heart"):
                continue
            for t, frame in enumerate(film.frames):
                x, y = (int(c * TILE / SIDE) for c in actor.place(t))
                off = np.abs(np.asarray(frame)[y, x].astype(int) - np.array(COLORS[actor.color])).max()
                assert (off < 40) == actor.shown(t), (actor, t, off)
                seen[actor.shown(t)] += 1
    assert seen[True] > 100 and seen[False] > 50


def test_what_moves_moves_to_its_side(drawn: list[films.Film]) -> None:
    for film in drawn:
        (mover,) = [actor for actor in film.actors if actor.way]
        (x0, y0), (x1, y1) = mover.place(0), mover.place(FRAMES - 1)
        dx, dy = WAYS[mover.way]
        assert (np.sign(x1 - x0), np.sign(y1 - y0)) == (dx, dy)
        assert 44 <= abs(x1 - x0) + abs(y1 - y0) <= 72
        assert all(mover.radius <= c <= SIDE - mover.radius for c in (x0, y0, x1, y1))


def test_answers_are_those_of_the_film(drawn: list[films.Film]) -> None:
    kinds = Counter[str]()
    for film in drawn:
        by_color = {actor.color: actor for actor in film.actors}
        by_shape = {actor.shape: actor for actor in film.actors}
        for kind, several in all_questions(film).items():
            for q in several:
                kinds[kind] += 1
                who = by_color.get(q.answer) or by_shape.get(q.answer)
                come = [a.there[0] for a in film.actors if a.there[0]]
                if kind == "moved":
                    assert who and who.way
                elif kind == "direction":
                    assert q.answer in WAYS and q.text.split()[-1] in {**by_color, **by_shape}
                elif kind == "appeared":
                    assert q.answer == NUMBERS[len(come)]
                elif kind in ("first", "last"):
                    assert who and who.there[0] == (min if kind == "first" else max)(come) and len(come) > 1
                elif kind == "vanished":
                    assert who and who.there[1] < FRAMES
                else:
                    assert kind == "still" and who and who.there == (0, FRAMES)
                assert set(q.text.split()) | {q.answer} <= set(WORDS)
    assert set(kinds) == set(TYPES)


@pytest.mark.usefixtures("undrawn")
def test_a_frame_does_not_tell_how_many_appeared() -> None:
    """The shapes in the last frame are as many, whatever the answer; every answer is as frequent."""
    rng = random.Random(0)
    found = [make_film(rng) for _ in range(1500)]
    fresh = np.array([sum(a.there[0] > 0 for a in film.actors) for film in found])
    last = np.array([sum(a.shown(FRAMES - 1) for a in film.actors) for film in found])
    assert np.bincount(fresh).min() > 200 and fresh.max() == 4
    assert abs(np.corrcoef(fresh, last)[0, 1]) < 0.1
    ways = Counter(a.way for film in found for a in film.actors if a.way)
    assert min(ways.values()) > 300


@pytest.mark.usefixtures("undrawn")
def test_long_films() -> None:
    film = make_film(random.Random(1), 128)
    assert len(film.frames) == 128 and max(a.there[0] for a in film.actors) > FRAMES
    clip = make_film(random.Random(1), films.CLIP)
    assert len(clip.frames) == 4 and all(a.there[0] < 4 for a in clip.actors)
    with pytest.raises(ValueError, match="at least 8"):
        make_film(random.Random(1), 7)


@pytest.mark.usefixtures("undrawn")
def test_samples_ask_each_kind_once_per_film() -> None:
    rows = list(vtr.pocket.films(60, split="val", seed=2))
    assert len(rows) == 60 and set(rows[0]) == {"frames", "question", "answer", "type"}
    by_film: dict[int, list[str]] = {}
    for row in rows:
        by_film.setdefault(id(row["frames"]), []).append(row["type"])
    assert all(len(kinds) == len(set(kinds)) for kinds in by_film.values())


# -- how they reach the model ------------------------------------------------------------------------------------------
def test_numbers_are_words_digit_by_digit() -> None:
    ids = make_processor().tokenizer("Frame12: what moved?", add_special_tokens=False)["input_ids"]
    assert ids == [IDS[word] for word in ("frame", "1", "2", "what", "moved")]
    assert marks(12)[-TOKENS - 5 : -TOKENS - 1] == [IDS[word] for word in ("frame", "1", "2", "<img>")]


@torch.no_grad()
def test_training_gives_what_the_model_gives(untrained: Any, drawn: list[films.Film]) -> None:
    """The answer's logits of a film by transformers' own forward, and by the one of training."""
    film, question = drawn[0], "what shape moved"
    video = Video(film.frames, None, list(range(FRAMES)), FRAMES)
    inputs = encode_videos(make_processor(), [question], [video])
    wanted = untrained(**inputs).logits[0, -1]
    vision = see(untrained, watch.pixels([film]))
    whole, place, number = prefix(untrained, vision, torch.ones(1, FRAMES * TOKENS, dtype=torch.bool))
    assert inputs["input_ids"][0, 1 : len(marks(FRAMES)) + 1].tolist() == marks(FRAMES)
    assert number[number >= 0].tolist() == list(range(FRAMES * TOKENS)) and place[0].tolist() == list(
        range(len(whole[0]))
    )
    words = untrained.get_input_embeddings()
    text = words(torch.tensor([[IDS[word] for word in question.split()]]))
    states = untrained.model.language_model(inputs_embeds=torch.cat([words(torch.tensor([[BOS]])), whole, text], 1))
    assert torch.allclose(untrained.lm_head(states.last_hidden_state[0, -1]), wanted, atol=1e-4)


def test_dropped_tokens_leave_their_marks(untrained: Any) -> None:
    vision = torch.randn(2, 3, TOKENS, 160)
    kept = watch.keep_random(2, [1.0, 0.25, 0.05], seed=1)
    assert kept.sum(1).tolist() == [36 + 9 + 2] * 2 and not torch.equal(kept[0], kept[1])
    whole, place, number = prefix(untrained, vision, kept)
    ids = torch.tensor(marks(3))
    assert whole.shape[1] == 47 + 3 * 4 and (place.diff(dim=1) > 0).all()
    for row in range(2):
        there = number[row] >= 0
        assert torch.equal(number[row][there], kept[row].nonzero()[:, 0])
        assert torch.equal(whole[row][there], vision[row].flatten(0, 1)[kept[row]])
        words = untrained.get_input_embeddings().weight[ids[place[row][~there]]]
        assert torch.equal(whole[row][~there], words)


def test_the_head_is_told_what_happens() -> None:
    """A shape that comes in frame 2, one that goes in frame 3, one that moves left from frame 1 to 5."""
    side, cell = int(TOKENS**0.5), SIDE // int(TOKENS**0.5)

    def actor(row: int, column: int, there: tuple[int, int], color: str = "red", **more: Any) -> films.Actor:
        middle = (column + 0.5) * cell, (row + 0.5) * cell
        return films.Actor("circle", color, 12, 0, (0, 0, 0), *middle, there, **more)

    def told(actors: list[films.Actor], shown: list[int]) -> dict[str, torch.Tensor]:
        film = films.Film([None] * 8, actors)  # type: ignore[list-item]
        seen = watch.events(film, shown).view(-1, side, side, len(watch.SEEN))
        return {name: seen[..., i] for i, name in enumerate(watch.SEEN)}

    come, gone, later = actor(0, 1, (2, 8)), actor(2, 3, (0, 3), "blue"), actor(3, 0, (5, 8))
    mover = actor(5, 4, (0, 8), way="left", length=2 * cell, begins=1, ends=5)
    at = told([come, gone, later, mover], list(range(8)))
    assert at["came"].nonzero().tolist() == [[2, 0, 1], [5, 3, 0]]
    assert at["first"].nonzero().tolist() == [[t, 0, 1] for t in range(2, 8)]
    assert at["last"].nonzero().tolist() == [[t, 0, 1] for t in range(2, 5)] + [[t, 3, 0] for t in range(5, 8)]
    assert torch.equal(at["appeared"], at["first"] | at["last"])
    assert at["vanished"].nonzero().tolist() == [[t, 2, 3] for t in range(3, 8)]
    assert at["blue"].nonzero().tolist() == [[t, 2, 3] for t in range(8)]
    assert at["left"].any((1, 2)).tolist() == [False, False] + [True] * 6
    assert at["left"][7].nonzero().tolist() == [[5, 2]] and torch.equal(at["left"], at["moved"])
    assert not any(at[way].any() for way in ("right", "top", "bottom"))
    assert told([come], [0, 4, 7])["came"].nonzero().tolist() == [[1, 0, 1]]


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    clips, whole = ({**stage, "films": 1, "save_every": 1} for stage in STAGES.values())
    work(tmp_path, stages={"clips": clips | {"steps": 1}})
    work(tmp_path, stages={"clips": clips | {"steps": 2}, "films": whole | {"steps": 1}})
    assert [torch.load(tmp_path / f"{stage}.pt", weights_only=True)["step"] for stage in STAGES] == [2, 1]
    model, processor = vtr.pocket.load("video", folder=tmp_path / "weights")
    assert len(processor.tokenizer) == len(WORDS) == model.config.text_config.vocab_size


# -- as data -----------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("undrawn")
def test_films_as_data() -> None:
    rows = list(open_data("pocket:task=video,frames=9,split=val", limit=8, videos=True))
    found = rows[0].seen()  # type: ignore[union-attr]
    assert isinstance(found, Video) and len(found.frames) == found.total == 9
    assert rows[0].group == rows[1].group  # type: ignore[union-attr]
    assert len(list(open_data("pocket:task=video", videos=True))) == 480


@pytest.mark.parametrize(
    ("data", "videos", "told"),
    [
        ("pocket:task=video", False, "only vtr eval"),
        ("pocket:task=video,frames=4", True, "8 frames or more"),
        ("pocket:frames=16", True, "pictures have none"),
        ("pocket:task=films", True, "task=questions .*listing"),
    ],
)
def test_what_is_no_film(data: str, videos: bool, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        open_data(data, videos=videos)
