"""``vtr eval published`` on lmms-eval itself: a local task on the pocket model, and the tasks that tables name."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from vtr.eval.published import tables
from vtr.eval.published.intervals import measured

from tests.eval import published_tables as made_up
from tests.eval.published_tables import FASTV, RANDOM
from tests.integrations import lmms_task
from tests.integrations.test_lmms_eval import MISSING, N

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_kit = pytest.mark.skipif(not INSTALLED, reason=MISSING)
BOOK = tables.read()
SCORED = {name: one for name, one in BOOK.benchmarks.items() if one.task is not None}


def command(folder: Path, *more: str) -> list[str]:
    where = ["--tables", str(folder / "tables"), "--include-path", str(folder / "tasks"), "--out", str(folder / "out")]
    return [sys.executable, "-m", "vtr.cli", "eval", "published", "--model", "pocket", "--device", "cpu", *where, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *more: str) -> str:
    done = subprocess.run(command(folder, *more), env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def ours(folder: Path) -> dict[str, Any]:
    body = json.loads((folder / "out" / "results.json").read_text())
    return {row["policy"]: row["columns"]["vqa"] for row in body["rows"]}


def answered(folder: Path) -> list[tuple[str, str]]:
    """(policy's folder, question) of the lines that are written whole."""
    found = []
    for path in sorted(folder.rglob("answers/*.jsonl")):
        whole = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
        found += [(path.parts[-3], entry["key"]) for entry in whole if "key" in entry]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, a table, and a finished run."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "tasks").mkdir()
    lmms_task.write(folder / "tasks", N)
    rows = [
        {"name": "FastV", "tokens": 0.3, "policy": FASTV, "numbers": {"vqa": 97.0}},
        {"name": "random", "tokens": 3, "policy": RANDOM, "numbers": {"vqa": 99.0}},
    ]
    made_up.write(folder / "tables", made_up.table(unreduced={"vqa": 99.0}, rows=rows), questions=N)
    run(folder)
    return folder


@pytest.mark.slow
@needs_kit
def test_scores_are_those_of_generate_and_so_are_the_words(world: Path) -> None:
    rows = lmms_task.questions(N)
    for policy, verdict in (("none", "agrees"), (FASTV, "agrees"), (RANDOM, "below")):
        said = lmms_task.direct_answers(rows, None if policy == "none" else policy)
        right = 100 * sum(a == row["answer"] for a, row in zip(said, rows, strict=True)) / N
        found = ours(world)[policy]
        assert found["ours"] == pytest.approx(right) and found["verdict"] == verdict
        assert found["low"] <= right <= found["high"] and found["why"] == ""
    assert ours(world)[RANDOM]["share"]["verdict"] == "below"


@pytest.mark.slow
@needs_kit
def test_a_second_call_runs_nothing_again(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world / "out" / "runs").rglob("*") if path.is_file()}
    first = ours(world)
    assert "runs of lmms-eval" not in run(world) and ours(world) == first
    assert before == {path: path.stat().st_mtime_ns for path in (world / "out" / "runs").rglob("*") if path.is_file()}


@pytest.mark.slow
@needs_kit
def test_a_killed_run_goes_on_where_it_was(world: Path, tmp_path: Path) -> None:
    """Everything is killed at once, in the middle of the first policy; the same table comes out in the end."""
    for name in ("tasks", "tables"):
        (tmp_path / name).symlink_to(world / name)
    first = subprocess.Popen(
        command(tmp_path, "--batch-size", "1", "-p", "random"), env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ends = time.monotonic() + 300
    while len(answered(tmp_path)) < 3 and first.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    early = answered(tmp_path)
    assert 3 <= len(early) < N and not list(tmp_path.rglob("*_results.json"))
    run(tmp_path, "-p", "random")
    late = answered(tmp_path)
    assert len(late) == len(set(late)) == 2 * N, "a question was asked twice, or not at all"
    assert set(early) < set(late)
    assert ours(tmp_path) == {policy: one for policy, one in ours(world).items() if policy in ("none", RANDOM)}


@pytest.mark.slow
@needs_kit
def test_two_processes_give_the_same(world: Path, tmp_path: Path) -> None:
    for name in ("tasks", "tables"):
        (tmp_path / name).symlink_to(world / name)
    run(tmp_path, "-p", "random", "--processes", "2")
    assert ours(tmp_path)[RANDOM] == ours(world)[RANDOM]
    assert len(list((tmp_path / "out").rglob("answers/*.jsonl"))) == 4  # of two policies, a file for each process


# -- what the tables say of lmms-eval ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def manager() -> Any:
    from lmms_eval.tasks import TaskManager

    own = Path(tables.__file__).with_name("tasks")
    return TaskManager(include_path=str(own), model_name="vtr")


@needs_kit
@pytest.mark.parametrize("name", sorted(SCORED))
def test_a_task_has_the_metrics_that_the_column_names(manager: Any, name: str) -> None:
    from lmms_eval import utils

    one = SCORED[name]
    assert one.task in manager.all_tasks
    config = utils.load_yaml_config(manager.task_index[one.task]["yaml_path"], mode="simple")
    assert set(one.metrics) <= {metric["metric"] for metric in config["metric_list"]}
    assert config["output_type"] == "generate_until"


@needs_kit
def test_the_question_comes_with_ocr_tokens(manager: Any) -> None:
    from lmms_eval import utils

    config = utils.load_yaml_config(manager.task_index["vtr_textvqa_ocr"]["yaml_path"], mode="full")
    document = {
        "question": "what brand is it?",
        "ocr_tokens": ["DAKOTA", "digital"],
        "answers": ["dakota"] * 10,
        "question_id": 1,
    }
    asked = config["doc_to_text"](document, config["lmms_eval_specific_kwargs"]["default"])
    assert asked == (
        "What brand is it?\nReference OCR token: DAKOTA, digital\nAnswer the question using a single word or phrase."
    )
    assert config["process_results"](document, ["Dakota"]) == {"exact_match": 1.0}


@needs_kit
def test_scores_are_made_of_samples_as_lmms_eval_makes_them() -> None:
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_process_results

    draw = random.Random(0)
    said = ["yes", "no", "Yes", "No.", "maybe"]
    pope = [
        pope_process_results({"answer": draw.choice(said[:2]), "question_id": i}, [draw.choice(said)])
        for i in range(200)
    ]
    samples = [{"doc_id": i, **one} for i, one in enumerate(pope)]
    f1 = pope_aggregate_f1_score([one["pope_f1_score"] for one in pope])
    found = measured("f1", ["pope_f1_score"], 100, {"pope_f1_score": f1}, samples)
    assert found.interval is not None and found.value == pytest.approx(100 * f1)
    documents = [
        {"answer": ("Yes", "No")[i % 2], "question_id": f"{kind}/{i // 2}.png", "category": kind}
        for kind in ("existence", "OCR", "code_reasoning") for i in range(40)
    ]  # fmt: skip
    mme = [mme_process_results(document, [draw.choice(said)]) for document in documents]
    logged = [{"doc_id": i, **one} for i, one in enumerate(mme)]
    metrics = ["mme_perception_score", "mme_cognition_score"]
    total = {m: mme_aggregate_results([one[m] for one in mme if m in one]) for m in metrics}
    found = measured("pairs", metrics, 1, total, logged)
    assert found.interval is not None and found.value == pytest.approx(sum(total.values()))
