"""What a request may ask for inside the decoder, and how many tokens each layer then holds at most. Pure: no vLLM here.

A spec is divided into what acts before the decoder, which the processor's options say, and what acts inside. The second
part is checked, and rehearsed, so that scheduler and worker know how many cache blocks the request needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from vtr.integrations.vllm.specs import LONGEST, NONE, TRIES, RequestError, checked_no_file, said

from vtr.base import CHOOSING, Policy, rehearsed
from vtr.chain import Chain
from vtr.inputs import InputPolicy, parts_of
from vtr.learned import SHIPPED, Learned
from vtr.limits import short
from vtr.parts import members
from vtr.settings import build, parse

QUESTIONS = ("prune", "route", "remember")
"""What is asked inside the decoder on vLLM."""
BY_IMAGE = ("avtp",)
"""Policies that divide a budget among a row's images by what these show: ``entering`` is of one image."""


@dataclass(frozen=True)
class Promise:
    """What a request under a policy inside the decoder takes up, as it travels to scheduler and worker.

    Attributes:
        spec: of the policy. vision: its vision tokens, behind what acts before the decoder. entering: how many of them
            enter each decoder layer, at most. forgets: whether decoded tokens may leave the cache.
    """

    spec: str
    vision: int
    entering: tuple[int, ...]
    forgets: bool

    def as_args(self) -> dict[str, Any]:
        """What stands in a request's ``extra_args``."""
        return {"spec": self.spec, "vision": self.vision, "entering": list(self.entering), "forgets": self.forgets}

    @classmethod
    def of(cls, sampling_params: Any) -> Promise | None:
        """What an admitted request carries; None: no policy acts in the decoder."""
        given = (getattr(sampling_params, "extra_args", None) or {}).get("vtr")
        return cls(**{**given, "entering": tuple(given["entering"])}) if isinstance(given, dict) else None

    def held(self, first_layers: Sequence[int]) -> list[int]:
        """Vision tokens that each part of the depth holds, at most. first_layers: where the parts begin."""
        ends = [*first_layers[1:], len(self.entering)]
        return [max(self.entering[a:b]) for a, b in zip(first_layers, ends, strict=True)]


def divided(text: Any, depth: int, weights: Mapping[str, str] | None = None) -> tuple[Any, str]:
    """A request's ``vtr`` as (what acts before the decoder, what acts inside it); :data:`NONE` where nothing does.

    Args:
        text: a spec string, or a list of one for each image, of which none may act inside. weights: names of weights
            that requests may give, and their folders.

    Raises:
        RequestError: no policy, one that names a file of the server, or a list with one that acts inside.
    """
    if text is None:
        return None, NONE
    if isinstance(text, (list, tuple)):
        if any(isinstance(one, str) and divided(one, depth, weights)[1] != NONE for one in text):
            raise RequestError(
                "a policy inside the decoder sees all images of a request together: name one for the request, as in "
                '"by_image:default=\\"m3:9\\",last=\\"none\\"+fastv:keep=0.25", not a list'
            )
        return text, NONE
    if not isinstance(text, str) or len(text) > LONGEST or text.strip().lower() in ("", NONE):
        return text, NONE  # the check of what acts before the decoder says what is wrong with it
    return _divided(text.strip(), depth, tuple(sorted((weights or {}).items())))


