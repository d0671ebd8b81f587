"""Dynamic-LLaVA (Huang et al., ICLR 2025, arXiv 2412.00876): trained predictors drop image tokens and forget words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vtr.base import Best, Token, Tokens
from vtr.checks import check_count, check_depth, check_layer
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.learned import Learned
from vtr.settings import register_policy

KEEP = 0
"""Which of a predictor's two outputs says "keep" (the paper's text has it the other way round, its code so)."""


class Attention(nn.Module):
    """Bidirectional self-attention over the tokens of one image, without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        for name, part in (("fc1", nn.Linear(width, inner)), ("act", nn.GELU()), ("fc2", nn.Linear(inner, width))):
            self.mlp.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


def _head(width: int) -> list[nn.Module]:
    """width → width / 2 → width / 4 → 2."""
    half, quarter = width // 2, width // 4
    return [nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)]


class ImagePredictor(nn.Module):
    """Hidden states of one image's tokens [b, n, hidden_size] → logits [b, n, 2], keep first."""

    def __init__(self, hidden_size: int, width: int, heads: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU())
        self.transformer = nn.Sequential(*(Block(width, heads, inner) for _ in range(blocks)))
        self.output_mlp = nn.Sequential(*_head(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, all_of_it = self.transformer(self.down_mlp(x)).chunk(2, -1)
        both = torch.cat([own, all_of_it.mean(1, keepdim=True).expand_as(all_of_it)], -1)
        logits: torch.Tensor = self.output_mlp(both)
        return logits


class TextPredictor(nn.Module):
    """Hidden states of decoded tokens [..., hidden_size] → logits [..., 2], keep first; each token by itself."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        first = [nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU()]
        self.output_mlp = nn.Sequential(*first, *_head(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output_mlp(x)
        return logits


class Predictors(nn.Module):
    """Both predictors; names within are those of official checkpoints."""

    def __init__(self, image: ImagePredictor, text: TextPredictor) -> None:
        super().__init__()
        self.image_score_predictor, self.output_text_score_predictor = image, text
        self.image_flops, self.text_flops = _linear_flops(image), _linear_flops(text)  # of a token

    def forward(self, which: str, x: torch.Tensor) -> torch.Tensor:
        predictor = self.image_score_predictor if which == "image" else self.output_text_score_predictor
        logits: torch.Tensor = predictor(x)
        return logits


@register_policy("dynamic-llava")
@dataclass(eq=False)
class DynamicLLaVA(Learned):
    """Before layer 2, once: an image predictor keeps the best tokens, a text predictor decides which words are kept.

    Image tokens: the ``keep`` share of each image with the largest log-softmax of the keep logit stays, at its original
    positions. Text of the prompt always stays. Every decoded token sees the cache and itself; its key and value stay in
    the cache of layers >= ``layer`` only if the text predictor's keep logit is the larger one. Decoding without a cache
    drops the same tokens when it meets them again, so that it says the same. So does a forward over question and answer
    (``labels``), which has no cache; one that does not say where the answer begins takes all of its text for prompt.

    Args:
        keep: image tokens that stay, of each image by itself: a ratio (cut off, as in the official code,
            but at least one token) or a count.
        layer: the decoder layer that the predictors stand in front of.
        forget: False remembers every decoded token (the paper's "I", without "|T").
        without_cache: "decision" as above; "ranked" as in the official code: as many as have the larger keep logit, but
            those of the largest keep logits (its doubled last prompt token is not repeated).
        width, heads, inner, blocks: sizes of the predictors (d_model, nhead, dim_feedforward, num_layers).

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.2
    layer: int = 2
    forget: bool = True
    without_cache: Literal["decision", "ranked"] = "decision"
    width: int = 512
    heads: int = 8
    inner: int = 2048
    blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_layer(self.layer)
        if self.without_cache not in ("decision", "ranked"):
            raise ValueError(f"without_cache={self.without_cache!r}: choose 'decision' or 'ranked'")
        if not isinstance(self.forget, bool):
            raise TypeError(f"forget must be true or false, got {self.forget!r}")
        check_count(self.width, "width", 4, 2**14)
        check_count(self.heads, "heads", 1, self.width)
        check_count(self.inner, "inner", 1, 2**16)
        check_count(self.blocks, "blocks", 0, 64)
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width={self.width} must be divisible by 4 and by heads={self.heads}")

    def make(self, hidden_size: int, num_hidden_layers: int) -> nn.Module:
        image = ImagePredictor(hidden_size, self.width, self.heads, self.inner, self.blocks)
        made = Predictors(image, TextPredictor(hidden_size, self.width))
        for part in made.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        return made

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers)
        super().check(num_hidden_layers)

    def asks(self, question: str) -> bool:
        return super().asks(question) and (question != "remember" or self.forget)

    def count(self, tokens: int) -> int:
        """How many of an image's tokens stay."""
        return keep_count(self.keep, tokens, slack=0.0)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        """How many tokens of one image enter each layer."""
        return [total if layer < self.layer else self.count(total) for layer in range(num_hidden_layers)]

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | Best | None:
        return self.prune_all(layer, [tokens])[0]

    def prune_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[torch.Tensor | Best | None]:
        if layer != self.layer:
            return [None] * len(tokens)
        scores = self._image_scores(tokens)
        kept: list[torch.Tensor | Best] = []
        for one in tokens:
            mine = [scores.pop(0) for _ in one.per_image]
            one.flops += sum(map(self.image_flops, one.per_image))
            if len(mine) == 1:
                kept.append(Best(mine[0], self.count(len(mine[0]))))
                continue
            starts = accumulate(one.per_image, initial=0)
            kept.append(torch.cat([top(s, self.count(len(s))) + at for s, at in zip(mine, starts, strict=False)]))
        return kept

    def _image_scores(self, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
        """The score of every image's tokens ([n] each), in order; images of as many tokens go through together."""
        hidden = torch.cat([one.hidden for one in tokens])
        sizes = [n for one in tokens for n in one.per_image]
        images, predict = hidden.split(sizes), self.at(hidden)
        found: dict[int, torch.Tensor] = {}
        for n in dict.fromkeys(sizes):
            which = [i for i, size in enumerate(sizes) if size == n]
            logits = predict("image", torch.stack([images[i] for i in which]))
            found.update(zip(which, logits.detach().log_softmax(-1)[..., KEEP].unbind(0), strict=True))
        return [found[i] for i in range(len(sizes))]

    def remember(self, layer: int, token: Token) -> bool | torch.Tensor:
        return self.remember_all(layer, [token])[0]

    def remember_all(self, layer: int, tokens: Sequence[Token]) -> list[bool] | torch.Tensor:
        return self._decide(layer, tokens, ranked=False)

    def recall(self, layer: int, tokens: Sequence[Token]) -> list[bool] | torch.Tensor:
        return self._decide(layer, tokens, ranked=self.without_cache == "ranked")

    def _decide(self, layer: int, tokens: Sequence[Token], ranked: bool) -> list[bool] | torch.Tensor:
        if layer < self.layer:
            return [True] * len(tokens)
        if layer > self.layer:
            together: torch.Tensor = tokens[0].memo["together"]
            if len(together) == len(tokens) and all(token.memo["together"] is together for token in tokens):
                return together  # the same tensor at every layer: what follows from it is made once
            return torch.stack([token.memo["stays"] for token in tokens])
        hidden = torch.stack([token.hidden for token in tokens])
        logits = self.at(hidden)("text", hidden)
        stay: torch.Tensor = logits[:, KEEP] > logits[:, 1 - KEEP]
        if ranked:
            stay = torch.zeros_like(stay).index_fill(0, top(logits[:, KEEP], int(stay.sum())), True)
        for token, one in zip(tokens, stay.unbind(0), strict=True):
            token.memo["stays"], token.memo["together"] = one, stay
            token.flops += self._text_flops
        return stay

    # -- what it costs ---------------------------------------------------------------------------------------------
    def image_flops(self, n: int) -> int:
        """Matrix products of the image predictor on n tokens."""
        assert isinstance(self.module, Predictors)
        return self.module.image_flops * n + self.blocks * 4 * n * n * self.width

    @property
    def _text_flops(self) -> int:
        assert isinstance(self.module, Predictors)
        return self.module.text_flops


def _linear_flops(module: nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
