"""A processor with a policy in front of it that acts on pictures: ``vtr.processor(processor, "fewer_crops")``."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from transformers.utils.hub import PushToHubMixin

from vtr.base import Policy, UnsupportedError
from vtr.inputs import InputPolicy, parts_of, split
from vtr.limits import short

T = TypeVar("T")
OWN = ("inner", "policy")


class ImageProcessor(PushToHubMixin):
    """Stands in for an image processor: pictures pass a policy first. All else is the image processor's own.

    Attributes:
        inner: the image processor. policy: what its pictures pass.
    """

    def __init__(self, inner: Any, policy: InputPolicy) -> None:
        self.inner, self.policy = inner, policy

    def __call__(self, images: Any, **settings: Any) -> Any:
        return self.policy.process(self.inner, self.inner.fetch_images(images), settings)

    preprocess = __call__

    def __getattr__(self, name: str) -> Any:
        if name in OWN or name.startswith("__"):  # (while it is copied it has nothing yet)
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.inner, name, value)


def processor(processor: T, policy: str | Policy | None) -> T:
    """A processor whose pictures pass a policy that acts before the vision tower, and which is otherwise the same.

    What ``processor(images=…)`` and ``processor.apply_chat_template(…, tokenize=True)`` give is for the model as ever.
    It is of the processor's class and saves what the processor would save. Videos are left as they are.

    Args:
        processor: any of transformers' with an image processor; it is not changed. A wrapped one gets one more policy.
        policy: a spec string or a policy, ``"fewer_crops"`` or ``"downsample:0.5+fewer_crops"``: the left one acts
            first. None: none.

    Returns:
        A shallow copy; for None the processor itself.

    Raises:
        TypeError, ValueError: no such policy, or one that acts in the model (:func:`vtr.split` takes a spec apart).
        UnsupportedError: it has nothing to do before this processor; the message names another way.
    """
    before, rest = split(policy)
    if rest is not None:
        here = "" if before is None else f", and {short(before.spec)!r} alone here (vtr.split(policy) gives both parts)"
        raise ValueError(f"{short(rest.spec)!r} acts in the model: give it to generate(policy=…){here}")
    if before is None:
        return processor
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise UnsupportedError(
            f"{type(processor).__name__} has no image_processor for {short(before.spec)!r} to stand in front of: give "
            "the processor of an image-text model (AutoProcessor.from_pretrained(…))"
        )
    parts = [part for part in parts_of(before) if isinstance(part, InputPolicy)]
    for part in parts:
        part.check_processor(images)
    for part in reversed(parts):
        images = ImageProcessor(images, part)
    made = copy.copy(processor)
    made.image_processor = images  # type: ignore[attr-defined]
    return made
