"""Requests under policies inside the decoder, to an engine in this process; and policies that break there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vtr.integrations.vllm.inside.asked import divided

import vtr
from tests.serving.asked import STEPS, Asked, text_of

FALLING = "[1.0,1.0,0.8,0.8,0.5,0.4,0.3,0.2,0.2,0.1]"


def prompts(processor: Any, asked: Sequence[Asked], depth: int) -> tuple[list[Any], list[str | None]]:
    """What vLLM is given of each request, and what acts inside the decoder."""
    made, inside = [], []
    for one in asked:
        before, within = divided(one.policy, depth) if isinstance(one.policy, str) else (one.policy, "none")
        given: dict[str, Any] = {"prompt": text_of(processor, one)}
        if one.pictures:
            given["multi_modal_data"] = {"image": one.images()}
            if before is not None:
                given["mm_processor_kwargs"] = {"vtr": before}
        made.append(given)
        inside.append(None if within == "none" else within)
    return made, inside


def said(llm: Any, processor: Any, asked: Sequence[Asked], depth: int, never: Sequence[int], steps: int = STEPS) -> Any:
    """What the engine answers to all of them at once."""
    from vllm import SamplingParams

    given, inside = prompts(processor, asked, depth)
    params = [
        SamplingParams(
            temperature=0, max_tokens=steps, min_tokens=steps, ignore_eos=True, logprobs=0,
            logit_bias={i: -100.0 for i in never}, extra_args=None if spec is None else {"vtr": spec},
        )
        for spec in inside
    ]  # fmt: skip
    return llm.generate(given, params, use_tqdm=False)


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.vtr_inside


def all_free(llm: Any) -> bool:
    """Whether no request holds a cache block (the first of the pool is nobody's)."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@dataclass
class Halves(vtr.Policy):
    """A policy of somebody's own: the first half of the tokens stays from ``layer`` on."""

    layer: int = 2

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        return torch.arange(len(tokens) // 2) if layer == self.layer else None


@dataclass
class More(Halves):
    """Promises half of the tokens, and keeps all."""

    def entering(self, num_hidden_layers: int, total: int) -> list[int]:
        return [total if layer < self.layer else total // 2 for layer in range(num_hidden_layers)]

    def prune(self, layer: int, tokens: vtr.Tokens) -> None:
        return None


@dataclass
class Passing(More):
    """Promises to let half of the tokens go around the layers, and lets none."""

    def route(self, layer: int, tokens: vtr.Tokens) -> None:
        return None


@dataclass
class Raising(Halves):
    """Raises on states that are not zero, as a rehearsal's are."""

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        assert layer != self.layer or not tokens.hidden.any(), "no such luck"
        return torch.arange(len(tokens) // 2) if layer == self.layer else None


@dataclass
class Strange(Halves):
    """Answers with something that is no answer, in front of the last layers."""

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        return "half of them" if layer == self.layer and tokens.hidden.any() else None


_FAILED = "failed inside the decoder ({}): the server's log says more"
SAYS = {
    "test-more-inside": "vtr: test-more-inside:layer=2 keeps more tokens than it promised",
    "test-passing": "vtr: test-passing:layer=2 keeps more tokens than it promised",
    "test-raising-inside": f"vtr: test-raising-inside:layer=2 {_FAILED.format('AssertionError')}",
    "test-strange": f"vtr: test-strange:layer=2 {_FAILED.format('TypeError')}",
}


def register() -> None:
    """Make them known in this process; may run several times."""
    known = {
        "test-halves": Halves,
        "test-more-inside": More,
        "test-passing": Passing,
        "test-raising-inside": Raising,
        "test-strange": Strange,
    }
    for name, cls in known.items():
        vtr.register_policy(name)(cls)
