"""A question under several policies, one after another; what they say is streamed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

import vtr
from vtr.base import SCORES, Policy
from vtr.chat import decode, encode, encode_videos
from vtr.data.pictures import upright
from vtr.data.videos import Video, read_video
from vtr.eval.cost.timing import forwards
from vtr.limits import short
from vtr.models import load
from vtr.picture import frame_spans, image_spans, vision_tokens
from vtr.play.knobs import NONE
from vtr.pocket import POLICIES
from vtr.settings import parse, policy_class
from vtr.visualize import Shot, rankings

if TYPE_CHECKING:
    from PIL import Image

LONGEST_SPEC, LONGEST_QUESTION, LONGEST_MESSAGE = 2000, 2000, 1000
"""Characters of a spec string, of a question, and of what is said about an error."""
SIDE = 560
"""Pixels of the longer side of a picture as it is drawn; the model gets it as it came."""


@dataclass(frozen=True)
class Asked:
    """What is looked at, the question, and how many tokens an answer has at most."""

    seen: Image.Image | Video
    question: str
    new_tokens: int = 32

    @classmethod
    def read(
        cls, picture: str | Path | None, film: str | Path | None, frames: int, question: str, new_tokens: int
    ) -> Asked:
        """Read the files that were sent; a film goes before a picture.

        Raises:
            ValueError: nothing to look at, no question, too long a one, or a file that cannot be read.
        """
        if not question.strip():
            raise ValueError("ask something: write a question")
        if len(question) > LONGEST_QUESTION:
            raise ValueError(f"a question has at most {LONGEST_QUESTION} characters, this one {len(question)}")
        if picture is None and film is None:
            raise ValueError("give a picture (or a video) to look at, or choose a sample")
        seen = upright(picture) if film is None else read_video(film, frames)  # type: ignore[arg-type]
        return cls(seen, question.strip(), new_tokens)


@dataclass(frozen=True, eq=False)
class Said:
    """What one policy has said so far, and, once it is done, what it kept and cost.

    Attributes:
        spec: as it was written. answer: so far. error: why there is none, or no whole one; "" where all went well.
        shots: of the picture, or of each frame. times: of the frames, in seconds. report: of the call.
        total: vision tokens of the prompt without a policy. prefill_ms, decode_ms: of this one run; the text model
            alone, selection included, a decoded token. None: nothing was decoded.
        ranks: float [layers - 1, tokens], how the text ranks the picture's tokens, where the policy looks at that.
        ranked_by: whose attention ``ranks`` are of; where there are none, why.
    """

    spec: str
    answer: str = ""
    error: str = ""
    shots: tuple[Shot, ...] = ()
    times: tuple[float, ...] | None = None
    report: vtr.Report | None = None
    total: int = 0
    prefill_ms: float | None = None
    decode_ms: float | None = None
    ranks: np.ndarray | None = None
    ranked_by: str = ""


class Player:
    """A model that is asked. One question at a time: others wait.

    Args:
        name, device, dtype: as :func:`vtr.models.load` takes them, and raises.
        seconds: all answers of a question together; past it nothing more is said. What takes longer than a token
            (reading a film, a prefill) is not interrupted.
        files: whether spec strings may name files of this machine (those of strangers may not).
    """

    def __init__(
        self, name: str | None = None, device: str = "auto", dtype: str | None = None, seconds: float = 120,
        files: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.seconds, self.files = name or "pocket", seconds, files
        self.model, self.processor = load(name, device, dtype)
        self.depth = len(self.model.get_decoder().layers)
        self.weights = self.name if self.name in POLICIES else "pocket"
        self.lock = Lock()
        self.warm_up()

    def warm_up(self) -> None:
        """Answer once, so that the first question's times are none of a process that has just begun."""
        picture, question, _ = vtr.pocket.sample(0)
        with torch.inference_mode():
            inputs = encode(self.processor, [question], [picture]).to(self.model.device)
            self.model.generate(**inputs, policy=None, max_new_tokens=2, do_sample=False, num_beams=1)

    def policy(self, spec: str) -> Policy | None:
        """The policy that someone has written; None for "none".

        Raises:
            ValueError, TypeError: it is none, too long, or names a file where that is not allowed.
            FileNotFoundError: it names a file that is not there.
        """
        spec = spec.strip()
        if spec.lower() in ("", NONE):
            return None
        if len(spec) > LONGEST_SPEC:
            raise ValueError(f"a policy has at most {LONGEST_SPEC} characters here, this one {len(spec)}")
        if not self.files:
            for name, settings in parse(spec):
                _check_no_file(name, settings)
        return vtr.policy(spec)

    def answers(self, asked: Asked, specs: Sequence[str], why: bool = True) -> Iterator[tuple[int, Said]]:
        """(which policy, what it has said so far), each time there is more; errors come as :attr:`Said.error`.

        Args:
            why: also rank the picture's tokens by the text's attention, in a forward of its own per kind of ranking.
        """
        run = _Run(self, asked, specs, why)
        worker = Thread(target=run.work, daemon=True)
        worker.start()
        news = run.news.get()
        try:
            while news is not None:
                yield news
                run.news.task_done()
                news = run.news.get()
        finally:
            run.stopped.set()  # nobody listens any more
            while news is not None:
                run.news.task_done()
                news = run.news.get()
            worker.join()


