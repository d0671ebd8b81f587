"""VLMEvalKit (https://github.com/open-compass/VLMEvalKit; on PyPI as ms-vlmeval): a reduced model among its models.

VLMEvalKit finds models in a dict, not through entry points, so its runner is started from a script of one's own::

    # run_vtr.py
    from vlmeval.run import main  # in a checkout of VLMEvalKit: from run import main
    from vtr.integrations.vlmevalkit import register

    register("llava-next-7b-fastv", "llava-hf/llava-v1.6-vicuna-7b-hf", policy="fastv:keep=0.25,layer=2")
    main()

and then ``python run_vtr.py --data MMBench_DEV_EN MME --model llava-next-7b-fastv`` (or ``torchrun`` for several GPUs).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel
from vtr.integrations.chat import Chat, generation_settings, parts_of

from vtr.data.videos import FRAMES


class Vtr(BaseModel):
    """A model under one policy, as VLMEvalKit calls it.

    Args:
        pretrained: ``pocket``, ``pocket-joint``, ``pocket-internvl``, a folder or a hub name.
        policy: a spec string, a folder with a saved policy, or None.
        device, dtype: as :class:`~vtr.integrations.chat.Chat` takes them.
        nframe: so many frames are taken of each video, evenly spread.
        settings: of generation, e.g. ``max_new_tokens=512``.

    Raises:
        ValueError: a checkpoint or policy that cannot be had, or a generation setting that is not known.
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        policy: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        nframe: int = FRAMES,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings, self.until, unknown = generation_settings({"do_sample": False, **settings})
        if unknown:
            raise ValueError(
                f"no generation setting is called {', '.join(unknown)}: name those of transformers.GenerationConfig"
            )
        self.chat_model = Chat(pretrained, policy, device, dtype, nframe)

    def generate_inner(self, message: str | list[Any], dataset: str | None = None) -> str:
        """The answer to one question: a text, or a list of texts and ``{"type": …, "value": …}`` (image, video)."""
        return self._answer([{"role": "user", "content": parts(message)}])

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer that continues a conversation: ``message`` is a list of ``{"role": …, "content": …}``."""
        return self._answer([{"role": turn["role"], "content": parts(turn["content"])} for turn in message])

    def _answer(self, turns: list[dict[str, Any]]) -> str:
        return self.chat_model.answers([self.chat_model.prompt(turns)], self.settings, self.until)[0].text


def parts(message: str | Iterable[Any]) -> list[dict[str, Any]]:
    """VLMEvalKit's parts of a message, or its plain text, as :class:`~vtr.integrations.chat.Chat` takes them."""
    return [
        {"type": part["type"], part["type"]: part["value"]} if "value" in part else part for part in parts_of(message)
    ]


def register(name: str, pretrained: str, policy: Any = None, **settings: Any) -> None:
    """Make ``--model name`` known to VLMEvalKit's runner of this process.

    Args:
        pretrained, policy, settings: what :class:`Vtr` takes.

    Raises:
        ValueError: VLMEvalKit has a model of its own with that name.
    """
    known = supported_VLM.get(name)
    if known is not None and getattr(known, "func", None) is not Vtr:
        raise ValueError(f"VLMEvalKit already has a model called {name!r}: choose another name")
    supported_VLM[name] = partial(Vtr, pretrained=pretrained, policy=policy, **settings)


__all__ = ["Vtr", "register"]
