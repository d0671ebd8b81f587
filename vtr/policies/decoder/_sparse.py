"""What SparseVLM is made of: text that rates, tokens that are put together, and how far apart rope puts two places."""

from __future__ import annotations

import torch

from vtr.keep import best

WIDTH = 10
"""One new token for so many."""
TAKEN = 0.3
"""Of the tokens that go, the share that is put together."""


def relevance(vision: torch.Tensor, text: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """float32 [t]: how much the image is about each text token: softmax over the text of products, mean over vision.

    Args:
        vision: [n, D], text: [t, D], as the text model embeds them. behind: bool [t], the text that counts (some of
            it); 0 for the other.
    """
    products = (vision.float() @ text.float().T).masked_fill(~behind, -torch.inf)
    weights: torch.Tensor = products.softmax(-1).mean(0)
    return weights


def raters(vision: torch.Tensor, text: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """int64 [k], ascending: the text behind the image of more than mean relevance; if none has more, all of it.

    Without any text behind the image, all text is asked. How many there are is read from the device.
    """
    behind = behind | ~behind.any()
    weights = relevance(vision, text, behind)
    some = behind & (weights > weights.sum() / behind.sum())
    return torch.where(some.any(), some, behind).nonzero().squeeze(1)


def taken_of(gone: int) -> tuple[int, int]:
    """Of so many tokens that go: how many are put together, and into how many new ones."""
    taken = int(TAKEN * gone) + 1
    return taken, taken // WIDTH + 1


def clusters(states: torch.Tensor, noise: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Density peaks: those with many near them that are far from any denser one are centres.

    Args:
        states: [g, D]. noise: float32 [g] in [0, 1), which says who is denser of two that are equally dense.
        count: at most g.

    Returns:
        int64 [count], the centres, best first; int64 [g], which centre (0 … count - 1) each belongs to, the nearest.
    """
    x = states.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    near = distance.sort(dim=-1).values[:, :count]
    density = (-near.square().mean(-1)).exp() + noise * 1e-6
    denser = density > density[:, None]
    apart = distance.masked_fill(~denser, distance.amax()).amin(-1)
    centres = best(apart * density, count)
    owner = best(-distance[:, centres], 1)[:, 0]
    return centres, owner.index_copy(0, centres, torch.arange(count, device=owner.device))


def put_together(states: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [count, D]: the mean state of each cluster. states: [g, D]; owner: int64 [g]."""
    member = (owner == torch.arange(count, device=owner.device)[:, None]).float()
    mean: torch.Tensor = member @ states.float() / (member.sum(-1, keepdim=True) + 1e-6)
    return mean


def gravity(
    here: tuple[torch.Tensor, torch.Tensor], there: tuple[torch.Tensor, torch.Tensor], least: float | None = None
) -> torch.Tensor:
    """float32 [r, n]: the logits that rope makes of queries and keys of ones; sqrt(d) where both stand at one place.

    Args:
        here: cosine and sine of the queries' positions, [r, d] each. there: of the keys', [n, d].
        least: a bound from below, as a share of sqrt(d).
    """

    def rotated(rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cosine, sine = rope[0].float(), rope[1].float()
        half = cosine.shape[-1] // 2
        return cosine + torch.cat([-sine[:, :half], sine[:, half:]], -1)

    scale = here[0].shape[-1] ** 0.5
    found = rotated(here) @ rotated(there).T / scale
    bounded: torch.Tensor = found if least is None else found.clamp(min=least * scale)
    return bounded


def best_heads(scores: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [n]: mean over rows of the heads that have most to say. scores: float32 [heads, rows, n]."""
    heads = best(scores.sum((1, 2)), count)
    return scores.index_select(0, heads).mean(0).mean(0)
