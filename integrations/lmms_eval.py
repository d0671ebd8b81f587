"""lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval): its models ``vtr``, found through an entry point.

::

    lmms-eval --model vtr --model_args 'pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,policy=fastv:keep=0.25;layer=2' \\
        --tasks mme --batch_size 8 --output_path runs

``pretrained``: a folder, a hub name, ``pocket``, ``pocket-joint`` or ``pocket-internvl``. ``policy``: a spec string.
lmms-eval splits ``--model_args`` at commas, so write ``;`` between a policy's settings, or put the spec in double
quotes (commas inside ``[…]`` are safe); a folder that ``policy.save_pretrained`` wrote is taken too. ``device``: cpu,
cuda, …; ``dtype``: auto, float32, …; ``max_frames_num``: so many frames of each video, evenly spread; ``answers``: a
folder for answers as they come, so that a run that was broken off goes on where it was.

Tasks that compare log-likelihoods (``multiple_choice``) need ``--force_simple``, as for every chat model of lmms-eval.
Several processes: ``accelerate launch --num_processes 2 -m lmms_eval …``; on a CPU
``ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m lmms_eval …`` (``--cpu`` would start one).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from vtr.integrations.chat import Answer, Chat, Prompt, generation_settings, parts_of, spelled
from vtr.integrations.kept_answers import KeptAnswers, key_of

from vtr.base import UnsupportedError
from vtr.data.videos import FRAMES

IMAGE_MARK = "<image>"
"""What lmms-eval's tasks write into their text where a picture belongs."""
MEDIA = ("image", "video")
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")


def manifests() -> list[Any]:
    """What lmms-eval asks the entry point for: one model with a chat and a simple class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vtr",
            simple_class_path=f"{__name__}.Vtr",
            chat_class_path=f"{__name__}.VtrChat",
        )
    ]


def interleaved(text: str, visuals: Sequence[Any]) -> list[dict[str, Any]]:
    """The content of a user turn: pictures and videos at the text's image marks, or in front where it has none.

    Raises:
        ValueError: some marks, but not one for each picture.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [*map(part_of, visuals), {"type": "text", "text": text}]
    if len(pieces) != len(visuals) + 1:
        raise ValueError(f"{len(pieces) - 1} {IMAGE_MARK} marks for {len(visuals)} pictures in {text[:80]!r}")
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        content += [{"type": "text", "text": piece}] if piece.strip() else []
        content += [part_of(visuals[i])] if i < len(visuals) else []
    return content


def part_of(visual: Any) -> dict[str, Any]:
    """One of a task's visuals: lmms-eval names videos by their files, and gives pictures themselves."""
    path = Path(visual) if isinstance(visual, (str, Path)) else None
    film = path is not None and (path.suffix.lower() in FILMS or path.is_dir())
    return {"type": "video", "video": path} if film else {"type": "image", "image": visual}


