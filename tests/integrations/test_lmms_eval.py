"""The lmms-eval adapter: over a stand-in for the interface it subclasses, and in real runs where lmms-eval is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import vtr
from tests.integrations import lmms_task
from vtr.commands.run import tokenize

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
MODULE = "vtr.integrations.lmms_eval"
MISSING = "lmms-eval is not installed (pip install -e '.[eval]')"
FASTV = "fastv:keep=0.02,layer=2"
N = 24


def real(test: Any) -> Any:
    """Marks a test that runs lmms-eval itself."""
    return pytest.mark.slow(pytest.mark.skipif(not INSTALLED, reason=MISSING)(test))


class Result(NamedTuple):
    text: str
    token_counts: Any = None


@dataclass
class Counts:
    output_tokens: int


class Lmms:
    """What a model of lmms-eval 0.7.3 inherits, as far as the adapter uses it."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, dict[str, Any]()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        pass


class Accelerator:
    process_index, num_processes, device = 0, 1, torch.device("cpu")


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """The adapter; without lmms-eval installed, over stand-ins for the names that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            logged: list[dict[str, Any]] = []
            names: dict[str, dict[str, Any]] = {
                "accelerate": {"Accelerator": Accelerator},
                "loguru": {"logger": types.SimpleNamespace(info=print, warning=print)},
                "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts, "Instance": Request},
                "lmms_eval.api.model": {"lmms": Lmms},
                "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **kw: logged.append(kw)},
            }
            packages = ("lmms_eval", "lmms_eval.api", "lmms_eval.models", "lmms_eval.models.model_utils")
            for name in (*packages, *names):
                made = types.ModuleType(name)
                made.__dict__.update(names.get(name, {}))
                patch.setitem(sys.modules, name, made)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def document(i: int = 0) -> dict[str, Any]:
    picture, question, answer = vtr.pocket.sample(i)
    return {"image": picture, "question": question, "answer": answer}


DOCUMENTS = [document(i) for i in range(3)]


def visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def model(adapter: Any, name: str = "Vtr", **settings: Any) -> Any:
    made = getattr(adapter, name)("pocket", device="cpu", **settings)
    made.task_dict = {"t": {"test": DOCUMENTS}}
    return made


def simple(i: int, visuals: Callable[[Any], Any] | None = visual, **kwargs: Any) -> Request:
    return Request((DOCUMENTS[i]["question"], {"max_new_tokens": 4, **kwargs}, visuals, i, "t", "test"))


def chat(i: int, turns: Callable[[Any], Any] = messages, **kwargs: Any) -> Request:
    return Request((DOCUMENTS[i]["question"], turns, {"max_new_tokens": 4, **kwargs}, i, "t", "test"))


# -- the adapter, as lmms-eval calls it ----------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [None, "fastv:keep=0.02;layer=2", '"fastv:keep=0.02,layer=2"'])
@pytest.mark.parametrize("batch_size", [1, 2, "3"])
def test_answers_are_those_of_generate(adapter: Any, policy: str | None, batch_size: Any) -> None:
    for name, ask in (("Vtr", simple), ("VtrChat", chat)):
        made = model(adapter, name, policy=policy, batch_size=batch_size)
        assert (made.is_simple, made.rank, made.world_size) == (name == "Vtr", 0, 1)
        results = made.generate_until([ask(i) for i in (2, 0, 1, 0)])
        assert [r.text for r in results] == [DOCUMENTS[i]["answer"] for i in (2, 0, 1, 0)]
        assert [r.token_counts.output_tokens for r in results] == [2] * 4  # the word and the end
        row = vtr.report(made.chat.model).rows[0]
        assert row.vision_tokens[2] == (744 if policy is None else 14)


def test_requests_are_grouped_by_generation_settings(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = model(adapter, "Vtr", batch_size=2), []
    answers = made.chat.answers

    def noted(prompts: Any, settings: Any, until: Any = ()) -> Any:
        calls.append((len(prompts), settings["max_new_tokens"], until))
        return answers(prompts, settings, until)

    monkeypatch.setattr(made.chat, "answers", noted)
    requests = [simple(0), simple(1, max_new_tokens=1), simple(2), simple(0, until=["\n\n"]), simple(1)]
    results = made.generate_until(requests)
    assert [r.text for r in results] == [DOCUMENTS[i]["answer"] for i in (0, 1, 2, 0, 1)]
    assert calls == [(2, 4, []), (1, 4, []), (1, 1, []), (1, 4, ["\n\n"])]


def test_rows_with_none_one_and_two_pictures_in_one_batch(adapter: Any) -> None:
    """Each row of the batch answers what it answers alone."""

    def two(doc: dict[str, Any]) -> list[Any]:
        return [DOCUMENTS[0]["image"].crop((0, 0, 96, 192)), doc["image"]]

    requests = [simple(0), simple(1, visuals=None), simple(2, visuals=two), simple(1, visuals=lambda doc: [])]
    together = model(adapter, batch_size=4, policy="fastv:keep=0.1;layer=2").generate_until(requests)
    one = model(adapter, batch_size=1, policy="fastv:keep=0.1;layer=2")
    assert [one.generate_until([r])[0].text for r in requests] == [r.text for r in together]
    assert together[0].text == DOCUMENTS[0]["answer"]


def test_a_run_that_was_broken_off_goes_on(adapter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Answers are kept by question and settings; sampled ones are not; a line that was cut off is asked again."""

    def fresh(**settings: Any) -> tuple[Any, list[int]]:
        made, asked = model(adapter, "Vtr", answers=str(tmp_path / "kept"), **settings), []
        answers = made.chat.answers

        def noted(prompts: Any, *rest: Any) -> Any:
            asked.append(len(prompts))
            return answers(prompts, *rest)

        monkeypatch.setattr(made.chat, "answers", noted)
        return made, asked

    made, asked = fresh(batch_size=2)
    first = made.generate_until([simple(0), simple(1)])
    made.clean()
    path = tmp_path / "kept" / "0.jsonl"
    path.write_text(path.read_text()[:-20])  # the process ended while it wrote the second
    made, asked = fresh(batch_size=4)
    again = made.generate_until([simple(2), simple(1), simple(0), simple(0, max_new_tokens=1)])
    assert asked == [2, 1] and [again[2].text, again[1].text] == [one.text for one in first]
    assert again[2].token_counts == first[0].token_counts
    made.generate_until([simple(0, do_sample=True)] * 2)
    assert asked == [2, 1, 2] and len(path.read_text().splitlines()) == 1 + 1 + 1 + 3
    with pytest.raises(ValueError, match=r"answers of another run \(policy changed\): name another folder"):
        fresh(policy="fastv:keep=0.5")


