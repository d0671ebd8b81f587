"""Exactly as many embeddings of an image as it has placeholders, or an error for the requests that have the image.

vLLM 0.32 dies when a model gives one embedding too few, and takes everybody's requests with it. Here a policy that
breaks its promise in the worker gets its image filled up to the promised length, so that the step can finish, and the
scheduler ends every request with that image in an error, also later ones: what prefix caches hold of it is nonsense.
What was wrong travels as the stop reason: a server answers HTTP 500 with it, ``vllm.LLM`` gives an output with it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.compression import compressed
from vtr.image import Image

logger = logging.getLogger(__name__)

SAYS = "vtr: "
"""Stop reasons that begin so are ours."""
BROKEN: dict[str, str] = {}
"""The scheduler's: cache identities of images whose policy broke its promise → what clients are told."""
_new: dict[str, str] = {}
"""The worker's: those that the scheduler, often in another process, has not been told yet."""
_marked: dict[int, str] = {}
"""The worker's: ids of embeddings that were filled up in the encoder run that is under way → what clients are told."""
_failed: dict[str, str] = {}
"""The worker's: requests whose policy broke inside the decoder → what clients are told."""
_watched = False
"""Whether this process has a runner that reports them."""


def exactly(count: int, spec: str, policy: Policy, image: Image) -> torch.Tensor:
    """What a policy makes of an image, if that is ``count`` embeddings; else ``count`` of its own, marked as broken.

    Raises:
        RuntimeError: the promise is broken, and nobody would tell the scheduler.
    """
    whole = image.features
    try:
        keep, pooled = compressed(policy, image)
        made = whole.index_select(0, keep.to(whole.device)) if pooled is None else pooled.features.to(whole)
        if len(made) == count:
            return made
        said = what = f"{spec} promised {count} embeddings of an image and gave {len(made)}"
    except Exception as error:  # whatever a policy raises must not end the engine
        said = f"{spec} failed on an image ({type(error).__name__}): the server's log says more"
        what = f"{spec} failed on an image: {type(error).__name__}: {error}"
    if not _watched:
        raise RuntimeError(f"{what}; the engine cannot go on")
    logger.error("%s: requests with this image end in an error", what)
    filled = whole[torch.arange(count, device=whole.device) % len(whole)].clone()
    _marked[id(filled)] = SAYS + said
    return filled


def failed(request: str, why: str) -> None:
    """A request's policy broke inside the decoder: it ends in an error when this step is over."""
    logger.error("%s: request %s ends in an error", why, request)
    _failed[request] = SAYS + why


def install() -> None:
    """Let vLLM's runner name the images that were filled up, its scheduler end the requests that have them, and its
    frontend say why.

    Raises:
        UnsupportedError: this vLLM is built otherwise than 0.32.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler.update_from_output, "vtr", False):
        return
    _watch_runner()
    _watch_scheduler(Scheduler)
    _watch_outputs()


def _watch_runner() -> None:
    """What the runner hands to the scheduler after each step says which images were filled up in it."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not hasattr(GPUModelRunner, "_cache_encoder_output"):
        raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one has no GPUModelRunner._cache_encoder_output")
    init, store, sample = GPUModelRunner.__init__, GPUModelRunner._cache_encoder_output, GPUModelRunner.sample_tokens

    def runner_init(self: Any, *args: Any, **kwargs: Any) -> None:
        global _watched
        init(self, *args, **kwargs)
        # the encoder runs on the first of several stages, and the last one talks to the scheduler
        _watched = self.vllm_config.parallel_config.pipeline_parallel_size == 1
        if getattr(self.vllm_config, "additional_config", None):
            from vtr.integrations.vllm.inside.worker import attach

            attach(self)

    def cache_encoder_output(self: Any, mm_hash: str, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if id(output) in _marked:
            _new[mm_hash] = _marked.pop(id(output))
        return store(self, mm_hash, output, *args, **kwargs)

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = sample(self, *args, **kwargs)
        output = getattr(made, "_model_runner_output", made)  # scheduled ahead: it is wrapped
        if (_new or _failed) and isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT:
            output.vtr_broken, output.vtr_failed = dict(_new), dict(_failed)
            _new.clear()
            _failed.clear()
        return made

    GPUModelRunner.__init__ = runner_init
    GPUModelRunner._cache_encoder_output = cache_encoder_output
    GPUModelRunner.sample_tokens = sample_tokens


def _watch_scheduler(scheduler: Any) -> None:
    """Requests with images that were filled up end in an error."""
    from vllm.v1.engine import FinishReason

    init, update = scheduler.__init__, scheduler.update_from_output

    def scheduler_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not hasattr(self, "encoder_cache_mismatch_reqs"):
            raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one's scheduler has no list of failed requests")

    def update_from_output(self: Any, scheduler_output: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        BROKEN.update(getattr(output, "vtr_broken", {}))
        told = {name: why for name, why in getattr(output, "vtr_failed", {}).items() if name in self.requests}
        for name in scheduler_output.num_scheduled_tokens if BROKEN else ():
            request = self.requests.get(name)
            said = [BROKEN[f.identifier] for f in request.mm_features if f.identifier in BROKEN] if request else []
            if said:
                told[name] = said[0]
        self.encoder_cache_mismatch_reqs.update(told)
        made = update(self, scheduler_output, output, *args, **kwargs)
        for one in (one for several in made.values() for one in several.outputs) if told else ():
            if one.request_id in told and one.finish_reason is not None:
                one.finish_reason, one.stop_reason = FinishReason.ERROR, told[one.request_id]
        return made

    update_from_output.vtr = True  # type: ignore[attr-defined]
    scheduler.__init__ = scheduler_init
    scheduler.update_from_output = update_from_output


def _watch_outputs() -> None:
    """A server answers "Internal server error" to whatever failed in the engine: here it gets to know what did."""
    from vllm.v1.engine.output_processor import OutputProcessor

    process = OutputProcessor.process_outputs

    def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        failed = [
            (state.queue, output.stop_reason)
            for output in outputs
            if isinstance(output.stop_reason, str) and output.stop_reason.startswith(SAYS)
            if (state := self.request_states.get(output.request_id)) is not None and state.queue is not None
        ]
        made = process(self, outputs, *args, **kwargs)
        if failed:
            from vllm.exceptions import GenerationError
            from vllm.v1.engine.async_llm import InputStreamError

            for queue, said in failed:  # what is put last is what the request's own task raises: of this, the cause
                queue.put(InputStreamError(GenerationError(said)))
        return made

    OutputProcessor.process_outputs = process_outputs
