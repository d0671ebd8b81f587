"""A patched model that answers chat prompts with pictures: what the adapters to evaluation kits share.

Uses vtr's public API only. Not imported by the package: only the kits' adapters need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import vtr
from vtr.chat import of_videos, shows_videos, video_parts, whole_frames
from vtr.data.pictures import upright
from vtr.data.videos import FRAMES, Video, read_video
from vtr.models import load

POCKET = "pocket"
DEFAULT_NEW_TOKENS = 1024
"""As lmms-eval's own models do where a task says nothing."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
SAME_AS_NEW_TOKENS = ("max_new_tokens", "max_gen_toks", "max_tokens")
NOT_FOR_GENERATE = ("do_sample", "max_length", "return_dict_in_generate", "use_cache", *SAMPLING)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the processor takes it: ``text`` with an image mark for each of ``images`` (PIL, RGB), in order.

    ``videos`` are those of a processor that takes videos; with ``framed`` the images are the frames of videos.
    """

    text: str
    images: list[Any]
    videos: list[Video] = field(default_factory=list)
    framed: bool = False


@dataclass(frozen=True)
class Answer:
    """What the model said. tokens: how many it generated. vision_tokens: mean over layers, mean_keep: as a share."""

    text: str
    tokens: int
    vision_tokens: float
    mean_keep: float


def read_policy(text: str | None) -> vtr.Policy | None:
    """A policy from a command line that has its own use for commas.

    ``none``; a folder that ``save_pretrained`` wrote; or a spec string, in which ``;`` may stand for ``,`` and which
    may be in quotes: ``fastv:keep=0.25;layer=2``, ``"fastv:keep=0.25,layer=2"``.

    Raises:
        ValueError, TypeError: not a policy.
    """
    if text is None or text.strip().lower() in ("", "none"):
        return None
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if Path(text).is_dir():
        return vtr.Policy.from_pretrained(text)
    return vtr.policy(text.replace(";", ","))


def generation_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """A kit's generation settings → keyword arguments of ``generate``, strings to stop at, and names not understood.

    Greedy unless the temperature is above 0 (or, where none is given, unless ``do_sample`` is true).

    Raises:
        ValueError: ``until`` is neither a string nor a list of strings.
    """
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"until must be a string or a list of strings, got {given['until']!r}")
    asked = [given[name] for name in SAME_AS_NEW_TOKENS if given.get(name) is not None]
    temperature = given.get("temperature")
    sample = given.get("do_sample") is not False and (bool(given.get("do_sample")) if temperature is None else True)
    sample = sample and (temperature is None or temperature > 0)
    out: dict[str, Any] = {"max_new_tokens": int(asked[0]) if asked else DEFAULT_NEW_TOKENS, "do_sample": sample}
    out.update({name: given.get(name) if sample else None for name in SAMPLING if sample is False or name in given})
    known = GenerationConfig()
    ignored = []
    for name, value in given.items():
        if name in ("until", *SAME_AS_NEW_TOKENS, *NOT_FOR_GENERATE):
            continue
        if hasattr(known, name):
            out[name] = value
        else:
            ignored.append(name)
    return out, [stop for stop in until if stop], sorted(ignored)


def cut(text: str, until: Sequence[str]) -> str:
    """``text`` up to the first of the strings in ``until``."""
    return text[: min([text.index(stop) for stop in until if stop in text], default=len(text))]


class Forced(LogitsProcessor):
    """Makes ``generate`` decode given tokens. tokens: int64 [rows, steps]."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return out


