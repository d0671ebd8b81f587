"""What ``vtr run`` does: one picture, one question, one or several policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vtr
from vtr.accounting import Report
from vtr.chat import encode
from vtr.data.pictures import upright
from vtr.engine.adapters import find_adapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Asked:
    """A patched model, its processor and one question about one picture, tokenized."""

    model: Any
    processor: Any
    picture: Image.Image
    question: str
    answer: str | None
    inputs: Any


@dataclass
class Outcome:
    """One policy's run."""

    spec: str
    answer: str
    report: Report
    timing: Any


def load(name: str | None, device: str, dtype: str | None = None) -> tuple[Any, Any]:
    """A pocket model, or any checkpoint transformers can load, patched and in evaluation mode.

    Args:
        name: a folder or hub name, or one of ``vtr.pocket.NAMES``; None is "pocket". device: "auto" is cuda where there
            is one.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and for pocket models, else the
            checkpoint's own.

    Raises:
        ValueError: a checkpoint that is not there, cut short, or of no image-text model; an unknown dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = None if dtype is None else getattr(torch, dtype)
    if name is None or name in vtr.pocket.NAMES:
        model, processor = vtr.pocket.load(vtr.pocket.NAMES[name or "pocket"], wanted)
    else:
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            chosen = wanted or (torch.float32 if device == "cpu" else "auto")
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen).eval()
            processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(
                f"cannot load {name}: {reason} — it must be a complete checkpoint of an image-text model with its "
                "processor (a family that `vtr list` shows); if a file was cut short, fetch it again"
            ) from error
    return vtr.patch(model.to(device)), processor


def prepare(image: Path | None, question: str | None, sample: int | None, name: str | None, device: str) -> Asked:
    """Load the model and tokenize the question.

    Raises:
        ValueError: neither a picture with a question nor a sample; not a picture.
    """
    if (image is None) == (sample is None):
        raise ValueError('give a picture and a question (vtr run cat.png "what …"), or --sample 0')
    answer = None
    if sample is not None:
        picture, asked, answer = vtr.pocket.sample(sample)
        question, answer = (asked, answer) if question is None else (question, None)
    else:
        picture = upright(image)  # type: ignore[arg-type]
    if not question:
        raise ValueError(f'ask something: vtr run {image} "what color is the star"')
    model, processor = load(name, device)
    return Asked(model, processor, picture, question, answer, tokenize(processor, picture, question, model.device))


def tokenize(processor: Any, picture: Image.Image, question: str, device: Any) -> Any:
    """One picture and one question, as :func:`vtr.chat.encode` puts them, on the device."""
    return encode(processor, [question], [picture]).to(device)


def same_budget(report: Report) -> list[str]:
    """The baselines that let as many vision tokens into the same layers as the reported policy did, in the mean.

    They cut once, where the policy first cuts.
    """
    row = report.rows[0]
    first = next((n for n, count in enumerate(row.vision_tokens) if count < row.total), None)
    if first is None:
        return []
    after = row.vision_tokens[first:]
    keep = round(sum(after) / len(after))
    return [f"random:keep={keep},layer={first}", f"uniform:keep={keep},layer={first}"]


def at_budget(asked: Asked, policy: str, budget: str | None) -> str:
    """The spec of a policy set to a budget ("192" tokens of this prompt, "0.25" of them); as it is without one.

    Raises:
        ValueError: not a number, or what :func:`vtr.at_budget` refuses.
    """
    if budget is None:
        return policy
    if policy == "none":
        raise ValueError("--budget sets a policy: name one as well, e.g. --policy fastv")
    try:
        mean = float(budget) if set(budget) & set(".e") else int(budget)
    except ValueError as error:
        raise ValueError(f"--budget {budget}: give a count of tokens (192) or a share (0.25)") from error
    ids = asked.inputs["input_ids"]
    marks = torch.tensor(find_adapter(asked.model).placeholders(asked.model), device=ids.device)
    return vtr.at_budget(policy, asked.model, mean, total=int(torch.isin(ids[0], marks).sum()) or None).spec


def answer_with(asked: Asked, policy: str, max_new_tokens: int, repeats: int) -> Outcome:
    """Run one policy: answer, report, timing."""
    from vtr.eval.cost.timing import time_call

    chosen = None if policy == "none" else vtr.policy(policy)
    out = asked.model.generate(**asked.inputs, policy=chosen, max_new_tokens=max_new_tokens, do_sample=False)
    report = vtr.report(asked.model)
    text = asked.processor.decode(out[0, asked.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    timing = time_call(asked.model, asked.inputs, chosen, repeats=repeats, new_tokens=8)
    return Outcome(policy, text.strip(), report, timing)


def compare(asked: Asked, policy: str, with_baselines: bool, max_new_tokens: int, repeats: int) -> list[Outcome]:
    """No reduction first, then the policy, then (if asked for) the baselines at its budget."""
    from tqdm import tqdm

    specs = ["none"] if policy == "none" else ["none", policy] if with_baselines else [policy]
    for spec in specs:
        if spec != "none":
            vtr.policy(spec).check(len(asked.model.get_decoder().layers))
    rows: list[Outcome] = []
    with tqdm(total=len(specs) + 2 * (with_baselines and policy != "none"), desc="policies", leave=False) as bar:
        while specs:
            spec = specs.pop(0)
            bar.set_description(spec[:40])
            rows.append(answer_with(asked, spec, max_new_tokens, repeats))
            if spec == policy and with_baselines and spec != "none":
                specs = same_budget(rows[-1].report)
            bar.update()
    return rows


def draw(asked: Asked, outcome: Outcome) -> Figure:
    """The kept tokens of ``outcome`` on the picture."""
    from vtr.picture import image_spans, show_kept

    _, first_slot, layout = image_spans(asked.model, asked.inputs)[0]
    title = f"{outcome.spec}\n“{asked.question}” → {outcome.answer}"
    return show_kept(asked.picture, layout, first_slot, outcome.report.rows[0], title=title)


def save_picture(asked: Asked, outcome: Outcome, path: Path) -> None:
    """Write what :func:`draw` draws; a ``.gif`` shows it layer by layer."""
    if path.suffix.lower() != ".gif":
        draw(asked, outcome).savefig(path, dpi=150)
        return
    from vtr import visualize
    from vtr.picture import image_spans

    _, first_slot, layout = image_spans(asked.model, asked.inputs)[0]
    visualize.animate(visualize.Shot(asked.picture, layout, first_slot, outcome.report.rows[0]), path)
