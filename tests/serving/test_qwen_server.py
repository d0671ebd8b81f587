"""``vtr serve`` of a random Qwen2.5-VL: what it does not take is an HTTP 400 that names what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment with it")

import openai

from tests.serving.asked import Asked
from tests.serving.server import SMALL, body, running
from tests.serving.tiny_qwen import save_qwen

PICTURES = ((1, 64, 64), (2, 60, 96))


def request(model: Path, policy: Any) -> dict[str, Any]:
    made = body(Asked("what is there", PICTURES, policy))
    return {**made, "model": str(model), "logit_bias": {str(i): -100 for i in range(4, 8)}}


def test_policies_that_look_at_the_picture_are_refused(tmp_path: Path) -> None:
    folder = save_qwen("qwen2_5_vl", tmp_path / "model")
    with running(tmp_path, "--policy", "pool:grid=2", "--", *SMALL, model=str(folder)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
        said = [client.chat.completions.create(**request(folder, spec)) for spec in (None, ["pool:grid=2", "none"])]
        lengths = [one.usage.prompt_tokens for one in said]
        assert lengths[1] - lengths[0] == 96 - 4  # of the second picture, 12 x 8 tokens, 2 x 2 are left
        for spec, way in (
            ("divprune:keep=0.25", "uniform:keep=16,before_decoder=true"),
            (["none", "cls:keep=0.25"], "uniform:keep=24,before_decoder=true"),
            ("fastv:keep=0.25,layer=2", "uniform:keep=0.625,before_decoder=true"),
        ):
            with pytest.raises(openai.BadRequestError, match=way) as error:
                client.chat.completions.create(**request(folder, spec))
            taken = way if isinstance(spec, str) else ["none", way]
            assert error.value.status_code == 400 and client.chat.completions.create(**request(folder, taken)).choices