def test_pictures_stand_where_the_text_marks_them(adapter: Any) -> None:
    pair = [DOCUMENTS[0]["image"], DOCUMENTS[1]["image"]]
    kinds = [part["type"] for part in adapter.interleaved("a <image> b <image>", pair)]
    assert kinds == ["text", "image", "text", "image"]
    assert [part["type"] for part in adapter.interleaved("a b", pair)] == ["image", "image", "text"]
    with pytest.raises(ValueError, match="1 <image> marks for 2 pictures"):
        adapter.interleaved("a <image> b", pair)


def test_plain_text_is_content_too(adapter: Any) -> None:
    """Of a whole message, and among the parts of one; pictures may stand under either of two names."""
    made = model(adapter, "VtrChat")

    def prompt(*contents: Any) -> Any:
        return made._prompt(chat(0, turns=lambda doc: [{"role": "user", "content": one} for one in contents]))

    text, shown = {"type": "text", "text": "what"}, {"type": "image", "url": DOCUMENTS[0]["image"]}
    assert prompt("what").text == prompt([text]).text == prompt(["what"]).text == prompt(text).text
    assert prompt([shown, "what"], "more") == prompt([{"type": "image", "image": shown["url"]}, text], ["more"])
    for wrong in (None, 3, [None], [{"text": "what"}]):
        with pytest.raises(vtr.UnsupportedError, match="content must be text or a list of parts"):
            prompt(wrong)
    with pytest.raises(vtr.UnsupportedError, match="got NoneType"):
        prompt([{"type": "image"}])


def test_until_ends_an_answer(adapter: Any) -> None:
    made = model(adapter, "VtrChat")
    answer = DOCUMENTS[0]["answer"]
    result = made.generate_until([chat(0, until=answer[-2:], min_new_tokens=4)])[0]
    assert result.text == answer[:-2]
    assert result.token_counts.output_tokens == 1  # the word that holds it; four were asked for


