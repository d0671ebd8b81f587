"""What an engine was started with, what it cannot serve then, and where in vLLM it hooks in. Pure: no vLLM here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtr.base import UnsupportedError

KEY = "vtr"
"""The key of ``additional_config``, and of a request's ``extra_args`` (over HTTP: ``vllm_xargs``)."""
SCHEDULER = "vtr.integrations.vllm.inside.scheduler.HoldingScheduler"
MOST_PARTS = 8
"""KV cache groups that the decoder is divided into by default, at most."""
FAMILIES = {
    "LlavaForConditionalGeneration": "LLaVA-1.5",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "InternVLForConditionalGeneration": "InternVL",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
}
"""What policies act inside of: model classes whose answers have been compared with transformers."""
PLACES = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("_model_forward", "get_kv_cache_spec", "initialize_kv_cache"),
    "vllm.v1.core.sched.scheduler:Scheduler": ("add_request", "_try_schedule_encoder_inputs", "_free_request"),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": (
        "get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks",
    ),
    "vllm.v1.engine.input_processor:InputProcessor": ("process_inputs",),
    "vllm.v1.worker.utils:AttentionGroup": ("build_metadata",),
}  # fmt: skip
"""Everything of vLLM that is wrapped, overridden or called without being public; read in 0.32.0. The first line is set
on the runner's instance, the next two are overridden in subclasses, and only ``process_inputs`` is wrapped in place."""


@dataclass(frozen=True)
class Options:
    """What ``additional_config["vtr"]`` says.

    Attributes:
        parts: into how many KV cache groups the decoder's layers are divided; None: as many as divide them evenly, at
            most eight.
        weights: names that requests may give as ``weights=``, and the folders they stand for.
        default: the policy of requests with pictures that name none, or None.
    """

    parts: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> Options | None:
        """Read off an engine's config; None: it was not started for policies in the decoder.

        Raises:
            ValueError: settings that are none.
        """
        given = (getattr(vllm_config, "additional_config", None) or {}).get(KEY)
        if given is None:
            return None
        if not isinstance(given, Mapping) or set(given) - {"parts", "weights", "default"}:
            raise ValueError(f'additional_config["vtr"] takes parts, weights and default, got {given!r:.200}')
        return cls(**given)

    def groups(self, depth: int) -> list[int]:
        """The first layer of each part of ``depth`` layers.

        Raises:
            ValueError: parts of different sizes, which vLLM would divide further.
        """
        parts = self.parts
        if parts is None:
            parts = max(n for n in range(1, MOST_PARTS + 1) if depth % n == 0)
        if not isinstance(parts, int) or isinstance(parts, bool) or not 1 <= parts <= depth or depth % parts:
            fit = [n for n in range(1, depth + 1) if depth % n == 0]
            raise ValueError(
                f"parts={parts!r}: {depth} decoder layers are divided evenly by {', '.join(map(str, fit))}"
            )
        return list(range(0, depth, depth // parts))


def engine_args(
    parts: int | None = None, weights: Mapping[str, str] | None = None, default: str | None = None
) -> dict[str, Any]:
    """What ``vllm.LLM`` or an engine is to be started with for policies inside the decoder.

    ``vllm.LLM(MODEL, **engine_args())``; a request then names its policy in
    ``SamplingParams(extra_args={"vtr": "fastv:keep=0.25,layer=2"})``.

    Args:
        parts, weights, default: see :class:`Options`.
    """
    given: dict[str, Any] = {"parts": parts, "weights": dict(weights or {}), "default": default}
    return {
        "additional_config": {KEY: {name: value for name, value in given.items() if value}},
        "scheduler_cls": SCHEDULER,
        "async_scheduling": False,
    }


def server_args(
    parts: int | None = None, weights: Mapping[str, str] | None = None, default: str | None = None
) -> list[str]:
    """:func:`engine_args` as options of vLLM's server."""
    made = engine_args(parts, weights, default)
    return [
        "--scheduler-cls", made["scheduler_cls"],
        "--additional-config", json.dumps(made["additional_config"]), "--no-async-scheduling",
    ]  # fmt: skip


def check_places() -> None:
    """Raise UnsupportedError unless this vLLM has all that policies inside the decoder stand on."""
    import importlib

    for place, names in PLACES.items():
        module, _, owner = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), owner)
        except (ImportError, AttributeError):
            found = None
        if lacking := [name for name in names if not hasattr(found, name)]:
            raise UnsupportedError(
                f"policies inside the decoder know vLLM 0.32: this one has no {owner}.{lacking[0]}. Start it without "
                "--decoder-policies (policies before the decoder stay), or install vLLM 0.32"
            )


def why_not(vllm_config: Any) -> str | None:
    """Why an engine of this config can serve no policy inside the decoder, and what to start it with; None: it can."""
    model, parallel, compilation = vllm_config.model_config, vllm_config.parallel_config, vllm_config.compilation_config
    architecture = (getattr(model.hf_config, "architectures", None) or ["?"])[0]
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES.values())
        return f"policies act inside the decoders of {known}; of {architecture} they act before it: e.g. pool:grid=4"
    text = model.hf_config.get_text_config()
    sliding = getattr(text, "layer_types", None) or []
    if "sliding_attention" in sliding or "chunked_attention" in sliding or _window(text):
        return "this decoder has sliding windows, which stand on positions without gaps: name a policy before it"
    scheduler = vllm_config.scheduler_config.scheduler_cls
    found = {
        "with --decoder-policies, or with all of vtr.integrations.vllm.inside.engine_args()": (
            scheduler != SCHEDULER and getattr(scheduler, "__name__", None) != SCHEDULER.rpartition(".")[2]
        ),
        "with --no-async-scheduling": getattr(vllm_config.scheduler_config, "async_scheduling", False) is True,
        "without --speculative-config": vllm_config.speculative_config is not None,
        "without --kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "without --enable-lora": vllm_config.lora_config is not None,
        "without --pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "without --decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "without --prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "without --enable-dbo": getattr(parallel, "enable_dbo", False) is True,
        "without --kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill is True,
        "without sequence parallelism": getattr(compilation.pass_config, "enable_sp", False) is True,
        "with the environment variable VLLM_USE_V2_MODEL_RUNNER=0": _second_runner(vllm_config),
    }
    wanted = [what for what, there in found.items() if there]
    return f"policies inside the decoder need a server that is started {' and '.join(wanted)}" if wanted else None


def _window(text: Any) -> bool:
    if getattr(text, "layer_types", None):
        return False  # it says of each layer what it is
    return bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True) is not False


def _second_runner(vllm_config: Any) -> bool:
    """Whether vLLM takes its V2 model runner, whose steps are prepared elsewhere."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))
