"""The objective of Dynamic-LLaVA (arXiv 2412.00876): sequences stay whole, dropped tokens are only masked.

Predictors decide by Gumbel-softmax with straight-through gradients; from their layer on, attention multiplies the
exponentials of a masked key by 0 (but for its own query), which lets gradients reach both decisions. The loss is the
answers' cross-entropy plus the squared distance of the kept shares from what is wanted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtr.base import UnsupportedError
from vtr.engine.adapters import find_adapter
from vtr.engine.attention import AttentionConfig, attention
from vtr.engine.compat import check_checkpointing
from vtr.engine.prompt import read_prompt
from vtr.policies.trained.dynamic_llava import KEEP, DynamicLLaVA

EPS = 1e-6
BLOCK = 256
"""Queries that attend at a time; their scores are made again in the backward pass."""
NAME = "vtr_masked_"


def temperature(done: float, first: float = 1.0, last: float = 0.1) -> float:
    """Of the Gumbel-softmax when the share ``done`` of all steps is over: from ``first`` to ``last``, exponentially."""
    return first * (last / first) ** done


# -- masked softmax ----------------------------------------------------------------------------------------------------
def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, scaling: float,
    mask: torch.Tensor | None = None, block: int = BLOCK,
) -> torch.Tensor:  # fmt: skip
    """Causal attention in which a key counts ``keep`` times, for its own query always once.

    attn_ij = (e_ij + eps / N) / (sum_j e_ij + eps), e_ij = exp(A_ij - max_j A_ij) · keep_j (· 1 for i = j), in float32.
    Never holds more than ``block`` × N scores a head, forward or backward.

    Args:
        query: [B, heads, N, d]. key, value: [B, kv_heads, N, d]. keep: [B, N], 0 or 1, with gradients.
        mask: what may be seen, [B or 1, 1, N, N], bool or added to the scores; None: what came before.

    Returns:
        [B, heads, N, d], in ``query``'s dtype.
    """
    groups, n = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    rest = value.float().sum(2, keepdim=True) * (EPS / n)
    outs = []
    for start in range(0, n, block):
        end = min(start + block, n)
        seen = None if mask is None else mask[..., start:end, :end]
        parts = (query[:, :, start:end], key[:, :, :end], value[:, :, :end], keep[:, :end], rest, seen, start, scaling)
        again = torch.is_grad_enabled() and n > block
        outs.append(checkpoint(_block, *parts, use_reentrant=False) if again else _block(*parts))
    return torch.cat(outs, 2).to(query.dtype)


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, rest: torch.Tensor,
    mask: torch.Tensor | None, start: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    scores = (q @ k.transpose(2, 3) * scaling).float()
    rows, columns = torch.arange(start, start + q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    if mask is None:
        mask = columns <= rows[:, None]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # a query of padding sees nothing
    counts = torch.where(columns == rows[:, None], 1.0, keep[:, None, None].float())
    weights = torch.exp(scores - top) * counts
    return (weights @ v.float() + rest) / (weights.sum(-1, keepdim=True) + EPS)


def _attention(
    base: str, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """As transformers asks for it; without a masking in its keyword arguments it is the model's own attention."""
    masking: Masking | None = kwargs.pop("vtr_masking", None)
    if masking is None or masking.keep is None:
        return attention(base, module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise UnsupportedError("masked attention has no dropout: set the model's attention_dropout to 0")
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out = masked_attention(query, key, value, masking.keep, scaling, attention_mask)
    return out.transpose(1, 2).contiguous(), None


class MaskedConfig(AttentionConfig):
    """What an attention module has for its config while the method is trained."""

    @property
    def _attn_implementation(self) -> str:
        config = self.own
        while isinstance(config, AttentionConfig):
            config = config.own
        base = config._attn_implementation
        if base not in ("sdpa", "eager"):
            raise UnsupportedError(f"training with attention {base!r}: load the model with attn_implementation='sdpa'")
        if NAME + base not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(NAME + base, partial(_attention, base))
        return NAME + base


# -- decisions ---------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Masking:
    """What one forward has to decide, and what it decided. Travels in keyword arguments.

    Attributes:
        images: row and slots (int64 [n]) of every image. answers: row, first and end slot of every answer; those of
            fewer than ``min_answer`` tokens stay whole (noise is drawn for them, as in the official code).
        tau: temperature of the Gumbel-softmax. keep: [B, N], set on entering the policy's layer.
        image_shares, text_shares: the kept share of every image and answer, scalars with gradients.
    """

    images: list[tuple[int, torch.Tensor]]
    answers: list[tuple[int, int, int]]
    tau: float
    min_answer: int
    keep: torch.Tensor | None = None
    image_shares: list[torch.Tensor] = field(default_factory=list)
    text_shares: list[torch.Tensor] = field(default_factory=list)

    def decide(self, policy: DynamicLLaVA, hidden: torch.Tensor) -> None:
        """Both predictors on the states [B, N, D] that enter the policy's layer."""
        predict, keep = policy.at(hidden), hidden.new_ones(hidden.shape[:2])
        by_length = defaultdict(list)
        for row, slots in self.images:
            by_length[len(slots)].append((row, slots.to(hidden.device)))
        for some in by_length.values():
            states = torch.stack([hidden[row, slots] for row, slots in some])
            kept = self._sample(predict("image", states))
            for (row, slots), mine in zip(some, kept, strict=True):
                keep = keep.index_put((torch.tensor(row, device=slots.device), slots), mine.to(keep))
                self.image_shares.append(mine.mean())
        if any(b - a >= self.min_answer for _, a, b in self.answers):
            states = nn.utils.rnn.pad_sequence([hidden[row, a:b] for row, a, b in self.answers], batch_first=True)
            kept = self._sample(predict("text", states))
            for (row, a, b), mine in zip(self.answers, kept, strict=True):
                if b - a < self.min_answer:
                    continue
                at = torch.arange(a, b, device=hidden.device)
                keep = keep.index_put((torch.tensor(row, device=at.device), at), mine[: b - a].to(keep))
                self.text_shares.append(mine[: b - a].mean())
        self.keep = keep

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., 2] → [...] in {0, 1}, gradients as if soft."""
        return F.gumbel_softmax(logits.float().log_softmax(-1), self.tau, hard=True)[..., KEEP]


def last_answer(labels: torch.Tensor, valid: torch.Tensor) -> tuple[int, int] | None:
    """First and end slot of the run of labels at the end of a row ([N]; padding apart), None where there is none."""
    slots = valid.nonzero().squeeze(1)
    learnt = labels[slots] != -100
    if not len(slots) or not bool(learnt[-1]):
        return None
    asked = (~learnt).nonzero().squeeze(1)
    first = int(asked[-1]) + 1 if len(asked) else 0
    return int(slots[first]), int(slots[-1]) + 1


# -- the objective -----------------------------------------------------------------------------------------------------
class DynamicLLaVATraining(nn.Module):
    """A model and the Dynamic-LLaVA policy that is trained into it, as one module, so that DDP sees both's weights.

    Installs attention functions and hooks in the decoder layers; :meth:`remove` takes them out again. Without labels to
    judge, images or a masking under way the model is what it was.

    Args:
        model: of a family vtr knows; patched or not. policy: with weights.
        text_keep: the share of an answer's tokens that is to stay. min_answer: shorter answers stay whole.
        weight: of the distance of both shares from what is wanted.

    Attributes:
        tau: the temperature of the next forward; see :func:`temperature`.

    Raises:
        ValueError: the policy has no weights or does not fit.
        UnsupportedError: an unknown family, or an attention implementation other than sdpa and eager.
    """

    def __init__(
        self, model: Any, policy: DynamicLLaVA, text_keep: float = 0.5, min_answer: int = 50, weight: float = 100.0
    ) -> None:
        super().__init__()
        self.adapter = find_adapter(model)
        text = self.adapter.text_model(model)
        policy.check(len(text.layers))
        policy.base = None  # the model is going to change
        if not isinstance(policy.keep, float):
            raise ValueError(f"keep={policy.keep!r}: what is trained is a share of the image tokens, e.g. keep=0.2")
        assert policy.module is not None
        self.model, self.policy, self.weights = model, policy, policy.module.train().requires_grad_(True)
        self.text_keep, self.min_answer, self.weight, self.tau = text_keep, min_answer, weight, 1.0
        self._attentions = [layer.self_attn for layer in text.layers[policy.layer :]]
        for module in self._attentions:
            module.config = MaskedConfig(module.config)
            assert module.config._attn_implementation  # raises if it is one that cannot be masked
        self._hook = text.layers[policy.layer].register_forward_pre_hook(self._decide, with_kwargs=True)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        for module in self._attentions:
            module.config = module.config.own

    def _decide(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masking: Masking | None = kwargs.get("vtr_masking")
        if masking is not None and masking.keep is None:
            masking.decide(self.policy, args[0] if args else kwargs["hidden_states"])

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """A batch with ``labels`` → {"loss", "cross_entropy", "image_kept", "text_kept"}, scalars.

        The shares are means over images and over answers that were judged (nan without any).

        Raises:
            ValueError: no labels, or no learnt token in the whole batch.
        """
        labels = inputs.get("labels")
        if labels is None or not bool((labels != -100).any()):
            raise ValueError("a training batch needs labels, some of them not -100")
        check_checkpointing(self.adapter.text_model(self.model))
        masking = self._masking(inputs, labels)
        out = self.model(**inputs, use_cache=False, vtr_masking=masking)
        rows, zero = len(labels), out.loss.new_zeros(())
        images, text = masking.image_shares, masking.text_shares
        penalty = zero
        if images:
            penalty = penalty + (self.policy.keep - torch.stack(images)).square().mean()
        if text:  # rows whose answers are too short count, with no distance
            penalty = penalty + (self.text_keep - torch.stack(text)).square().sum() / rows
        unused = sum(p.sum() for p in self.weights.parameters()) * 0  # so that every rank has gradients for all
        return {
            "loss": out.loss + self.weight * penalty + unused,
            "cross_entropy": out.loss.detach(),
            "image_kept": torch.stack(images).mean().detach() if images else zero / 0,
            "text_kept": torch.stack(text).mean().detach() if text else zero / 0,
        }

    def _masking(self, inputs: dict[str, Any], labels: torch.Tensor) -> Masking:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        prompt = read_prompt(self.adapter, self.model, ids, mask, inputs)
        images = []
        for row, layouts in enumerate(prompt.layouts):
            slots = prompt.is_vision[row].nonzero().squeeze(1)
            images += [(row, part) for part in slots.split([len(lay) for lay in layouts])] if layouts else []
        valid = torch.ones(ids.shape, dtype=torch.bool) if prompt.valid is None else prompt.valid
        found = [last_answer(row, here) for row, here in zip(labels.cpu(), valid, strict=True)]
        answers = [(row, *span) for row, span in enumerate(found) if span is not None]
        return Masking(images, answers if self.policy.forget else [], self.tau, self.min_answer)
