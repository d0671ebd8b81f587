"""TOPS (Wang et al., arXiv 2606.27161): three times a set of tokens that is relevant, diverse and covers the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.nn.functional import pad

from vtr.base import Scores, Tokens
from vtr.checks import check_number, check_on_continue, check_positions
from vtr.image import Image, Layout, cell
from vtr.keep import Keep, check_keep, keep_count, top
from vtr.policies.decoder._preserve import Normalise, preserving
from vtr.policies.decoder._stages import Staged, spread
from vtr.policies.picture._greedy import only, unit
from vtr.policies.picture._saliency import saliency
from vtr.settings import register_policy
from vtr.shares import ratio

MEMO = "tops"


@register_policy("tops")
@dataclass
class TOPS(Staged):
    """Before the decoder and twice inside it, keep a set of tokens that is relevant, diverse and covers the others.

    TOPS (arXiv 2606.27161). A set is built token by token: the largest sum of relevance, of distance to those chosen,
    and of what it covers better than they do. Before the decoder relevance is the attention of the tower's CLS token,
    and 2 · T tokens stay; inside it is the text's attention, and T, then T / 4 tokens stay, numbered anew each time. No
    code is published, and what the paper leaves open is our choice: cosines in float32; each criterion is divided by
    its mean, relevance once over all, the others over the tokens not chosen yet; the tower's layer is the one whose
    output the model uses, mean over heads (of towers without CLS token: the attention a token receives); all tiles of
    an image are one pool; newline tokens all stay and are not counted; text looks from all tokens behind the first
    image, in the layer before the cut; counts are each image's own before the decoder, and their sum inside.

    Args:
        target: T, of each image: a ratio (float) or a count (int). The default is 128 of 576.
        layers: the two decoder layers before which the other cuts happen; None for the paper's 12 and 24 of 32
            (Qwen2.5-VL-7B and InternVL3-8B: ``[12, 16]`` of 28).
        steps: what stays at each of the three cuts, in multiples of T.
        diversity, coverage: how much they count, before the decoder and inside it (the paper tunes the latter).
        normalise: "mean", as in the paper's algorithms, or "minmax", as in its section 4.1.
        raters: "text", the mean over all text behind the first image, or "last", the last text token.
        positions: "reindex" numbers the tokens that stay contiguously after each cut (paper); "keep" leaves them their
            own positions, which models whose positions have several axes (Qwen-VL) need.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    target: Keep = 0.2223
    layers: Sequence[int] | None = None
    steps: Sequence[float] = (2.0, 1.0, 0.25)
    diversity: Sequence[float] = (0.5, 0.5)
    coverage: Sequence[float] = (0.5, 0.5)
    normalise: Normalise = "mean"
    raters: Literal["text", "last"] = "text"
    positions: Literal["keep", "reindex"] = "reindex"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True
    wants: ClassVar[tuple[str, ...]] = ("attentions",)
    published: ClassVar[tuple[tuple[int, ...], int]] = ((12, 24), 32)

    def __post_init__(self) -> None:
        check_keep(self.target, "target")
        self.check_layers(2)
        for name, size in (("steps", 3), ("diversity", 2), ("coverage", 2)):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != size:
                raise TypeError(f"{name} must be a list of {size} numbers, got {given!r}")
            setattr(self, name, [check_number(x, name) for x in given])
            if min(getattr(self, name)) < 0:
                raise ValueError(f"{name}={given!r} must not be negative")
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"normalise={self.normalise!r}: choose 'mean' or 'minmax'")
        if self.raters not in ("text", "last"):
            raise ValueError(f"raters={self.raters!r}: choose 'text' or 'last'")
        check_positions(self.positions)
        check_on_continue(self.on_continue)

    @classmethod
    def settings_at(cls, share: float, num_hidden_layers: int, side: int, layer: int | None = None) -> dict[str, Any]:
        """The paper's three cuts, with another T."""
        first, second = spread(*cls.published, num_hidden_layers)
        spans = (first, second - first, num_hidden_layers - second)
        low, high = 0.0, 1.0
        for _ in range(60):
            target = (low + high) / 2
            mean = sum(span * min(step * target, 1.0) for span, step in zip(spans, cls.steps, strict=True))
            low, high = (target, high) if mean < share * num_hidden_layers else (low, target)
        if high == 1.0:
            raise ValueError(f"the cuts in layers {first} and {second} keep the mean below {share:.3g}")
        return {"target": ratio(low)}

    def count(self, step: int, target: int, total: int) -> int:
        """How many of ``total`` tokens a cut leaves, at least one where T is."""
        return min(max(int(target * self.steps[step]), int(target > 0 and self.steps[step] > 0)), total)

    # -- before the decoder ----------------------------------------------------------------------------------------
    def kept_of(self, layout: Layout) -> int:
        """How many tokens of an image of this layout enter the decoder, newlines included."""
        newlines = int(layout.newline.sum())
        patches = len(layout) - newlines
        return self.count(0, keep_count(self.target, patches), patches) + newlines

    def compress(self, image: Image) -> torch.Tensor | None:
        patches = (image.layout.newline == 0).nonzero().squeeze(1)
        target = keep_count(self.target, len(patches))
        image.memo.setdefault(MEMO, {})[image.index] = target, len(image) - len(patches)
        count = self.count(0, target, len(patches))
        if count == len(patches):
            return None
        at = cell(image.layout)[patches].to(image.features.device)
        relevance = saliency(image.tower).flatten().index_select(0, at)
        units = unit(image.features.detach().index_select(0, patches.to(at.device)))
        picks, flops = self._set(units[None], relevance[None], count, 0)
        image.flops += flops
        return torch.cat([patches[picks[0].cpu()], image.layout.newline.nonzero().squeeze(1)])

    def _set(
        self, units: torch.Tensor, relevance: torch.Tensor, count: int, stage: int, there: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        how = self.diversity[stage], self.coverage[stage], self.normalise
        return preserving(units, relevance, count, *how, there)

    # -- inside it -------------------------------------------------------------------------------------------------
    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        raise ValueError(f"{self.spec} keeps a share of what there was before the decoder: its report says how many")

    def entering_of(self, num_hidden_layers: int, layout: Layout) -> list[int]:
        newlines, found = int(layout.newline.sum()), list[int]()
        left = len(layout) - newlines
        target, cuts = keep_count(self.target, left), [0, *self.cuts(num_hidden_layers)]
        for layer in range(num_hidden_layers):
            left = self.count(cuts.index(layer), target, left) if layer in cuts else left
            found.append(left + newlines)
        return found

    def needs(self, layer: int) -> Scores | None:
        return self.raters if self.acts(layer) else None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        return self.prune_all(layer, [tokens])[0]

    def prune_all(self, layer: int, tokens: Sequence[Tokens]) -> Sequence[torch.Tensor | None]:
        """All rows' sets are built together, the shorter ones filled up."""
        cuts = self.cuts(tokens[0].num_hidden_layers)
        answers: list[torch.Tensor | None] = [None] * len(tokens)
        if layer not in cuts:
            return answers
        left = [self._left(cuts.index(layer) + 1, one) for one in tokens]
        asked = [i for i, one in enumerate(tokens) if one.scores is not None and sum(left[i]) < len(one)]
        if not asked:
            return answers
        rows = [tokens[i] for i in asked]
        sizes = [len(one) for one in rows]
        most, there = max(sizes), only(torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])
        units = torch.stack([pad(unit(one.hidden.detach()), (0, 0, 0, most - len(one))) for one in rows])
        relevance = torch.stack([pad(one.scores, (0, most - len(one))) for one in rows])
        newline: torch.Tensor | None = None
        if any(left[i][1] for i in asked):
            newline = torch.stack([pad(one.newline, (0, most - len(one))) for one in rows]).bool()
            units = units * ~newline[..., None]
            there = ~newline if there is None else ~newline & there.to(newline.device, non_blocking=True)
        picks, flops = self._set(units, relevance, max(left[i][0] for i in asked), 1, there)
        for n, i in enumerate(asked):
            tokens[i].flops += flops // len(asked)
            mine = picks[n, : left[i][0]]
            if newline is None:
                answers[i] = mine.sort().values
            else:
                stays = newline[n, : sizes[n]].index_fill(0, mine, True)
                answers[i] = top(stays.float(), sum(left[i]))
        return answers

    def _left(self, step: int, tokens: Tokens) -> tuple[int, int]:
        """How many tokens stay, and how many newline tokens besides."""
        noted: dict[int, tuple[int, int]] | None = tokens.memo.get(MEMO)
        target, newlines = keep_count(self.target, tokens.total), 0
        if noted is not None:
            target, newlines = (sum(numbers) for numbers in zip(*noted.values(), strict=True))
        return self.count(step, target, len(tokens) - newlines), newlines