def _check_no_file(name: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for settings that name a file, unless it is one that ships with vtr."""
    shipped = settings.get("weights") in POLICIES
    others = {key: value for key, value in settings.items() if not (shipped and key == "weights")}
    if "weights" in others or policy_class(name).names_file(others):
        raise ValueError(
            f"{name!r} names a file of the server, which is allowed only where `vtr play` listens at 127.0.0.1 and is "
            f"not shared; without, there are weights={' and weights='.join(POLICIES)}"
        )


class _Run:
    """One question, in a thread of its own: ``news`` gets what is said, and None at the end."""

    def __init__(self, player: Player, asked: Asked, specs: Sequence[str], why: bool) -> None:
        self.player, self.asked, self.why = player, asked, why
        self.said = [Said(spec) for spec in specs]
        self.news: Queue[tuple[int, Said] | None] = Queue()
        self.stopped = Event()
        self.end = 0.0

    def work(self) -> None:
        model = self.player.model
        try:
            with self.player.lock, torch.inference_mode(), vtr.shared_features(model), forwards(model) as spans:
                self.end = time.monotonic() + self.player.seconds
                for i in range(len(self.said)):
                    self.guarded(i, "error", partial(self.answer, i, spans))
                known: dict[Any, np.ndarray] = {}
                for i, said in enumerate(self.said):
                    if self.why and said.report is not None:
                        self.guarded(i, "ranked_by", partial(self.rank, i, known))
        finally:
            self.news.put(None)

    def guarded(self, i: int, place: str, act: Callable[[], None]) -> None:
        """Whatever goes wrong is said in the policy's own place: in this field of its :class:`Said`."""
        self.news.join()  # who draws the answer before this one would be in this one's times
        if self.stopped.is_set():
            return
        try:
            self.check_time()
            act()
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            self.put(i, **{place: in_words(error)})
        except Exception as error:  # a fault of ours, or of a policy: said there, and told in the server's log
            logging.getLogger("vtr").exception("%s failed", self.said[i].spec)
            self.put(i, **{place: in_words(error)})

    def put(self, i: int, **more: Any) -> None:
        self.said[i] = replace(self.said[i], **more)
        self.news.put((i, self.said[i]))

    def check_time(self) -> None:
        if time.monotonic() > self.end:
            raise RuntimeError(f"the time of a question is up: {self.player.seconds:g} seconds (--time-limit)")

    # -- one policy ------------------------------------------------------------------------------------------------
    def encode(self, before: Policy | None = None) -> Any:
        """The prompt, on the model's device."""
        player, question, seen = self.player, self.asked.question, self.asked.seen
        if not isinstance(seen, Video):
            return encode(player.processor, [question], [seen], before).to(player.model.device)
        if before is not None:
            raise ValueError(f"{before.spec} acts on pictures, and a video is left as it is: name another policy")
        return encode_videos(player.processor, [question], [seen]).to(player.model.device)

    def answer(self, i: int, spans: list[float]) -> None:
        """Ask under one policy."""
        model = self.player.model
        before, chosen = vtr.split(self.player.policy(self.said[i].spec))
        inputs = self.encode(before)
        total = vision_tokens(model, self.encode() if before is not None else inputs)
        spans.clear()
        more: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([_Stop(self)])}
        if chosen is None or not chosen.asks("resolve"):  # which tries answers, and takes no streamer
            more["streamer"] = _Streamer(self, i)
        out = model.generate(
            **inputs, policy=chosen, max_new_tokens=self.asked.new_tokens, do_sample=False, num_beams=1, **more
        )
        report = vtr.report(model)
        answer = decode(self.player.processor, out, inputs["input_ids"].shape[1])[0]
        decoded, prompt = spans[len(spans) - report.steps :], spans[: len(spans) - report.steps]
        late = time.monotonic() > self.end
        self.put(
            i,
            answer=answer,
            error=f"stopped after {self.player.seconds:g} seconds (--time-limit)" if late else "",
            shots=tuple(self.shots(inputs, answer, report)),
            times=tuple(self.asked.seen.times or ()) or None if isinstance(self.asked.seen, Video) else None,
            report=report,
            total=total,
            prefill_ms=1e3 * sum(prompt),
            decode_ms=1e3 * sum(decoded) / len(decoded) if decoded else None,
        )

    def shots(self, inputs: Any, answer: str, report: vtr.Report) -> Iterator[Shot]:
        """Of the picture, or of each frame."""
        seen, model = self.asked.seen, self.player.model
        film = isinstance(seen, Video)
        spans = frame_spans(model, inputs) if film else [span[1:] for span in image_spans(model, inputs)]
        for picture, (slot, layout) in zip(seen.frames if film else [seen], spans, strict=True):  # type: ignore[union-attr]
            scale = SIDE / max(picture.size)
            drawn = picture.resize([max(round(side * scale), 1) for side in picture.size])
            yield Shot(drawn, layout, slot, report.rows[0], answer, report.flops, self.asked.question)

    # -- why -------------------------------------------------------------------------------------------------------
    def rank(self, i: int, known: dict[Any, np.ndarray]) -> None:
        """How the text ranks the tokens of the picture, if the policy looks at that."""
        said = self.said[i]
        before, chosen = vtr.split(self.player.policy(said.spec))
        queries = ranks_by(chosen, self.player.depth)
        if queries is None or isinstance(self.asked.seen, Video):
            what = "shown of pictures alone" if queries else "this policy does not rank by the decoder's attention"
            self.put(i, ranked_by=what)
            return
        key = queries, None if before is None else before.spec
        if key not in known:
            known[key] = rankings(self.player.model, self.encode(before), queries=queries)  # type: ignore[arg-type]
        self.put(i, ranks=known[key][:, : len(said.shots[0].layout)], ranked_by=queries)


