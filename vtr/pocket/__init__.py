"""The pocket models: three tiny LLaVA-NeXT and two tiny InternVL with their weights, pictures and films with questions.

They exist to compare token-reduction policies in seconds on a CPU, without a download. See the MODEL_CARD.md in
weights, joint/weights, shots/weights, internvl/weights and video/weights. A sixth, of pretrained parts, is built by a
command (``vtr.pocket.pretrained``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr.base import Policy
from vtr.learned import SHIPPED

from . import pretrained

if TYPE_CHECKING:
    import torch
    from PIL import Image

_HERE = Path(__file__).parent
WEIGHTS, SAMPLES = _HERE / "weights", _HERE / "samples"
MODELS = {"llava-next": WEIGHTS} | {name: _HERE / name / "weights" for name in ("joint", "internvl")}
"""The pocket models that are whole checkpoints, the first by default, and where their weights are. "joint" is the
LLaVA-NeXT trained on under every policy, p-MoD and Dynamic-LLaVA among them; it also lists all objects of a picture
(answers of fifty words)."""
TRAINED_ON = {"video": "internvl", "shots": "llava-next"}
"""Those that are kept as changes of another one, and of which (``vtr.pocket.changes``). "video" has learnt to watch
films, "shots" to read demonstrations."""
NAMES = {"pocket": "llava-next"} | {f"pocket-{name}": name for name in ("joint", "internvl", "video", "shots")}
"""What a shipped pocket model is called where a folder or a hub name may stand (``--model``)."""
SHIPPED_NAMES = tuple(NAMES)
"""Those that need no download."""
NAMES[pretrained.NAME] = "pretrained"
UNSERVED = ("pocket-internvl", "pocket-video", pretrained.NAME)
UNSERVED_BECAUSE = "vLLM asks InternVL for a processor with videos and for features of the last layer: serve pocket"
POLICIES = {"pocket": _HERE / "policies", "pocket-joint": _HERE / "joint" / "policies"}
"""What the trained policies of a pocket model are called as ``weights=``, and where they are."""
SHIPPED.update(POLICIES)

__all__ = [
    "MODELS",
    "NAMES",
    "POLICIES",
    "SAMPLES",
    "SHIPPED_NAMES",
    "WEIGHTS",
    "autoscale",
    "canvases",
    "checkpoint",
    "films",
    "listings",
    "load",
    "sample",
    "samples",
    "task_of",
]


def load(family: str = "llava-next", dtype: torch.dtype | None = None, folder: Path | None = None) -> tuple[Any, Any]:
    """A trained model (evaluation mode; float32 unless told otherwise) and its processor, from the package.

    Args:
        family: "llava-next", "joint", "shots" (both of the same family), "internvl" or "video" (of the same family), or
            "pretrained", which a command builds (``vtr.pocket.pretrained``).
        folder: another one with such a model: a whole checkpoint or, of "video" and "shots", changes as their training
            writes them.

    Raises:
        ValueError: no such model, or one that is not built; the message says by what it is. Or changes of other weights
            than this package's.
    """
    if family == "pretrained":
        folder = pretrained.built(folder)
        pretrained.say_limits(folder)
    if folder is None:
        folder = _HERE / family / "weights" if family in TRAINED_ON else checkpoint(family)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from . import changes

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a few megabytes need none
    how: dict[str, Any] = {"dtype": dtype or torch.float32, "local_files_only": True, "attn_implementation": "sdpa"}
    try:
        if family in TRAINED_ON and (folder / changes.FILE).is_file():
            model = changes.load_model(folder, checkpoint(TRAINED_ON[family]), **how)
        else:
            model = AutoModelForImageTextToText.from_pretrained(folder, **how)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def checkpoint(family: str) -> Path:
    """The folder of a pocket model that is a whole checkpoint.

    Raises:
        ValueError: it is none, or not built.
    """
    if family == "pretrained":
        return pretrained.built()
    if family in TRAINED_ON:
        raise ValueError(
            f"the pocket model {family!r} is no whole checkpoint, but changes of another one: write one with "
            f"vtr.pocket.load({family!r}), then save_pretrained of model and processor, and use that folder"
        )
    if family not in MODELS:
        raise ValueError(f"family={family!r}: choose one of {', '.join(NAMES.values())}")
    return MODELS[family]


def autoscale(method: str = "cascade") -> Policy:
    """The chooser of scales fitted on the pocket LLaVA-NeXT: "cascade" or "router" (see :class:`vtr.AutoScale`).

    Raises:
        ValueError: no such method.
    """
    if method not in ("cascade", "router"):
        raise ValueError(f"method={method!r}: choose 'cascade' or 'router'")
    return Policy.from_pretrained(POLICIES["pocket"] / method)


def task_of(model: str | None) -> str:
    """What ``pocket`` means as data where a model is asked: the pretrained one has learnt a task of its own."""
    return "canvases" if model == pretrained.NAME else "questions"


def data_of(model: str | None, data: str) -> str:
    """``data`` as a model is asked it: ``pocket`` without a task is of the task that the model has learnt."""
    kind, _, settings = data.partition(":")
    if kind != "pocket" or "task=" in settings or task_of(model) == "questions":
        return data
    return "pocket:" + ",".join([*filter(None, [settings]), f"task={task_of(model)}"])


def sample(i: int = 0, model: str | None = None) -> tuple[Image.Image, str, str]:
    """One of the shipped pictures with a question and its answer.

    Args:
        model: the pocket model that is to be asked; "pocket-pretrained" has pictures of its own.

    Raises:
        ValueError: no such sample; the message lists those there are.
    """
    from PIL import Image

    if task_of(model) == "canvases":
        made = list(canvases(3, per_canvas=1))
        if i in range(len(made)):
            return made[i]["image"], made[i]["question"], made[i]["answer"]
        there = ", ".join(f"{n} ({one['question']})" for n, one in enumerate(made))
        raise ValueError(f"there is no sample {i}: choose one of {there}")
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    if i not in range(len(entries)):
        there = ", ".join(f"{n} ({entry['question']}?)" for n, entry in enumerate(entries))
        raise ValueError(f"there is no sample {i}: choose one of {there}")
    entry = entries[i]
    return Image.open(SAMPLES / entry["file"]).convert("RGB"), entry["question"], entry["answer"]


def samples(n: int, split: str = "test", seed: int = 0, per_scene: int = 8) -> Iterator[dict[str, Any]]:
    """n fresh questions as dict(image, question, answer, type); needs scikit-learn (handwritten digits)."""
    from .scenes import samples as draw

    return draw(n, split, seed, per_scene)


def listings(n: int, split: str = "test", seed: int = 0) -> Iterator[dict[str, Any]]:
    """n pictures whose objects are all to be listed (about fifty words; ``vtr.pocket.listing``), as :func:`samples`."""
    from .listing import samples as draw

    return draw(n, split, seed)


def films(n: int, split: str = "test", seed: int = 0, frames: int = 8) -> Iterator[dict[str, Any]]:
    """n questions about films as dict(frames, question, answer, type); the answers need time (``vtr.pocket.video``).

    Args:
        frames: in a film, 8 or more.
    """
    from .video.films import samples as draw

    return draw(n, split, seed, frames)


def canvases(
    n: int, split: str = "test", seed: int = 0, side: int = 224, per_canvas: int = 2
) -> Iterator[dict[str, Any]]:
    """n questions about one to four things on a canvas as dict(image, question, answer, type): what the pretrained
    pocket model has learnt, in a style of drawing that it has never seen.

    Args:
        split: "test", or "val" for choosing settings. side: of the pictures in pixels; 448 makes five tiles of one.
        per_canvas: questions of one canvas.
    """
    from .pretrained.canvases import samples as draw
    from .pretrained.drawings import held_out

    return draw(n, held_out(), f"{split}-{seed}", side, per_canvas)