class Stops(StoppingCriteria):
    """Ends a row once one of some strings stands at its end.

    Unlike transformers' own ``stop_strings`` it asks nothing of the tokenizer's vocabulary.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, until, start
        self.window = max(len(stop.encode()) for stop in until) + 1  # a token is a byte or more

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        ended = [any(stop in text for stop in self.until) for text in self.tokenizer.batch_decode(new)]
        return torch.tensor(ended, device=input_ids.device)


class Chat:
    """A model with its processor and one policy, whose parts act before the tower and in the model.

    Args:
        pretrained: ``pocket``, ``pocket-joint``, ``pocket-internvl``, a folder or a hub name.
        policy: a policy, or text that :func:`read_policy` reads; None is no reduction.
        device: cpu, cuda, cuda:1, …, or auto.
        dtype: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16 or float16.
        frames: so many are taken of each video, evenly spread.

    Raises:
        ValueError: a checkpoint that cannot be loaded, an unknown dtype or policy.
        UnsupportedError: a policy that has nothing to do before this processor.
    """

    def __init__(
        self, pretrained: str = POCKET, policy: Any = None, device: str = "auto", dtype: str = "auto",
        frames: int = FRAMES,
    ) -> None:  # fmt: skip
        if frames < 1:
            raise ValueError(f"frames={frames}: of a video at least one frame is taken")
        self.frames = frames
        self.policy = read_policy(policy) if policy is None or isinstance(policy, str) else vtr.policy(policy)
        precision = None if dtype == "auto" else getattr(torch, dtype, None)
        if dtype != "auto" and not isinstance(precision, torch.dtype):
            raise ValueError(f"dtype={dtype!r}: choose auto, float32, bfloat16 or float16")
        before, self.inside = vtr.split(self.policy)
        self.model, processor = load(pretrained, device)
        self.processor = vtr.processor(processor, before)
        if precision is not None:
            self.model.to(precision)
        if self.inside is not None:
            self.inside.check(len(self.model.get_decoder().layers))
        self.tokenizer = self.processor.tokenizer

    # -- prompts ---------------------------------------------------------------------------------------------------
    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """Chat turns → a prompt that ends where the answer begins.

        Args:
            messages: ``{"role": …, "content": …}``; the content is a text or a list of parts, and a part is a text,
                ``{"type": "text", "text": …}``, ``{"type": "image", "image": a PIL picture or a file}`` or
                ``{"type": "video", "video": a file, a folder of frames or a list of pictures}``.

        Raises:
            UnsupportedError: sound, or content of another kind; pictures beside a video whose frames are put as
                pictures, which this processor would cut into crops.
        """
        images, videos, framed, turns = [], [], 0, []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for part in parts_of(message["content"]):
                if part["type"] == "image":
                    images.append(picture(part.get("image")))
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                elif part["type"] == "video":
                    video = read_video(part["video"], self.frames)
                    parts += video_parts(self.processor, len(video.frames))
                    if shows_videos(self.processor):
                        videos.append(video)
                    else:
                        images += video.frames
                        framed += len(video.frames)
                else:
                    raise vtr.UnsupportedError(f"a prompt with {part['type']}: give pictures, videos and text")
            turns.append({"role": message["role"], "content": parts})
        if framed and framed < len(images) and whole_frames(self.processor):
            raise vtr.UnsupportedError(
                "a prompt with pictures and a video, on a processor that puts frames as pictures without crops: ask "
                "about them in two prompts"
            )
        if getattr(self.processor, "chat_template", None):
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        else:
            text = self._plain(turns)
        return Prompt(text, images, videos, framed > 0)

    def _plain(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """For a processor without a chat template: LLaVA-1.5's layout."""
        names, lines = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}, []
        for turn in turns:
            parts = [p["text"] if p["type"] == "text" else f"{self.processor.image_token}\n" for p in turn["content"]]
            lines.append(f"{names[turn['role']]}: {''.join(parts)}")
        return " ".join([*lines, "ASSISTANT:"])

    def tokenize(self, prompts: Sequence[Prompt]) -> Any:
        """A left-padded batch of prompts with pictures, videos or neither, all alike."""
        media: dict[str, Any] = {"images": [prompt.images for prompt in prompts] if prompts[0].images else None}
        if prompts[0].framed:
            media |= whole_frames(self.processor)
        if prompts[0].videos:
            media |= of_videos(self.processor, [video for prompt in prompts for video in prompt.videos])
        inputs = self.processor(
            text=[p.text for p in prompts], return_tensors="pt", padding=True, padding_side="left", **media
        )
        return inputs.to(self.model.device, self.model.dtype)

    # -- answers ---------------------------------------------------------------------------------------------------
    def answers(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], until: Sequence[str] = ()
    ) -> list[Answer]:
        """Generate an answer to each prompt, all in one batch (one a kind, if some have pictures and others not).

        Args:
            settings: keyword arguments of ``generate``. until: strings the answers end before.
        """
        out: dict[int, Answer] = {}
        for indexes in by_media(prompts):
            inputs = self.tokenize([prompts[i] for i in indexes])
            start = inputs["input_ids"].shape[1]
            stops = StoppingCriteriaList([Stops(self.tokenizer, until, start)] if until else [])
            made = self.model.generate(
                **inputs, **self._padding(), policy=self.inside, stopping_criteria=stops, **settings
            )[:, start:]
            rows = vtr.report(self.model).rows
            texts = self.processor.batch_decode(made, skip_special_tokens=True)
            counts = (made != self._padding()["pad_token_id"]).sum(1).tolist()
            for i, text, count, row in zip(indexes, texts, counts, rows, strict=True):
                kept = sum(row.vision_tokens) / len(row.vision_tokens)
                out[i] = Answer(cut(text, until).strip(), count, kept, row.mean_keep)
        return [out[i] for i in range(len(prompts))]

    def _padding(self) -> dict[str, int]:
        pad = self.tokenizer.pad_token_id
        return {"pad_token_id": self.tokenizer.eos_token_id if pad is None else pad}

    def losses(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """For each prompt: the mean negative log-likelihood of the continuation's tokens, and whether it is what greedy
        decoding would say.

        The continuation is decoded by force, so that tokens are chosen for the question alone, as when generating.

        Raises:
            ValueError: an empty continuation.
        """
        tokens = [self._continuation(p.text, text) for p, text in zip(prompts, continuations, strict=True)]
        out: dict[int, tuple[float, bool]] = {}
        for indexes in by_media(prompts):
            for i, loss in zip(indexes, self._forced(indexes, prompts, tokens), strict=True):
                out[i] = loss
        return [out[i] for i in range(len(prompts))]

    def _forced(
        self, indexes: list[int], prompts: Sequence[Prompt], tokens: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        inputs = self.tokenize([prompts[i] for i in indexes])
        lengths = [len(tokens[i]) for i in indexes]
        wanted = torch.full((len(indexes), max(lengths)), 0)
        for row, i in enumerate(indexes):
            wanted[row, : lengths[row]] = torch.tensor(tokens[i])
        wanted = wanted.to(self.model.device)
        steps = self.model.generate(
            **inputs, **self._padding(), policy=self.inside, do_sample=False, num_beams=1, max_new_tokens=max(lengths),
            logits_processor=LogitsProcessorList([Forced(wanted)]), eos_token_id=[], output_logits=True,
            return_dict_in_generate=True,
        ).logits  # fmt: skip
        logits = torch.stack(steps, 1).float()  # [rows, steps, vocabulary], as the model gave them
        found = logits.log_softmax(-1).gather(2, wanted[:, : logits.shape[1], None]).squeeze(2)
        greedy = logits.argmax(-1) == wanted
        return [(-float(found[row, :n].mean()), bool(greedy[row, :n].all())) for row, n in enumerate(lengths)]

    def _continuation(self, prompt: str, text: str) -> list[int]:
        """The tokens by which ``text`` continues ``prompt`` (by itself, where the two melt into one token)."""
        before = self.tokenizer(prompt)["input_ids"]
        both = self.tokenizer(prompt + text)["input_ids"]
        alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = both[len(before) :] if both[: len(before)] == before else alone
        if not tokens:
            raise ValueError(f"cannot score {text!r}: it has no tokens after the prompt")
        return tokens


def by_media(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indexes of the prompts that one call of a processor takes: none with media beside one without."""
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    for i, p in enumerate(prompts):
        kinds.setdefault((bool(p.images), bool(p.videos), p.framed), []).append(i)
    return list(kinds.values())


def parts_of(content: Any) -> list[dict[str, Any]]:
    """A message's content as a list of parts: a plain text is one of them.

    Raises:
        UnsupportedError: neither text nor a list of texts and of dicts with a ``type``.
    """
    parts = [content] if isinstance(content, (str, Mapping)) else content
    if isinstance(parts, Iterable):
        made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        if all(isinstance(part, Mapping) and "type" in part for part in made):
            return [dict(part) for part in made]
    raise vtr.UnsupportedError(
        f'a message\'s content must be text or a list of parts like {{"type": "text", …}}, got {str(content)[:80]!r}'
    )


def picture(source: Any) -> Any:
    """A PIL picture in RGB, upright, from a PIL picture (turned already or not) or a file.

    Raises:
        UnsupportedError: neither. BadPictureError: broken. OSError: no such file.
    """
    try:
        return upright(source)
    except TypeError as error:
        raise vtr.UnsupportedError(str(error)) from error


def spelled(policy: vtr.Policy | None) -> str:
    """The policy's spec string, or ``none``."""
    return "none" if policy is None else policy.spec


__all__ = ["Answer", "Chat", "Prompt", "generation_settings", "picture", "read_policy", "spelled"]
