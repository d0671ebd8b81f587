"""The embedded model answers, and the command line shows what a newcomer expects to see."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import vtr
from tests.docs.test_docs import commands_of, parse
from vtr.chat import decode, encode
from vtr.cli import app
from vtr.commands.list import ELSEWHERE
from vtr.commands.run import same_budget, tokenize
from vtr.settings import policy_class


@pytest.fixture(scope="module")
def pocket() -> Any:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


def ask(pocket: Any, i: int, policy: Any = None) -> str:
    model, processor = pocket
    picture, question, _ = vtr.pocket.sample(i)
    inputs = tokenize(processor, picture, question, "cpu")
    out = model.generate(**inputs, policy=policy, max_new_tokens=3, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("i", [0, 1, 2])
def test_shipped_pictures_are_answered(pocket: Any, i: int) -> None:
    assert ask(pocket, i) == vtr.pocket.sample(i)[2]


def test_the_same_answer_from_a_fraction_of_the_tokens(pocket: Any) -> None:
    assert ask(pocket, 0, "fastv:keep=0.25,layer=2") == vtr.pocket.sample(0)[2]
    row = vtr.report(pocket[0]).rows[0]
    assert row.vision_tokens == [744, 744] + [186] * (len(row.vision_tokens) - 2)


@pytest.mark.slow
def test_the_model_reads_and_the_questions_need_the_picture(pocket: Any) -> None:
    """A small held-out sample; the model card has the full figures."""
    model, processor = pocket
    samples, right, blind = list(vtr.pocket.samples(40, split="test", seed=11)), 0, 0
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        for seen in (True, False):
            pictures = [s["image"] if seen else s["image"].point(lambda v: 128) for s in part]
            inputs = encode(processor, [s["question"] for s in part], pictures)
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            said = decode(processor, out, inputs["input_ids"].shape[1])
            hits = sum(answer == s["answer"] for answer, s in zip(said, part, strict=True))
            right, blind = right + seen * hits, blind + (not seen) * hits
    n = len(samples)
    assert right >= 0.7 * n and blind <= 0.4 * n


def test_questions_are_seeded_and_splits_differ() -> None:
    a, b = ([(s["question"], s["answer"]) for s in vtr.pocket.samples(24, seed=5)] for _ in range(2))
    assert a == b
    train = [(s["question"], s["answer"]) for s in vtr.pocket.samples(24, split="train", seed=5)]
    assert a != train


def test_a_batch_of_pictures_of_several_shapes(pocket: Any) -> None:
    """Padding and policies per row through the processor, as people call it."""
    model, processor = pocket
    pictures = [vtr.pocket.sample(i)[0] for i in range(3)]
    pictures[1] = pictures[1].crop((0, 0, 96, 192))
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what color is the {shape}?"}]}]
        for shape in ("star", "red circle", "heart")
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, images=[[p] for p in pictures], padding=True, return_tensors="pt")
    policies = ["random:keep=0.5", None, "uniform:keep=0.1"]
    out = model.generate(**inputs, policy=policies, max_new_tokens=3, do_sample=False)
    totals = [row.total for row in vtr.report(model).rows]
    assert totals[0] == totals[2] == 744 > totals[1] > 144
    for b in range(3):
        one = processor(text=[text[b]], images=[[pictures[b]]], return_tensors="pt")
        alone = model.generate(**one, policy=policies[b], max_new_tokens=3, do_sample=False)
        new = alone[0, one["input_ids"].shape[1] :]
        assert torch.equal(new, out[b, inputs["input_ids"].shape[1] :][: len(new)])


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "100"})


def test_help_teaches() -> None:
    for args in (["--help"], ["run", "--help"], ["list"]):
        result = run(*args)
        assert result.exit_code == 0
    assert "fastv" in run("list").output and "LLaVA-NeXT" in run("list").output
    assert "--compare" in run("run", "--help").output


def test_every_help_has_an_example_that_parses() -> None:
    for path, command in commands_of(typer.main.get_command(app)).items():
        examples = re.findall(r"`(vtr [^`]+)`", (command.help or "").replace("\n", " "))
        own = [one for one in examples if one.split()[1 : len(path) + 1] == list(path)]
        assert own, f"vtr {' '.join(path)} --help shows no example"
        for example in own:
            if not re.search("[…&]", example):
                parse(shlex.split(example)[1:])


def test_run_and_compare(tmp_path: Any) -> None:
    target = tmp_path / "kept.png"
    result = run(
        "run", "--sample", "0", "--policy", "fastv:keep=0.25", "--compare", "--repeats", "1", "--show", str(target)
    )
    assert result.exit_code == 0, result.output
    for word in ("none", "fastv:keep=0.25", "random:keep=186", "uniform:keep=186", "GFLOPs", vtr.pocket.sample(0)[2]):
        assert word in result.output
    assert "744 744 186" in result.output
    assert target.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "or --sample 0"),
        (["run", "--sample", "0", "--policy", "fastvv"], "unknown policy"),
        (["run", "--sample", "0", "--policy", "fastv:layer=99"], "decoder layers"),
        (["run", "pyproject.toml", "what"], "not a picture"),
        (["run", "nothing-here.png", "what"], "nothing-here.png"),
        (["run", "--sample", "0", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_foreign_and_truncated_checkpoints(tmp_path: Any) -> None:
    import shutil

    shutil.copytree(vtr.pocket.WEIGHTS, tmp_path / "short")
    whole = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(whole[:1_000_000])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("short", "foreign"):
        result = run("run", "--sample", "0", "--model", str(tmp_path / name), "--policy", "fastv")
        assert result.exit_code == 1
        assert "cannot load" in result.output and "fetch it again" in result.output.replace("\n", " ")


def test_baselines_get_the_policys_budget(pocket: Any) -> None:
    ask(pocket, 0, "fastv:keep=0.1,layer=3")
    assert same_budget(vtr.report(pocket[0])) == ["random:keep=74,layer=3", "uniform:keep=74,layer=3"]


SHIPPED = [
    name
    for name in vtr.list_policies()
    if (module := policy_class(name).__module__).startswith("vtr.") and not module.startswith("vtr.eval.")
]
QUICK = ("autoscale", "visionzip", "gsearch", "auto")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SHIPPED])
def test_every_policy_answers_and_is_drawn(name: str, tmp_path: Path) -> None:
    """By its bare name, which on the pocket model stands for what ships with it where the policy needs something."""
    drawn, model = tmp_path / "kept.png", ELSEWHERE.get(name, "pocket")
    done = run("run", "--sample", "1", "--model", model, "--policy", name, "--repeats", "1", "--show", str(drawn))
    assert done.exit_code == 0, done.output
    assert drawn.stat().st_size > 10_000 and "vision tokens into each decoder layer" in done.output
