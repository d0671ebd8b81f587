"""What a request may ask for: spec strings of policies that act before the decoder or the tower, one for each image.

Pure: no vLLM here. A spec is checked before anything is made of it, so that no request can name a file on the server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from vtr.base import CHOOSING, QUESTIONS, Policy, UnsupportedError
from vtr.by_image import ByImage
from vtr.chain import Chain, policy
from vtr.image import Layout
from vtr.inputs import InputPolicy, as_picture, parts_of, split
from vtr.limits import MOST_LAYERS, short
from vtr.parts import members
from vtr.policies import GlobalCom2, GSearch, Random, UniformGrid
from vtr.schedule import presets
from vtr.settings import parse, policy_class

NONE = "none"
LONGEST = 500
"""Characters a spec may have."""
MOST_IMAGES = 1024
"""Images of a request that may have policies of their own."""
LONGEST_MESSAGE = 600
"""Characters of what is said about a request."""
VERSION = "vtr-vllm-1"
"""Changes whenever the same spec would give other embeddings: it is part of the cache identity of an image."""


INSIDE = (
    "acts inside the decoder, which takes a server started with --decoder-policies (without its gate: in vllm_xargs)"
)
UNSEEN = {
    "question": "looks at the question, but vLLM encodes an image once for all questions and keeps it",
    "hidden_states": "reads states inside the vision tower, which vLLM does not hand out",
    "attentions": "reads attention inside the vision tower, which vLLM does not hand out",
    "projector": "merges in front of the projector, which vLLM runs by itself",
}
"""What policies may want and a vLLM worker cannot give, and why."""
TRIES = "{} tries answers before it chooses, which vLLM cannot: name a scale, e.g. m3:tokens=36"


def decoder_layers(config: Any) -> int:
    """How many layers the decoder of a model has, by its config."""
    return int(config.get_text_config().num_hidden_layers)


class RequestError(ValueError):
    """Something in a request's ``vtr`` that cannot be served; the message, never a long one, says what to write."""

    def __init__(self, message: str) -> None:
        super().__init__(short(message, LONGEST_MESSAGE))


def read(value: Any, images: int, depth: int) -> list[str]:
    """The spec of each image of a request, in its shortest form.

    Args:
        value: what the request says: a spec string, a list with one for each image, or None.
        images: how many images the request has. depth: decoder layers of the model.

    Raises:
        RequestError: not a spec that can be served, or a list of another length.
    """
    if value is None:
        return [NONE] * images
    if isinstance(value, str):
        one = spec_of(value, depth)
        return [_of_image(one, i, images) for i in range(images)]
    if not isinstance(value, Sequence):
        raise RequestError(
            f'vtr must be a spec string like "m3:tokens=36" or a list, one for each image, got {type(value).__name__}'
        )
    if len(value) > MOST_IMAGES:
        raise RequestError(f"vtr names {len(value)} policies: a request has at most {MOST_IMAGES}")
    if len(value) != images:
        raise RequestError(f"vtr names {len(value)} policies, but the request has {images} images: one for each image")
    return [_of_image(spec_of(one, depth), 0, 1) for one in value]


def _of_image(spec: str, index: int, count: int) -> str:
    if not any(mark in spec for mark in ("m3:tokens=[", f"{ByImage.name}:")):
        return spec
    before, made = split(spec)
    try:
        one: Policy | None = made.of_image(index, count)  # type: ignore[union-attr]
    except ValueError as error:
        raise RequestError(str(error)) from error
    return "+".join(part.spec for part in (before, one) if part is not None) or NONE


def spec_of(text: Any, depth: int) -> str:
    """A spec in its shortest form, or ``none``.

    Raises:
        RequestError: no policy, one that acts in the decoder, one whose number of tokens is not known beforehand, or
            settings that name a file.
    """
    if text is None:
        return NONE
    if not isinstance(text, str):
        raise RequestError(f'a policy is a spec string like "m3:tokens=36", got {reprlib.repr(text)}')
    if len(text) > LONGEST:
        raise RequestError(f"a spec has at most {LONGEST} characters, this one {len(text)}")
    if text.strip().lower() in ("", NONE):
        return NONE
    return _checked(text.strip(), depth)


