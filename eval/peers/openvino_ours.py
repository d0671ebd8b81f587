"""Worker: vtr on the Qwen2-VL that the worker of OpenVINO GenAI has made."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from channel import serve

import vtr
from vtr.data.pictures import upright
from vtr.image import Image
from vtr.policies.picture._greedy import determinant, unit
from vtr.policies.picture._tiles import first_of
from vtr.policies.question.cdpruner import CDPruner, scaled

START, END = "<|vision_start|>", "<|vision_end|>"


class AsTheirs(CDPruner):
    """``cdpruner`` with the kernel that OpenVINO GenAI computes: S (1 + rᵢ rⱼ) / 2, S the cosines of the tokens.

    r is the cosine with the mean embedding of all words outside the picture, the marks of roles among them, scaled to 0
    to 1 (create_conditional_kernel_model in its conditional_kernel.cpp, extract_text_features in its
    vision_token_pruning_processor.cpp). Ours, and what it falls back to, has S exp((rᵢ + rⱼ) / 2) instead.
    """

    words: torch.Tensor

    def choose(self, image: Image, counts: list[int], there: torch.Tensor) -> torch.Tensor:
        assert image.tiles is not None
        units = unit(image.tiles)
        r = scaled(torch.matmul(units, unit(self.words)[:, None])[..., 0], 0.0)
        both = torch.cat([units, r[..., None] * units], -1) / 2**0.5  # whose products are that kernel
        picks, _ = determinant(unit(both), both.norm(dim=-1), max(counts), None)
        return first_of(picks, counts, there.shape[1])


class Ours:
    def start(self, folder: str) -> dict[str, str]:
        import transformers
        from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

        self.folder, checkpoint = Path(folder), Path(folder) / "checkpoint"
        self.entries = json.loads((self.folder / "questions.json").read_text())
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()
        self.words = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
        self.pictures = Qwen2VLImageProcessorPil.from_pretrained(checkpoint, local_files_only=True)
        vtr.patch(self.model)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _inputs(self, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
        seen = self.pictures(images=[upright(self.folder / entry["picture"])], return_tensors="pt")
        picture = "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4)
        text = f"<|im_start|>user\n{START}{picture}{END}{entry['question']}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([self.words.encode(text, add_special_tokens=False)])
        placed = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": placed, **seen}

    def _outside(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [hidden size]: the mean embedding of the words that are not between the picture's marks."""
        first, last = (ids.tolist().index(self.words.convert_tokens_to_ids(mark)) for mark in (START, END))
        return self.model.get_input_embeddings()(torch.cat([ids[:first], ids[last + 1 :]])).mean(0)

    @torch.inference_mode()
    def run(self, index: int, method: str, steps: int, as_theirs: bool = False) -> dict[str, Any]:
        """method: ``none``, or a spec of ``cdpruner``. as_theirs: with their kernel."""
        entry, began = self.entries[index], time.process_time()
        inputs = self._inputs(entry)
        policy: Any = None if method == "none" else method
        if as_theirs and policy is not None:
            policy = AsTheirs(**vtr.policy(method).config())
            policy.words = self._outside(inputs["input_ids"][0])
        out = self.model.generate(**inputs, policy=policy, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        spent = 1e3 * (time.process_time() - began)
        length, row = inputs["input_ids"].shape[1], vtr.report(self.model).rows[0]
        left = length - row.total + row.vision_tokens[0]
        return {"ids": out[0, length:].tolist(), "tokens": left, "cpu_ms": spent}


if __name__ == "__main__":
    worker = Ours()
    serve({"start": worker.start, "run": worker.run})
