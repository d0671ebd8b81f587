"""How a question about a picture is put to a model: the chat template, then text and pictures in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtr.data.pictures import upright
from vtr.inputs import split
from vtr.processing import processor as before_tower

if TYPE_CHECKING:
    from PIL import Image

    from vtr.base import Policy


def prompt(processor: Any, question: str, picture: bool = True) -> str:
    """The text of one turn: a picture (unless ``picture`` is False), then the question.

    Without a chat template it is LLaVA-1.5's ``USER: <image>\\n… ASSISTANT:``.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * picture + [{"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turn, add_generation_prompt=True))
    image = f"{processor.image_token}\n" if picture else ""
    return f"USER: {image}{question} ASSISTANT:"


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


def _upright(picture: Any) -> Any:
    """PIL pictures as one looks at them (see :func:`vtr.data.pictures.upright`); anything else is the processor's."""
    return upright(picture) if hasattr(picture, "getexif") else picture


def decode(processor: Any, generated: Any, prompt_length: int) -> list[str]:
    """What was said after the prompt, a stripped string a row; ``generated`` is what ``generate`` gave, [rows, L]."""
    said = processor.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in said]
