"""What is refused when an engine starts: settings of vLLM under which reduced images would be wrong. Pure, no vLLM."""

from __future__ import annotations

from typing import Any

from vtr.base import UnsupportedError

WITHOUT = 'or set VLLM_PLUGINS="" to serve this model without vtr'


def check(vllm_config: Any) -> None:
    """Raise UnsupportedError if images would go past the plugin, or come to it in another form.

    Args:
        vllm_config: the engine's, a ``VllmConfig``.
    """
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        raise UnsupportedError(
            "cudagraph_mm_encoder replays the vision encoder past the plugin, so images would not be reduced, but the "
            f"room for them would: leave it out of --compilation-config, {WITHOUT}"
        )
    pictures = vllm_config.model_config.multimodal_config
    if pictures is not None and pictures.is_multimodal_pruning_enabled():
        raise UnsupportedError(
            "vLLM's own pruning of videos (--video-pruning-rate, --video-pruning-method) also changes what it makes of "
            f"pictures, which vtr reduces: leave it out, {WITHOUT}"
        )
