"""What requests that ask for no policy pay for an engine that is made for policies inside its decoder.

``python -m vtr.eval.cost.unreduced MODEL`` makes two engines of vLLM in this process, one as ever and one with
``vtr.integrations.vllm.inside.engine_args()``, lets them answer the same requests in turns, and says the ratio of CPU
times. In vLLM's environment, on a CPU.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from tqdm import tqdm
from vtr.eval.cost.interleave import median_ratio
from vtr.eval.cost.serve import picture
from vtr.eval.report import results

SMALL = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_num_seqs": 8, "enable_prefix_caching": False}
QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUIET |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


def cpu_seconds(llm: Any, prompt: str, images: Sequence[Any], tokens: int) -> float:
    """CPU time of this process while ``llm`` answers about each picture, ``tokens`` tokens each."""
    from vllm import SamplingParams

    asked = [{"prompt": prompt, "multi_modal_data": {"image": [image]}} for image in images]
    params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
    began = time.process_time()
    llm.generate(asked, params, use_tqdm=False)
    return time.process_time() - began


def main(
    model: Annotated[Path, typer.Argument(help="a folder, e.g. what `python -m vtr.eval.cost.servable` writes")],
    requests: Annotated[int, typer.Option(min=1, help="at a time")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 64,
    rounds: Annotated[int, typer.Option(min=3, help="each engine once")] = 15,
    side: Annotated[int, typer.Option(min=8, help="of the pictures, in pixels")] = 192,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """CPU time of requests without a policy: an engine for policies inside the decoder over one that is as ever."""
    os.environ.update(QUIET)
    from transformers import AutoProcessor
    from vllm import LLM
    from vtr.integrations.vllm.inside import engine_args

    content = [{"type": "image"}, {"type": "text", "text": "what is in the picture"}]
    chat = [{"role": "user", "content": content}]
    prompt = AutoProcessor.from_pretrained(model).apply_chat_template(chat, add_generation_prompt=True)
    started: list[dict[str, Any]] = [{}, engine_args()]
    engines = [LLM(str(model), disable_log_stats=True, **SMALL, **more) for more in started]
    times: list[list[float]] = [[], []]
    draw = np.random.default_rng(0)
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for which in (0, 1) if turn % 2 else (1, 0):
            gc.collect()
            images = [picture(draw, side) for _ in range(requests)]  # no two alike: nothing is in a cache
            spent = cpu_seconds(engines[which], prompt, images, tokens)
            if turn:  # the first one warms up
                times[which].append(spent)
    found = median_ratio(times[1], times[0])
    Console().print(
        f"{requests} requests of {tokens} tokens: {found.value:.3f} ({found.low:.3f}–{found.high:.3f}) of the CPU time"
    )
    if json_file is not None:
        made = {"model": str(model), "requests": requests, "tokens": tokens, "rounds": rounds, "seconds": times}
        ratio = {"median": found.value, "low": found.low, "high": found.high}
        results.save(json_file, "unreduced", {**made, "ratio": ratio}, seed=0)


if __name__ == "__main__":
    typer.run(main)
