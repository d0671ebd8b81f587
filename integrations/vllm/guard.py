"""Exactly as many embeddings of an image as it has placeholders, or an error for the requests that have the image.

vLLM 0.32 dies when a model gives one embedding too few, and takes everybody's requests with it. Here a policy that
breaks its promise in the worker gets its image filled up to the promised length, so that the step can finish, and the
scheduler ends every request with that image in an error (HTTP 500), also later ones: what prefix caches hold of it is
nonsense.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from vtr.base import Image, Policy, UnsupportedError
from vtr.engine.rows import compressed

logger = logging.getLogger(__name__)

BROKEN: set[str] = set()
"""Cache identities of images whose policy broke its promise. Runner and scheduler of one engine share this process."""
_marked: set[int] = set()
"""ids of embeddings that were filled up in the encoder run that is under way."""
_here = False
"""Whether a scheduler that looks at BROKEN lives in this process."""


def exactly(count: int, spec: str, policy: Policy, image: Image) -> torch.Tensor:
    """What a policy makes of an image, if that is ``count`` embeddings; else ``count`` of its own, marked as broken.

    Raises:
        RuntimeError: the promise is broken, and this process has no scheduler that could end the request alone.
    """
    whole = image.features
    try:
        keep, pooled = compressed(policy, image)
        made = whole.index_select(0, keep.to(whole.device)) if pooled is None else pooled.features.to(whole)
        if len(made) == count:
            return made
        what = f"{spec} promised {count} embeddings of an image and gave {len(made)}"
    except Exception as error:  # whatever a policy raises must not end the engine
        what = f"{spec} failed on an image: {type(error).__name__}: {error}"
    if not _here:
        raise RuntimeError(f"{what}; the engine cannot go on")
    logger.error("%s: requests with this image end in an error", what)
    filled = whole[torch.arange(count, device=whole.device) % len(whole)].clone()
    _marked.add(id(filled))
    return filled


def install() -> None:
    """Let vLLM's runner name the images that were filled up, and its scheduler end the requests that have them.

    Raises:
        UnsupportedError: this vLLM is built otherwise than 0.32.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(Scheduler.update_from_output, "vtr", False):
        return
    if not hasattr(GPUModelRunner, "_cache_encoder_output"):
        raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one has no GPUModelRunner._cache_encoder_output")
    store, init, update = GPUModelRunner._cache_encoder_output, Scheduler.__init__, Scheduler.update_from_output

    def cache_encoder_output(self: Any, mm_hash: str, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if id(output) in _marked:
            _marked.discard(id(output))
            BROKEN.add(mm_hash)
        return store(self, mm_hash, output, *args, **kwargs)

    def scheduler_init(self: Any, *args: Any, **kwargs: Any) -> None:
        global _here
        init(self, *args, **kwargs)
        if not hasattr(self, "encoder_cache_mismatch_reqs"):
            raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one's scheduler has no list of failed requests")
        _here = self.vllm_config.parallel_config.world_size == 1

    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if BROKEN:
            for name in scheduler_output.num_scheduled_tokens:
                request = self.requests.get(name)
                if request is not None and any(f.identifier in BROKEN for f in request.mm_features):
                    self.encoder_cache_mismatch_reqs.add(name)
        return update(self, scheduler_output, *args, **kwargs)

    update_from_output.vtr = True  # type: ignore[attr-defined]
    GPUModelRunner._cache_encoder_output = cache_encoder_output
    Scheduler.__init__ = scheduler_init
    Scheduler.update_from_output = update_from_output
