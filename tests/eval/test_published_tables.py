"""The published tables as data, which of them is chosen, and what a run would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel
from vtr.eval.published import choose, cost, kit, tables
from vtr.eval.published.cells import slug

import vtr
from tests.eval import published_tables as made_up

LLAVA = "llava-hf/llava-1.5-7b-hf"
SIX = ["gqa", "pope", "textvqa", "mme", "mmb", "sqa"]
BOOK = tables.read()
ROOT = Path(__file__).parents[2]


# -- the files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(BOOK.tables))
def test_a_shipped_table_is_whole(name: str) -> None:
    """Policies are policies, as they are when they come out of a spec again; rows have a source and distinct specs."""
    table = BOOK.tables[name]
    assert table.source and table.read and table.runnable()
    specs = [vtr.policy(row.policy).spec for row in table.rows if row.policy]
    assert len(specs) == len(set(specs)), "two rows are the same policy"
    assert all(vtr.policy(spec).spec == spec for spec in specs)
    for row in table.rows:
        assert row.numbers or row.average is not None, row.label
        assert bool(row.policy) != bool(row.why), row.label
        assert row.tokens is None or row.tokens > 0
        for column, number in row.numbers.items():
            one = BOOK.benchmark(table, column)
            assert (
                0 < number <= (2800 if one.scale == 1 and "MME" in one.title else one.scale if one.scale > 1 else 100)
            )


@pytest.mark.parametrize("name", sorted(name for name, table in BOOK.tables.items() if table.average))
def test_printed_averages_are_those_of_the_numbers(name: str) -> None:
    table = BOOK.tables[name]
    near = 0.1 if (table.average or {}).get("relative") else 0.06  # shares were rounded before they were averaged
    for row in table.rows:
        found = tables.averaged(table, row.numbers)
        if found is not None and row.average is not None:
            assert found == pytest.approx(row.average, abs=near), row.label


def test_averages_could_be_checked() -> None:
    checked = [
        row
        for table in BOOK.tables.values()
        for row in table.rows
        if row.average is not None and tables.averaged(table, row.numbers) is not None
    ]
    assert len(checked) >= 35
    levels = {name: tables.averaged(BOOK.tables[name], BOOK.tables[name].unreduced or {}) for name in BOOK.tables}
    assert levels["eadp-llava-1.5-7b"] == pytest.approx(64.9, abs=0.05)
    assert levels["eadp-llava-next-7b"] == pytest.approx(66.3, abs=0.05)


def test_what_is_not_certain_says_so() -> None:
    assert {t.name for t in BOOK.tables.values() if not t.certain} == {
        "divprune-llava-1.5-7b",
        "globalcom2-llava-next-7b",
    }
    assert all("notes" in t.read for t in BOOK.tables.values() if not t.certain)


FAMILIES = {"LLaVA-1.5": "LLaVA-1.5", "LLaVA-NeXT": "LLaVA-NeXT", "Qwen2": "Qwen2-VL, Qwen2.5-VL", "Qwen3": "Qwen3-VL"}


def test_rows_are_policies_that_the_model_can_have() -> None:
    """As the table of families says, which is made of what tests came out at."""
    lines = [line.split("|")[1:-1] for line in (ROOT / "docs/families.md").read_text().splitlines() if line[:1] == "|"]
    heads = [cell.strip() for cell in lines[0]]
    can = {cells[0].strip(" `"): dict(zip(heads, map(str.strip, cells), strict=True)) for cells in lines[2:]}
    asked = 0
    for table in BOOK.tables.values():
        (family,) = {name for start, name in FAMILIES.items() if table.model.startswith(start)}
        for row in table.rows:
            for part in (row.policy or "").split("+") if row.policy else []:
                assert can[part.split(":")[0]][family].startswith("✓"), f"{table.name}: {row.label}"
                asked += 1
    assert asked > 80


def broken(**changed: Any) -> dict[str, Any]:
    return made_up.table(**changed)


def with_row(**row: Any) -> dict[str, Any]:
    return made_up.table(rows=[{"name": "a", "policy": "fastv:keep=0.5", "numbers": {"vqa": 1.0}, **row}])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (broken(source=""), "made-up.json: every table says its source"),
        (broken(model="other"), "model='other' is not in models.json"),
        (broken(columns={"vqa": "other"}), "column vqa: 'other' is not in benchmarks.json"),
        (broken(columns={"VQA": "pocket_vqa"}), "column 'VQA': small letters"),
        (broken(rows=[]), '"rows" must be a list'),
        (broken(colour="red"), "unknown colour: there are name, source"),
        (broken(certain="yes"), "certain='yes' is no bool"),
        (broken(unreduced={"pope": 1.0}), "unreduced numbers of pope, which is no column"),
        (broken(unreduced={"vqa": "1"}), "unreduced="),
        (broken(unreduced={"vqa": float("nan")}), "unreduced="),
        (broken(average={"of": ["vqa"]}), 'average: "over" lists columns'),
        (broken(rows=[{"name": "a", "why": "no"}] * 2), "two rows are called a"),
        (with_row(policy="fastvv"), "a: policy 'fastvv': unknown policy"),
        (with_row(policy=None), "without a policy, why says the reason"),
        (with_row(numbers={"pope": 1.0}), "a: numbers of pope, which is no column"),
        (with_row(numbers={"vqa": True}), "row 1: numbers="),
        (with_row(tokens="many"), "row 1: tokens='many' is no Number"),
        (broken(rows=[{"policy": "none"}]), "row 1: name missing"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        tables.read([made_up.write(tmp_path, data)])


def test_a_broken_benchmark_is_refused(tmp_path: Path) -> None:
    for changed, said in (
        ({"interval": "wide"}, "choose one of mean, f1"),
        ({"task": None}, "why says the reason"),
        ({"counted": ""}, "where that is from"),
    ):
        with pytest.raises(ValueError, match=said):
            tables.read([made_up.write(tmp_path, None, **changed)])
    with pytest.raises(FileNotFoundError, match="--tables names a folder"):
        tables.read([tmp_path / "gone"])


# -- which is chosen ---------------------------------------------------------------------------------------------------
def test_the_table_follows_from_model_and_columns() -> None:
    found = choose.choose(BOOK, LLAVA, None, SIX, [])
    assert found.table.name == "eadp-llava-1.5-7b" and found.columns == tuple(SIX)
    assert "its own unreduced row and 10 rows" in found.because and "hiprune-llava-1.5-7b" in found.because
    assert len(found.rows) == 10 and all(row.policy for row in found.rows)
    assert found.left_out["PruMerge+ 64"].startswith("a variant with a fixed budget")
    assert choose.tasks_of(BOOK, found).keys() == {
        "gqa", "pope", "vtr_textvqa_ocr", "mme", "mmbench_en_dev_static", "scienceqa_img",
    }  # fmt: skip
    only = choose.choose(BOOK, LLAVA.upper(), None, ["docvqa"], ["SCOPE 64"])
    assert (only.table.name, [row.label for row in only.rows]) == ("scope-llava-1.5-7b", ["SCOPE 64"])
    assert "the only table" in only.because


def test_rows_are_named_as_the_paper_does() -> None:
    def labels(*names: str) -> list[str]:
        return [row.label for row in choose.choose(BOOK, LLAVA, "eadp-llava-1.5-7b", ["gqa"], names).rows]

    assert labels("VisionZip") == ["VisionZip 128", "VisionZip 64", "VisionZip 32"]
    assert labels("visionzip 64", "dart:32,placement=official") == ["VisionZip 64", "DART 32"]
    whole = choose.choose(BOOK, LLAVA, "eadp-llava-1.5-7b", [], [])
    assert whole.columns == ("gqa", "sqa", "textvqa", "pope", "mme", "mmb")
    assert whole.left_out["mmvet"] == "GPT-4 scores it, through OpenAI's API"


@pytest.mark.parametrize(
    ("model", "source", "columns", "policies", "said"),
    [
        ("me/mine", None, [], [], "no table is about --model me/mine: there are tables about"),
        (LLAVA, "eadp", [], [], "--source eadp"),
        (LLAVA, None, ["gqa", "docvqa", "pope", "ocrbench"], [], "mixed: gsearch-llava-1.5-7b lacks ocrbench; "),
        (LLAVA, None, ["gqa"], ["nobody"], "no single table"),
        (LLAVA, "eadp-llava-1.5-7b", ["gqq"], [], r"--table gqq \(did you mean gqa\?\)"),
        (LLAVA, "eadp-llava-1.5-7b", ["mmb_cn"], [], "OpenAI's API alone; leave it out"),
        (LLAVA, "eadp-llava-1.5-7b", ["gqa"], ["VisionZap"], r"did you mean Vision"),
        (LLAVA, "eadp-llava-1.5-7b", ["gqa"], ["FastV 64"], "cannot be compared: which layers it cuts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(model: str, source: str | None, columns: Any, policies: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose.choose(BOOK, model, source, columns, policies)


def test_of_equal_tables_one_has_to_be_named(tmp_path: Path) -> None:
    folder = made_up.write(tmp_path)
    (folder / "again.json").write_text(json.dumps(made_up.table()))
    book = tables.read([folder])
    with pytest.raises(ValueError, match="as good: --source again or --source made-up"):
        choose.choose(book, "pocket", None, [], [])
    assert choose.choose(book, "pocket", "made-up", [], []).because == "named by --source"
    said = choose.choose(book, "mine", "made-up", [], []).because
    assert "the table is about pocket" in said and "that mine is one, you say" in said


# -- what it takes -----------------------------------------------------------------------------------------------------
def test_flops_are_those_that_torch_counts() -> None:
    """A decoder of a model's sizes, on the meta device."""
    text = {"hidden": 64, "intermediate": 160, "layers": 3, "heads": 4, "kv_heads": 2}
    model = tables.Model(("x",), text, {**made_up.MODEL["vision"], "layers": 0}, "made up")  # type: ignore[dict-item]
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        decoder = LlamaModel(config)
        with FlopCounterMode(display=False) as counted:
            decoder(inputs_embeds=torch.zeros(1, 40, 64))
    assert counted.get_total_flops() == cost.question_flops(model, [30.0] * 3, text=10, answer=0)


