"""MMTok (Dong et al., ICLR 2026, arXiv 2508.18264): tokens that cover the question's words and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtr.base import UnsupportedError
from vtr.checks import check_number
from vtr.image import Image
from vtr.policies.picture._greedy import covering, only, products, unit
from vtr.policies.picture._tiles import Tilewise, first_of
from vtr.settings import register_policy


def coverage(
    projected: torch.Tensor, states: torch.Tensor, words: torch.Tensor, alpha: float, text_temperature: float,
    vision_temperature: float, there: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """How well each vision token covers each word and each vision token; every row is a distribution over the tokens.

    Args:
        projected: [tiles, n, hidden_size]. states: [tiles, n, width], before the projector. words: [m, hidden_size].
        there: bool [tiles, n], or None for all: the others cover nothing, and need not be covered.

    Returns:
        float32 [tiles, m + n, n]; the FLOPs of the products.
    """
    (tiles, n, width), m = projected.shape, len(words)
    asked = torch.matmul(unit(words), unit(projected).transpose(1, 2)) / text_temperature
    alike, flops = products(unit(states))
    alike /= vision_temperature
    sizes: int | torch.Tensor = n
    if there is not None:
        away = ~there.to(alike.device, non_blocking=True)[:, None]
        asked, alike = asked.masked_fill_(away, -torch.inf), alike.masked_fill_(away, -torch.inf)
        sizes = there.sum(1).clamp(min=1).to(alike.device, non_blocking=True)[:, None, None]
    table = torch.cat([asked.softmax(-1) / max(m, 1), alike.softmax(-1) * alpha / sizes], 1)
    if there is not None:
        table = table.nan_to_num_().masked_fill_(away, 0)
        table[:, m:].masked_fill_(away.transpose(1, 2), 0)
    return table, flops + 2 * tiles * m * n * width


@register_policy("mmtok")
@dataclass
class MMTok(Tilewise):
    """Of every tile, keep tokens that together stand for the question's words and for the tile's other tokens.

    MMTok, Dong et al., ICLR 2026, arXiv 2508.18264 (Eqs. 1 and 2, Algorithm 2). Each word spreads a mass of 1 over the
    tile's tokens (softmax of cosines with its embedding), each token likewise (cosines of what the tower gives, before
    the projector); the next token is always the one that adds most to what is covered. The words are the row's text
    behind its last image as the text model embeds it, chat template included: a policy does not see words. The official
    code takes the last user turn without 47 stop words; ``leave_out`` names tokens that are no words of yours.
    Newline tokens stay, and padding takes no part. Without any text, the picture alone is covered.

    Args:
        keep: patches of each tile that stay: a ratio (float; above 0 at least one), or a count (int).
        placement: "true" leaves every token where it was; "official" repeats the published code for pictures with
            crops: no unpadding, no newline tokens.
        alpha: weight of the picture, at least 0; that of the question is 1.
        text_temperature: of the words' softmax, above 0 (the official one is 0.02 for LLaVA, 0.01 for Qwen2.5-VL).
        vision_temperature: of the tokens' softmax, above 0.
        leave_out: ids of text tokens that are no words of the question (template, stop words); if nothing else is
            asked, all count.

    Raises:
        TypeError, ValueError: settings out of range.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    leave_out: Sequence[int] = ()

    question_guided: ClassVar[bool] = True

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return "tiles", "hidden_states", "question"

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_number(self.alpha, "alpha") < 0:
            raise ValueError(f"alpha={self.alpha} must be at least 0 (0: the question alone)")
        for name in ("text_temperature", "vision_temperature"):
            if check_number(getattr(self, name), name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if isinstance(self.leave_out, str) or not isinstance(self.leave_out, Sequence):
            raise TypeError(f"leave_out must be a list of token ids, got {self.leave_out!r}")
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in self.leave_out):
            raise ValueError("leave_out must be token ids: ints of at least 0")
        self.leave_out = tuple(self.leave_out)

    def words(self, image: Image) -> torch.Tensor:
        """[m, hidden_size]: what of the row's question counts.

        Raises:
            UnsupportedError: ``leave_out`` is set, but the call gave embeddings, whose ids nobody knows.
        """
        assert image.question is not None
        if not self.leave_out or not len(image.question):
            return image.question
        if image.question_ids is None:
            raise UnsupportedError("leave_out names token ids, but the call gives inputs_embeds: give input_ids")
        stays = (~torch.isin(image.question_ids, torch.tensor(self.leave_out))).nonzero()[:, 0]
        return image.question.index_select(0, stays.to(image.question.device)) if len(stays) else image.question

    @torch.no_grad()
    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tower is not None and image.tiles is not None
        table, flops = coverage(
            image.tiles, image.tower.hidden_states(), self.words(image), self.alpha, self.text_temperature,
            self.vision_temperature, only(there),
        )  # fmt: skip
        image.flops += flops
        picks, _ = covering(table, max(counts), only(there))
        return first_of(picks, counts, there.shape[1])
