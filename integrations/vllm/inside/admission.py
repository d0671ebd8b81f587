"""The frontend's part: a request's policy inside the decoder is checked before the engine sees the request."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vtr.integrations.vllm.inside.asked import Promise, check_sizes, divided, entering, resolved
from vtr.integrations.vllm.inside.options import KEY, Options, why_not
from vtr.integrations.vllm.specs import NONE, RequestError, decoder_layers, refusal

from vtr.base import Policy, UnsupportedError
from vtr.limits import short


def install() -> None:
    """Let vLLM's frontend check what requests ask for in ``extra_args["vtr"]``."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    process = getattr(InputProcessor, "process_inputs", None)
    if process is None:
        raise UnsupportedError("vtr's plugin knows vLLM 0.32: this one has no InputProcessor.process_inputs")
    if getattr(process, "vtr", False):
        return

    class Refused(VLLMValidationError, ValueError):
        """HTTP 400, and the same ValueError as for what the processor refuses."""

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = process(self, *args, **kwargs)
        try:
            admit(self.vllm_config, made)
        except RequestError as error:
            _forget_images(self.renderer.mm_processor_cache, made.mm_features or ())
            raise Refused(f"vtr: {error}") from error
        return made

    process_inputs.vtr = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def _forget_images(cache: Any, features: Any) -> None:
    """The frontend's cache holds that the engine has been sent these pictures: now it has not been."""
    for feature in features if cache is not None else ():
        if feature.data is not None:
            cache.invalidate(feature.mm_hash or feature.identifier)


def admit(vllm_config: Any, request: Any) -> None:
    """Put what a request promises into its ``extra_args``; one without a policy inside the decoder stays as it is.

    Raises:
        RequestError: it cannot be served; the message says what to send, or how to start the server.
    """
    params = request.sampling_params
    extra = dict(getattr(params, "extra_args", None) or {})
    options = Options.of(vllm_config)
    named = KEY in extra
    asked = extra.pop(KEY, None)
    if not named and options is not None and request.mm_features:
        asked = options.default
    if named:
        params.extra_args = extra
    if asked is None or (isinstance(asked, str) and asked.strip().lower() in ("", NONE)):
        return
    if not isinstance(asked, str):
        raise RequestError(f'extra_args["vtr"] is a spec string like "fastv:keep=0.25,layer=2", got {asked!r:.80}')
    hf_config = vllm_config.model_config.hf_config
    depth = decoder_layers(hf_config)
    weights = {} if options is None else options.weights
    before, within = divided(asked, depth, weights)
    if before != NONE and before is not None:
        raise RequestError(
            f'{short(str(before))} acts before the decoder: name it in mm_processor_kwargs, {{"vtr": …}}; here stands '
            "what acts inside"
        )
    if within == NONE:
        return
    made = _policy(within, tuple(sorted(weights.items())))
    if options is None:
        raise RequestError(refusal(made, depth))
    if (reason := why_not(vllm_config)) is not None:
        raise RequestError(reason)
    if request.mm_features:
        check_sizes(made, depth, int(hf_config.get_text_config().hidden_size))
        params.extra_args = {**extra, KEY: _promise(vllm_config, request, made, depth).as_args()}


@lru_cache(maxsize=1024)
def _policy(text: str, weights: tuple[tuple[str, str], ...]) -> Policy:
    return resolved(text, dict(weights))


def _promise(vllm_config: Any, request: Any, made: Policy, depth: int) -> Promise:
    """What the request takes up.

    Raises:
        RequestError: something about the request that a policy inside the decoder cannot be served with.
    """
    _check_call(request, made)
    _check_prompt(request, made)
    _check_room(vllm_config.scheduler_config, request, made)
    hf_config = vllm_config.model_config.hf_config
    if made.renumbers and vllm_config.model_config.uses_mrope:
        raise RequestError(
            f"{made.spec} renumbers positions, but this model's have several axes (M-RoPE): let tokens keep theirs, "
            "e.g. pyramid:positions=keep"
        )
    sizes = [feature.mm_position.get_num_embeds() for feature in request.mm_features]
    counts = entering(made, depth, sizes)
    levels = len(getattr(getattr(hf_config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if levels and min(counts[:levels]) < sum(sizes):
        raise RequestError(
            f"{short(made.spec)} drops tokens in front of layer {levels}, and this model adds what its tower saw to "
            f"all of them behind its first {levels} layers (DeepStack): cut from layer {levels} on, e.g. "
            f"fastv:keep=0.25,layer={levels}"
        )
    return Promise(made.spec, sum(sizes), tuple(counts), made.asks("remember"))


def _check_call(request: Any, made: Policy) -> None:
    params = request.sampling_params
    if params is None:
        raise RequestError(f"{short(made.spec)} acts inside the decoder: pooling sees all of its tokens, leave it out")
    if params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise RequestError(
            "tokens that a policy drops have no log-probabilities: leave out prompt_logprobs (echo), or the policy"
        )
    if getattr(request, "resumable", False):
        raise RequestError("a prompt that comes in pieces cannot have a policy inside the decoder: send it whole")
    if getattr(request, "prompt_embeds", None) is not None:
        raise RequestError("a prompt of embeddings does not say which tokens are an image's: send text and pictures")
    if others := sorted({f.modality for f in request.mm_features} - {"image"}):
        raise RequestError(f"a request with {others[0]} cannot have a policy inside the decoder: leave the policy out")


def _check_prompt(request: Any, made: Policy) -> None:
    last = max(feature.mm_position.offset + feature.mm_position.length for feature in request.mm_features)
    if last >= len(request.prompt_token_ids):
        raise RequestError(
            f"no text stands behind the last image, and by it {short(made.spec)} is to rank that image's tokens: put "
            "the question behind the picture"
        )


def _check_room(scheduler: Any, request: Any, made: Policy) -> None:
    """A reduced prompt is computed in one step, whatever else is decoded in that step."""
    wanted = len(request.prompt_token_ids)
    if made.asks("remember"):  # recomputed after a preemption, what was answered is judged again in the same step
        wanted += request.sampling_params.max_tokens or 0
    room = scheduler.max_num_batched_tokens - min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens // 2)
    threshold = getattr(scheduler, "long_prefill_token_threshold", 0)
    if threshold and threshold < wanted:
        raise RequestError(
            f"this prompt of {wanted} tokens is computed in one step under {short(made.spec)}, but the server cuts "
            f"prompts at {threshold} (--long-prefill-token-threshold): compress before the decoder as well, e.g. "
            f"pool:grid=4+{short(made.spec)}"
        )
    if wanted > room:
        raise RequestError(
            f"this prompt of {wanted} tokens{' with its answer' * made.asks('remember')} must fit into one step under "
            f"{short(made.spec)}, and a step has room for {room}: compress before the decoder as well (pool:grid=4+…), "
            "or start the server with a larger --max-num-batched-tokens"
        )
