"""Worker: a small random Qwen2-VL, made and exported here, in OpenVINO GenAI, which prunes its picture by CDPruner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from channel import serve

os.environ["CDPRUNER_SPLIT_THRESHOLD"] = "0"  # the method as published: one kernel, not two halves
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VOCABULARY = 272
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, and the marks of Qwen2-VL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]  # of transformers 4

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return Qwen2TokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL,
        chat_template=TEMPLATE,
    )  # fmt: skip


def make(folder: Path, seed: int = 0) -> None:
    """``folder``/checkpoint: random weights, tokenizer and image processor."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    words = tokenizer()
    at = {mark: words.convert_tokens_to_ids(mark) for mark in SPECIAL}
    text = dict(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, rope_theta=10_000.0,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=2, embed_dim=64, hidden_size=256, num_heads=4, mlp_ratio=2, patch_size=14)
    ends: dict[str, Any] = {"bos_token_id": at["<|im_start|>"], "eos_token_id": at["<|endoftext|>"]}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=at["<|image_pad|>"], video_token_id=at["<|video_pad|>"],
        vision_start_token_id=at["<|vision_start|>"], vision_end_token_id=at["<|vision_end|>"], **ends,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # far enough from zero that what is kept decides what is said
                weight.normal_(0, 0.08)
    for part in (model, words, Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 400)):
        part.save_pretrained(folder / "checkpoint")


def export(folder: Path) -> None:
    """``folder``/openvino: the checkpoint as OpenVINO's models, by optimum-intel, float32."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "-m", folder / "checkpoint",
               "--task", "image-text-to-text", "--weight-format", "fp32", folder / "openvino"]  # fmt: skip
    done = subprocess.run([*map(str, command)], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"optimum-cli export openvino: {done.stderr.strip().splitlines()[-1]}")
    reads, writes = convert_tokenizer(tokenizer(), with_detokenizer=True)
    openvino.save_model(reads, folder / "openvino" / "openvino_tokenizer.xml")
    openvino.save_model(writes, folder / "openvino" / "openvino_detokenizer.xml")
    settings = (folder / "checkpoint" / "preprocessor_config.json").read_text()
    (folder / "openvino" / "preprocessor_config.json").write_text(settings)


class OpenVINO:
    def start(self, folder: str) -> dict[str, str]:
        import openvino_genai
        import transformers

        self.folder, self.genai = Path(folder), openvino_genai
        make(self.folder)
        export(self.folder)
        self.entries = json.loads((self.folder / "questions.json").read_text())
        self.pipeline = openvino_genai.VLMPipeline(
            str(self.folder / "openvino"), "CPU", INFERENCE_NUM_THREADS=1, INFERENCE_PRECISION_HINT="f32"
        )  # some processors get bfloat16 otherwise
        return {"openvino-genai": openvino_genai.__version__, "transformers": transformers.__version__}

    def run(self, index: int, method: str, steps: int) -> dict[str, Any]:
        """method: ``none``, or the percentage that is pruned. CPU time is of the whole call, with tower and words."""
        import numpy as np
        import openvino
        from PIL import Image

        ids: list[int] = []

        class Heard(self.genai.StreamerBase):  # type: ignore[name-defined]
            def write(self, said: int | list[int]) -> Any:
                ids.extend(said if isinstance(said, list) else [said])
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        genai, entry, config = self.genai, self.entries[index], self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = steps
        config.do_sample, config.ignore_eos = False, True
        config.pruning_ratio = 0 if method == "none" else int(method)
        picture = openvino.Tensor(np.asarray(Image.open(self.folder / entry["picture"]).convert("RGB"))[None].copy())
        heard, began = Heard(), time.process_time()
        out = self.pipeline.generate(entry["question"], images=[picture], generation_config=config, streamer=heard)
        spent = 1e3 * (time.process_time() - began)
        return {"ids": ids, "tokens": out.perf_metrics.get_num_input_tokens(), "cpu_ms": spent}


if __name__ == "__main__":
    worker = OpenVINO()
    serve({"start": worker.start, "run": worker.run})
