"""What a policy may ask for and answer inside the decoder, as data: the engine does the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from vtr.keep import top

if TYPE_CHECKING:
    import torch

Scores = Literal["last", "text", "last-max", "text-max"]
"""Short forms of :class:`Attention`. ``"last"``: attention of the last text query. ``"text"``: mean over all text
queries that can see the token. Mean over heads; with ``-max`` each query's strongest head instead."""
SCORES: tuple[Scores, ...] = get_args(Scores)


# ------------------------------------------------------------------------------------------------------- asked for
@dataclass(frozen=True)
class Attention:
    """Attention that vision tokens get in layer ``layer - 1``, after softmax: what ``needs(layer)`` may ask for.

    ``tokens.scores`` is then float32 [n]; with ``heads="each"`` [heads, n], with ``over="each"`` [rows, n], with both
    [heads, rows, n].

    Attributes:
        rows: who pays it. ``"last"``: the prompt's last text token. ``"text"``: its text behind the first vision token.
            ``"behind"``: its text behind the last vision token. ``"vision"``: the vision tokens themselves. Another
            word: the tokens whose numbers, indices into ``tokens.text`` (int64 [k]), the policy has put into
            ``tokens.memo`` under it; nobody, as long as there are none.
        heads: ``"mean"``, ``"max"`` or ``"each"`` (taken first).
        over: the rows' ``"mean"`` (over those that can see the token), ``"sum"``, ``"max"`` or ``"each"``.
    """

    rows: str = "text"
    heads: Literal["mean", "max", "each"] = "mean"
    over: Literal["mean", "sum", "max", "each"] = "mean"

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "max", "each"):
            raise ValueError(f"heads={self.heads!r}: choose 'mean', 'max' or 'each'")
        if self.over not in ("mean", "sum", "max", "each"):
            raise ValueError(f"over={self.over!r}: choose 'mean', 'sum', 'max' or 'each'")
        if not self.rows or not isinstance(self.rows, str):
            raise ValueError(f"rows={self.rows!r}: choose 'last', 'text', 'behind', 'vision' or a name in tokens.memo")


@dataclass(frozen=True)
class KeyNorms:
    """L1 norms of layer ``layer - 1``'s keys after rope, all heads of a token together (keys that several query heads
    share count once for each). ``tokens.scores`` is float32 [n], ``tokens.text_scores`` those of the text, [t]."""


Request = Scores | Attention | KeyNorms
"""What ``needs`` may answer: one of them, or a tuple of several, and ``tokens.scores`` is a tuple then."""


# -------------------------------------------------------------------------------------------------------- answered
@dataclass(frozen=True, eq=False)
class Route:
    """An answer of ``route``: which vision tokens pass through this layer.

    Attributes:
        keep: int64 [k], indices into the row's vision tokens that pass, or the :class:`Best` of them; the others go
            around the layer.
        weights: [n] or None. Kept tokens have the layer's MLP output multiplied by it, skipped tokens their whole
            hidden state (p-MoD's symmetric token reweighting, section "STRing"); text is left alone.
    """

    keep: torch.Tensor | Best
    weights: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Best:
    """An answer of ``prune``, or the ``keep`` of a :class:`Route`: so many tokens stay, those of largest score.

    The rows of a batch that are answered so are ranked together, however many they are; of equal scores the lower index
    wins.

    Attributes:
        scores: [n], one for each of the row's vision tokens; or ``tokens.ahead``, not called, which is then computed
            for all such rows at once.
        count: how many stay; all of them, if there are no more.
        groups: (tokens, how many of them stay) of stretches of the tokens, one behind the other, that are each ranked
            by itself: the row's images. Together they are the n tokens, and ``count`` stay. None: all are one.
    """

    scores: torch.Tensor | Callable[[], torch.Tensor]
    count: int
    groups: Sequence[tuple[int, int]] | None = None

    def indices(self) -> torch.Tensor:
        """int64 [min(count, n)], ascending: the tokens that stay."""
        scores = self.scores() if callable(self.scores) else self.scores
        if self.groups is None:
            return top(scores, self.count)
        import torch

        kept, first = [], 0
        for size, count in self.groups:
            kept.append(top(scores[first : first + size], count) + first)
            first += size
        return torch.cat(kept)


@dataclass(frozen=True, eq=False)
class Merged:
    """An answer of ``prune`` that makes new tokens out of some that go.

    The new ones stand where the row's last vision token stood, behind all that stay, in their order. Under a policy
    that renumbers they get positions of their own; else each has the position of the token in front of them.

    Attributes:
        keep: int64 [k], k at least 1: the tokens that stay as they are.
        states: [c, hidden_size], the new ones; k + c is at most the number of tokens there were.
        sources: c lists: which of the tokens each new one was made from.
    """

    keep: torch.Tensor
    states: torch.Tensor
    sources: Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Attend:
    """An answer of ``attend``: who takes part in this layer's attention. All tokens have the layer's MLP.

    Attributes:
        asks: int64, the vision tokens that are queries; None: all. The others get nothing from this layer's attention.
        seen: int64, those that are keys, and cached; None: all.
        text: int64, which of the prompt's text (indices into ``tokens.text``) does both; None: all of it.
    """

    asks: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    text: torch.Tensor | None = None


class LayerAttention(Protocol):
    """This layer's attention as ``attend`` may look at it; nothing is computed before it is asked."""

    def received(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention that the row's tokens, text too, are about to get from some of them in this layer.

        Args:
            rows: int64 [r], ascending: places among the row's tokens (``tokens.place``, ``tokens.text_place``).

        Returns:
            float32 [row_length], after softmax: mean over heads, sum over ``rows``.
        """


def left_by(answer: torch.Tensor | Best | Merged | None, count: int) -> int:
    """How many of a row's ``count`` vision tokens there are after this answer of ``prune``."""
    if answer is None:
        return count
    if isinstance(answer, Merged):
        return len(answer.keep) + len(answer.states)
    return min(answer.count, count) if isinstance(answer, Best) else len(answer)
