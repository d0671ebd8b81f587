"""Worker: AngelSlim's wrapped models, set up by the YAML files of its checkout."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import meter
import random_models
import torch
from channel import serve
from forced import Recorder, said

PACKAGE = "angelslim.compressor.token_compressor"
MENDED = ("model.vision_tower.vision_model.encoder", "model.vision_tower.encoder")
"""Its LLaVA files name the first; transformers has the second since it dropped a level there."""


class AngelSlim:
    def start(self, folder: str, checkout: str) -> dict[str, str]:
        import transformers

        self.folder, self.checkout = Path(folder), Path(checkout)
        parts = PACKAGE.split(".")
        if not self.checkout.joinpath(*parts).is_dir():
            raise FileNotFoundError(f"{checkout} is no checkout of AngelSlim: {'/'.join(parts)} is not there")
        for n in range(1, len(parts) + 1):  # without what its packages import on the way
            made = types.ModuleType(".".join(parts[:n]))
            made.__path__ = [str(self.checkout.joinpath(*parts[:n]))]
            sys.modules[made.__name__] = made
        self.adapter = importlib.import_module(f"{PACKAGE}.adapter").UniversalPruningAdapter
        self.settings = importlib.import_module(f"{PACKAGE}.base.config").TokenCompressorConfig
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _wrap(self, model: Any, kind: str, method: str) -> tuple[Any, str]:
        """``model`` as it wraps it, and what had to be mended for that. method: a file's name without its end."""
        import yaml

        path, mended = self.checkout / "configs" / kind / "pruning" / f"{method}.yaml", ""
        mapping = yaml.safe_load(path.read_text())["model_mapping"]
        if not hasattr(getattr(model.model, "vision_tower", None), "vision_model"):
            for entry in mapping:
                if MENDED[0] in entry["path"]:
                    entry["path"], mended = entry["path"].replace(*MENDED), "path of the tower"
        return self.adapter(model, self.settings.from_yaml(str(path)), mapping).wrap_model(), mended

    @torch.inference_mode()
    def run(self, kind: str, method: str, seed: int, words: list[int]) -> dict[str, Any]:
        """method: a file's name without its end, or ``none``."""
        torch.manual_seed(seed)
        model, inputs = random_models.load(self.folder, kind), random_models.inputs(kind, seed)
        plain = Recorder(model, model.model.language_model).run(inputs, words)
        if method == "none":
            return said(plain, plain)
        wrapped, mended = self._wrap(model, kind, method)
        return said(Recorder(wrapped, wrapped.model.language_model).run(inputs, words), plain) | {"mended": mended}

    def prepare(self, kind: str, method: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model, _ = self._wrap(random_models.load(self.folder, kind, random_models.MIDDLE), kind, method)

    @torch.inference_mode()
    def time(self, seeds: list[int], steps: int) -> dict[str, Any]:
        inputs = random_models.batch(self.kind, seeds, random_models.MIDDLE)
        return meter.generate(self.model, random_models.tower(self.model, self.kind), inputs, steps)


if __name__ == "__main__":
    worker = AngelSlim()
    serve({"start": worker.start, "run": worker.run, "prepare": worker.prepare, "time": worker.time,
           "give_back": meter.give_back})  # fmt: skip
