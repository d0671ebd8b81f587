"""What a dense, masked run of the untouched model says of given words, were the same tokens kept: the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vtr.eval.peers.forced import Recorder

from vtr.testing import dense


@dataclass(frozen=True)
class Reference:
    """A prompt of the untouched model.

    Attributes:
        row: as it enters the decoder, with its positions. words: ids that are decoded behind it.
    """

    model: Any
    row: dense.Row
    words: Sequence[int]

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Tensor], words: Sequence[int], image: int) -> Reference:
        """``image``: id of a vision token's placeholder."""
        with torch.inference_mode():
            plain = Recorder(model, model.get_decoder()).run(inputs, words)
        row = dense.Row(plain["entered"][0], inputs["input_ids"][0] == image, plain["positions"][0])
        return cls(model, row, words)

    def positions(self, entered: Sequence[int] = (), at: Tensor | None = None) -> Tensor:
        """Of prompt and words, [n] or with M-RoPE [3, n]: the words go on where the prompt ends.

        Args:
            entered, at: slots that entered the decoder, and their positions, if these are others than the prompt's own
                (or of all slots). Methods differ in whether positions close up over what is dropped before the decoder.

        Raises:
            ValueError: ``at`` is neither of the slots nor of the prompt.
        """
        assert self.row.positions is not None
        prompt = self.row.positions.clone()
        if at is not None:
            if at.shape[-1] not in (len(entered), len(self.row.embeds)):
                raise ValueError(f"{at.shape[-1]} positions of {len(entered)} slots that entered the decoder")
            prompt[..., list(entered) if at.shape[-1] == len(entered) else slice(None)] = at
        return torch.cat([prompt, prompt[..., -1:] + 1 + torch.arange(len(self.words))], -1)

    def closed_up(self, entered: Sequence[int], positions: Tensor) -> bool:
        """Whether the slots ``entered`` stand elsewhere than in the whole prompt."""
        return not torch.equal(positions[..., list(entered)], self.positions()[..., list(entered)])

    @torch.inference_mode()
    def logits(self, kept: list[list[int]], positions: Tensor | None = None) -> Tensor:
        """Of the prompt's end and of each word: float32 [1 + words, vocabulary].

        kept: vision tokens that enter each layer, as slots. positions: if others than the prompt's own.
        """
        return self._of(self.row.embeds, self.row.vision, kept, self.positions() if positions is None else positions)

    def entered(self, vision: Sequence[int]) -> list[int]:
        """All words of the prompt and these vision tokens: slots, ascending."""
        return sorted({*range(len(self.row.embeds))} - {*self.row.slots} | {*vision})

    @torch.inference_mode()
    def logits_of(self, rows: Tensor, at: Tensor) -> Tensor:
        """The same where the prompt's rows are ``rows``, all of which enter all layers, at positions ``at``."""
        none = torch.zeros(len(rows)).bool()
        return self._of(rows, none, [[] for _ in self.model.get_decoder().layers], at)

    def _of(self, embeds: Tensor, vision: Tensor, kept: list[list[int]], positions: Tensor) -> Tensor:
        new = self.model.get_input_embeddings().weight[torch.tensor(self.words)]
        seen = torch.cat([vision, torch.zeros(len(new)).bool()])
        row = dense.Row(torch.cat([embeds, new]), seen, positions)
        return dense.run(self.model, row, dense.Given(kept)).logits[len(embeds) - 1 :]
