"""Tiny models under every policy on the device: beside float32 on the CPU, rows alone, and decoding without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vtr.eval.gpu.kernels import relative
from vtr.eval.gpu.policies import tiny_policies
from vtr.eval.gpu.record import Record, Setup
from vtr.eval.gpu.waits import watched

import vtr
from vtr.base import CHOOSING
from vtr.testing import tiny
from vtr.testing.tiny import IMAGE

ROWS = [["ab", IMAGE, "what"], ["a", IMAGE, "bc", IMAGE, "whichone"], ["abcdef"], ["abcd", IMAGE, "efg"]]
LAYERS, WIDTH, TOKENS = 5, 16, 6
"""Decoder layers; how wide a head is, so that kernels take it; tokens of an answer."""
FAMILIES = ("llava", "llava_next", "internvl")
CLOSE, CLOSE_HALF = 2e-3, 5e-2
"""How far logits may be off: in float32 by value, in bfloat16 as a share of their norm."""

Inputs = dict[str, torch.Tensor]
Kept = list[list[list[tuple[int, ...]]]]


@dataclass
class Said:
    """What a model said of a batch.

    Attributes:
        logits: [rows, slots, vocab] in float32 on the CPU, or None. kept: by row and layer the slots that each vision
            token was made from, padding not counted.
        tokens: of the answers.
    """

    logits: Any
    kept: Kept
    tokens: list[list[int]]


@torch.no_grad()
def measure(setup: Setup, record: Record, found: dict[str, Any]) -> None:
    """Fill ``found``: family → policy → what agrees. What does not is a fault of the run."""
    with no_tf32():
        for family in FAMILIES[:1] if setup.small else FAMILIES:
            models = Models.of(family, setup.device)
            cases: dict[str, Sequence[Any]] = {
                name: [policy, policy, policy, None] for name, policy in tiny_policies(models.hidden_size).items()
            }
            own = tiny_policies(models.hidden_size)
            cases["a mix"] = [own[name] for name in ("gsearch", "dynamic-llava", "pyramid", "fastv")]
            cases["another mix"] = [own[name] for name in ("pmod", "m3", "random", "uniform")]
            for name, policies in cases.items():
                found.setdefault(family, {})[name] = one = models.compare(policies)
                for what in one.get("faults", ()):
                    record.fault(f"{family}, {name}: {what}")


@contextmanager
def no_tf32() -> Iterator[None]:
    """Products and convolutions of float32 in float32."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@dataclass
