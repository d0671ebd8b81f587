"""Accuracy of the pocket model by question type: `python -m vtr.pocket.evaluate [--n 640] [--blind]`.

Plain transformers: left-padded batches, greedy generation, the whole generated text must equal the answer.
`--blind` also asks every question about an even gray picture.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtr.chat import decode, encode

from . import WEIGHTS, load, samples
from .scenes import TYPES


def answers(model: Any, processor: Any, images: list[Any], questions: list[str], longest: int = 2) -> list[str]:
    """What the model says to a batch of questions, in so many tokens at most."""
    import torch

    inputs = encode(processor, questions, images).to(model.device)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    return decode(processor, out, inputs["input_ids"].shape[1])


def accuracy(
    model: Any, processor: Any, rows: list[dict[str, Any]], blind: bool = False, batch: int = 8, name: str = "full",
    longest: int = 2,
) -> dict[str, float]:  # fmt: skip
    """Share of right answers, over all rows and by type; ``longest`` as in :func:`answers`."""
    from PIL import Image

    hits: dict[str, list[bool]] = defaultdict(list)
    for start in tqdm(range(0, len(rows), batch), desc=name):
        part = rows[start : start + batch]
        images = [Image.new("RGB", r["image"].size, (128, 128, 128)) if blind else r["image"] for r in part]
        said = answers(model, processor, images, [r["question"] for r in part], longest)
        for row, text in zip(part, said, strict=True):
            hits[row["type"]].append(text == row["answer"])
    every = [h for list_ in hits.values() for h in list_]
    order = [*(t for t in TYPES if t in hits), *sorted(set(hits) - set(TYPES))]
    return {"all": sum(every) / len(every), **{t: sum(hits[t]) / len(hits[t]) for t in order}}


def table(results: dict[str, dict[str, float]]) -> str:
    """Results as a Markdown table."""
    columns = ["all", *TYPES]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3f}" if c in row else "-" for c in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=640, help="questions")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="also ask about an even gray picture")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another folder with a model of this kind")
    args = parser.parse_args()
    model, processor = load(folder=args.weights)
    rows = list(samples(args.n, args.split, args.seed))
    results = {"full": accuracy(model, processor, rows)}
    if args.blind:
        results["blind"] = accuracy(model, processor, rows, blind=True, name="blind")
    print(table(results))
    print("questions: " + ", ".join(f"{t} {sum(r['type'] == t for r in rows)}" for t in TYPES))


if __name__ == "__main__":
    main()
