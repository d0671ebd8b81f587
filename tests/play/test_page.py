"""The page's functions, called as Gradio calls them, and the page itself: what is on it, what it calls."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from typing import Any

import pytest

import vtr
from vtr.play.ask import Player, Said
from vtr.play.shown import KEPT, RANKING

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'gradio>=6,<7'")

from vtr.play import page as pages  # noqa: E402
from vtr.play.handlers import FILM, PANELS, PICTURE, Handlers, Samples, alert, spoken  # noqa: E402

EVIL = '<img src=x onerror="alert(1)">'
NAMES = ["none", *(name for name in vtr.list_policies() if name != "chain")]


@pytest.fixture(scope="module")
def on(player: Player) -> Handlers:
    return Handlers(player)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    vtr.pocket.sample(0)[0].save(path := tmp_path_factory.mktemp("play") / "picture.png")
    return str(path)


def asked(on: Handlers, picture: str | None, *specs: str, **more: Any) -> list[list[Any]]:
    given = {
        "still": picture, "film": None, "tab": PICTURE, "frames": 8, "question": "what color is the star",
        "new_tokens": 4, "why": True, "number": len(specs), "layer": 2, "view": KEPT, "tiles": "crops", **more,
    }  # fmt: skip
    filled = [*specs, *["none"] * (PANELS - len(specs))]
    return list(on.ask(*given.values(), *filled))


def is_skip(value: Any) -> bool:
    return value == gr.skip()


def test_answers_fill_their_panels(on: Handlers, picture: str) -> None:
    first, *news = asked(on, picture, "none", "fastv:keep=0.1", "fastvv")
    assert first[0] == [] and "1 · none" in first[2] and "2 · fastv:keep=0.1" in first[5]
    assert all(len(out) == 2 + 3 * PANELS for out in [first, *news])
    latest: list[Any] = list(first)
    for out in news:
        latest = [old if is_skip(new) else new for old, new in zip(latest, out, strict=True)]
    state, stairs = latest[:2]
    assert [one.spec for one in state] == ["none", "fastv:keep=0.1", "fastvv"] and stairs.width > 300
    assert "orange" in latest[2] and "orange" in latest[5] and "did you mean fastv?" in latest[8]
    assert latest[3]["visible"] and latest[6]["visible"] and not latest[9]["visible"]
    assert "into layer 2: 744 of 744" in latest[4] and "into layer 2: 74 of 744" in latest[7] and "%" in latest[7]
    assert all(map(is_skip, latest[11:]))  # panels that are not shown

    looked = on.look(state, 3, RANKING, "thumbnail")
    assert len(looked) == 2 * PANELS and "in layer 2" in looked[3] and all(map(is_skip, looked[6:]))

    spec, script, request = on.copy(state, 1, "what", 4, None, PICTURE)
    assert spec == "fastv:keep=0.1" and 'policy="fastv:keep=0.1"' in script and "--decoder-policies" in request
    refused, nothing, why = on.copy(state, 2, "what", 4, None, PICTURE)
    assert refused == "fastvv" and not nothing and why.startswith("#") and "did you mean fastv?" in why
    assert on.copy(state, 4, "what", 4, None, PICTURE) == ("", "", "")
    assert "read_video" in on.copy(state, 0, "what", 4, "film.gif", FILM)[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"question": " "}, "write a question"),
        ({"still": None}, "give a picture"),
        ({"tab": FILM}, "give a picture"),
        ({"still": __file__}, "not a picture Pillow can read"),
        ({"tab": FILM, "film": __file__}, "film|video"),
    ],
)
def test_what_cannot_be_asked_is_a_message(on: Handlers, picture: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error, match=message):
        asked(on, picture, "none", **more)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_can_be_chosen(on: Handlers, name: str) -> None:
    *sliders, spec, what = on.choose(name)
    assert len(sliders) == 2 and what.startswith("<small>")
    shown = [one for one in sliders if one["visible"]]
    values = [one["value"] for one in shown] + [0.0] * (2 - len(shown))
    assert name == "none" or vtr.policy(spec).name == name
    turned, _ = on.turn(name, *values)
    assert turned == spec or is_skip(turned)


def test_a_slider_says_what_cannot_be(on: Handlers) -> None:
    spec, what = on.turn("gsearch", 0.02, 0.0)
    assert is_skip(spec) and 'role="alert"' in what and "layer 0 takes all tokens" in what
    assert on.turn("uniform", 0.5, 0.0)[0] == "uniform:keep=0.5"
    assert [one["visible"] for one in on.count(2)] == [True] * 4 + [False] * 8


def test_what_is_written_is_looked_at(on: Handlers) -> None:
    """A known policy gets its name and sliders, another setting of the same one changes nothing else."""
    name, budget, hidden, what = on.write("uniform", "fastv:keep=0.5,layer=3")
    assert name == "fastv" and budget["visible"] and not hidden["visible"] and what == on.choose("fastv")[-1]
    assert all(map(is_skip, on.write("fastv", "fastv:keep=0.5,layer=3")[:3]))
    assert on.write("fastv", "fewer_crops+fastv")[0] == "fewer_crops" and on.write("fastv", " ")[0] == "none"
    *same, why = on.write("fastv", "fastvv")
    assert all(map(is_skip, same)) and "did you mean fastv?" in why
    assert "names a file" in on.write("pmod", "pmod:/etc")[-1]


def test_what_models_and_visitors_write_is_text() -> None:
    for html in (spoken(0, Said(EVIL, answer=EVIL, error=EVIL)), alert(EVIL)):
        assert "<img" not in html and "&lt;img" in html


def test_films_are_samples_of_the_video_model(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Samples(player).films and len(Samples(player).pictures) == 3
    monkeypatch.setattr(player, "name", "pocket-video")
    path, question = Samples(player).films[0]
    assert Path(path).suffix == ".gif" and question
    monkeypatch.setattr(player, "name", "pocket")


def test_the_page_calls_nobody(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built and launched without a look-up of an address that is not this machine's; no analytics, no open API."""
    real = socket.socket.connect
    called: list[Any] = []

    def connect(self: socket.socket, address: Any) -> Any:
        called.append(address[0])
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    page = pages.build(player)
    try:
        pages.launch(page, "127.0.0.1", None, block=False)
        assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
        assert set(map(str, called)) <= {"127.0.0.1", "::1", "localhost"}
        assert not page.analytics_enabled and page.max_file_size == 20 * 1024 * 1024
        assert page.get_api_info()["named_endpoints"] == {} == page.get_api_info()["unnamed_endpoints"]
        assert "googleapis" not in str(page.theme_css) + str(page.get_config_file())
    finally:
        page.close()


def test_one_question_runs_at_a_time(player: Player) -> None:
    page = pages.build(player)
    (run,) = [one for one in page.fns.values() if inspect.isgeneratorfunction(getattr(one.fn, "__func__", one.fn))]
    assert run.concurrency_limit == 1 and run.queue
    light = [one for one in page.fns.values() if one is not run and one.fn is not None]
    assert light and all(not one.queue for one in light)
