"""Policies that act on pictures, before the processor: what they are, and how a policy is split into both parts.

The model never sees them. :func:`vtr.processor` puts one in front of a processor; what else a spec names is for
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtr.base import Policy, UnsupportedError
from vtr.chain import Chain, policy
from vtr.limits import short

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]
"""(width, height) of a picture in pixels."""


@dataclass
class InputPolicy(Policy):
    """Base class of policies that act before the vision tower: a picture goes in, the processor gets another one.

    Subclass it as any :class:`~vtr.Policy`, and define ``size_for``; ``process`` where the processor is to be called in
    another way than once.
    """

    def size_for(self, size: Size, image_processor: Any, settings: Mapping[str, Any]) -> Size:
        """The size that a picture of ``size`` is scaled to, both (width, height) in pixels.

        Args:
            image_processor: what gets the picture. settings: what it is called with, above its own settings.
        """
        raise NotImplementedError(f"{type(self).__name__} must define size_for (or process)")

    def check_processor(self, image_processor: Any) -> None:
        """Raise UnsupportedError if this policy does nothing, or harm, in front of this image processor."""

    def process(self, image_processor: Any, images: Any, settings: Mapping[str, Any]) -> Any:
        """What the image processor makes of the pictures, a BatchFeature.

        Args:
            images: a PIL picture, or a list (of lists) of them.
        """
        return image_processor(mapped(lambda one: self.scaled(one, image_processor, settings), images), **settings)

    def scaled(self, picture: Image.Image, image_processor: Any, settings: Mapping[str, Any]) -> Image.Image:
        """The picture in its new size (Lanczos), or itself where that is the old one."""
        from PIL import Image

        size = self.size_for(picture.size, image_processor, settings)
        return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def mapped(function: Callable[[Image.Image], Any], images: Any) -> Any:
    """``function`` of every picture in lists of lists.

    Raises:
        TypeError: something that is no picture.
    """
    if isinstance(images, (list, tuple)):
        return [mapped(function, one) for one in images]
    return function(as_picture(images))


def as_picture(image: Any) -> Image.Image:
    """A PIL picture of a PIL picture, or of a uint8 array or tensor.

    Raises:
        TypeError: anything else; pixels that are floats have been scaled by someone already.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if str(getattr(image, "dtype", None)).removeprefix("torch.") == "uint8":
        from transformers.image_transforms import to_pil_image

        made: Image.Image = to_pil_image(image)
        return made
    what = getattr(image, "dtype", None)
    raise TypeError(
        f"policies before the tower act on PIL pictures (or uint8 arrays), got {type(image).__name__}"
        + (f" of {what}" if what is not None else "")
    )


def split(what: str | Policy | None) -> tuple[Policy | None, Policy | None]:
    """A policy as (what acts on pictures before the processor, what acts in the model); None where there is nothing.

    ``vtr.split("fewer_crops+globalcom2:0.25")`` gives both; the first is for :func:`vtr.processor`, the second for
    ``generate(policy=…)``.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`vtr.policy`.
    """
    if what is None:
        return None, None
    made = policy(what)
    parts = parts_of(made)
    before = [part for part in parts if isinstance(part, InputPolicy)]
    if not before:
        return None, made
    return _joined(before), _joined([part for part in parts if not isinstance(part, InputPolicy)])


def parts_of(made: Policy) -> list[Policy]:
    """The policies that a chain joins, or the one."""
    return list(made.policies) if isinstance(made, Chain) else [made]  # type: ignore[arg-type]


def _joined(parts: Sequence[Policy]) -> Policy | None:
    return None if not parts else parts[0] if len(parts) == 1 else Chain(list(parts))


def refuse_inputs(made: Policy | None) -> None:
    """Raise UnsupportedError for a policy, on its way into a model, that acts before the processor."""
    before, rest = split(made)
    if before is None:
        return
    raise UnsupportedError(
        f"{short(before.spec)!r} acts on pictures before the processor, and the model gets pixels: encode with "
        f"vtr.processor(processor, {short(before.spec)!r}), and give the model policy="
        f"{None if rest is None else short(rest.spec)!r} (vtr.split(policy) gives both parts)"
    )