@lru_cache(maxsize=4096)
def _checked(text: str, depth: int) -> str:
    try:
        for name, settings in parse(text):
            _check_before_made(name, settings, depth)
        made = policy(text)
    except RequestError:
        raise
    except Exception as error:  # whatever a policy stumbles over is in the request
        raise RequestError(said(error)) from error
    before, inside = split(made)
    for part in [] if before is None else parts_of(before):
        if type(part).size_for is InputPolicy.size_for:  # type: ignore[attr-defined]
            raise RequestError(f"{part.spec} cuts tiles in its own way, which vLLM's models do not know: leave it out")
    if before is None or inside is not None:
        _check_place(inside, depth)  # type: ignore[arg-type]
    return made.spec


def said(error: Exception) -> str:
    """What a client is told of an error that a policy raised."""
    return str(error) if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {error}"


def _check_before_made(name: str, settings: Mapping[str, Any], depth: int) -> None:
    """What can be refused without making the policy: files, trials of answers, schedules for another depth."""
    checked_no_file(name, settings)
    cls = policy_class(name)
    if cls.resolve is not Policy.resolve or cls.accept is not Policy.accept:
        raise RequestError(TRIES.format(name))
    layers = settings.get("layers")
    if issubclass(cls, GSearch) and layers is not None and (type(layers) is not int or layers != depth):
        raise RequestError(
            f"{name} with layers={reprlib.repr(layers)}: this model has {depth} decoder layers; and {INSIDE}: use a "
            f"policy before it, e.g. m3:tokens=36 or {same_budget(0.25)}"
        )


