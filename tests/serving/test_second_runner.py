"""vLLM's second runner, which needs a GPU: what the guard wraps of it, on its own classes without a device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu import async_utils
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vtr.integrations.llava import tile_layout
from vtr.integrations.vllm import guard

import vtr
from tests.serving import broken
from vtr.image import Image

broken.register()
PICTURE = Image(torch.randn(16, 4), tile_layout(4, 4), 0, 1)


class State(ModelState):
    """vLLM's own, but for what needs a model. ``ModelState`` itself is not touched."""

    execute_mm_encoder = ModelState.execute_mm_encoder
    prepare_inputs_embeds = prepare_inputs = prepare_dummy_inputs = prepare_attn = None  # type: ignore[assignment]

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self.encoder_cache = EncoderCache()
        self.encoder_runner = EncoderRunner(
            SimpleNamespace(), 64, 4, self.encoder_cache, torch.float32, torch.device("cpu")
        )
        self.encoder_runner.execute_mm_encoder = lambda given: [outputs[item] for _, item in given]  # type: ignore
        features = [SimpleNamespace(identifier=name, modality="image", data=name) for name in outputs]
        self.encoder_cache.add_request("request", features)


class Runner:
    """Gives what the second runner gives: an ``AsyncOutput`` around the output that is filled later."""

    def sample_tokens(self, grammar: Any) -> Any:
        made = async_utils.AsyncOutput.__new__(async_utils.AsyncOutput)  # its own __init__ asks for CUDA
        made.model_runner_output = ModelRunnerOutput(req_ids=["request"], req_id_to_index={"request": 0})
        return made


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Classes of this test's own, watched."""
    monkeypatch.setattr(guard, "_watched", True)
    guard._new.clear()
    state, runner = type("Watched", (State,), {}), type("Runner", (Runner,), {})
    guard.watch_second(runner, state)
    guard.watch_second(runner, state)  # a process may hold two engines
    yield state, runner
    guard._new.clear()


def exactly(spec: str, count: int = 8) -> torch.Tensor:
    made = vtr.policy(spec)
    return guard.exactly(count, made.spec, made, PICTURE)


def test_a_filled_up_image_is_told_once_with_the_output_of_its_step(watched: Any) -> None:
    good, bad = exactly("uniform:keep=8,before_decoder=true"), exactly("test-short")
    state, runner = watched[0]({"good": good, "bad": bad}), watched[1]()
    state.execute_mm_encoder({"request": [0, 1]})
    assert state.encoder_cache.encoder_outputs["bad"] is bad and len(bad) == 8
    first, second = runner.sample_tokens(None), runner.sample_tokens(None)
    assert first.model_runner_output.vtr_broken == {"bad": broken.SAYS["test-short"]}
    assert not hasattr(second.model_runner_output, "vtr_broken")


def test_an_encoder_run_without_new_images_tells_nothing(watched: Any) -> None:
    state = watched[0]({"good": exactly("uniform:keep=8,before_decoder=true")})
    for _ in range(2):  # the second time it is in the cache
        state.execute_mm_encoder({"request": [0]})
    assert not hasattr(watched[1]().sample_tokens(None).model_runner_output, "vtr_broken")


def test_outputs_that_several_steps_share_stay_as_they_are(watched: Any) -> None:
    class Empty:
        def sample_tokens(self, grammar: Any) -> Any:
            return EMPTY_MODEL_RUNNER_OUTPUT

    state = watched[0]({"bad": exactly("test-short")})
    state.execute_mm_encoder({"request": [0]})
    assert not hasattr(guard.telling(Empty.sample_tokens)(Empty(), None), "vtr_broken")
    assert watched[1]().sample_tokens(None).model_runner_output.vtr_broken  # kept for the next


def test_the_real_classes_are_watched_where_the_second_runner_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    monkeypatch.setattr(GPUModelRunner, "sample_tokens", GPUModelRunner.sample_tokens)  # put back afterwards
    monkeypatch.setattr(ModelState, "execute_mm_encoder", ModelState.execute_mm_encoder)
    monkeypatch.setattr(guard, "_watched", False)
    config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        ec_transfer_config=None,
    )
    guard.watch(config)
    assert guard._watched and not hasattr(GPUModelRunner.sample_tokens, "vtr")
    config.use_v2_model_runner = True
    guard.watch(config)
    assert GPUModelRunner.sample_tokens.vtr
    for name, other in (("parallel_config", SimpleNamespace(pipeline_parallel_size=2)), ("ec_transfer_config", 1)):
        guard.watch(SimpleNamespace(**{**vars(config), name: other}))
        assert not guard._watched  # whoever encodes does not talk to the scheduler
        with pytest.raises(RuntimeError, match="the engine cannot go on"):
            exactly("test-short")


def test_another_second_runner_is_refused_with_a_way_out() -> None:
    with pytest.raises(vtr.UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        guard.watch_second(type("Runner", (Runner,), {}), object)