@lru_cache(maxsize=4096)
def _divided(text: str, depth: int, weights: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    before, inside, said_inside = [], list[Policy](), []
    for name, settings in _parsed(text):
        as_written = spec_of(name, settings)
        for one in _made(name, settings, dict(weights)):
            if not isinstance(one, InputPolicy) and not one.asks("compress"):
                inside.append(one)
                said_inside.append(as_written)
                continue
            _check_alone(one)
            before.append(one.spec)
    if not inside:
        return text, NONE
    check(_chained(inside), depth)
    return "+".join(before) or NONE, "+".join(said_inside)


def resolved(text: str, weights: Mapping[str, str]) -> Policy:
    """The policy of a checked part of a request, with the folders that its names of weights stand for.

    Raises:
        RequestError: it names another file of the server, or is no policy.
    """
    return _chained([one for name, settings in _parsed(text) for one in _made(name, settings, weights)])


def _parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        return parse(text)
    except ValueError as error:
        raise RequestError(said(error)) from error


def _chained(parts: list[Policy]) -> Policy:
    try:
        return parts[0] if len(parts) == 1 else Chain(parts)
    except ValueError as error:  # some do not go together
        raise RequestError(said(error)) from error


def _made(name: str, settings: Mapping[str, Any], weights: Mapping[str, str]) -> list[Policy]:
    given = settings.get("weights")
    try:
        if not (isinstance(given, str) and given in {*SHIPPED, *weights}):
            checked_no_file(name, settings, sorted({*SHIPPED, *weights}))
        elif given in weights:
            settings = {**settings, "weights": weights[given]}
        return parts_of(build(name, dict(settings)))
    except RequestError:
        raise
    except Exception as error:  # whatever a policy stumbles over is in the request
        raise RequestError(said(error)) from error


def _check_alone(one: Policy) -> None:
    """Raise RequestError for a policy that acts before the decoder and has something to do with it inside as well."""
    asked = [q for q in (*QUESTIONS, "attend") if not isinstance(one, InputPolicy) and one.asks(q)]
    if asked:
        raise RequestError(
            f"{short(one.spec)} acts before the decoder and inside it ({', '.join(asked)}) with what it noted of a "
            "picture, which vLLM encodes once for all requests: use two policies, e.g. "
            "globalcom2:retention=0.5,budget=exact+fastv:keep=0.5,layer=2"
        )


def spec_of(name: str, settings: Mapping[str, Any]) -> str:
    """A policy as a spec string, with these settings as they were written."""
    written = [f"{key}={_value(value)}" for key, value in settings.items()]
    return name + (":" + ",".join(written) if written else "")


def _value(value: Any) -> str:
    plain = isinstance(value, str) and not value.startswith(("[", "{", '"')) and not set(value) & set(",+")
    return value if plain else json.dumps(value)


def check(made: Policy, depth: int) -> None:
    """Raise RequestError unless ``made`` can act inside a decoder of ``depth`` layers on vLLM."""
    if made.asks("attend"):
        raise RequestError(
            f"{short(made.spec)} leaves tokens out of single layers' attention, which vLLM's kernels cannot: use one "
            "that drops them, e.g. fastv:keep=0.25,layer=2"
        )
    if any(map(made.asks, CHOOSING)):
        raise RequestError(TRIES.format(short(made.spec)))
    if not any(map(made.asks, QUESTIONS)):
        raise RequestError(f"{short(made.spec)} reduces nothing: ask for {NONE!r}")
    try:
        made.check(depth)
    except ValueError as error:
        raise RequestError(str(error)) from error


def check_sizes(made: Policy, depth: int, width: int) -> None:
    """Raise RequestError if what a policy has learned is for models of other sizes."""
    for part in members(made):
        if isinstance(part, Learned) and part.sizes is not None and not part.allow_mismatch:
            theirs = (part.sizes["hidden_size"], part.sizes["num_hidden_layers"])
            if theirs != (width, depth):
                raise RequestError(
                    f"{part.name}'s weights are for hidden_size={theirs[0]} and {theirs[1]} layers, this model has "
                    f"{width} and {depth}: train them with this model"
                )


def entering(made: Policy, depth: int, sizes: Sequence[int]) -> list[int]:
    """How many vision tokens of a request with images of these sizes enter each decoder layer, at most.

    Where that depends on what the images show, all of them: such a policy saves computation and no cache.
    """
    total = sum(sizes)
    if total == 0 or (len(sizes) > 1 and any(part.name in BY_IMAGE for part in members(made))):
        return [total] * depth
    found = _counted(made, depth, total)
    if len(sizes) == 1:
        return found
    alone = [_counted(made, depth, size) for size in sizes]  # for those that count image by image, rounded up and down
    together = [sum(counts) for counts in zip(*alone, strict=True)]
    return [min(max(a, b) + len(sizes), total) for a, b in zip(found, together, strict=True)]


def _counted(made: Policy, depth: int, total: int) -> list[int]:
    try:
        counts = made.entering(depth, total)
        if type(made).entering is Policy.entering and made.asks("prune"):
            for seed in (0, 1):
                drawn = torch.rand(total, generator=torch.Generator().manual_seed(seed))
                if rehearsed(made, depth, total, drawn) != counts:
                    return [total] * depth
        return [min(max(int(n), 0), total) for n in counts]
    except Exception:  # it depends on more than sizes
        return [total] * depth
