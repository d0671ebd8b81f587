"""Exactly as many embeddings of an image as it has placeholders, or an error for the requests that have the image.

vLLM 0.32 dies when a model gives one embedding too few, and takes everybody's requests with it. Here a policy that
breaks its promise in the worker gets its image filled up to the promised length, so that the step can finish, and the
scheduler ends every request with that image in an error, also later ones: what prefix caches hold of it is nonsense.
What was wrong travels as the stop reason: a server answers HTTP 500 with it, ``vllm.LLM`` gives an output with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from vtr.base import Policy, UnsupportedError
from vtr.engine.compression import Answered, compressed
from vtr.image import Image

logger = logging.getLogger(__name__)

SAYS = "vtr: "
"""Stop reasons that begin so are ours."""
BROKEN: dict[str, str] = {}
"""The scheduler's: cache identities of images whose policy broke its promise → what clients are told."""
_new: dict[str, str] = {}
"""The worker's: those that the scheduler, often in another process, has not been told yet."""
_failed: dict[str, str] = {}
"""The worker's: requests whose policy broke inside the decoder → what clients are told."""
_marked: Any = WeakIdKeyDictionary()
"""The worker's: embeddings that were filled up in the encoder run that is under way → what clients are told."""
_watched = False
"""Whether this process has a runner that reports them."""


def exactly(
    count: int, spec: str, policy: Policy, *parts: Image, expected: Callable[[Answered], bool] | None = None
) -> torch.Tensor:
    """What a policy makes of a picture, if that is ``count`` embeddings; else ``count`` of its own, marked as broken.

    Args:
        count: of all parts together.
        parts: the picture, or its tiles where each of them is an image of its own; they leave as many each.
        expected: whether an answer is the one that the rest of the engine was told of; None: any answer is.

    Raises:
        RuntimeError: the promise is broken, and nobody would tell the scheduler.
    """
    each = count // len(parts)
    try:
        made = []
        for image in parts:
            answer = compressed(policy, image)
            made.append(_taken(image.features, answer))
            if len(made[-1]) != each:
                said = what = f"{spec} promised {each} embeddings of an image and gave {len(made[-1])}"
                break
            if expected is not None and not expected(answer):
                said = what = f"{spec} chose other tokens of an image than those whose positions were told"
                break
        else:
            return made[0] if len(made) == 1 else torch.cat(made)
    except Exception as error:  # whatever a policy raises must not end the engine
        said = f"{spec} failed on an image ({type(error).__name__}): the server's log says more"
        what = f"{spec} failed on an image: {type(error).__name__}: {error}"
    if not _watched:
        raise RuntimeError(f"{what}; the engine cannot go on")
    logger.error("%s: requests with this image end in an error", what)
    whole = parts[0].features
    filled = whole[torch.arange(count, device=whole.device) % len(whole)].clone()
    _marked[filled] = SAYS + said
    return filled


def failed(request: str, why: str) -> None:
    """A request's policy broke inside the decoder: it ends in an error when this step is over."""
    logger.error("%s: request %s ends in an error", why, request)
    _failed[request] = SAYS + why


def _taken(whole: torch.Tensor, answer: Answered) -> torch.Tensor:
    keep, pooled = answer
    return whole.index_select(0, keep.to(whole.device)) if pooled is None else pooled.features.to(whole)


def install(ready: Callable[[Any], None]) -> None:
    """Let vLLM's runner name the images that were filled up, its scheduler end the requests that have them, and its
    frontend say why.

    Args:
        ready: called with each runner of vLLM's first kind that has been made.

    Raises:
        UnsupportedError: this vLLM is built otherwise than 0.32.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler.update_from_output, "vtr", False):
        return
    _watch_runner(ready)
    _watch_scheduler(Scheduler)
    _watch_outputs()


def _watch_runner(ready: Callable[[Any], None]) -> None:
    """What the runner hands to the scheduler after each step says which images were filled up in it."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not hasattr(GPUModelRunner, "_cache_encoder_output"):
        raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one has no GPUModelRunner._cache_encoder_output")
    init, store = GPUModelRunner.__init__, GPUModelRunner._cache_encoder_output

    @wraps(init)
    def runner_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        ready(self)

    @wraps(store)
    def cache_encoder_output(self: Any, mm_hash: str, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _named(mm_hash, output)
        return store(self, mm_hash, output, *args, **kwargs)

    GPUModelRunner.__init__ = runner_init
    GPUModelRunner._cache_encoder_output = cache_encoder_output
    GPUModelRunner.sample_tokens = telling(GPUModelRunner.sample_tokens)


def watch(vllm_config: Any) -> None:
    """A model of ours is being made in this process: its runner must report images that were filled up.

    vLLM has two runners. The second one (``v1/worker/gpu``, where Triton works) is only imported where it is used.

    Raises:
        UnsupportedError: this vLLM's second runner is built otherwise than 0.32's.
    """
    global _watched
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.interface import ModelState

        watch_second(GPUModelRunner, ModelState)
    # the encoder runs on the first of several stages, and the last one talks to the scheduler; an engine that encodes
    # for others tells nobody
    _watched = vllm_config.parallel_config.pipeline_parallel_size == 1 and vllm_config.ec_transfer_config is None


def watch_second(runner: Any, state: Any) -> None:
    """The same of the second runner, and of what runs the encoder for it; may be called several times."""
    if getattr(runner.sample_tokens, "vtr", False):
        return
    if not hasattr(state, "execute_mm_encoder"):
        raise UnsupportedError(
            "vtr's plugin knows vLLM 0.32: this one's second runner has no ModelState.execute_mm_encoder; set "
            "VLLM_USE_V2_MODEL_RUNNER=0 to start it with the first"
        )
    run = state.execute_mm_encoder

    @wraps(run)
    def execute_mm_encoder(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        made = run(self, scheduled, *args, **kwargs)
        cache = self.encoder_cache
        for request, inputs in scheduled.items() if _marked else ():
            for feature in (cache.mm_features[request][i] for i in inputs):
                _named(feature.identifier, cache.encoder_outputs.get(feature.identifier))
        return made

    state.execute_mm_encoder = execute_mm_encoder
    runner.sample_tokens = telling(runner.sample_tokens)


def _named(identity: str, output: torch.Tensor | None) -> None:
    """An image's embeddings are cached under this name: if they were filled up, the scheduler is to be told."""
    if output is not None and output in _marked:
        _new[identity] = _marked.pop(output)


def telling(sample: Any) -> Any:
    """A runner's ``sample_tokens``, whose output names the images that were filled up in its step."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    @wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = sample(self, *args, **kwargs)
        # what is scheduled ahead is wrapped, by each of the two runners in another way
        output = getattr(made, "_model_runner_output", getattr(made, "model_runner_output", made))
        if (_new or _failed) and isinstance(output, ModelRunnerOutput) and output is not EMPTY_MODEL_RUNNER_OUTPUT:
            output.vtr_broken, output.vtr_failed = dict(_new), dict(_failed)
            _new.clear()
            _failed.clear()
        return made

    sample_tokens.vtr = True  # type: ignore[attr-defined]
    return sample_tokens


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