def test_hours_follow_from_rate_and_questions() -> None:
    model, found = BOOK.models["LLaVA-1.5-7B"], choose.choose(BOOK, LLAVA, None, SIX, [])
    tasks, slow = choose.tasks_of(BOOK, found), cost.rate_of("A100", 50.0)
    whole, known = cost.hours(model, choose.NONE, tasks, slow, None)
    assert known and 1 < whole < 4  # 35 thousand questions of some 9 TFLOPs at 50 TFLOP/s
    assert cost.hours(model, choose.NONE, tasks, cost.rate_of("A100", 100.0), None)[0] == pytest.approx(whole / 2)
    assert cost.hours(model, found.rows[0], tasks, slow, None)[0] < whole / 2
    assert cost.hours(model, choose.NONE, tasks, slow, 10)[0] < whole / 200
    assert cost.rate_of("H100", None).tflops == pytest.approx(0.3 * 989)
    for wrong, said in (({"gpu": "A10", "rate": None}, "one of A100"), ({"gpu": "A100", "rate": 0.0}, "more than 0")):
        with pytest.raises(ValueError, match=said):
            cost.rate_of(**wrong)  # type: ignore[arg-type]


def test_tokens_that_enter_are_the_policys_or_the_tables() -> None:
    model = BOOK.models["LLaVA-1.5-7B"]
    assert cost.entering(choose.NONE, model) == ([576.0] * 32, True)
    assert cost.entering(tables.Row("a", 128, "fastv:keep=0.125,layer=2"), model) == ([576.0] * 2 + [72.0] * 30, True)
    assert cost.entering(tables.Row("a", 64, "mustdrop:64"), model) == ([64.0] * 32, False)
    assert cost.entering(tables.Row("a", 0.25, "zipvl:tau=0.96"), model) == ([144.0] * 32, False)
    assert cost.entering(tables.Row("a", None, "zipvl:tau=0.96"), model) == ([576.0] * 32, False)
    assert len(cost.layout_of(BOOK.models["LLaVA-NeXT-7B"])) == 2880 + 48


