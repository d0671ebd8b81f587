"""How a question about a picture or a video is put to a model: the chat template, then text and media in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtr.data.pictures import upright
from vtr.inputs import split
from vtr.processing import processor as before_tower

if TYPE_CHECKING:
    from PIL import Image

    from vtr.base import Policy
    from vtr.data.videos import Video


def prompt(processor: Any, question: str, picture: bool = True) -> str:
    """The text of one turn: a picture (unless ``picture`` is False), then the question.

    Without a chat template it is LLaVA-1.5's ``USER: <image>\\n… ASSISTANT:``.
    """
    if getattr(processor, "chat_template", None):
        return _turn(processor, [{"type": "image"}] * picture, question)
    image = f"{processor.image_token}\n" if picture else ""
    return f"USER: {image}{question} ASSISTANT:"


def _turn(processor: Any, media: Sequence[dict[str, str]], question: str) -> str:
    """The text of one turn: media parts, then the question, as the chat template puts them."""
    turn = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return str(processor.apply_chat_template(turn, add_generation_prompt=True))


def encode(
    processor: Any, questions: Sequence[str], pictures: Sequence[Image.Image] | None, policy: str | Policy | None = None
) -> Any:
    """A left-padded batch for ``generate``: one picture a question, or text only where ``pictures`` is None.

    PIL pictures are turned upright, as their EXIF orientation says.

    Args:
        policy: what of it acts before the tower (``"fewer_crops"``) acts on the pictures; the rest is for ``generate``
            (:func:`vtr.split` says which that is).

    Raises:
        ValueError: not as many pictures as questions.
        UnsupportedError: the policy has nothing to do before this processor.
    """
    processor = before_tower(processor, split(policy)[0])
    texts = [prompt(processor, question, pictures is not None) for question in questions]
    given = {"text": texts, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    if pictures is None:
        return processor(**given)
    if len(pictures) != len(questions):
        raise ValueError(f"{len(questions)} questions need as many pictures, got {len(pictures)}")
    return processor(images=[[_upright(picture)] for picture in pictures], **given)


def shows_videos(processor: Any) -> bool:
    """Whether a processor takes videos; else their frames are put as pictures, each behind its number."""
    return getattr(processor, "video_processor", None) is not None


def video_parts(processor: Any, frames: int) -> list[dict[str, str]]:
    """The parts of a message that stand for a video of so many frames, in transformers' chat format.

    One part where the processor takes videos; else ``Frame1: <image>``, ``Frame2: <image>`` …, a line each, as InternVL
    writes them.
    """
    if shows_videos(processor):
        return [{"type": "video"}]
    parts = []
    for i in range(1, frames + 1):
        parts += [{"type": "text", "text": f"Frame{i}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
    return parts


def whole_frames(processor: Any) -> dict[str, Any]:
    """Settings with which a processor lays each picture as one tile, as it does with the frames of a video."""
    known = getattr(processor, "image_processor", None)
    return {name: False for name in ("crop_to_patches", "do_image_splitting") if hasattr(known, name)}


def encode_videos(processor: Any, questions: Sequence[str], videos: Sequence[Video]) -> Any:
    """A left-padded batch for ``generate``: one video a question (:func:`vtr.data.videos.read_video`).

    A processor that takes videos gets them, all frames and their times; of others see :func:`video_parts`.

    Raises:
        ValueError: not as many videos as questions, or a processor without a chat template.
    """
    if len(videos) != len(questions):
        raise ValueError(f"{len(questions)} questions need as many videos, got {len(videos)}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so nobody knows where it wants the frames of a video: "
            "set processor.chat_template, or give the frames as pictures"
        )
    texts = [
        _turn(processor, video_parts(processor, len(video.frames)), question)
        for question, video in zip(questions, videos, strict=True)
    ]
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **of_videos(processor, videos))


def of_videos(processor: Any, videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor's call takes for these videos, one a row: videos with what is known of them, or pictures."""
    if not shows_videos(processor):
        return {"images": [video.frames for video in videos], **whole_frames(processor)}
    known = [{"total_num_frames": v.total, "fps": v.fps, "frames_indices": v.indices} for v in videos]
    return {"videos": [video.frames for video in videos], "video_metadata": known, "do_sample_frames": False}


def _upright(picture: Any) -> Any:
    """PIL pictures as one looks at them (see :func:`vtr.data.pictures.upright`); anything else is the processor's."""
    return upright(picture) if hasattr(picture, "getexif") else picture


def decode(processor: Any, generated: Any, prompt_length: int) -> list[str]:
    """What was said after the prompt, a stripped string a row; ``generated`` is what ``generate`` gave, [rows, L]."""
    said = processor.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in said]
