"""vtr as a plugin of vLLM: each request, each image its own policy before the decoder. See docs/serving.md.

Nothing of vLLM is imported until :func:`register` runs, which vLLM does in each of its processes (the entry point
``vllm.general_plugins``), possibly more than once.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "families",
    "LlavaNextForConditionalGeneration": "families",
    "LlavaOnevisionForConditionalGeneration": "families",
    "InternVLForConditionalGeneration": "families",
    "Qwen2VLForConditionalGeneration": "qwen",
    "Qwen2_5_VLForConditionalGeneration": "qwen",
    "Qwen3VLForConditionalGeneration": "qwen",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "idefics3",
}
"""vLLM's names of what has a class of ours → the module here that it is in."""


def register() -> None:
    """Put our classes in the place of vLLM's for the same architecture names; configs stay as they are."""
    from vllm import ModelRegistry
    from vtr.integrations.vllm import guard
    from vtr.integrations.vllm.inside import admission

    for name, module in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"vtr.integrations.vllm.{module}:{name}")
    guard.install(_ready)
    admission.install()


def _ready(runner: Any) -> None:
    """A runner of vLLM has been made: it serves policies inside the decoder, if its engine was started for them."""
    if getattr(runner.vllm_config, "additional_config", None):
        from vtr.integrations.vllm.inside.worker import attach

        attach(runner)