def checked_no_file(name: str, settings: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """A spec string may name folders of weights and files of schedules; a request may not.

    Args:
        known: names that a request may give as weights.

    Raises:
        RequestError: it does.
    """
    cls = policy_class(name)
    if "weights" in settings or cls is Chain:
        takes = f"weights are one of {', '.join(known)}" if known else f"{name!r} takes no weights or parts here"
        raise RequestError(f"a request cannot name files of the server: {takes}")
    if not cls.names_file(settings):
        return
    if issubclass(cls, GSearch):
        raise RequestError(
            f"a request cannot name files of the server: schedule is a list or one of {', '.join(presets())}"
        )
    raise RequestError(f"a request cannot name files of the server: {name!r} takes none here")


def _check_place(made: Policy, depth: int) -> None:
    """Raise unless ``made`` acts before the decoder alone, and it is known beforehand how many tokens it leaves."""
    inside = [question for question in QUESTIONS if question != "compress" and made.asks(question)]
    if inside:
        raise RequestError(refusal(made, depth))
    if not made.asks("compress"):
        raise RequestError(f"{made.spec} reduces nothing: ask for {NONE!r}")
    if lacking := next((why for wish, why in UNSEEN.items() if any(w.startswith(wish) for w in made.wants)), None):
        raise RequestError(f"{made.spec} {lacking}: use a policy without, e.g. m3:tokens=36 or {same_budget(0.25)}")
    for part in members(made):
        if isinstance(part, GlobalCom2) and part.budget == "paper":
            raise RequestError(
                f"how many tokens {part.spec} leaves depends on the picture, and vLLM must know it before the picture "
                f"is encoded: use {dataclasses.replace(part, budget='exact').spec}"
            )


def refusal(made: Policy, depth: int) -> str:
    """Why a policy that acts in the decoder is not served, and which one before it has the same mean budget."""
    says = f"{short(made.spec)} {INSIDE}"
    if isinstance(made, (UniformGrid, Random)) and made.layer == 0:
        return f"{says}: use {dataclasses.replace(made, before_decoder=True).spec}"
    if any(map(made.asks, CHOOSING)):
        return TRIES.format(made.spec)
    if isinstance(made, Chain) and (before := [p.spec for p in made.policies if p.asks("compress")]):  # type: ignore[union-attr]
        return f"{says}: ask for {before[0]} alone, which acts before it"
    share = mean_keep(made, depth)
    if share is None:
        return f"{says}: use a policy before it, e.g. m3:tokens=36 or {same_budget(0.25)}"
    return (
        f"{says}. Of the same mean budget ({share:.3g} of the tokens over {depth} layers) and before it is "
        f"{same_budget(share)}; or run {made.name} with vtr on transformers. On Qwen-VL, Idefics3 and SmolVLM it is "
        f"{by_size(share)}"
    )


def mean_keep(made: Policy, depth: int, tokens: int = 2880) -> float | None:
    """The mean over layers of the share of an image's tokens that enters, by its own account; None: unknown."""
    if not 1 <= depth <= MOST_LAYERS or (isinstance(made, GSearch) and len(made.schedule) != depth):
        return None
    try:
        return sum(made.entering(depth, tokens)) / (depth * tokens)
    except Exception:  # a policy that cannot say without a model
        return None


def same_budget(share: float) -> str:
    """The spec before the decoder that keeps this share of an image."""
    return GlobalCom2(max(round(share, 4), 0.0001), budget="exact").spec


def by_size(share: float) -> str:
    """The same for families that take none that looks at the picture, or none that ranks tiles against each other."""
    return UniformGrid(max(round(share, 4), 0.0001), before_decoder=True).spec


def made_of(spec: str) -> Policy | None:
    """What of a checked spec acts in the model, or None."""
    return None if spec == NONE else _made(spec)[1]


@lru_cache(maxsize=4096)
def _made(spec: str) -> tuple[Policy | None, Policy | None]:
    return split(spec)


def acts_before(spec: str) -> bool:
    """Whether some of a checked spec acts before the tower."""
    return spec != NONE and _made(spec)[0] is not None


def scaled(picture: Any, spec: str, image_processor: Any) -> Any:
    """A picture as what of its checked spec acts before the tower leaves it; itself where nothing does.

    Raises:
        RequestError: that has nothing to do before this image processor, or cannot take such a picture.
    """
    before = _made(spec)[0] if acts_before(spec) and picture is not None else None
    try:
        for part in [] if before is None else parts_of(before):
            assert isinstance(part, InputPolicy)
            part.check_processor(image_processor)
            picture = part.scaled(as_picture(picture), image_processor, {})
    except (UnsupportedError, TypeError) as error:
        raise RequestError(str(error)) from error
    return picture


def identity(image: str, spec: str) -> str:
    """An image's name in all caches: what it is, what is done to it, and by which version of this plugin.

    Args:
        image: the name of the image (and of the other options it is processed with) without its policy.
    """
    return hashlib.sha256(f"{VERSION}\0{spec}\0{image}".encode()).hexdigest()


# -- what goes with an image to the worker -----------------------------------------------------------------------------
def packed(spec: str, count: int) -> bytes:
    """A spec and the number of embeddings promised of it."""
    return f"{count} {spec}".encode()


def unpacked(row: bytes) -> tuple[str, int]:
    """What :func:`packed` gave: (spec, count)."""
    count, _, spec = row.decode().partition(" ")
    return spec, int(count)


def promised(spec: str, layout: Layout) -> int:
    """How many embeddings an image of this layout has under a checked spec.

    Raises:
        RequestError: the policy cannot be used on such an image.
    """
    made = made_of(spec)
    if made is None:
        return len(layout)
    try:
        count = made.kept_of(layout)
    except Exception as error:  # of a policy of the server's own, perhaps
        raise RequestError(said(error)) from error
    if count < 1:
        raise RequestError(f"{spec} leaves nothing of an image of {len(layout)} tokens: at least one must stay")
    return count
