"""Worker: vtr on the pocket model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from channel import serve
from meter import spans
from vtr.eval.accuracy import blind  # noqa: F401  (registers the question-blind selector)
from vtr.eval.studies.budgets import tokenize

import vtr
from vtr.data.pictures import upright


class Ours:
    """The pocket model, patched."""

    def start(self, folder: str, weights: str, budget: Any = None) -> dict[str, str]:
        import transformers

        self.folder = Path(folder)
        self.entries = json.loads((self.folder / "questions.json").read_text())
        self.model, self.processor = vtr.pocket.load(folder=Path(weights))
        vtr.patch(self.model)
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _inputs(self, indexes: list[int]) -> Any:
        picked = [self.entries[i] for i in indexes]
        rows = [{"image": upright(self.folder / e["picture"]), "question": e["question"]} for e in picked]
        return tokenize(self.processor, rows)

    @torch.inference_mode()
    def answer(self, method: str, indexes: list[int], steps: int = 0, budget: Any = None) -> dict[str, Any]:
        """Token ids after each prompt (exactly ``steps``, if given); cached tokens of row 0's, mean over layers."""
        inputs = self._inputs(indexes)
        policy = None if method == "none" else method
        length = {"max_new_tokens": steps, "min_new_tokens": steps} if steps else {"max_new_tokens": 2}
        out = self.model.generate(**inputs, policy=policy, do_sample=False, **length)
        row = vtr.report(self.model).rows[0]
        left = int(inputs["attention_mask"][0].sum()) - row.total + sum(row.vision_tokens) / len(row.vision_tokens)
        return {"ids": out[:, inputs["input_ids"].shape[1] :].tolist(), "kv_tokens": left}

    @torch.inference_mode()
    def time(self, method: str, index: int, steps: int, budget: Any = None) -> dict[str, Any]:
        inputs = self._inputs([index])
        policy = None if method == "none" else method
        with spans(self.model, self.model.get_decoder()) as found:
            self.model.generate(
                **inputs, policy=policy, max_new_tokens=1 + steps, min_new_tokens=1 + steps, do_sample=False
            )
        return {"prefill_ms": found[0], "decode_ms": found[1:]}


if __name__ == "__main__":
    worker = Ours()
    serve({"start": worker.start, "answer": worker.answer, "time": worker.time})
