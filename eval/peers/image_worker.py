"""Worker: packages that reduce image tokens, called as their own documentation says, on the pocket LLaVA-NeXT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from channel import serve
from meter import spans


class ImagePeers:
    def start(self, folder: str, weights: str, budget: Any = None) -> dict[str, str]:
        import transformers
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.folder = Path(folder)
        self.entries = json.loads((self.folder / "questions.json").read_text())
        self.load: Callable[[str], Any] = lambda attention: AutoModelForImageTextToText.from_pretrained(
            weights, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()
        self.model = self.load("sdpa")
        self.processor = AutoProcessor.from_pretrained(weights, local_files_only=True)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _inputs(self, index: int) -> Any:
        from PIL import Image

        entry = self.entries[index]
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": entry["question"]}]}
        text = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        picture = Image.open(self.folder / entry["picture"]).convert("RGB")
        return self.processor(text=text, images=picture, return_tensors="pt")

    def _generate(self, method: str, index: int, steps: int, budget: dict[str, float]) -> tuple[list[int], float]:
        """New token ids and the cached tokens of the prompt, mean over layers."""
        inputs = self._inputs(index)
        length, tokens = inputs["input_ids"].shape[1], int(budget["vision_tokens"])
        keep = int(budget["kept_tokens"])
        if method == "sparsevlm_generate":
            from sparsevlm import sparsevlm_generate

            if self.model.config._attn_implementation != "eager":
                self.model = self.load("eager")
            out = sparsevlm_generate(
                self.model, self.processor, inputs, n_vis=tokens, keep_n_vis=keep, max_new_tokens=steps, device="cpu"
            )
            return out[0, 1:].tolist(), length - tokens + keep
        if method == "apply_sparsevlm":
            return self._hooked(inputs, tokens, steps, length)
        if method == "visionzip":
            from visionzip import visionzip

            self.model = visionzip(self.model, dominant=keep - keep // 6, contextual=keep // 6)
        elif method == "tomesd":
            import tomesd

            tomesd.apply_patch(self.model, ratio=1 - keep / tokens)
        return self._plain(inputs, steps, length)

    def _plain(self, inputs: Any, steps: int, length: int) -> tuple[list[int], float]:
        out = self.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        ids = out.sequences[0, length:].tolist()
        kept = [layer.keys.shape[2] - len(ids) + 1 for layer in out.past_key_values.layers]
        return ids, sum(kept) / len(kept)

    def _hooked(self, inputs: Any, tokens: int, steps: int, length: int) -> tuple[list[int], float]:
        from sparsevlm import apply_sparsevlm, remove_hooks

        state = apply_sparsevlm(self.model, n_vis=tokens)
        try:
            ids, kept = self._plain(inputs, steps, length)
        finally:
            remove_hooks(state)
        if kept == length:
            raise RuntimeError(
                f"it ran and reduced nothing: every layer still caches all {length} tokens of the prompt"
            )
        return ids, kept

    @torch.inference_mode()
    def answer(self, method: str, indexes: list[int], budget: dict[str, float]) -> dict[str, Any]:
        ids, kept = self._generate(method, indexes[0], 2, budget)
        return {"ids": [ids], "kv_tokens": kept}

    @torch.inference_mode()
    def time(self, method: str, index: int, steps: int, budget: dict[str, float]) -> dict[str, Any]:
        with spans(self.model, self.model.model.language_model) as found:
            self._generate(method, index, 1 + steps, budget)
        return {"prefill_ms": found[0], "decode_ms": found[1:]}


if __name__ == "__main__":
    worker = ImagePeers()
    serve({"start": worker.start, "answer": worker.answer, "time": worker.time})
