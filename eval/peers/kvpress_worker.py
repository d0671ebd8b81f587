"""Worker: kvpress on the pocket model's language model, in the way of kvpress's own pipeline.

The picture is the context: it is read under the press, which then shortens the cache of every layer. The question is
read after that, on the shortened cache; the answer is decoded greedily.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from channel import serve
from meter import spans


class Kvpress:
    def start(self, folder: str, weights: str, budget: Any = None) -> dict[str, str]:
        import kvpress
        import transformers
        from safetensors import safe_open
        from transformers import AutoModelForCausalLM

        self.kvpress = kvpress
        self.entries = json.loads((Path(folder) / "questions.json").read_text())
        self.tensors = safe_open(str(Path(folder) / "embeddings.safetensors"), "pt")
        self.model = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "language_model", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _press(self, method: str, budget: dict[str, float]) -> Any:
        """``none``, or a press's class with settings: ``SnapKVPress(window_size=16)``; the ratio is the budget's."""
        if method == "none":
            return nullcontext()
        name, _, rest = method.rstrip(")").partition("(")
        settings = dict(item.split("=") for item in rest.split(",") if item)
        ratio = 1 - budget["context_share"]
        return getattr(self.kvpress, name)(compression_ratio=ratio, **{k: int(v) for k, v in settings.items()})(
            self.model
        )

    def _read(self, method: str, index: int, budget: dict[str, float]) -> tuple[Any, torch.Tensor, int]:
        from transformers import DynamicCache

        embeddings = self.tensors.get_tensor(str(index))[None]
        end, length = self.entries[index]["picture_ends"], embeddings.shape[1]
        cache = DynamicCache()
        with self._press(method, budget):
            self.model.model(inputs_embeds=embeddings[:, :end], past_key_values=cache)
        out = self.model(
            inputs_embeds=embeddings[:, end:], past_key_values=cache, logits_to_keep=1,
            position_ids=torch.arange(end, length)[None],
        )  # fmt: skip
        return cache, out.logits[:, -1].argmax(-1, keepdim=True), length

    def _decode(self, cache: Any, token: torch.Tensor, position: int, steps: int) -> list[int]:
        ids = [int(token)]
        for step in range(steps):
            out = self.model(
                input_ids=token, past_key_values=cache, logits_to_keep=1,
                position_ids=torch.tensor([[position + step]]),
            )  # fmt: skip
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(token))
        return ids

    @torch.inference_mode()
    def answer(self, method: str, indexes: list[int], budget: dict[str, float], steps: int = 0) -> dict[str, Any]:
        if len(indexes) > 1 or steps:
            return self._batch(method, indexes, budget, steps)
        cache, token, length = self._read(method, indexes[0], budget)
        kept = [layer.keys.shape[2] for layer in cache.layers]
        return {"ids": [self._decode(cache, token, length, 1)], "kv_tokens": sum(kept) / len(kept)}

    def _batch(self, method: str, indexes: list[int], budget: dict[str, float], steps: int) -> dict[str, Any]:
        """Prompts of several lengths in one left-padded ``generate``, picture and question in one piece."""
        length = {"max_new_tokens": steps, "min_new_tokens": steps} if steps else {"max_new_tokens": 2}
        rows = [self.tensors.get_tensor(str(i)) for i in indexes]
        width = max(map(len, rows))
        padded = torch.stack([torch.nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with self._press(method, budget):
            out = self.model.generate(inputs_embeds=padded, attention_mask=mask, do_sample=False, **length)
        return {"ids": out.tolist(), "kv_tokens": None}

    @torch.inference_mode()
    def time(self, method: str, index: int, steps: int, budget: dict[str, float]) -> dict[str, Any]:
        with spans(self.model, self.model.model) as found:
            cache, token, length = self._read(method, index, budget)
            self._decode(cache, token, length, steps)
        return {"prefill_ms": found[0] + found[1], "decode_ms": found[2:]}


if __name__ == "__main__":
    worker = Kvpress()
    serve({"start": worker.start, "answer": worker.answer, "time": worker.time})
