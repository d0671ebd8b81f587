"""Worker: token reduction of LightCompress (LLMC+) on transformers' models, given what its own model classes give."""

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

STANDS = {"llava": "LlavaHf", "qwen2_5_vl": "Qwen2_5VL"}
"""Its classes for our two models; methods ask for a class by its name."""
IN_TOWER = ("VisionZip", "VisPruner", "ToMe", "MustDrop")
"""Methods that its settings apply to the tower."""
CACHES = (random_models.QWEN,)
"""Models that its evaluation lets cache."""
FILES = {"RandomPrune": "random"}


class LightCompress:
    def start(self, folder: str, checkout: str) -> dict[str, str]:
        import transformers

        self.folder, root = Path(folder), Path(checkout)
        self.untouched: dict[Any, Any] = {}
        if not (root / "llmc" / "compression" / "token_reduction").is_dir():
            raise FileNotFoundError(f"{checkout} is no checkout of LightCompress: llmc/compression is not there")
        for name in ("", ".utils", ".compression", ".compression.token_reduction", ".compression.sparsification"):
            made = types.ModuleType("llmc" + name)  # without what its packages import on the way
            made.__path__ = [str(root.joinpath("llmc", *name.split(".")))]
            sys.modules[made.__name__] = made
        self.registry = importlib.import_module("llmc.utils.registry_factory").TOKEN_REDUCTION_REGISTRY
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def _load(self, kind: str, size: random_models.Size) -> tuple[Any, Any]:
        """A model and its text model; VisionZip changes the model's class, which is put right first."""
        for changed, forward in self.untouched.items():
            changed.forward = forward
        model = random_models.load(self.folder, kind, size)
        self.untouched[type(model)] = type(model).forward
        return model, model.model if kind == random_models.QWEN else model.language_model.model

    def _reduce(self, kind: str, method: str, model: Any, text: Any, settings: dict[str, Any] | None) -> None:
        """method: a name in its registry. settings: its ``special`` section."""
        importlib.import_module(f"llmc.compression.token_reduction.{FILES.get(method, method.lower())}")
        stand = stand_in(kind, model, text, method in IN_TOWER)
        self.registry[method]({"special": {"method": method, **(settings or {})}}, stand, stand.blocks)

    @torch.inference_mode()
    def run(
        self, kind: str, method: str, seed: int, words: list[int], settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """method, settings: as ``_reduce`` takes them, or ``none``."""
        torch.manual_seed(seed)
        model, text = self._load(kind, random_models.SMALL)
        inputs = random_models.inputs(kind, seed)
        inputs.pop("mm_token_type_ids", None)  # younger than this transformers
        cached = {"use_cache": kind in CACHES}
        plain = Recorder(model, text).run(inputs, words, **cached)
        if method == "none":
            return said(plain, plain)
        self._reduce(kind, method, model, text, settings)
        return said(Recorder(model, text).run(inputs, words, **cached), plain)

    def prepare(self, kind: str, method: str, settings: dict[str, Any] | None = None) -> None:
        torch.manual_seed(0)
        self.kind, (self.model, text) = kind, self._load(kind, random_models.MIDDLE)
        self._reduce(kind, method, self.model, text, settings)

    @torch.inference_mode()
    def time(self, seeds: list[int], steps: int) -> dict[str, Any]:
        tower = self.model.vision_tower if self.kind == random_models.LLAVA else self.model.visual
        inputs = random_models.batch(self.kind, seeds, random_models.MIDDLE)
        inputs.pop("mm_token_type_ids", None)
        return meter.generate(self.model, tower, inputs, steps, use_cache=self.kind in CACHES)


def stand_in(kind: str, model: Any, text: Any, in_tower: bool) -> Any:
    """What its own class of this name holds, without the evaluation harness that the class is made for."""
    made = type(STANDS[kind], (), {})()
    made.vlm_model = made.mm_model = model
    made.vision_model = model.vision_tower if kind == random_models.LLAVA else model.visual
    made.vlm_model_config, made.embed_tokens, made.rotary_emb = model.config, text.embed_tokens, text.rotary_emb
    if kind == random_models.LLAVA:
        made.vision_projector, made.model = model.multi_modal_projector, model.language_model
        made.pruning_config = {
            "is_video_model": False, "image_token_start_index": 5, "image_token_length": model.config.image_seq_length,
            "select_layer": model.config.vision_feature_layer,
            "select_feature": model.config.vision_feature_select_strategy,
            "image_token_index": model.config.image_token_index, "vision_token_start_index": 35,
        }  # fmt: skip
        tower = made.vision_model.vision_model.encoder.layers
    else:
        made.vision_projector, made.model, made.language_model = model.visual.merger, model, text
        made.first_turn_question = True
        made.pruning_config = {
            "is_video_model": False, "image_token_index": model.config.image_token_id,
            "vision_end_token_id": model.config.vision_end_token_id,
            "vision_start_token_id": model.config.vision_start_token_id, "vision_token_start_index": 15,
        }  # fmt: skip
        tower = model.visual.blocks
    made.blocks = tower if in_tower else text.layers
    return made


if __name__ == "__main__":
    worker = LightCompress()
    serve({"start": worker.start, "run": worker.run, "prepare": worker.prepare, "time": worker.time,
           "give_back": meter.give_back})  # fmt: skip
