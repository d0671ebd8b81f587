"""The scheduler's part: a reduced prompt is computed in one step, and takes nothing from prefix caches."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vtr.integrations.vllm.inside import blocks
from vtr.integrations.vllm.inside.asked import Promise
from vtr.integrations.vllm.inside.options import Options
from vtr.integrations.vllm.specs import decoder_layers


class HoldingScheduler(Scheduler):
    """vLLM's scheduler; requests under a policy inside the decoder wait until a step has room for all of their prompt.

    Which tokens stay is chosen by the prompt's last text, so no earlier piece can be cut before that has come.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        depth = decoder_layers(config.model_config.hf_config)
        self._vtr_parts = (Options.of(config) or Options()).groups(depth)
        self._vtr_promises: dict[str, Promise] = {}

    def add_request(self, request: Any) -> None:
        """Note what a request promises, before anything is scheduled."""
        if (promise := Promise.of(request.sampling_params)) is not None:
            self._vtr_promises[request.request_id] = promise
            request.skip_reading_prefix_cache = True
            blocks.DROPPED[request.request_id] = [promise.vision - held for held in promise.held(self._vtr_parts)]
        super().add_request(request)

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """vLLM's own; a reduced prompt that would come in pieces is not begun."""
        made = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )
        promise = self._vtr_promises.get(request.request_id)
        if promise is None or num_computed_tokens >= request.num_prompt_tokens:
            return made
        wanted = request.num_tokens if promise.forgets else request.num_prompt_tokens
        if num_computed_tokens + made[1] < wanted:
            return [], 0, encoder_compute_budget, [], []
        return made

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, and what was noted of the request."""
        made = super()._free_request(request, *args, **kwargs)
        self._vtr_promises.pop(request.request_id, None)
        blocks.DROPPED.pop(request.request_id, None)
        return made