def test_losses_are_those_of_a_plain_forward(adapter: Any) -> None:
    """Without a policy: mean of −log p over the continuation, from one forward over prompt and continuation."""
    made = model(adapter, batch_size=3)
    texts = [" " + DOCUMENTS[0]["answer"], " two red", lambda doc: " " + doc["answer"]]
    requests = [Request(("what", text, visual, i, "t", "test")) for i, text in enumerate(texts)]
    got = [result.text for result in made.loglikelihood(requests)]
    stock, processor = vtr.pocket.load()
    for i, (text, (loss, greedy)) in enumerate(zip(texts, got, strict=True)):
        words = text if isinstance(text, str) else text(DOCUMENTS[i])
        inputs = tokenize(processor, DOCUMENTS[i]["image"], "what", "cpu")
        ids = processor.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
        both["attention_mask"] = torch.ones_like(both["input_ids"])
        with torch.inference_mode():
            logits = stock(**both).logits[0, -ids.shape[1] - 1 : -1]
        wanted = -logits.log_softmax(-1).gather(1, ids.T).mean()
        torch.testing.assert_close(torch.tensor(loss), wanted, atol=1e-5, rtol=0)
        assert greedy == torch.equal(logits.argmax(-1), ids[0])
    assert len(ids[0]) == 1 and math.isfinite(got[1][0])


def test_a_continuation_does_not_choose_the_tokens(adapter: Any) -> None:
    """Under a policy the question alone chooses, and rows of a batch are what they are alone."""
    ask = [Request((DOCUMENTS[0]["question"], text, visual, 0, "t", "test")) for text in (" red", " two one", " fox")]
    made = model(adapter, batch_size=3, policy="fastv:keep=0.02;layer=2")
    together = [result.text for result in made.loglikelihood(ask)]
    one = model(adapter, batch_size=1, policy="fastv:keep=0.02;layer=2")
    kept = []
    for request, (loss, greedy) in zip(ask, together, strict=True):
        alone = one.loglikelihood([request])[0].text
        torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(loss), atol=1e-4, rtol=0)
        assert alone[1] == greedy
        kept.append(vtr.report(one.chat.model).rows[0].kept(2))
    assert kept[0] == kept[1] == kept[2]


def test_what_cannot_be_is_said(adapter: Any) -> None:
    with pytest.raises(vtr.UnsupportedError, match="batch_size='auto'"):
        model(adapter, batch_size="auto")
    with pytest.raises(ValueError, match="unknown policy"):
        model(adapter, policy="fastvv")
    with pytest.raises(ValueError, match="dtype='floaty'"):
        model(adapter, dtype="floaty")
    with pytest.raises(ValueError, match="decoder layers"):
        model(adapter, policy="fastv:keep=0.5;layer=99")
    made = model(adapter, "VtrChat")
    sound = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    with pytest.raises(vtr.UnsupportedError, match="audio"):
        made.generate_until([chat(0, turns=lambda doc: sound)])
    video = [{"role": "user", "content": [{"type": "video", "url": "gone.gif"}]}]
    with pytest.raises(FileNotFoundError, match=r"gone\.gif"):
        made.generate_until([chat(0, turns=lambda doc: video)])
    with pytest.raises(vtr.UnsupportedError, match="several rounds"):
        made.generate_until_multi_round([])
    with pytest.raises(vtr.UnsupportedError, match="acc_mutual_info"):
        made.loglikelihood([Request(("", "red"))])
    made.clean()
    with pytest.raises(RuntimeError, match="already freed"):
        made.generate_until([chat(0)])


