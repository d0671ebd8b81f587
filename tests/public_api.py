"""A user's typed script: every public name of vtr in use, as ``mypy --strict`` must accept it.

.ci/run checks it here. .ci/wheel checks it against the installed package, and runs it: what the types promise comes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, assert_type

import torch
from PIL.Image import Image as Picture
from transformers import DynamicCache

import vtr
from vtr.base import LayerAttention
from vtr.testing import Checked, check_policy


@vtr.register_policy("public-api-norm")
@dataclass
class Norm(vtr.ScorePolicy):
    """The patches of largest norm enter one layer; in the others nothing is asked."""

    layer: int = 1

    def score(self, tokens: vtr.Tokens) -> torch.Tensor:
        norms: torch.Tensor = tokens.hidden.float().norm(dim=-1)
        return norms


@vtr.register_policy("public-api-half")
@dataclass
class Half(vtr.Policy):
    """The same without the base class."""

    question_guided: ClassVar[bool] = False

    def prune(self, layer: int, tokens: vtr.Tokens) -> torch.Tensor | None:
        return None if layer != 1 else vtr.top(tokens.hidden.norm(dim=-1), vtr.keep_count(0.5, tokens.total))


@dataclass
class Answers(vtr.Policy):
    """Every question once, with the types that its answer may have."""

    def compress(self, image: vtr.Image) -> torch.Tensor | vtr.Pooled | None:
        if len(image) < 2:
            return None
        halves = image.features.chunk(2)
        return vtr.Pooled(torch.stack([half.mean(0) for half in halves]), [[0], [len(image) - 1]])

    def needs(self, layer: int) -> tuple[vtr.Attention | vtr.KeyNorms, ...] | None:
        return (vtr.Attention("behind", heads="each", over="sum"), vtr.KeyNorms()) if layer else None

    def prune(self, layer: int, tokens: vtr.Tokens) -> vtr.Best | vtr.Merged | None:
        if layer == 1 and len(tokens) > 1:
            return vtr.Merged(torch.arange(len(tokens) - 1), tokens.hidden[-1:], [[len(tokens) - 1]])
        return vtr.Best(tokens.hidden.norm(dim=-1), len(tokens)) if layer else None

    def route(self, layer: int, tokens: vtr.Tokens) -> vtr.Route | None:
        return vtr.Route(keep=torch.arange(len(tokens)))

    def attend(self, layer: int, tokens: vtr.Tokens, attention: LayerAttention) -> vtr.Attend | None:
        return vtr.Attend(asks=vtr.top(attention.received(tokens.text_place)[tokens.place], 9))

    def remember(self, layer: int, token: vtr.Token) -> bool:
        return bool(token.hidden.isfinite().all())


def policies() -> list[vtr.Policy]:
    """One of each, by class, by spec string, and two in a chain."""
    assert_type(Norm(keep=0.25), Norm)  # the decorator leaves the class what it is
    chained: vtr.Policy = vtr.Pool(grid=4) + Norm(layer=2)
    made: list[vtr.Policy] = [
        vtr.FastV(keep=0.25, layer=2),
        vtr.Pyramid(keeps=[0.5, 0.25]),
        vtr.GSearch(vtr.Schedule([1.0, 1.0, 0.5, 8])),
        vtr.GSearch("llava-1.5-7b"),
        vtr.Matryoshka(36),
        vtr.GlobalCom2(),
        vtr.FasterVLM(64),
        vtr.VisPruner(64, important_ratio=0.75),
        vtr.HiPrune(64, alpha=0.1, object_layer=8),
        vtr.HoloV(64, select="holistic"),
        vtr.HiRED(0.2, budget="stripes", placement="official"),
        vtr.PruneSID(64),
        vtr.EVS(0.3),
        vtr.VidCom2(0.25, frames="images"),
        vtr.DyCoke(0.3, frames=[0, 1]),
        vtr.VisionZip(64, contextual=10),
        vtr.PruMerge(),
        vtr.PruMergePlus(0.25),
        vtr.VScan(96, local_layer=5),
        vtr.ToMe(64),
        vtr.Trim(29, relevance="embeddings"),
        vtr.Pool(grid=4),
        vtr.ClsTop(),
        vtr.DivPrune(64, newline="official"),
        vtr.MMR(trade=0.5),
        vtr.Scope(features="projected"),
        vtr.MMTok(leave_out=[1, 2]),
        vtr.CDPruner(relevance="embeddings"),
        vtr.SparseVLM(64),
        vtr.SparseVLMPlus(64, heads=14),
        vtr.DART(64),
        vtr.FitPrune(0.6),
        vtr.VTW(16),
        vtr.DeFT(0.1),
        vtr.TOPS(128),
        vtr.MustDrop(192),
        vtr.AVTP(),
        vtr.Reroute(),
        vtr.OccamToken(),
        vtr.ZipVL(0.975),
        vtr.EEMLLM("all"),
        vtr.SCM(0.5),
        vtr.Random(),
        vtr.UniformGrid(keep=0.5),
        vtr.AutoScale(),
        vtr.PMoD(),
        vtr.DynamicLLaVA(),
        vtr.Chain([vtr.Pool(), Norm()]),
        vtr.ByImage("m3:9", last="none"),
        vtr.AutoPolicy(["m3:9", "none"], thresholds=0.9),
        vtr.policy("fastv:keep=0.25,layer=2"),
        vtr.policy(Norm()),
        chained,
    ]
    return made


def before_the_tower() -> list[vtr.InputPolicy]:
    """Policies that act on the picture, and a spec of both kinds taken apart."""
    before, rest = vtr.split("fewer_crops+fastv:keep=0.25")
    assert rest is not None
    _, processor = vtr.pocket.load()
    vtr.processor(processor, before)
    return [vtr.Downsample(0.5), vtr.FewerCrops(alpha=0.1), vtr.MSAC()]


def schedules() -> vtr.Schedule:
    schedule = vtr.Schedule([1.0, 0.5, 16])
    assert_type(schedule[0], int | float)
    assert_type(schedule[1:], tuple[int | float, ...])
    assert_type(schedule.counts(64), list[int])
    with tempfile.TemporaryDirectory() as folder:
        schedule.save(Path(folder) / "schedule.json")
        return vtr.Schedule.load(Path(folder) / "schedule.json")


def answers() -> list[str]:
    """A question under several policies: patched, reported, drawn, and put back."""
    model, processor = vtr.pocket.load()
    model = vtr.patch(model, "fastv:keep=0.25,layer=2")
    picture, question, answer = vtr.pocket.sample(0)
    assert_type(picture, Picture)
    inputs = vtr.chat.encode(processor, [question, question], [picture, picture])
    norm = vtr.at_budget(Norm(), model, mean=16, total=144)
    with vtr.use(model, [norm, None]) as patched, vtr.shared_features(patched):
        out = patched.generate(**inputs, max_new_tokens=3)
    cache = DynamicCache()
    assert_type(vtr.fork(cache, 2), DynamicCache)
    said = vtr.chat.decode(processor, out, inputs["input_ids"].shape[1])
    assert_type(said, list[str])
    report: vtr.Report = vtr.report(model)
    assert_type(report.flops, int)
    assert_type(report.rows[0].vision_tokens, list[int])
    shots = vtr.visualize.ask(model, processor, picture, question, ["fastv:keep=0.1", None], max_new_tokens=2)
    vtr.visualize.staircase(shots)
    print(vtr.describe(model))
    vtr.display(report, norm)
    vtr.unpatch(model)
    return [*said, answer]


def patched_modules(module: torch.nn.Linear) -> None:
    """What is patched keeps its type."""
    assert_type(vtr.patch(module), torch.nn.Linear)
    assert_type(vtr.unpatch(module), torch.nn.Linear)
    with vtr.use(module, None) as same:
        assert_type(same, torch.nn.Linear)


def checked() -> Checked:
    return check_policy(Norm(), families=("llava",))


def searched(model: torch.nn.Module, processor: object, data: list[tuple[Picture, str, str]]) -> vtr.Policy:
    sides = vtr.search.split(data, calibration=8)
    found = vtr.search.gsearch(model, processor, sides.calibration, tolerance=0.02, progress=False)
    assert_type(found.policy(), vtr.GSearch)
    return found.policy()


def refused() -> str:
    try:
        vtr.patch(torch.nn.Linear(1, 1))
    except (vtr.UnsupportedError, TypeError) as error:
        return str(error)
    raise AssertionError("a Linear is no model of a known family")


if __name__ == "__main__":
    assert {"public-api-norm", "fastv"} <= set(vtr.list_policies())
    print(len(policies()), list(schedules()), answers(), checked(), refused(), sep="\n")
