"""The worker's part of families whose image tokens are all that the projector gave, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vtr.integrations.vllm import guard
from vtr.integrations.vllm.processor import DEFAULT
from vtr.integrations.vllm.specs import RequestError, decoder_layers, spec_of
from vtr.integrations.vllm.worker import Reducing

from vtr.base import Policy, UnsupportedError
from vtr.engine.captures import Captures, Place
from vtr.engine.compression import Answered
from vtr.image import Layout


class Whole(Reducing):
    """Mixed in before such a model of vLLM. Tiles are among the tokens, so tower and projector need no hooks.

    :meth:`image_layouts` gives a layout of each of a picture's parts (all alike), and how many there are: tiles that
    are images of their own, for vtr on transformers as well.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if isinstance(default := getattr(config, DEFAULT, None), str):
            try:
                self.check_default(spec_of(default, decoder_layers(config)))
            except RequestError as error:
                raise UnsupportedError(f"the policy of requests that name none, {default!r}: {error}") from error
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def check_default(spec: str) -> None:
        """Raise RequestError if a checked spec cannot be served on this family, whatever the picture."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The model's own: towers without a CLS token have nothing to keep."""
        return super(Reducing, self).load_weights(weights)  # type: ignore[misc]

    def expected(self, spec: str, layout: Layout) -> Callable[[Answered], bool] | None:
        """Whether an answer on such an image is the one that its positions were made for; None: they fit any."""
        return None

    def _given(self, kwargs: dict[str, Any]) -> Any:
        return super(Reducing, self).embed_multimodal(**kwargs)  # type: ignore[misc]

    def _reduced(
        self, kwargs: dict[str, Any], asked: Sequence[tuple[str, int]], policies: Sequence[Policy | None]
    ) -> list[torch.Tensor]:
        layouts, parts = self.image_layouts(kwargs, len(asked))
        patch: Any = SimpleNamespace(model=self, adapter=SimpleNamespace(newline=lambda model: None))
        captures, first, out = Captures(patch, False, False, [sum(parts)]), 0, []
        wholes = super(Reducing, self).embed_multimodal(**kwargs)  # type: ignore[misc]
        for (spec, count), policy, layout, n, whole in zip(asked, policies, layouts, parts, wholes, strict=True):
            if policy is None:
                out.append(whole)
            else:
                places = [Place(0, first + i, 1) for i in range(n)]
                images = [
                    captures.image(part, layout, place, i, n, policy)
                    for i, (part, place) in enumerate(zip(whole.unflatten(0, (n, -1)), places, strict=True))
                ]
                out.append(guard.exactly(count, spec, policy, *images, expected=self.expected(spec, layout)))
            first += n
        return out
