"""Local lmms-eval tasks on pocket pictures, and what plain ``generate`` answers to the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import vtr
from vtr.commands.run import tokenize
from vtr.pocket.scenes import COLOR_NAMES

GENERATE = """\
task: pocket_vqa
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  until: ["\\n\\n"]
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """\
task: pocket_choice
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: color
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
doc_to_choice: {choices}
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = '''\
"""What the task files point to."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"])}
'''


def questions(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Held-out questions about pocket pictures."""
    return list(vtr.pocket.samples(n, split="test", seed=seed))


def write(folder: Path, n: int, seed: int = 0) -> None:
    """Tasks ``pocket_vqa`` (all questions) and ``pocket_choice`` (the questions about colors) into ``folder``."""
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    rows = questions(n, seed)
    columns = ("image", "question", "answer")
    splits = {"test": rows, "color": [r for r in rows if r["type"] == "color"]}
    made = {
        name: Dataset.from_list([{c: r[c] for c in columns} for r in part]).cast_column("image", ImageFeature())
        for name, part in splits.items()
    }
    DatasetDict(made).save_to_disk(str(folder / "data"))
    choices = [str(name) for name in COLOR_NAMES]
    (folder / "pocket_vqa.yaml").write_text(GENERATE.format(data=folder / "data"))
    (folder / "pocket_choice.yaml").write_text(CHOICE.format(data=folder / "data", choices=choices))
    (folder / "utils.py").write_text(UTILS)


def direct_answers(rows: list[dict[str, Any]], policy: str | None) -> list[str]:
    """One question at a time, by ``generate`` alone."""
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    said = []
    for row in rows:
        inputs = tokenize(processor, row["image"], row["question"], "cpu")
        with torch.inference_mode():
            out = model.generate(**inputs, policy=policy, max_new_tokens=4, do_sample=False)
        said.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


def vtr_eval(folder: Path, policy: str, n: int, seed: int = 0) -> tuple[float, list[str]]:
    """Score and answers of ``vtr eval`` on the same questions."""
    from vtr.eval.accuracy.journal import Journal
    from vtr.eval.accuracy.run import Settings, evaluate

    body = evaluate(Settings(policies=(policy,), limit=n, seed=seed, max_new_tokens=4), folder, processes=1)
    assert body is not None
    row = next(row for row in body["policies"] if row["name"] == policy.split(":")[0])
    journal = Journal(folder)
    journal.read()
    said = [journal.rows[index]["policies"][row["policy"]]["said"] for index in range(n)]
    return row["accuracy"], said
