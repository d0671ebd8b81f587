"""Turns a training checkpoint into what the package ships: `python -m vtr.pocket.release CHECKPOINT --out DIR`.

Writes DIR/weights (half precision, tokenizer, processor) and DIR/samples (three held-out pictures with a question
each that these weights answer right).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SAMPLE_TYPES = ("color", "word", "count")
SAMPLE_SEED = 77


def export(model: Any, folder: Path, processor: Any = None, longest: int = 96, base: Path | None = None) -> None:
    """Model, tokenizer and processor in the layout from_pretrained reads; the model's numbers become fp16.

    processor: None is LLaVA-NeXT's. longest: answer, in tokens (96: listings; short ones end by themselves). base: the
    checkpoint that this model was trained on from, of which it is kept as changes (``vtr.pocket.changes``).
    """
    import torch

    from . import changes
    from .processing import make_processor

    folder.mkdir(parents=True, exist_ok=True)
    small = model.to(torch.float16)
    small.generation_config.max_new_tokens = longest
    small.generation_config.do_sample = False
    small.save_pretrained(folder)
    (processor or make_processor()).save_pretrained(folder)
    if base is not None:
        changes.leave_only(folder, base)
    for path in folder.iterdir():
        path.chmod(0o644)


def write_samples(weights: Path, folder: Path) -> None:
    """One picture per type of SAMPLE_TYPES: the first held-out ones that the model answers right."""
    from . import load, samples
    from .evaluate import answers

    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load(folder=weights)
    entries: list[dict[str, str]] = []
    for row in samples(400, "test", SAMPLE_SEED, per_scene=1):
        fresh = len(entries) < len(SAMPLE_TYPES) and row["type"] == SAMPLE_TYPES[len(entries)]
        plain = row["image"].width == row["image"].height and row["answer"] != "zero"
        if fresh and plain and answers(model, processor, [row["image"]], [row["question"]])[0] == row["answer"]:
            name = f"sample-{len(entries) + 1}.png"
            row["image"].save(folder / name)
            entries.append({"file": name, "question": row["question"], "answer": row["answer"], "type": row["type"]})
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n")


def main() -> None:
    import torch

    from .model import build

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = build()
    model.load_state_dict(torch.load(args.checkpoint, weights_only=True)["model"])
    export(model, args.out / "weights")
    write_samples(args.out / "weights", args.out / "samples")


if __name__ == "__main__":
    main()
