"""A policy per image of a row: coarse demonstrations and a whole query picture, for example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtr.base import QUESTIONS, Policy
from vtr.chain import policy
from vtr.image import Image, Layout, Pooled
from vtr.inputs import split
from vtr.limits import short
from vtr.parts import Parts
from vtr.settings import parse, policy_class, register_policy

if TYPE_CHECKING:
    import torch

NONE = "none"
Part = str | Policy | None
"""A policy, its spec string, or ``"none"`` for no reduction."""
INSIDE = tuple(question for question in QUESTIONS if question != "compress")


@register_policy("by_image")
@dataclass
class ByImage(Parts):
    """Every image of the row has a policy of its own: one for all, and others for the first, the last or some.

    ``ByImage("m3:9", last="none")`` shows all pictures but the last one at nine tokens a tile: demonstrations coarse,
    the query's picture whole. Policies that divide one budget among the images of a row divide it among those that are
    theirs. Joins with policies that act in the decoder: ``ByImage("m3:9", last="none") + FastV(0.5, share="image")``.

    Args:
        default: the policy of images that nothing else names: a spec string, a policy, or "none"; or a list of one for
            each image of the row.
        first: of the row's first image. last: of its last one; a row's only image is its last. at: of some images,
            {index: policy}, counted from 0, from the end if below 0; goes before first and last.

    Raises:
        TypeError, ValueError: no policy, or one that acts in the decoder, which sees all images of a row together; a
            list and other settings beside it. Later, when a row is there: a list of another length than the row has
            images.
    """

    default: Part | Sequence[Part] = NONE
    first: Part = None
    last: Part = None
    at: Mapping[int, Part] | None = None

    def __post_init__(self) -> None:
        several = isinstance(self.default, (list, tuple))
        if several and (self.first, self.last, self.at) != (None, None, None):
            raise ValueError("a list of policies is one for each image of the row: leave out first, last and at")
        if several and not self.default:
            raise ValueError("a list of policies names one for each image of the row: it is empty")
        self.default = [_part(one, "default") for one in self.default] if several else _part(self.default, "default")  # type: ignore[union-attr,arg-type]
        self.first, self.last = (
            None if one is None else _part(one, name) for one, name in ((self.first, "first"), (self.last, "last"))
        )
        if self.at is not None:
            if not isinstance(self.at, Mapping):
                raise TypeError(f'at must say a policy for some images, like {{"2": "m3:36"}}, got {self.at!r}')
            self.at = {_index(key): _part(one, "at") for key, one in self.at.items()} or None
        if not self.parts():
            raise ValueError('by_image names no policy: say e.g. by_image:default="m3:9",last="none"')

    def parts(self) -> list[Policy]:
        return [one for one in self._named() if isinstance(one, Policy)]

    def _named(self) -> list[Any]:
        given = self.default if isinstance(self.default, list) else [self.default]
        return [*given, self.first, self.last, *(self.at or {}).values()]

    def of_image(self, index: int, count: int) -> Policy | None:
        """The policy of image ``index`` of a row of ``count``; None: it stays as it is.

        Raises:
            ValueError: a list of policies that is not as long as the row has images.
        """
        found: Any = self.default
        if isinstance(found, list):
            if len(found) != count:
                raise ValueError(
                    f"by_image names {len(found)} policies, but the row has {count} images: name one for each, or say "
                    "default=…, first=…, last=…"
                )
            found = found[index]
        if index == 0 and self.first is not None:
            found = self.first
        if index == count - 1 and self.last is not None:
            found = self.last
        for place in (index, index - count):
            if self.at is not None and place in self.at:
                found = self.at[place]
        return found if isinstance(found, Policy) else None

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(wish for part in self.parts() for wish in part.wants))

    def kept_of(self, layout: Layout) -> int:
        """How many tokens stay of a row's only image; of others ask ``of_image(index, count).kept_of(layout)``."""
        mine = self.of_image(0, 1)
        return len(layout) if mine is None else mine.kept_of(layout)

    def compress(self, image: Image) -> torch.Tensor | Pooled | None:
        return self.compress_row([image])[0]

    def compress_row(self, images: Sequence[Image]) -> list[torch.Tensor | Pooled | None]:
        """One answer an image. Images of one policy are put to it together."""
        chosen = [self.of_image(image.index, image.count) for image in images]
        answers: list[torch.Tensor | Pooled | None] = [None] * len(images)
        for part in {id(one): one for one in chosen if one is not None}.values():
            mine = [i for i, one in enumerate(chosen) if one is part]
            said = part.compress_row([images[i] for i in mine])
            if len(said) != len(mine):
                raise ValueError(f"{type(part).__name__}.compress_row must answer for each of {len(mine)} images")
            for i, answer in zip(mine, said, strict=True):
                answers[i] = answer
        return answers

    # -- as data ---------------------------------------------------------------------------------------------------
    @classmethod
    def example(cls) -> str:
        return cls("m3:9", last=NONE).spec

    @classmethod
    def names_file(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a policy that the settings name does so with a file."""
        return any(
            "weights" in inner or policy_class(name).names_file(inner)
            for text in _texts(list(settings.values()))
            for name, inner in _parsed(text)
        )

    def config(self) -> dict[str, Any]:
        default = [_spec(one) for one in self.default] if isinstance(self.default, list) else _spec(self.default)
        at = None if self.at is None else {str(key): _spec(one) for key, one in self.at.items()}
        return {"default": default, "first": _spec(self.first), "last": _spec(self.last), "at": at}


def _part(given: Any, name: str) -> Policy | str:
    """A policy that compresses, or "none".

    Raises:
        TypeError, ValueError: it is none, or acts inside the decoder.
    """
    if given is None or (isinstance(given, str) and given.strip().lower() == NONE):
        return NONE
    if not isinstance(given, (str, Policy)):
        raise TypeError(f'{name} must be a policy, a spec string or "none", got {given!r}')
    made = policy(given)
    if isinstance(made, ByImage):
        raise ValueError(f"{name}: a policy by image cannot have another inside: say all images in one by_image")
    if (before := split(made)[0]) is not None:
        raise ValueError(
            f"{short(before.spec)} acts on pictures before the tower: join it in front, {before.spec}+by_image:…"
        )
    if inside := [question for question in INSIDE if made.asks(question)]:
        raise ValueError(_refusal(made, inside))
    if not made.asks("compress"):
        raise ValueError(f'{name}={short(made.spec)!r} reduces no image: say "none"')
    return made


def _refusal(made: Policy, inside: Sequence[str]) -> str:
    what = short(made.spec)
    if "before_decoder" in made.config():
        return f"{what} acts in the decoder, on all images of a row together: say before_decoder=true"
    if inside in (["resolve"], ["accept"]):
        return f"{what} tries answers with all images of a row: choose a fixed policy for each image"
    share = ' (share="image" divides its budget among the images)' if "share" in made.config() else ""
    return (
        f"{what} acts in the decoder, where a row's images are one sequence: join it behind, "
        f'by_image:default="m3:9",last="none"+{made.name}:…{share}'
    )


def _index(key: Any) -> int:
    try:
        if isinstance(key, bool):
            raise TypeError
        return int(key)
    except (TypeError, ValueError):
        raise ValueError(f"at: {short(repr(key))} is no image's index: 0 is the first, -1 the last") from None


def _spec(one: Any) -> str | None:
    return one.spec if isinstance(one, Policy) else one


def _texts(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(list(value.values()))
        elif isinstance(value, (list, tuple)):
            yield from _texts(list(value))


def _parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    """What a spec string names; nothing where it is none (making it will say so)."""
    try:
        found = parse(text)
        for name, _ in found:
            policy_class(name)
    except ValueError:
        return []
    return found