def test_a_saved_policy_is_taken_from_its_folder(adapter: Any, tmp_path: Path) -> None:
    vtr.FastV(keep=0.25, layer=3).save_pretrained(tmp_path)
    assert model(adapter, policy=str(tmp_path)).chat.policy == vtr.FastV(keep=0.25, layer=3)
    assert model(adapter, policy="none").chat.policy is None


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 0}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_generation_settings(given: dict[str, Any], sampled: bool) -> None:
    from vtr.integrations.chat import DEFAULT_NEW_TOKENS, generation_settings

    settings, until, ignored = generation_settings({**given, "image_aspect_ratio": "pad", "num_beams": 2})
    assert (settings["do_sample"], settings["num_beams"], until) == (sampled, 2, [])
    assert ignored == ["image_aspect_ratio"] and settings["max_new_tokens"] == DEFAULT_NEW_TOKENS
    for name in ("temperature", "top_p"):  # a model's own sampling settings must not warn in a greedy run
        assert settings.get(name) == (given.get(name) if sampled else None)
    assert generation_settings({"max_gen_toks": 7, "until": "x"})[0]["max_new_tokens"] == 7
    assert generation_settings({"until": "x"})[1] == ["x"]
    with pytest.raises(ValueError, match="until must be"):
        generation_settings({"until": 3})


def test_importing_vtr_does_not_import_the_kits() -> None:
    code = (
        "import sys, vtr.integrations; print([n for n in sys.modules if 'lmms_eval' in n or 'integrations.chat' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- real runs -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lmms_task.write(folder, N)
    return folder


def evaluate(
    tasks: Path, out: Path, launcher: list[str], *more: str, task: str = "pocket_vqa", processes: int = 1
) -> tuple[float, Any]:
    """Run lmms-eval; its score and samples."""
    command = [*launcher, "--model", "vtr", "--include_path", str(tasks), "--tasks", task, "--output_path", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--log_samples", *more], env=environment, capture_output=True, text=True, timeout=900
    )
    found = sorted(out.rglob("*_results.json"))  # one table, however many processes; none after an error (status 0)
    assert done.returncode == 0 and len(found) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    log = done.stdout + done.stderr
    assert [f"Running on rank {rank} " in log for rank in range(3)] == [rank < processes for rank in range(3)]
    results = json.loads(found[0].read_text())["results"][task]
    lines = next(iter(out.rglob(f"*_samples_{task}.jsonl"))).read_text().splitlines()
    metric = "acc" if task == "pocket_choice" else "exact_match"
    return results[f"{metric},none"], sorted((json.loads(line) for line in lines), key=lambda s: s["doc_id"])


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "lmms_eval"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *rendezvous, "-m", "lmms_eval"]


@real
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("policy", ["none", FASTV])
def test_scores_are_those_of_generate(tasks: Path, tmp_path: Path, policy: str, processes: int) -> None:
    arguments = f"pretrained=pocket,policy={policy.replace(',', ';')}"
    score, samples = evaluate(
        tasks, tmp_path, launcher(processes), "--model_args", arguments, "--batch_size", "5", processes=processes
    )
    rows = lmms_task.questions(N)
    said = lmms_task.direct_answers(rows, None if policy == "none" else policy)
    assert [sample["filtered_resps"] for sample in samples] == said
    assert score == sum(a == row["answer"] for a, row in zip(said, rows, strict=True)) / N
    assert lmms_task.vtr_eval(tmp_path / "vtr", policy, N) == (score, said)
    if policy != "none":
        assert said != [row["answer"] for row in rows]  # so hard a cut costs something: the policy was there


@real
def test_the_console_script_and_a_quoted_policy(tasks: Path, tmp_path: Path) -> None:
    """Through accelerate's launcher, on two processes; the simple interface."""
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "lmms_eval",
    ]
    arguments = f'pretrained=pocket,policy="{FASTV}"'
    score, samples = evaluate(tasks, tmp_path / "two", start, "--model_args", arguments, "--force_simple", processes=2)
    one = [str(Path(sys.executable).with_name("lmms-eval"))]
    assert evaluate(tasks, tmp_path / "one", one, "--model_args", arguments, "--force_simple")[0] == score
    assert len(samples) == N


@real
def test_multiple_choice_by_likelihood(tasks: Path, tmp_path: Path) -> None:
    score, samples = evaluate(
        tasks, tmp_path, launcher(1), "--model_args", "pretrained=pocket", "--force_simple",
        "--batch_size", "4", task="pocket_choice",
    )  # fmt: skip
    rows = [row for row in lmms_task.questions(N) if row["type"] == "color"]
    said = lmms_task.direct_answers(rows, None)
    assert score == sum(a == row["answer"] for a, row in zip(said, rows, strict=True)) / len(rows)
    assert len(samples) == len(rows) > 0
