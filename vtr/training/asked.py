"""Questions asked once under every choice of an :class:`vtr.AutoPolicy`: what choosers are fitted and measured on.

All choices of a question are tried in one ``generate``: its picture is encoded once, and each choice says its whole
answer. Thresholds are searched on the record, without the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vtr.accounting import report as last_report
from vtr.auto_policy import why_not_gauged
from vtr.base import Began, Policy
from vtr.chat import decode, encode
from vtr.data.records import Sample
from vtr.engine.install import patch_of

TRIED = ("ids", "sure", "there", "states", "stayed")
"""What is kept of every choice but the last."""
Score = Callable[[str, Sample], float]
"""How right a reply is, 0 … 1."""


@dataclass(eq=False)
class Asked:
    """n questions under c choices, the last of which is what the others are held against.

    Attributes:
        choices: spec strings, cheapest first. score: float64 [n, c], how right each answer is, 0 … 1.
        tokens: int64 [n, c], vision tokens that entered the text model.
        ids, sure, there: [n, c - 1, t], what each choice but the last said, see :class:`vtr.base.Began`.
        states: float16 [n, c - 1, hidden_size]. group: which picture. kind: what sort of question.
        said: [n, c], the answers.
        stayed: float32 [n, c - 1], see :class:`vtr.base.Began`; None unless it says something of every choice.
    """

    choices: list[str]
    score: np.ndarray
    tokens: np.ndarray
    ids: np.ndarray
    sure: np.ndarray
    there: np.ndarray
    states: np.ndarray
    group: np.ndarray
    kind: np.ndarray
    said: np.ndarray
    stayed: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.score)

    def part(self, rows: Any) -> Asked:
        """Some of the questions: a slice, or indices."""
        return replace(self, **{name: a[rows] for name, a in self._arrays().items()})

    def of(self, steps: Sequence[int]) -> Asked:
        """Some of the choices, by their place; the last one among them."""
        chosen, tried = list(steps), list(steps)[:-1]
        some = {name: getattr(self, name)[:, chosen] for name in ("score", "tokens", "said")}
        some |= {name: a[:, tried] for name, a in self._arrays().items() if name in TRIED}
        return replace(self, choices=[self.choices[step] for step in chosen], **some)

    def began(self, step: int) -> list[Began]:
        """What every question's answer begins with under the choices up to ``step``, as a policy is told."""
        whole = [torch.from_numpy(a) for a in (self.ids, self.sure, self.there)]
        states = torch.from_numpy(self.states).float()
        ids, sure, there = whole
        stayed = None if self.stayed is None else torch.from_numpy(self.stayed)
        return [
            Began(ids[:, i], sure[:, i], there[:, i], states[:, i], None if stayed is None else stayed[:, i])
            for i in range(step + 1)
        ]

    def _arrays(self) -> dict[str, np.ndarray]:
        """All that is said of questions, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "choices"}
        return {name: a for name, a in found.items() if a is not None}

    def save(self, path: Path) -> None:
        """Write it (``.npz``), so that nothing need be asked again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"choices": np.asarray(self.choices), **self._arrays()}
        np.savez_compressed(path, allow_pickle=False, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path) -> Asked:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            made = {f.name: found[f.name] for f in fields(Asked) if f.name != "stayed" or f.name in found}
        return Asked(**{**made, "choices": made["choices"].tolist()})


class Everything(Policy):
    """Tries every choice, and keeps what each begins to say; the last one answers."""

    def __init__(self, choices: Sequence[Policy | None], tokens: int, gauges: bool) -> None:
        self.choices, self.most, self.began, self.gauged = list(choices), tokens, list[Began](), gauges

    def options(self) -> Sequence[Policy | None]:
        return self.choices

    @property
    def hears(self) -> int:
        return self.most

    @property
    def gauges(self) -> bool:
        return self.gauged

    def accept(self, step: int, began: Sequence[Began]) -> torch.Tensor:
        self.began = list(began)
        return torch.zeros(len(began[-1].ids), dtype=torch.bool, device=began[-1].ids.device)


@torch.inference_mode()
def ask(
    model: Any, processor: Any, samples: Iterable[Sample], choices: Sequence[tuple[str, Policy | None]], score: Score,
    *, max_new_tokens: int = 32, batch_size: int = 8, total: int | None = None, shown: str = "questions",
) -> Asked:  # fmt: skip
    """Ask every question under every choice, greedily. ``model`` is patched.

    Args:
        choices: (name, policy), the last of which is what the others are held against.

    Raises:
        ValueError: no samples, or fewer than two choices.
    """
    if len(choices) < 2:
        raise ValueError("there is nothing to choose from: name two choices or more")
    policies = [policy for _, policy in choices]
    parts = []
    with tqdm(total=total, desc=shown, unit="", disable=total is None) as bar:
        for rows in _batches(samples, batch_size):
            parts.append(_ask(model, processor, rows, policies, score, max_new_tokens))
            bar.update(len(rows))
    if not parts:
        raise ValueError("no questions: give some")
    width = max(part["ids"].shape[2] for part in parts)
    for part in parts:
        for name, fill in (("ids", 0), ("sure", 1.0), ("there", False)):
            missing = ((0, 0), (0, 0), (0, width - part[name].shape[2]))
            part[name] = np.pad(part[name], missing, constant_values=fill)
    return Asked([name for name, _ in choices], **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    stream = iter(samples)
    while rows := list(islice(stream, size)):
        yield rows


def _ask(
    model: Any, processor: Any, rows: list[Sample], policies: Sequence[Policy | None], score: Score, longest: int
) -> dict[str, Any]:
    depth = patch_of(model).decoder.depth
    gauges = not any(why_not_gauged(one, depth) for one in policies[:-1])
    chooser = Everything(policies, longest, gauges)
    inputs = encode(processor, [row.asked for row in rows], [row.picture() for row in rows]).to(model.device)
    out = model.generate(**inputs, policy=chooser, do_sample=False, max_new_tokens=longest)
    report = last_report(model)
    texts = [_texts(processor, one) for one in chooser.began] + [decode(processor, out, inputs["input_ids"].shape[1])]
    width = max(one.ids.shape[1] for one in chooser.began)

    def stacked(name: str, fill: Any) -> np.ndarray:
        parts = [getattr(one, name).cpu() for one in chooser.began]
        padded = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in parts]
        return torch.stack(padded, 1).numpy()

    said = list(zip(*texts, strict=True))
    found = {"stayed": torch.stack([one.stayed for one in chooser.began], 1).cpu().numpy()} if gauges else {}  # type: ignore[misc]
    return found | {
        "score": np.array([[score(text, row) for text in line] for line, row in zip(said, rows, strict=True)]),
        "tokens": np.array([[n for _, n in row.tries] + [row.vision_tokens[0]] for row in report.rows]),
        "ids": stacked("ids", 0), "sure": stacked("sure", 1.0), "there": stacked("there", False),
        "states": torch.stack([one.states for one in chooser.began], 1).half().cpu().numpy(),
        "group": np.array([row.group for row in rows]), "kind": np.array([row.kind for row in rows]),
        "said": np.array(said),
    }  # fmt: skip


def _texts(processor: Any, began: Began) -> list[str]:
    """What the tokens of each row say."""
    return [
        decode(processor, ids[there][None], 0)[0] for ids, there in zip(began.ids.cpu(), began.there.cpu(), strict=True)
    ]
