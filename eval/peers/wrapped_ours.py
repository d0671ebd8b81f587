"""Worker: vtr on the random models of ``random_models``, for what a reduction costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import meter
import random_models
import torch
from channel import serve

import vtr


class Ours:
    def start(self, folder: str) -> dict[str, str]:
        import transformers

        self.folder, self.models = Path(folder), {}  # type: tuple[Path, dict[str, Any]]
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def prepare(self, kind: str, method: str) -> None:
        """method: a spec, or ``none``."""
        if kind not in self.models:
            self.models[kind] = vtr.patch(random_models.load(self.folder, kind, random_models.MIDDLE))
        self.kind, self.policy = kind, None if method == "none" else method

    @torch.inference_mode()
    def time(self, seeds: list[int], steps: int) -> dict[str, Any]:
        model = self.models[self.kind]
        inputs = random_models.batch(self.kind, seeds, random_models.MIDDLE)
        return meter.generate(model, random_models.tower(model, self.kind), inputs, steps, policy=self.policy)


if __name__ == "__main__":
    worker = Ours()
    serve({"start": worker.start, "prepare": worker.prepare, "time": worker.time, "give_back": meter.give_back})
