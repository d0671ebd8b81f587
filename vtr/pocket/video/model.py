"""The pocket InternVL with a few more words, and how a film reaches its language model.

A frame is an image of one tile of 6 x 6 tokens, behind its number, as transformers' InternVL processor writes a video:
``Frame1: <img>…</img>``. The number is one word a digit.
"""

from __future__ import annotations

from typing import Any

import torch

from ..internvl.model import CLOSE, OPEN, SIDE, features, tokens_of
from ..internvl.model import WORDS as BEFORE
from ..internvl.model import make_processor as make_internvl_processor
from ..model import IMAGE, pixels_of

WORDS = [*BEFORE, "frame", "moved", "appeared", "vanished", "first", "last"]
IDS = {word: i for i, word in enumerate(WORDS)}
TOKENS = SIDE**2  # of a frame


def build(teacher: Any, seed: int = 0) -> Any:
    """The pocket InternVL ``teacher`` with rows for the new words: about as loud as the others, in any direction."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config: Any = InternVLConfig.from_dict(teacher.config.to_dict())
    config.text_config.vocab_size = len(WORDS)
    model = InternVLForConditionalGeneration(config)
    state = {name: value for name, value in teacher.state_dict().items() if "embed_tokens" not in name}
    words = teacher.get_input_embeddings().weight.detach()
    noise = torch.randn(len(WORDS) - len(words), words.shape[1], generator=torch.Generator().manual_seed(seed))
    table = torch.cat([words, noise * words[IMAGE + 1 :].std()])
    name = next(name for name in model.state_dict() if name.endswith("embed_tokens.weight"))
    state |= {name: table, "lm_head.weight": table}
    model.load_state_dict(state)
    model.tie_weights()
    return model


def make_processor() -> Any:
    """The pocket InternVL's, with the new words."""
    return make_internvl_processor(IDS, numbers=True)


@torch.no_grad()
def see(model: Any, frames: torch.Tensor) -> torch.Tensor:
    """Frames as the language model gets them.

    Args:
        frames: uint8 (films, T, 96, 96, 3).

    Returns:
        (films, T, 36, width).
    """
    return tokens_of(model, features(model, pixels_of(frames).flatten(0, 1))).unflatten(0, frames.shape[:2])


def marks(frames: int) -> list[int]:
    """Token ids of a film of so many frames, with IMAGE where vision tokens stand."""
    ids: list[int] = []
    for number in range(1, frames + 1):
        digits = [IDS[digit] for digit in str(number)]
        ids += [IDS["frame"], *digits, IDS[OPEN], *[IMAGE] * TOKENS, IDS[CLOSE]]
    return ids


def prefix(model: Any, vision: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Films with their marks, of which only some vision tokens are there.

    Args:
        vision: (films, T, 36, width). kept: bool (films, T · 36), as many True in each row.

    Returns:
        Embeddings (films, n, width), their places in the whole film, int64 (films, n), and which vision token each is,
        int64 (films, n), -1 for a word.
    """
    films, count = vision.shape[0], vision.shape[1] * TOKENS
    ids = torch.tensor(marks(vision.shape[1]))
    is_vision = ids == IMAGE
    whole = model.get_input_embeddings()(ids).expand(films, -1, -1).clone()
    whole[:, is_vision] = vision.flatten(1, 2)
    number = torch.full((len(ids),), -1).masked_scatter(is_vision, torch.arange(count))
    there = torch.ones(films, len(ids), dtype=torch.bool)
    there[:, is_vision] = kept
    place = there.nonzero()[:, 1].view(films, -1)
    return whole.gather(1, place[..., None].expand(-1, -1, whole.shape[-1])), place, number[place]
