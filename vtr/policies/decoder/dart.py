"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): a few pivots, and the tokens that repeat them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vtr.base import KeyNorms, Policy, Tokens
from vtr.checks import check_count, check_depth, check_layer, check_on_continue, check_placement
from vtr.keep import Keep, best, check_keep, keep_count
from vtr.settings import register_policy


@register_policy("dart")
@dataclass
class DART(Policy):
    """One cut: a few pivots with large keys, and the vision tokens that are least like the pivots.

    Pivots are the vision tokens, and the text tokens behind the last image, whose keys of layer ``layer - 1`` have the
    largest L1 norms. Pivot after pivot takes from the vision tokens that are left those whose states (normed as behind
    the last layer) have the lowest cosine similarity to it. Original positions stay; no attention is looked at.

    Exactly ``keep`` tokens stay, divided among the pivots, and the largest norm chooses first. The official code keeps
    ``image_pivots + pivots · (keep // pivots)``, and its pivots choose in the order in which Python iterates over a set
    of their places in the prompt: ``placement="official"`` (which must wait for the device). With several images it
    takes the later ones for text; here they are not.

    Args:
        keep: tokens that stay: a ratio (float) or a count (int).
        layer: the decoder layer before which the cut happens, the paper's K, at least 1.
        image_pivots, text_pivots: how many of each. Where too few text tokens stand behind the last image, those in
            front of it help out.
        placement: "true", or "official" as above.
        on_continue: what to do when a later turn meets tokens kept for an earlier question: "warn", "keep", "error".

    Raises:
        TypeError, ValueError: settings out of range.
    """

    keep: Keep = 0.25
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    placement: str = "true"
    on_continue: str = "warn"

    question_guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer, 1, "DART chooses pivots by the keys of the layer before, so layer must be at least 1")
        check_count(self.image_pivots, "image_pivots", 0, 1024)
        check_count(self.text_pivots, "text_pivots", 0, 1024)
        if not self.image_pivots + self.text_pivots:
            raise ValueError("image_pivots=0, text_pivots=0: DART needs a pivot to choose by")
        check_placement(self.placement)
        check_on_continue(self.on_continue)

    def check(self, num_hidden_layers: int) -> None:
        check_depth(self.layer, num_hidden_layers, 1)

    def count(self, total: int) -> int:
        """How many of ``total`` vision tokens stay."""
        if self.placement == "true":
            return keep_count(self.keep, total)
        wished = total * self.keep if isinstance(self.keep, float) else self.keep
        pivots = self.image_pivots + self.text_pivots
        each = int(max(min(wished, total - self.image_pivots), 0) // pivots)
        return min(self.image_pivots + pivots * each, total)

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        return [total if layer < self.layer else self.count(total) for layer in range(num_hidden_layers)]

    def needs(self, layer: int) -> KeyNorms | None:
        return KeyNorms() if layer == self.layer else None

    def prune(self, layer: int, tokens: Tokens) -> torch.Tensor | None:
        n = len(tokens)
        count = min(self.count(tokens.total), n)
        if layer != self.layer or count == n or tokens.scores is None or tokens.text_scores is None:
            return None
        norms, behind = tokens.text_scores, tokens.behind
        texts = min(self.text_pivots, len(norms))
        images = min(max(self.image_pivots, int(not texts)), count)
        if not count or images == count:
            return best(tokens.scores, images).sort().values
        mine = best(tokens.scores, images)
        theirs = best(torch.where(behind, norms, -1 / (1 + norms)), texts)
        if self.placement == "official":
            order = set_order([*tokens.place[mine].tolist(), *tokens.text_place[theirs].tolist()])
            by_order = torch.tensor(order, device=mine.device)
        else:
            by_order = best(torch.cat([tokens.scores[mine], norms[theirs]]), images + texts)
        states = normalize(tokens.norm(tokens.hidden).float(), dim=-1)
        asking = normalize(tokens.norm(tokens.text[theirs]).float(), dim=-1)
        pivots = torch.cat([states[mine], asking])[by_order]
        tokens.flops += 2 * len(pivots) * n * states.shape[1]
        each, more = divmod(count - images, len(pivots))
        shares = [each + (i < more) for i in range(len(pivots))]
        return torch.cat([mine, *unlike(pivots @ states.T, mine, shares)]).sort().values


def unlike(similarity: torch.Tensor, taken: torch.Tensor, shares: Sequence[int]) -> list[torch.Tensor]:
    """What each pivot takes, one after the other: as many as its share, of lowest similarity among those not taken.

    Args:
        similarity: float32 [pivots, n]. taken: int64 [k], tokens that nobody may take. shares: how many each takes.

    Returns:
        int64 indices of each pivot.
    """
    gone = torch.zeros_like(similarity[0], dtype=torch.bool).index_fill(0, taken, True)
    picks = []
    for row, share in zip(similarity, shares, strict=True):
        picks.append(best(-row.masked_fill(gone, torch.inf), share))
        gone = gone.index_fill(0, picks[-1], True)
    return picks


def set_order(places: Sequence[int]) -> list[int]:
    """In which order Python iterates over ``set(places)``: indices into ``places``, which are distinct."""
    return [places.index(place) for place in set(places)]
