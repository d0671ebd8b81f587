"""Pictures as the decoder would get them: for engines that take finished embeddings (``image_embeds``)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import QUESTIONS, Policy, UnsupportedError
from vtr.data.pictures import upright
from vtr.engine.midway import enter
from vtr.inputs import split
from vtr.policies import UniformGrid
from vtr.processing import processor as before_tower

if TYPE_CHECKING:
    from PIL import Image

EVERYTHING = UniformGrid(1.0, before_decoder=True)


@torch.no_grad()
def encode(model: Any, processor: Any, picture: Image.Image, policy: str | Policy | None) -> torch.Tensor:
    """What of one picture enters the decoder: tower, projector, then the policy.

    How many tokens stay may depend on what the picture shows: nobody has to know it beforehand.

    Args:
        model: a patched model. picture: turned upright, as its EXIF orientation says.
        policy: one that acts before the decoder, or before the tower; None or ``"none"`` for all tokens.

    Returns:
        [n, hidden_size], in the model's dtype, on the CPU; newline tokens included.

    Raises:
        UnsupportedError: the policy acts in the decoder as well, or there alone.
    """
    before, made = split(None if policy == "none" else policy)
    processor, made = before_tower(processor, before), made or EVERYTHING
    inside = [question for question in QUESTIONS if question != "compress" and made.asks(question)]
    if inside or not made.asks("compress"):
        raise UnsupportedError(
            f"{made.spec} acts in the decoder, and embeddings are made before it: use a policy that compresses, e.g. "
            "m3:tokens=36 or globalcom2:retention=0.25"
        )
    inputs = processor(text=processor.image_token, images=[upright(picture)], return_tensors="pt").to(model.device)
    at = enter(model, inputs, made, inputs["input_ids"].shape[1])
    return at.hidden[0].index_select(0, at.session.packed.vision).cpu()


def as_part(embeds: torch.Tensor) -> dict[str, Any]:
    """The part of an OpenAI chat message that gives vLLM one picture's embeddings [n, hidden_size]."""
    raw = io.BytesIO()
    torch.save(embeds.contiguous(), raw)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(raw.getvalue()).decode()}


def messages(embeds: Sequence[torch.Tensor], question: str) -> list[dict[str, Any]]:
    """A chat about pictures that are embeddings."""
    return [{"role": "user", "content": [*map(as_part, embeds), {"type": "text", "text": question}]}]