def ranks_by(policy: Policy | None, depth: int) -> str | None:
    """Whose attention a policy ranks tokens by, of :data:`vtr.base.SCORES`; the nearest of them where it asks for
    something else ("last" where it looks at the layer ahead). None: it does not look at the decoder's attention."""
    if policy is None or not policy.asks("prune"):
        return None
    wanted = [ask for layer in range(1, depth) if (ask := policy.needs(layer)) is not None]
    if not wanted:
        return "last" if getattr(policy, "question_guided", False) else None
    return wanted[0] if isinstance(wanted[0], str) and wanted[0] in SCORES else "text"


def in_words(error: BaseException) -> str:
    """An error as a visitor reads it."""
    return short(f"{type(error).__name__}: {error}", LONGEST_MESSAGE)


class _Streamer(TextStreamer):
    """Gives on an answer's words as they are known."""

    def __init__(self, run: _Run, i: int) -> None:
        super().__init__(run.player.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.run, self.i = run, i

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.run.put(self.i, answer=self.run.said[self.i].answer + text)


class _Stop(StoppingCriteria):
    """Ends an answer when its time is up, or nobody listens."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        over = self.run.stopped.is_set() or time.monotonic() > self.run.end
        return torch.full((input_ids.shape[0],), over, dtype=torch.bool, device=input_ids.device)