# -- the command lines -------------------------------------------------------------------------------------------------
def test_lmms_eval_gets_a_policy_in_one_piece(tmp_path: Path) -> None:
    """It splits at commas that stand outside brackets."""
    policy = "vscan:96,placement=official+pyramid:keeps=[0.3334,0.2],layers=[16,20]"
    launch = kit.Launch("a/b", tmp_path, processes=2, device="cpu", dtype="bfloat16", limit=5, include=Path("mine"))
    job = kit.Job(policy, ("mme", "vtr_textvqa_ocr"))
    words = kit.arguments(launch, job)
    settings = dict(one.split("=", 1) for one in words[words.index("--model_args") + 1].split(","))
    assert settings.keys() == {"pretrained", "policy", "answers", "dtype"}
    assert settings["policy"].replace(";", ",") == policy
    assert settings["answers"] == str(tmp_path / "runs" / slug(policy) / "answers")
    assert kit.environment(launch) == {"ACCELERATE_USE_CPU": "true"}
    line = kit.spelled(launch, job)
    assert "accelerate launch --multi_gpu --num_processes 2 -m lmms_eval --model vtr" in line
    assert line.endswith("--limit 5 --include_path mine") and "--tasks mme,vtr_textvqa_ocr" in line
    alone = kit.spelled(kit.Launch("a/b", tmp_path, device="cuda:1"), kit.Job("none", ("mme",)))
    assert alone.startswith("python -m lmms_eval --model vtr") and "device=cuda:1" in alone
    assert "--include_path" not in alone
    ours = kit.arguments(kit.Launch("a/b", tmp_path), kit.Job("none", ("mme", "vtr_textvqa_ocr")))
    assert ours[-2] == "--include_path" and (Path(ours[-1]) / "vtr_textvqa_ocr.yaml").exists()


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model a,b: lmms-eval splits"):
        kit.check(kit.Launch("a,b", tmp_path))
    with pytest.raises(ValueError, match="several processes take a GPU each"):
        kit.check(kit.Launch("a", tmp_path, processes=2, device="cuda:1"))
    with pytest.raises(ValueError, match="vtr_textvqa_ocr must be in it too: copy the files of"):
        kit.check(kit.Launch("a", tmp_path, include=tmp_path), ["mme", "vtr_textvqa_ocr"])
    kit.check(kit.Launch("a", tmp_path, include=kit.TASKS), ["mme", "vtr_textvqa_ocr"])
    kit.check(kit.Launch("a", tmp_path, include=tmp_path), ["mme"])


def test_other_specs_have_other_files() -> None:
    assert len({slug(spec) for spec in ("m3:1", "m3:1.", "M3:1", "m3-1")}) == 4
    assert slug("fastv:keep=0.1,layer=2").startswith("fastv-keep-0-1-layer-2-")
