"""What a reduced model did: its logits of given words, rows that entered each layer, positions. Needs torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Runs ``generate`` along given words and looks on.

    Args:
        text: the text model: with ``layers`` (of which each begins with ``input_layernorm``) and ``rotary_emb``.
    """

    def __init__(self, model: Any, text: Any) -> None:
        self.model, self.text = model, text

    def run(self, inputs: dict[str, Tensor], words: Sequence[int], **options: Any) -> dict[str, Any]:
        """``logits``: float32 [1 + words, vocabulary], of the prompt's end and of each word.

        Beside these ``entered`` and ``left``: of each layer the prompt's rows [n, hidden size]; ``positions``: of each
        forward those that rotary embeddings were made for, [n] or [3, n]; ``cached``: of each layer the keys that its
        cache holds in the end, none without a cache.
        """
        self.logits: list[Tensor] = []
        self.entered: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        self.positions: list[Tensor] = []
        hooks = [self.text.rotary_emb.register_forward_pre_hook(self._placed, with_kwargs=True)]
        for i, layer in enumerate(self.text.layers):
            hooks.append(layer.input_layernorm.register_forward_pre_hook(self._entering(i)))
            hooks.append(layer.register_forward_hook(self._leaving(i)))

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            step = len(self.logits)
            self.logits.append(scores[0].detach().float().clone())
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([[*words, words[-1]][step]]), 0.0)

        try:
            out = self.model.generate(
                **inputs, max_new_tokens=1 + len(words), do_sample=False, logits_processor=[force],
                return_dict_in_generate=True, **options,
            )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        cache = out.past_key_values
        cached = [] if cache is None else [cache.get_seq_length(i) for i in range(len(self.text.layers))]
        return {"logits": torch.stack(self.logits), "entered": self.entered, "left": self.left,
                "positions": self.positions, "cached": cached}  # fmt: skip

    def _placed(self, module: Any, args: Any, kwargs: Any) -> None:
        found = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self.positions.append((found[:, 0] if found.dim() == 3 else found[0]).clone())

    def _entering(self, layer: int) -> Any:
        def note(module: Any, args: Any) -> None:
            if not self.logits:  # of the prompt alone; the last call counts
                self.entered[layer] = args[0][0].detach().clone()

        return note

    def _leaving(self, layer: int) -> Any:
        def note(module: Any, args: Any, out: Any) -> None:
            if not self.logits:
                self.left[layer] = (out if isinstance(out, Tensor) else out[0])[0].detach().clone()

        return note


def kept(done: dict[str, Any], whole: Tensor) -> tuple[list[list[int]], int | None]:
    """Of each layer the slots of the prompt that entered it, by their rows; and the first layer that was entered by
    rows which are none of the prompt's (then the list ends there), None without one.

    Args:
        whole: [length, hidden size], what enters the text model without reduction.
    """
    out: list[list[int]] = []
    slots, rows = list(range(len(whole))), whole
    for layer in range(len(done["entered"])):
        places = found(done["entered"][layer], rows)
        if places is None:
            return out, layer
        slots = [slots[place] for place in places]
        out.append(slots)
        rows = done["left"][layer]
    return out, None


def found(some: Tensor, rows: Tensor, tolerance: float = 1e-3) -> list[int] | None:
    """Where the rows ``some`` stand among ``rows``, in that order; None if one of them does not.

    tolerance: of the rows' standard deviation: another attention function rounds otherwise.
    """
    out: list[int] = []
    at, close = 0, tolerance * float(rows.std())
    for row in some:
        while at < len(rows) and float((row - rows[at]).abs().max()) > close:
            at += 1
        if at == len(rows):
            return None
        out.append(at)
        at += 1
    return out


def said(done: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """As JSON, with the rows that entered the first layer where they are not the prompt's own."""
    slots, made = kept(done, plain["entered"][0])
    rows = {"rows": done["entered"][0].tolist()} if made == 0 else {}
    positions = [one.tolist() for one in done["positions"]]
    return {"logits": done["logits"].tolist(), "kept": slots, "made": made, "positions": positions,
            "entered": [len(one) for one in done["entered"].values()], "cached": done["cached"], **rows}  # fmt: skip