class Vtr(lmms):
    """lmms-eval's simple interface: text, pictures apart. The one that also compares log-likelihoods."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_frames_num: int | str = FRAMES,
        answers: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UnsupportedError(f"batch_size={batch_size!r}: vtr needs a number, e.g. --batch_size 8")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.chat: Chat | None = Chat(
            str(pretrained), policy, str(self.accelerator.device) if several else device or "auto", dtype,
            int(max_frames_num),
        )  # fmt: skip
        self.device: torch.device = self.chat.model.device
        about = {
            "model": str(pretrained),
            "policy": spelled(self.chat.policy),
            "dtype": dtype,
            "frames": int(max_frames_num),
        }
        self.kept = None if answers is None else KeptAnswers(Path(answers), about, self._rank)
        logger.info(f"vtr: {pretrained}, policy {spelled(self.chat.policy)}, {self.device}, rank {self._rank}")

    @property
    def tokenizer(self) -> Any:
        return self._chat().tokenizer

    def _chat(self) -> Chat:
        if self.chat is None:
            raise RuntimeError("lmms-eval has already freed this model: make a new one")
        return self.chat

    def clean(self) -> None:
        """Free the model, when lmms-eval has all answers."""
        self.chat = None
        if self.kept is not None:
            self.kept.close()
        super().clean()

    # -- what a request asks ---------------------------------------------------------------------------------------
    def _document(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _visuals(self, doc_to_visual: Callable[[Any], Any] | None, document: Any) -> list[Any]:
        return list((doc_to_visual(document) if doc_to_visual is not None else None) or [])

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _prompt(self, request: Instance) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = self._visuals(doc_to_visual, self._document(task, split, doc_id))
        return self._chat().prompt([{"role": "user", "content": interleaved(context, visuals)}])

    # -- answers ---------------------------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of ``requests``; those with equal generation settings share batches."""
        chat, results, warned = self._chat(), dict[int, Answer](), set[str]()
        started = time.perf_counter()
        with tqdm(total=len(requests), desc=f"vtr {spelled(chat.policy)}", disable=self._rank != 0) as bar:
            for indexes in grouped(requests, self._settings):
                settings, until, ignored = generation_settings(self._settings(requests[indexes[0]]))
                if new := set(ignored) - warned:
                    logger.warning(f"vtr ignores these generation settings: {', '.join(sorted(new))}")
                    warned |= new
                names = self._names(requests, indexes, settings)
                known = {i: old for i, name in names.items() if (old := self._kept(name)) is not None}
                results |= known
                bar.update(len(known))
                for part in chunks([i for i in indexes if i not in known], self.batch_size):
                    said = chat.answers([self._prompt(requests[i]) for i in part], settings, until)
                    results.update(zip(part, said, strict=True))
                    if self.kept is not None and names:
                        self.kept.put({names[i]: results[i] for i in part})
                    bar.update(len(part))
        answers = [results[i] for i in range(len(requests))]
        self._log(answers, time.perf_counter() - started)
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.tokens)) for a in answers]

    def _kept(self, name: str) -> Answer | None:
        return None if self.kept is None else self.kept.get(name)

    def _names(self, requests: list[Instance], indexes: list[int], settings: dict[str, Any]) -> dict[int, str]:
        """The names that answers are kept under; none without a folder for them, or where they are sampled."""
        if self.kept is None or settings["do_sample"]:
            return {}
        asked = {i: requests[i].args for i in indexes}
        return {i: key_of(*args[-2:], args[-3], args[0], self._settings(requests[i])) for i, args in asked.items()}

    def _log(self, answers: Sequence[Answer], seconds: float) -> None:
        """What was kept goes beside lmms-eval's own throughput figures."""
        if not answers:
            return
        tokens = sum(a.tokens for a in answers)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds,
            additional_metrics={
                "vision_tokens": sum(a.vision_tokens for a in answers) / len(answers),
                "mean_keep": sum(a.mean_keep for a in answers) / len(answers),
            },
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood of each continuation (a loss: lmms-eval takes the choice with the least), and
        whether greedy decoding would say it.

        Each pair is wrapped: lmms-eval 0.7.3 makes a string of a bare one, and unwraps this.

        Raises:
            UnsupportedError: a continuation without a prompt (the metric ``acc_mutual_info``).
        """
        chat, out = self._chat(), list[GenerationResult]()
        with tqdm(total=len(requests), desc=f"vtr {spelled(chat.policy)}", disable=self._rank != 0) as bar:
            for part in chunks(range(len(requests)), self.batch_size):
                pairs = [self._scored(requests[i]) for i in part]
                losses = chat.losses([prompt for prompt, _ in pairs], [text for _, text in pairs])
                out += [GenerationResult(loss) for loss in losses]
                bar.update(len(part))
        return out

    def _scored(self, request: Instance) -> tuple[Prompt, str]:
        if len(request.args) != 6:
            raise UnsupportedError("vtr scores continuations of a prompt only: leave out the metric acc_mutual_info")
        context, target, doc_to_visual, doc_id, task, split = request.args
        document = self._document(task, split, doc_id)
        text = target if isinstance(target, str) else target(document)
        content = interleaved(context, self._visuals(doc_to_visual, document))
        return self._chat().prompt([{"role": "user", "content": content}]), str(text)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UnsupportedError("vtr answers single-round tasks; this task asks several rounds")


class VtrChat(Vtr):
    """lmms-eval's chat interface: messages with pictures where they belong."""

    is_simple = False

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _prompt(self, request: Instance) -> Prompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self._document(task, split, doc_id))
        return self._chat().prompt([{"role": m["role"], "content": content(m["content"])} for m in messages])


def content(given: str | Iterable[Any]) -> list[dict[str, Any]]:
    """The content of one of lmms-eval's messages (media stand under ``url``), as :class:`Chat` takes it."""
    return [
        {"type": part["type"], part["type"]: part["url"]} if part["type"] in MEDIA and "url" in part else part
        for part in parts_of(given)
    ]


def grouped(requests: Sequence[Instance], key: Callable[[Instance], Any]) -> list[list[int]]:
    """Indexes of requests whose ``key`` is equal (as JSON), in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(json.dumps(key(request), sort_keys=True, default=str), []).append(i)
    return list(groups.values())


def chunks(indexes: Sequence[int], size: int) -> list[list[int]]:
    """Pieces of at most ``size``."""
    return [list(indexes[i : i + size]) for i in range(0, len(indexes), size)]