class Models:
    """The same tiny model three times, patched: float32 on the CPU, float32 and bfloat16 on the device."""

    cpu: Any
    device: Any
    half: Any
    inputs: Inputs

    @classmethod
    def of(cls, family: str, device: torch.device) -> Models:
        models = [vtr.patch(getattr(tiny, family)(layers=LAYERS, head_dim=WIDTH)) for _ in range(3)]
        inputs = tiny.batch(models[0], ROWS)
        return cls(models[0], models[1].to(device), models[2].to(device, torch.bfloat16), inputs)

    @property
    def hidden_size(self) -> int:
        return int(self.cpu.get_decoder().config.hidden_size)

    def compare(self, policies: Sequence[Any]) -> dict[str, Any]:
        """Everything about one batch of four rows with these policies; ``faults`` says what does not agree."""
        here, faults = moved(self.inputs, self.device), list[str]()
        out: dict[str, Any] = {"faults": faults}
        try:
            want = says(self.cpu, self.inputs, policies)
        except vtr.UnsupportedError as error:
            return {"unsupported": str(error)}
        got, plain = says(self.device, here, policies), spoken(self.device, here, policies, use_cache=False)
        out["kept as on the CPU"] = got.kept == want.kept
        out["says what the CPU says"] = got.tokens == want.tokens
        out["says the same without a cache"] = plain == want.tokens
        if got.logits is not None and want.logits is not None:
            alone = [self.alone(self.device, b, policies) for b in range(len(ROWS))]
            out["logits off by"] = apart(got.logits, want.logits)
            out["rows kept as alone"] = got.kept == [one.kept[0] for one in alone]
            out["rows off by"] = max(apart(self.real(got, b), one.logits[0]) for b, one in enumerate(alone))
            out |= self.in_half(policies, want, faults)
        faults += [what for what, value in out.items() if value is False]
        faults += [
            f"{what} {out[what]:.1e}" for what in ("logits off by", "rows off by") if not out.get(what, 0.0) <= CLOSE
        ]
        if self.device.device.type == "cuda":
            for name, model in (("float32", self.device), ("bf16", self.half)):
                with watched(model) as waits:
                    spoken(model, moved(self.inputs, model), policies)
                out[f"waits, {name}"] = waits.facts()
                faults += [f"{name} waits at {line}" for line in sorted({*waits.inside, *waits.decoding})]
        return out

    def in_half(self, policies: Sequence[Any], want: Said, faults: list[str]) -> dict[str, Any]:
        """In bfloat16 scores that are near each other may change places: rows are compared that keep the same."""
        here = moved(self.inputs, self.half)
        got, plain = says(self.half, here, policies), spoken(self.half, here, policies, use_cache=False)
        alone = [self.alone(self.half, b, policies) for b in range(len(ROWS))]
        as_cpu = [b for b in range(len(ROWS)) if got.kept[b] == want.kept[b]]
        as_alone = [b for b in range(len(ROWS)) if got.kept[b] == alone[b].kept[0]]
        out = {
            "bf16 rows kept as on the CPU": len(as_cpu),
            "bf16 kept in common": common(got.kept, want.kept),
            "bf16 off by": max([0.0, *(relative(self.real(got, b), self.real(want, b)) for b in as_cpu)]),
            "bf16 rows kept as alone": len(as_alone),
            "bf16 rows off by": max([0.0, *(relative(self.real(got, b), alone[b].logits[0]) for b in as_alone)]),
            "bf16 answers as without a cache": sum(a == b for a, b in zip(got.tokens, plain, strict=True)),
        }
        faults += [
            f"{what} {out[what]:.1e}" for what in ("bf16 off by", "bf16 rows off by") if not out[what] <= CLOSE_HALF
        ]
        return out

    def alone(self, model: Any, b: int, policies: Sequence[Any]) -> Said:
        """Row ``b`` by itself."""
        return says(model, moved(tiny.single(self.inputs, b, self.cpu), model), [policies[b]], tokens=False)

    def real(self, said: Said, b: int) -> torch.Tensor:
        """[n, vocab]: row ``b`` of a batch's logits without its padding."""
        out: torch.Tensor = said.logits[b, self.inputs["attention_mask"][b].bool()]
        return out


def says(model: Any, inputs: Inputs, policies: Sequence[Any], tokens: bool = True) -> Said:
    """Of a forward and, with ``tokens``, an answer; of an answer alone where a policy chooses around ``generate``."""
    if any(policy is not None and policy.asks(question) for policy in policies for question in CHOOSING):
        said = spoken(model, inputs, policies)
        return Said(None, kept_slots(model, inputs), said)
    out = model(**inputs, policy=list(policies), use_cache=True)
    kept = kept_slots(model, inputs)
    return Said(out.logits.float().cpu(), kept, spoken(model, inputs, policies) if tokens else [])


def kept_slots(model: Any, inputs: Inputs) -> Kept:
    """What the last call kept, and of what merged tokens were made; slots are counted from the row's first token.

    At the end of each row (asks, is seen): how many tokens took part in each layer's attention.
    """
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    rows = zip(vtr.report(model).rows, padding, strict=True)
    return [
        [
            *([tuple(slot - pad for slot in made) for made in row.sources(layer)] for layer in range(LAYERS)),
            list(zip(row.asked, row.seen, strict=True)),
        ]
        for row, pad in rows
    ]


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference."""
    return float((ours - theirs).abs().max())


def spoken(model: Any, inputs: Inputs, policies: Sequence[Any], **kwargs: Any) -> list[list[int]]:
    """The answers' tokens."""
    out = tiny.generate(model, inputs, policy=list(policies), max_new_tokens=TOKENS, **kwargs)
    return out[:, -TOKENS:].tolist()


def moved(inputs: Inputs, model: Any) -> Inputs:
    """On the model's device, pixels in its dtype."""
    return {
        n: t.to(model.device, model.dtype) if t.is_floating_point() else t.to(model.device) for n, t in inputs.items()
    }


def common(ours: Kept, theirs: Kept) -> float:
    """The share of kept tokens that both have, over all rows and layers."""
    pairs = [(set(a), set(b)) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x[:-1], y[:-1], strict=True)]
    either = sum(len(a | b) for a, b in pairs)
    return sum(len(a & b) for a, b in pairs) / either if either else 1.0
