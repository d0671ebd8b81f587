"""The page: where things stand, and which function answers which of them. Needs Gradio."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read as Gradio is imported

import gradio as gr

import vtr
from vtr.play import handlers as on
from vtr.play.ask import LONGEST_QUESTION, LONGEST_SPEC, Player
from vtr.play.knobs import MOST, NONE
from vtr.play.shown import KEPT, VIEWS

FEWEST, AT_FIRST = 2, 3
FIRST = (NONE, "uniform", "fastv", "m3", "globalcom2", "pyramid")
"""What the panels show at first."""
FRAMES, MOST_FRAMES, LONGEST_ANSWER = 8, 32, 512
WAITING = 16
"""Questions that may wait for their turn; one more is told to come again."""
KEPT_FOR = 3600
"""Seconds after which uploads are deleted, and what a visitor was shown is forgotten."""
FONT = ("system-ui", "sans-serif")
CSS = """
.vtr-panels {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr))}
.vtr-said {overflow-wrap: anywhere}
.vtr-said p {white-space: pre-wrap; font-size: 1.15em; margin: .3em 0}
"""


@dataclass(frozen=True)
class Panel:
    """The components of one policy."""

    name: gr.Dropdown
    sliders: list[gr.Slider]
    spec: gr.Textbox
    about: gr.HTML
    chosen: gr.Column
    said: gr.HTML
    picture: gr.Image
    line: gr.HTML
    shown: gr.Column


def build(player: Player) -> gr.Blocks:
    """The page of a model, to be launched: ``launch(build(player))``."""
    answer = on.Handlers(player)
    with gr.Blocks(title="vtr play", analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as page:
        state = gr.State([], time_to_live=KEPT_FOR)
        gr.Markdown(f"## vtr play\n`{player.name}`, {player.depth} decoder layers: one question, a policy per answer")
        picture, film, frames, tab, question, new_tokens, why, number, go, stop = _question(player)
        with gr.Row(elem_classes="vtr-panels"):
            chosen = [_choice(player, i) for i in range(on.PANELS)]
        with gr.Row():
            layer = gr.Slider(
                0,
                player.depth - 1,
                min(2, player.depth - 1),
                step=1,
                label="decoder layer",
                min_width=280,
                elem_id="layer",
            )
            view = gr.Radio(list(VIEWS), value=KEPT, label="show", min_width=280, elem_id="view")
            tiles = gr.Radio(["crops", "thumbnail"], value="crops", label="tiles", min_width=280)
        with gr.Row(elem_classes="vtr-panels"):
            panels = [Panel(*parts, *_result(i)) for i, parts in enumerate(chosen)]
        stairs = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], elem_id="stairs")
        copied, which = _copies()
        for panel in panels:
            parts = [*panel.sliders, panel.spec, panel.about]
            gr.on(panel.name.input, answer.choose, panel.name, parts, **LIGHT)
            gr.on(
                panel.spec.blur,
                answer.write,
                [panel.name, panel.spec],
                [panel.name, *panel.sliders, panel.about],
                **LIGHT,
            )
            for slider in panel.sliders:
                gr.on(slider.input, answer.turn, [panel.name, *panel.sliders], parts[-2:], **LIGHT)
        gr.on(number.input, answer.count, number, _boxes(panels), **LIGHT)
        pictures = [part for panel in panels for part in (panel.picture, panel.line)]
        gr.on([layer.change, view.change, tiles.change], answer.look, [state, layer, view, tiles], pictures, **LIGHT)
        gr.on(
            [which.change, state.change], answer.copy, [state, which, question, new_tokens, film, tab], copied, **LIGHT
        )
        inputs = [picture, film, tab, frames, question, new_tokens, why, number, layer, view, tiles]
        outputs = [state, stairs, *(part for panel in panels for part in (panel.said, panel.picture, panel.line))]
        specs = [panel.spec for panel in panels]
        run = gr.on(
            [go.click, question.submit], answer.ask, [*inputs, *specs], outputs, concurrency_limit=1,
            show_progress="minimal", show_progress_on=go, api_visibility="private",
        )  # fmt: skip
        run.then(answer.look, [state, layer, view, tiles], pictures, **LIGHT)  # these may have been moved meanwhile
        gr.on(stop.click, None, cancels=[run], api_visibility="private")
    return page


LIGHT: dict[str, Any] = {
    "queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private",
}  # fmt: skip
"""Of what is answered at once, also while a question is."""


def _question(player: Player) -> tuple[Any, ...]:
    """What is asked: a picture or a video, and the question."""
    samples = on.Samples(player)
    first = samples.films or samples.pictures
    question = gr.Textbox(
        first[0][1], label="question", max_length=LONGEST_QUESTION, lines=1, max_lines=4, elem_id="question",
        render=False,
    )  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            tab = gr.State(on.FILM if samples.films else on.PICTURE)
            with gr.Tabs(selected=on.FILM if samples.films else on.PICTURE):
                with gr.Tab("picture", id=on.PICTURE) as still:
                    picture = gr.Image(
                        samples.pictures[0][0], type="filepath", image_mode=None, show_label=False, height=260,
                        sources=["upload", "webcam", "clipboard"], buttons=["fullscreen"],
                    )  # fmt: skip
                with gr.Tab("video", id=on.FILM) as moving:
                    film = gr.File(
                        samples.films[0][0] if samples.films else None, label="a film, or an animated GIF",
                        file_types=["video", ".gif", ".webp", ".apng"], type="filepath", height=180,
                    )  # fmt: skip
                    frames = gr.Slider(1, MOST_FRAMES, FRAMES, step=1, label="frames of it, evenly spread")
            for one, what in ((still, on.PICTURE), (moving, on.FILM)):
                one.select(lambda what=what: what, None, tab, **LIGHT)
            gr.Examples(first, [film if samples.films else picture, question], label="samples")
        with gr.Column(scale=3, min_width=300):
            question.render()
            with gr.Row():
                go = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
            with gr.Row():
                number = gr.Slider(
                    FEWEST, on.PANELS, AT_FIRST, step=1, label="policies side by side", min_width=200, elem_id="number"
                )
                new_tokens = gr.Slider(1, LONGEST_ANSWER, 32, step=1, label="longest answer, tokens", min_width=200)
            why = gr.Checkbox(True, label="also rank by attention, for “show” (one more forward)")
    return picture, film, frames, tab, question, new_tokens, why, number, go, stop


def _choice(player: Player, i: int) -> tuple[Any, ...]:
    """A policy, its sliders, its spec string."""
    names = [NONE, *(name for name in vtr.list_policies() if name != vtr.Chain.name)]
    answer = on.Handlers(player)
    with gr.Column(min_width=240, visible=i < AT_FIRST, variant="panel") as box:
        name = gr.Dropdown(names, value=FIRST[i], label=f"policy {i + 1}", elem_id=f"policy-{i + 1}")
        made = answer.choose(FIRST[i])
        sliders = [gr.Slider(**{k: v for k, v in one.items() if k != "__type__"}) for one in made[:MOST]]
        spec = gr.Textbox(
            made[MOST], label="as a spec string; edit it for other settings", max_length=LONGEST_SPEC, lines=1,
            max_lines=3, elem_id=f"spec-{i + 1}",
        )  # fmt: skip
        about = gr.HTML(made[MOST + 1])
    return name, sliders, spec, about, box


def _result(i: int) -> tuple[Any, ...]:
    """What a policy said, what it kept, what it cost."""
    with gr.Column(min_width=240, visible=i < AT_FIRST) as box:
        said = gr.HTML(elem_id=f"said-{i + 1}", elem_classes="vtr-said")
        picture = gr.Image(
            show_label=False, interactive=False, buttons=["fullscreen"], visible=False, elem_id=f"kept-{i + 1}",
        )  # fmt: skip
        line = gr.HTML(elem_id=f"line-{i + 1}")
    return said, picture, line, box


def _boxes(panels: list[Panel]) -> list[gr.Column]:
    return [box for panel in panels for box in (panel.chosen, panel.shown)]


def _copies() -> tuple[list[gr.Code], gr.Dropdown]:
    """An answer's policy as text to be copied."""
    with gr.Accordion("Copy: spec string, Python, curl", open=False, elem_id="copy"):
        which = gr.Dropdown(
            [(f"policy {i + 1}", i) for i in range(on.PANELS)], value=0, label="of", elem_id="copy-which"
        )
        spec = gr.Code(label="spec string", language=None, lines=1, interactive=False, elem_id="copy-spec")
        python = gr.Code(label="Python", language="python", interactive=False, elem_id="copy-python")
        curl = gr.Code(label="curl, for vtr serve", language="shell", interactive=False, elem_id="copy-curl")
    return [spec, python, curl], which


def launch(
    page: gr.Blocks, host: str | None = None, port: int | None = None, share: bool = False, max_upload_mb: int = 20,
    block: bool = True, quiet: bool = False,
) -> Any:  # fmt: skip
    """Serve the page.

    Args:
        host, port: None: as the environment says (``GRADIO_SERVER_NAME``), else 127.0.0.1 and the first free port from
            7860. share: a public address, by Gradio's tunnel. max_upload_mb: of one file. block: until it is stopped.
            quiet: do not print where.
    """
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page.launch(
        server_name=host, server_port=port, share=share, max_file_size=f"{max_upload_mb}mb", css=CSS,
        theme=gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace")), footer_links=[],
        quiet=quiet, ssr_mode=False, enable_monitoring=False, show_error=True, prevent_thread_lock=not block,
    )  # fmt: skip
