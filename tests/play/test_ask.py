"""Policies side by side: answers as by hand, streamed, with errors in their own place; what may be written."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from vtr import visualize
from vtr.play import shown
from vtr.play.ask import LONGEST_QUESTION, LONGEST_SPEC, Asked, Player, Said, ranks_by

SPECS = ["none", "fastv:keep=0.1", "m3:tokens=36", "autoscale", "downsample:0.25+fastv:0.1", "fastvv", "vtw:layer=99"]


@pytest.fixture(scope="module")
def asked() -> Asked:
    picture, question, _ = vtr.pocket.sample(2)
    return Asked(picture, question, 4)


@pytest.fixture(scope="module")
def said(player: Player, asked: Asked) -> list[Said]:
    return last(player, asked, SPECS)


def last(player: Player, asked: Asked, specs: list[str], **more: Any) -> list[Said]:
    return [one for _, one in sorted(dict(player.answers(asked, specs, **more)).items())]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_an_answer_is_what_the_model_says_by_hand(player: Player, asked: Asked, said: list[Said], i: int) -> None:
    policy = None if SPECS[i] == "none" else SPECS[i]
    (by_hand,) = visualize.ask(player.model, player.processor, asked.seen, asked.question, [policy], 4)  # type: ignore[arg-type]
    one = said[i]
    assert one.report is not None and not one.error
    assert one.answer == by_hand.answer
    assert one.report.flops == by_hand.flops and one.report.rows[0].vision_tokens == by_hand.row.vision_tokens
    assert one.total == 744 and one.prefill_ms is not None and one.prefill_ms > 0


def test_every_policy_has_its_own_times(said: list[Said]) -> None:
    for one in said[:5]:
        assert one.report is not None
        assert (one.decode_ms is None) is (one.report.steps == 0)
    assert said[0].report is not None and said[0].report.steps > 0


def test_a_policy_before_the_tower_is_counted_of_the_whole_picture(said: list[Said]) -> None:
    fewer = said[4]
    assert fewer.report is not None and not fewer.error
    assert fewer.total == 744 > fewer.report.rows[0].total


def test_errors_stand_where_they_belong(said: list[Said]) -> None:
    assert [bool(one.error) for one in said] == [False] * 5 + [True] * 2
    assert "did you mean fastv?" in said[5].error and "99" in said[6].error
    assert all(one.report is None for one in said[5:])


def test_words_come_before_the_answer_is_whole(player: Player) -> None:
    model_says = next(vtr.pocket.listings(1))  # fifty words of the joint model, here of any
    seen = Asked(model_says["image"], "which word is purple", 6)
    news = [one for _, one in player.answers(seen, ["none"], why=False)]
    assert len(news) > 1 and news[0].report is None and news[-1].report is not None
    assert news[-1].answer.startswith(news[0].answer.strip())


# -- why ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "queries"),
    [
        ("fastv", "last"),
        ("gsearch:schedule=pocket", "text"),
        ("m3+fastv", "last"),
        ("pyramid", "last"),
        ("uniform", None),
        ("m3", None),
        ("random", None),
        ("none", None),
    ],
)
def test_by_whose_attention(spec: str, queries: str | None) -> None:
    assert ranks_by(None if spec == "none" else vtr.policy(spec), 10) == queries


def test_ranks_are_those_of_visualize(player: Player, asked: Asked, said: list[Said]) -> None:
    inputs = vtr.chat.encode(player.processor, [asked.question], [asked.seen])  # type: ignore[list-item]
    assert said[1].ranks is not None and said[1].ranked_by == "last"
    np.testing.assert_array_equal(said[1].ranks, visualize.rankings(player.model, inputs, queries="last"))
    assert said[0].ranks is None and "does not rank" in said[0].ranked_by


def test_a_model_that_takes_no_policy_inside_says_so(
    player: Player, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise vtr.UnsupportedError("acts inside the decoder")

    monkeypatch.setattr("vtr.play.ask.rankings", refused)
    (one,) = last(player, asked, ["fastv:keep=0.1"])
    assert one.report is not None and not one.error and "acts inside the decoder" in one.ranked_by


# -- what is shown -----------------------------------------------------------------------------------------------------
def test_the_picture_is_that_of_the_layer(said: list[Said]) -> None:
    fastv = said[1]
    first, last_one = (shown.picture(fastv, layer, "crops") for layer in (0, 9))
    assert first[1] == "into layer 0: 744 of 744" and last_one[1] == "into layer 9: 74 of 744"
    assert first[0] is not None and last_one[0] is not None
    whole = shown.picture(said[0], 9, "crops")[0]
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(whole))
    assert (np.asarray(last_one[0]) != np.asarray(whole)).mean() > 0.5
    assert shown.picture(fastv, 99, "no such tiles")[1] == last_one[1]
    assert shown.picture(said[5], 0, "crops") == (None, "")


def test_the_ranking_is_of_the_layer_before(said: list[Said]) -> None:
    heat, line = shown.picture(said[1], 2, "crops", shown.RANKING)
    assert "the last word in layer 1" in line
    kept = shown.picture(said[1], 2, "crops")[0]
    assert np.asarray(heat).shape == np.asarray(kept).shape and (np.asarray(heat) != np.asarray(kept)).any()
    assert "nothing ranks what enters layer 0" in shown.picture(said[1], 0, "crops", shown.RANKING)[1]
    assert "does not rank" in shown.picture(said[2], 2, "crops", shown.RANKING)[1]


def test_numbers_stand_beside_those_without_reduction(said: list[Said]) -> None:
    whole = shown.whole_of(said)
    assert whole is said[0]
    html = shown.numbers(said[2], whole)
    report = said[2].report
    assert report is not None and whole.report is not None
    entering = report.rows[0].vision_tokens[0]
    for words in (
        entering,
        f"{entering / 744:.0%}",
        f"{report.flops / 1e9:.3g}",
        f"{report.flops / whole.report.flops:.0%}",
    ):
        assert f">{words}<" in html
    assert "%" not in shown.numbers(whole, whole) and shown.numbers(said[5], whole) == ""
    assert shown.tokens(said[1]) == "of 744 vision tokens enter the layers: 744 in 0–1, 74 in 2–9"
    assert shown.staircase(said) is not None and shown.staircase(said[5:]) is None


def test_a_film_is_shown_frame_by_frame() -> None:
    player = Player("pocket-video", "cpu")
    film = next(iter(vtr.pocket.films(1)))
    asked = Asked(vtr.data.videos.Video(film["frames"], None, [*range(8)], 8), film["question"], 4)
    one, input_policy = last(player, asked, ["fastv:keep=0.1", "fewer_crops"])
    assert one.report is not None and len(one.shots) == 8 and one.ranks is None and "pictures alone" in one.ranked_by
    picture, line = shown.picture(one, 9, "crops")
    assert picture is not None and line.startswith("into layer 9:")
    assert "a video is left as it is" in input_policy.error


# -- limits ------------------------------------------------------------------------------------------------------------
def test_what_is_asked_is_checked(tmp_path: Path) -> None:
    vtr.pocket.sample(0)[0].save(good := tmp_path / "good.png")
    (bad := tmp_path / "bad.png").write_text("no picture")
    assert Asked.read(good, None, 8, " what \n", 4).question == "what"
    for wrong, message in (
        ((good, None, 8, " ", 4), "write a question"),
        ((good, None, 8, "x" * (LONGEST_QUESTION + 1), 4), "at most 2000 characters"),
        ((None, None, 8, "what", 4), "give a picture"),
        ((bad, None, 8, "what", 4), "not a picture Pillow can read"),
        ((None, bad, 8, "what", 4), "cannot be read as an animated picture"),
    ):
        with pytest.raises(ValueError, match=message):
            Asked.read(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        "pmod:weights=/etc",
        "pmod:/etc",
        "gsearch:schedule=/etc/passwd",
        "m3+gsearch:/etc/passwd",
        'by_image:default="cdpruner:text_tower=/etc"',
        "trim:text_tower=/etc",
    ],
)
def test_strangers_name_no_files(spec: str, player: Player) -> None:
    assert not player.files
    with pytest.raises(ValueError, match="names a file of the server"):
        player.policy(spec)


def test_shipped_weights_and_schedules_are_no_files_of_the_server(player: Player) -> None:
    for spec in ("pmod:weights=pocket", "dynamic-llava:pocket-joint", "gsearch:schedule=pocket", "none", ""):
        made = player.policy(spec)
        assert (made is None) is (spec in ("none", ""))
    with pytest.raises(ValueError, match=f"at most {LONGEST_SPEC} characters"):
        player.policy("m3:" + "1" * LONGEST_SPEC)


def test_who_sits_at_this_machine_may_name_files(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(player, "files", True)
    with pytest.raises(FileNotFoundError):
        player.policy("gsearch:schedule=nothing.json")


def test_time_is_up(player: Player, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer under way is cut off, those behind it are not begun, and all say so."""
    monkeypatch.setattr(player, "seconds", -1.0)
    begun, late = last(player, asked, ["none", "m3"])
    assert "time of a question is up" in begun.error and "time of a question is up" in late.error

    monkeypatch.setattr(player, "seconds", 1e9)
    forward = player.model.get_decoder().forward

    def then_late(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr("vtr.play.ask.time.monotonic", lambda: float("inf"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(player.model.get_decoder(), "forward", then_late)
    one, *_ = last(player, asked, ["none"])
    assert "stopped after" in one.error and one.report is not None and one.report.steps == 0


def test_who_goes_away_ends_the_answer(player: Player, asked: Asked) -> None:
    """The thread ends with the generator, and the next question has its turn."""
    before = threading.active_count()
    news = player.answers(asked, ["none", "m3", "uniform"])
    next(news)
    news.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and not player.lock.locked()
    assert last(player, asked, ["none"], why=False)[0].report is not None


def test_a_fault_is_said_too(player: Player, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("something of ours")

    monkeypatch.setattr(player.model, "generate", broken)
    one, two = last(player, asked, ["none", "m3"])
    assert "KeyError" in one.error and "KeyError" in two.error


def test_one_question_at_a_time(player: Player, asked: Asked) -> None:
    """Two visitors at once get what each would get alone."""
    found: dict[int, list[Said]] = {}

    def visit(n: int) -> None:
        with torch.inference_mode():
            found[n] = last(player, asked, ["none", "m3:tokens=36"], why=False)

    visitors = [threading.Thread(target=visit, args=(n,)) for n in range(2)]
    for one in visitors:
        one.start()
    for one in visitors:
        one.join(60)
    answers = [[one.answer for one in found[n]] for n in range(2)]
    assert answers[0] == answers[1] and all(answers[0])
    assert time.monotonic() > 0  # the clock that a test above replaced is back
