"""The worker's part: finds the decoder, divides its cache, and prepares each forward that has reduced requests in it.

Three methods of the runner are replaced on its instance, and hooks stand on the decoder's layers; both do nothing in a
step without reduced requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from vtr.integrations.vllm.inside.asked import Promise
from vtr.integrations.vllm.inside.options import Options, check_places, why_not
from vtr.integrations.vllm.inside.segments import Segments
from vtr.integrations.vllm.inside.served import ServedDecoder
from vtr.integrations.vllm.inside.step import Held, Step, past
from vtr.integrations.vllm.specs import decoder_layers

logger = logging.getLogger(__name__)


def install() -> None:
    """Let vLLM's runners ask, when they are made, whether policies act inside their decoder; may be called again."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    init = GPUModelRunner.__init__
    if getattr(init, "vtr", False):
        return

    @wraps(init)
    def runner_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        attach(self)

    runner_init.vtr = True  # type: ignore[attr-defined]
    GPUModelRunner.__init__ = runner_init


def attach(runner: Any) -> None:
    """Let a runner serve policies inside its decoder, if its engine was started for that and can.

    Raises:
        UnsupportedError: this vLLM is built otherwise than 0.32.
    """
    options = Options.of(runner.vllm_config)
    if options is None:
        return
    if (reason := why_not(runner.vllm_config)) is not None:
        logger.warning("No policy acts inside this engine's decoder: %s", reason)
        return
    check_places()
    Worker(runner, options)


class Worker:
    """What a runner knows of policies inside its decoder.

    Attributes:
        step: the forward that is running, while some of its prompts are being cut; else None.
        steps: how many forwards there were, with reduced requests among them, and with hooks at work: for tests.
    """

    def __init__(self, runner: Any, options: Options) -> None:
        self.runner = runner
        self.parts = options.groups(decoder_layers(runner.model_config.hf_config))
        self.decoder: ServedDecoder
        self.segments: Segments
        self.step: Step | None = None
        self.steps = {"all": 0, "reduced": 0, "cut": 0}
        self._forward, self._specs = runner._model_forward, runner.get_kv_cache_spec
        self._initialize = runner.initialize_kv_cache
        runner._model_forward, runner.get_kv_cache_spec = self.forward, self.specs
        runner.initialize_kv_cache = self.initialize
        runner.vtr_inside = self

    # -- when the engine starts ------------------------------------------------------------------------------------
    def specs(self) -> dict[str, Any]:
        """The cache of every layer, as that of a part of the depth."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec
        from vtr.integrations.vllm.inside.blocks import PartSpec

        made = dict(self._specs())
        decoder = ServedDecoder.of(self.runner.model)
        for index, name in enumerate(decoder.names):
            if type(made[name]) is FullAttentionSpec:
                part = max(i for i, first in enumerate(self.parts) if first <= index)
                made[name] = PartSpec.of(made[name], part)
        return made

    def initialize(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The caches are there, and with them the groups that the layers are in."""
        made = self._initialize(config, *args, **kwargs)
        if not hasattr(self, "decoder"):
            self.decoder = ServedDecoder.of(self.runner.model)
            self._hook()
        self.segments = Segments(self.runner, self.decoder.names)
        return made

    def _hook(self) -> None:
        for index, layer in enumerate(self.decoder.text.layers):

            def entering(module: Any, args: Any, index: int = index) -> Any:
                step = self._now()
                return None if step is None else (*step.enter(index, module, *args[:3]), *args[3:])

            def asked(module: Any, args: Any) -> None:
                if (step := self._now()) is not None:
                    step.questions.probes.take(module, args[0], args[1])

            def fed(module: Any, args: Any, out: Any) -> Any:
                step = self._now()
                return None if step is None else step.weighed(out)

            def behind(module: Any, args: Any, out: Any, index: int = index) -> Any:
                step = self._now()
                return None if step is None else step.left(index, out)

            layer.register_forward_pre_hook(entering)
            layer.self_attn.attn.register_forward_pre_hook(asked)
            layer.mlp.register_forward_hook(fed)
            layer.register_forward_hook(behind)

        def leaving(module: Any, args: Any, out: Any) -> Any:
            if (step := self._now()) is None or not step.through:  # a policy looks at normed states
                return None
            return (step.spread(out[0]), *out[1:]) if isinstance(out, tuple) else step.spread(out)

        self.decoder.text.norm.register_forward_hook(leaving)

    def _now(self) -> Step | None:
        return None if torch.compiler.is_compiling() else self.step

    # -- at each forward -------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own forward, with what each layer holds of each request in the attention's metadata."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        self.steps["all"] += 1
        context = get_forward_context()
        batch = self.runner.input_batch
        held = [self._held(name) for name in batch.req_ids]
        if not any(held) or not isinstance(context.attn_metadata, dict):
            return self._forward(*args, **kwargs)
        self.steps["reduced"] += 1
        lengths = [int(n) for n in self.runner.num_scheduled_tokens.np[: len(held)]]
        starts = [int(n) for n in batch.num_computed_tokens_cpu[: len(held)]]
        self.segments.begin(context, len(held))
        if context.cudagraph_runtime_mode == CUDAGraphMode.FULL:  # such a graph reads the runner's own metadata
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        if not any(one is not None and one.acts(start) for one, start in zip(held, starts, strict=True)):
            self._still(held, lengths, starts)
            return self._forward(*args, **kwargs)
        self.steps["cut"] += 1
        context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
        self.step = Step(self.decoder, self.segments, list(batch.req_ids), held, lengths, starts, self._layouts)
        try:
            made = self._forward(*args, **kwargs)
            self.step.done()
            return made
        finally:
            self.step = None

    def _still(self, held: Sequence[Held | None], lengths: list[int], starts: list[int]) -> None:
        """A step in which nothing is cut: shapes are as ever, only each layer's metadata differ."""
        for index in range(self.decoder.depth):
            self.segments.enter(index, lengths, past(held, starts, index))

    def _held(self, name: str) -> Held | None:
        """What is known of a request under a policy; None of others."""
        state = self.runner.requests[name]
        if "vtr_held" not in state.__dict__:
            promise = Promise.of(state.sampling_params)
            state.vtr_held = None if promise is None else Held.of(promise, state, self.decoder, self.parts)
        found: Held | None = state.vtr_held
        return found

    def _layouts(self, features: Sequence[Any]) -> list[Any] | None:
        """How the tokens of a request's images lie; None where the model's class cannot say, or they were reduced."""
        from vllm.multimodal.utils import group_and_batch_mm_items

        tell, found = getattr(self.runner.model, "image_layouts", None), []
        for feature in features:
            data = feature.data
            if tell is None or data is None or "image_embeds" in data:
                return None
            ((_, kwargs),) = group_and_batch_mm_items([data])
            (layout,), _ = tell(kwargs, 1)
            if len(layout) != feature.mm_position.get_num_embeds():
                return None
            found.append(layout)
        return found
