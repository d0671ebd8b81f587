"""Positions of several axes (M-RoPE) behind policies before the decoder. Pure: no vLLM here.

vLLM gives a request its positions before any picture is encoded. So it must follow from a picture's size which tokens
stay of it, not only how many: here that is found out, and policies that look at the picture are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from vtr.integrations.llava import tile_layout
from vtr.integrations.vllm.layouts import check_count, stand_in
from vtr.integrations.vllm.specs import RequestError, made_of, promised

from vtr.engine.compression import Answered, Compression, Shrunk, compressed
from vtr.image import Layout
from vtr.policies import UniformGrid

LOOKS = (
    "which tokens {} leaves depends on the picture, and this model's positions (M-RoPE) are told before it is encoded"
)
SMALL = tile_layout(8, 8)
"""Policies that look at the picture are as a rule found out on a picture of this size, which takes no time."""


def same(one: Answered, other: Answered) -> bool:
    """Whether two answers leave the same tokens, or make new ones of the same."""
    (keep, pooled), (kept, made) = one, other
    if not torch.equal(keep, kept) or (pooled is None) != (made is None):
        return False
    if pooled is None or made is None or pooled.sources is made.sources:
        return True
    return list(map(list, pooled.sources)) == list(map(list, made.sources))


def count_of(spec: str, layout: Layout) -> int:
    """As :func:`layouts.count_of`, of policies that leave the same tokens of every picture of a size.

    Raises:
        RequestError: also where a policy does not.
    """
    count = promised(spec, layout)
    if made_of(spec) is not None:
        check_count(spec, count, len(chosen(spec, layout)[0]))
    return count


def check(spec: str) -> None:
    """Raise RequestError if a checked spec is seen to choose by what a picture shows."""
    if made_of(spec) is not None and _looks(spec):
        raise RequestError(f"{LOOKS.format(spec)}: use uniform or random (with before_decoder=true), pool or m3")


@lru_cache(maxsize=256)
def chosen(spec: str, layout: Layout) -> Answered:
    """What a policy leaves of every picture of this layout.

    Raises:
        RequestError: that depends on the picture, or the policy cannot be used on it.
    """
    made = made_of(spec)
    assert made is not None
    if not _looks(spec):
        try:
            found, again = (compressed(made, stand_in(layout, seed)) for seed in (1, 2))
        except Exception as error:  # whatever a policy raises on this image, it is the request's
            raise RequestError(f"{spec}: {error}") from error
        if same(found, again):
            keep, pooled = found
            return keep, pooled and replace(pooled, features=pooled.features[:, :0].clone())  # nobody asks for them
    other = UniformGrid(promised(spec, layout), before_decoder=True).spec
    raise RequestError(f"{LOOKS.format(spec)}: use {other}, which leaves as many of this one, or m3, pool or random")


@lru_cache(maxsize=4096)
def _looks(spec: str) -> bool:
    """Whether a policy leaves other tokens of another picture of the same size; False also where this is not seen."""
    made = made_of(spec)
    assert made is not None
    try:
        found, again = (compressed(made, stand_in(SMALL, seed)) for seed in (1, 2))
    except Exception:  # it takes no picture of this size
        return False
    return not same(found, again)


def carried(answer: Answered, own: torch.Tensor) -> torch.Tensor:
    """int64 [axes, n] of an image's tokens → [axes, m] of what is left: its own each, of pooled ones the mean."""
    keep, pooled = answer
    n, m = own.shape[1], len(keep)
    made = [] if pooled is None else [(torch.arange(m), Shrunk(torch.arange(n), keep, {}, pooled))]
    return Compression(keep, made).means(own.T).T


def as_told(spec: str, layout: Layout, answer: Answered) -> bool:
    """Whether an answer in the worker is the one that positions were given for."""
    return same(chosen(spec, layout), answer)


class Cut(NamedTuple):
    """An image under a policy.

    Attributes:
        begin: where it begins in the reduced prompt. left: how many of its tokens are there.
    """

    begin: int
    left: int
    layout: Layout
    spec: str


def lengthened(tokens: Sequence[int], cuts: Sequence[Cut], mark: int) -> tuple[list[int], list[int]]:
    """A prompt as long as it was, with ``mark`` where an image was, and where each of the ``cuts`` begins in it."""
    out: list[int] = []
    begins, at = [], 0
    for cut in cuts:
        out += tokens[at : cut.begin]
        begins.append(len(out))
        out += [mark] * len(cut.layout)
        at = cut.begin + cut.left
    return [*out, *tokens[at:]], begins


def shortened(whole: torch.Tensor, cuts: Sequence[Cut], begins: Sequence[int]) -> torch.Tensor:
    """int64 [axes, L], the positions of a prompt as long as it was → [axes, l] of the reduced one."""
    parts, at = [], 0
    for cut, begin in zip(cuts, begins, strict=True):
        end = begin + len(cut.layout)
        parts += [whole[:, at:begin], _told(cut, whole[:, begin:end])]
        at = end
    return torch.cat([*parts, whole[:, at:]], 1)


def _told(cut: Cut, own: torch.Tensor) -> torch.Tensor:
    """The positions of what is left of an image. A policy that says something else by now gets as many of any: the
    worker finds out (:func:`as_told`), and the request ends in an error."""
    try:
        found = carried(chosen(cut.spec, cut.layout), own)
    except RequestError:
        return own[:, : cut.left]
    return found if found.shape[1] == cut.left else own[:, : cut.left]
