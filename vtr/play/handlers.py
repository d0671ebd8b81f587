"""What answers the page's controls. Needs Gradio for its updates and messages alone."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import vtr
from vtr.about import about
from vtr.play import snippets
from vtr.play.ask import Asked, Player, Said, in_words
from vtr.play.knobs import MOST, NONE, first_spec, knobs, spec_at
from vtr.play.shown import numbers, picture, staircase, tokens, whole_of
from vtr.settings import parse, policy_class
from vtr.visualize import COLORS

PICTURE, FILM = "picture", "video"
"""The tabs, by which is known what is asked about."""
PANELS = 6
"""Policies side by side, at most."""


class Samples:
    """Pictures and films to begin with, as files: [path, question] each."""

    def __init__(self, player: Player) -> None:
        folder = Path(tempfile.mkdtemp(prefix="vtr-play-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.pictures = []
        for i in range(3):
            shown, question, _ = vtr.pocket.sample(i)
            shown.save(path := folder / f"sample-{i}.png")
            self.pictures.append([str(path), question])
        self.films: list[list[str]] = []
        if player.name == "pocket-video":
            for i, one in enumerate(vtr.pocket.films(3)):
                path, (first, *rest) = folder / f"film-{i}.gif", one["frames"]
                first.save(path, save_all=True, append_images=rest, duration=400, loop=0)
                self.films.append([str(path), one["question"]])


class Handlers:
    """The functions behind the page, of one model."""

    def __init__(self, player: Player) -> None:
        self.player = player

    # -- policies --------------------------------------------------------------------------------------------------
    def choose(self, name: str) -> list[Any]:
        """Another policy: its sliders (those that it does not need are hidden), its spec string, what it is."""
        return [*sliders_of(name), first_spec(name, self.player.model, self.player.weights), described(name)]

    def write(self, name: str, spec: str) -> list[Any]:
        """A spec string was written: its policy's name and sliders, what it is; where it is none, why."""
        try:
            self.player.policy(spec)
        except (ValueError, TypeError, OSError) as error:
            return [gr.skip()] * (1 + MOST) + [alert(in_words(error))]
        written = parse(spec)[0][0] if spec.strip() else NONE
        if written == name:
            return [gr.skip()] * (1 + MOST) + [described(name)]
        return [written, *sliders_of(written), described(written)]

    def turn(self, name: str, *values: float) -> tuple[Any, str]:
        """A slider was moved: the spec string; where that cannot be, why, and the string stays."""
        try:
            return spec_at(name, values, self.player.model, self.player.weights), described(name)
        except (ValueError, TypeError) as error:
            return gr.skip(), alert(in_words(error))

    def count(self, number: int) -> list[Any]:
        """Another number of policies: two boxes each, shown or not."""
        return [gr.update(visible=i < number) for i in range(PANELS) for _ in range(2)]

    # -- answers ---------------------------------------------------------------------------------------------------
    def ask(
        self, still: str | None, film: str | None, tab: str, frames: int, question: str, new_tokens: int, why: bool,
        number: int, layer: int, view: str, tiles: str, *specs: str,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """The answers as they come: the state, the staircase, and of each panel what is said, the picture, the line.

        ``layer``, ``view``, ``tiles`` are those at the beginning: at the end the page asks :meth:`look` with its own.
        """
        try:
            moving = tab == FILM
            asked = Asked.read(None if moving else still, film if moving else None, frames, question, new_tokens)
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise gr.Error(in_words(error), print_exception=False) from error
        said = [Said(spec.strip() or NONE) for spec in specs[:number]]
        empty = [gr.skip()] * (3 * (len(specs) - len(said)))
        waiting = [part for i, one in enumerate(said) for part in (spoken(i, one), gr.update(visible=False), "")]
        yield [[], None, *waiting, *empty]
        for i, news in self.player.answers(asked, [one.spec for one in said], why):
            new = news.report is not None and said[i].report is None
            said[i] = news
            out: list[Any] = [gr.skip()] * (2 + 3 * len(specs))
            out[2 + 3 * i] = spoken(i, news)
            if news.report is not None:
                out[0] = list(said)
            if new:
                out[1], whole = staircase(said), whole_of(said)
                out[3 + 3 * i : 5 + 3 * i] = drawn(news, layer, view, tiles, whole)
                if news is whole:  # the others' numbers are shares of its own
                    for j, one in enumerate(said):
                        out[4 + 3 * j] = drawn(one, layer, view, tiles, whole)[1]
            yield out

    def look(self, said: Sequence[Said], layer: int, view: str, tiles: str) -> list[Any]:
        """Another layer, view or tiles: of each panel the picture and the line."""
        whole, out = whole_of(said), []
        for one in said:
            out += drawn(one, layer, view, tiles, whole)
        return out + [gr.skip()] * (2 * PANELS - len(out))

    def copy(
        self, said: Sequence[Said], which: int, question: str, new_tokens: int, film: str | None, tab: str
    ) -> tuple[str, str, str]:
        """A policy's spec string, a script, a request; of one that cannot be, why."""
        if which >= len(said):
            return "", "", ""
        spec, player, video = said[which].spec, self.player, tab == FILM
        try:
            player.policy(spec)
            python = snippets.python(player.name, spec, question, new_tokens, video)
            curl = snippets.curl(player.name, spec, question, new_tokens, player.depth)
        except (ValueError, TypeError, OSError) as error:
            return spec, "", "\n".join(f"# {line}" for line in in_words(error).splitlines())
        return spec, python, "# a request has pictures here: ask about one\n" if video else curl


def sliders_of(name: str) -> list[Any]:
    """A policy's sliders; those that it does not need are hidden."""
    found = [
        gr.update(label=one.label, minimum=one.low, maximum=one.high, step=one.step, value=one.value, visible=True)
        for one in knobs(name)
    ]
    return found + [gr.update(visible=False)] * (MOST - len(found))


def drawn(said: Said, layer: int, view: str, tiles: str, whole: Said | None) -> list[Any]:
    """The picture and the line of a panel."""
    shown, line = picture(said, layer, tiles, view)
    lines = f"<div>{escape(line)}</div>{numbers(said, whole)}<div>{escape(tokens(said))}</div>"
    return [gr.update(value=shown, visible=shown is not None), lines]


def spoken(i: int, said: Said) -> str:
    """Which policy said what."""
    words = escape(said.answer) or ("" if said.error else "…")
    head = f'<div style="border-top: 4px solid {COLORS[i % len(COLORS)]}"><b>{i + 1} · {escape(said.spec)}</b></div>'
    return f'{head}<p aria-live="polite">{words}</p>{alert(said.error) if said.error else ""}'


def described(name: str) -> str:
    """What a policy does, in a sentence."""
    what = "no reduction: all vision tokens" if name == NONE else about(policy_class(name))[0]
    return f"<small>{escape(what)}</small>"


def alert(message: str) -> str:
    """An error, in the panel that it belongs to."""
    return f'<div role="alert" style="color: #c0392b; overflow-wrap: anywhere">{escape(message)}</div>'
