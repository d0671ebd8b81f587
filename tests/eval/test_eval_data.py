"""Where samples come from, and that what cannot be used is reported with its place in the count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vtr.eval.accuracy.data import Bad, BadPictureError, Sample, open_data, samples_of

import vtr

RECORDS = [
    {"id": "p", "image": "red.png", "question": "what color?", "answer": "red", "kind": "color"},
    {"image": "red.png", "question": "which?", "answers": ["B"], "choices": ["blue", "red"], "category": "pick"},
    {"image": "sub/blue.png", "question": "what color?", "answers": [{"answer": "blue"}, {"answer": "navy"}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    Image.new("L", (5, 5), 7).save(tmp_path / "sub" / "blue.png")
    write(tmp_path / "questions.jsonl", RECORDS)
    return tmp_path


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in records))


def good(records: Iterator[Sample | Bad]) -> list[Sample]:
    found = list(records)
    assert all(isinstance(record, Sample) for record in found), found
    return found  # type: ignore[return-value]


def test_a_jsonl_with_pictures_beside_it(folder: Path) -> None:
    for spec in (str(folder / "questions.jsonl"), str(folder)):
        first, second, third = good(iter(open_data(spec)))
        assert (first.id, first.question, first.answers, first.choices) == ("p", "what color?", ("red",), None)
        assert (first.kind, first.group, second.group) == ("color", "red.png", "red.png")
        assert (second.id, second.choices, second.kind) == ("1", ("blue", "red"), "pick")
        assert (third.answers, third.kind) == (("blue", "navy"), "all")
        assert first.picture().getpixel((0, 0)) == (255, 0, 0)
        assert third.picture().mode == "RGB"
    assert [record.index for record in open_data(str(folder), limit=2)] == [0, 1]


def test_a_picture_asked_about_several_times_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = good(iter(open_data(str(folder))))
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: opened.append(path) or original(path, *args))
    for sample in (first, second, third, first):
        sample.picture()
    assert len(opened) <= 2  # none, if another test has opened the same files


def test_another_folder_of_pictures_and_other_names(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else"
    elsewhere.mkdir()
    write(elsewhere / "x.jsonl", [{"file": "red.png", "query": "what?", "gt": "red", "label": "wrong"}])
    source = open_data(str(elsewhere / "x.jsonl"), images=folder, columns={"image": "file", "answers": "gt"})
    (sample,) = good(iter(source))
    assert (sample.question, sample.answers, sample.picture().size) == ("what?", ("red",), (8, 6))
    with pytest.raises(ValueError, match="there is no 'picture'; a sample has id, image"):
        open_data(str(elsewhere / "x.jsonl"), columns={"picture": "file"})


def test_bad_records_are_reported_where_they_stand(folder: Path) -> None:
    Image.effect_noise((64, 64), 90).save(folder / "noise.png")
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:900])
    (folder / "text.png").write_text("no picture")
    ask = {"question": "what?", "answer": "red"}
    write(
        folder / "bad.jsonl",
        [
            {"image": "red.png", **ask},
            '{"image": "red.png", "question": ',
            {"image": "red.png", "question": "what?"},
            {"image": "red.png", "answer": "red"},
            ask,
            "[1, 2]",
            {"image": ["red.png", "red.png"], **ask},
            {"image": "red.png", "question": "what?", "answer": 5, "choices": ["a", "b"]},
            {"image": "red.png", "question": "what?", "answer": "", "id": 77},
            {"image": "broken.png", **ask},
            {"image": "text.png", **ask},
            {"image": "missing.png", **ask},
            {"image": "red.png", **ask},
        ],
    )
    found = list(open_data(str(folder / "bad.jsonl")))
    assert [record.index for record in found] == list(range(13))
    reasons = {record.index: record.reason for record in found if isinstance(record, Bad)}
    assert sorted(reasons) == list(range(1, 9))
    for index, said in {1: "line 2 is not JSON", 2: "no answer", 3: "no question", 4: "no picture", 5: "no JSON object",
                        6: "2 pictures", 7: "answer 5 is no index of 2 choices"}.items():  # fmt: skip
        assert said in reasons[index]
    assert found[8].id == "77"
    for index, said in {9: "truncated", 10: "cannot identify", 11: "No such file"}.items():
        sample = found[index]
        assert isinstance(sample, Sample)
        with pytest.raises(BadPictureError, match=said):
            sample.picture()


def test_not_even_text(folder: Path) -> None:
    (folder / "bytes.jsonl").write_bytes(b'\xff\xfe\n\n{"image": "red.png", "question": "q", "answer": "a"}\n')
    bad, fine = open_data(str(folder / "bytes.jsonl"))
    assert isinstance(bad, Bad) and isinstance(fine, Sample) and fine.index == 1


def test_an_integer_is_an_index_of_the_choices() -> None:
    record = {"image": "x.png", "question": "q", "answer": 1, "A": "red", "B": "blue"}
    (sample,) = samples_of(0, record, {}, None)
    assert isinstance(sample, Sample) and (sample.answers, sample.choices) == (("blue",), ("red", "blue"))
    (without,) = samples_of(0, {"image": "x.png", "question": "q", "answer": 1}, {}, None)
    assert isinstance(without, Sample) and without.answers == ("1",)


def test_the_pocket_tasks_are_those_of_the_evaluation() -> None:
    made = list(vtr.pocket.samples(20, split="test", seed=3))
    found = good(iter(open_data("pocket", limit=20, seed=3)))
    assert [(s.question, s.answers[0], s.kind) for s in found] == [
        (m["question"], m["answer"], m["type"]) for m in made
    ]
    same = {(a.group == b.group, x["image"] is y["image"]) for a, x in zip(found, made, strict=True)
            for b, y in zip(found, made, strict=True)}  # fmt: skip
    assert same == {(True, True), (False, False)}
    assert found[0].picture().tobytes() == made[0]["image"].tobytes()
    assert good(iter(open_data("pocket:split=val", limit=1)))[0].group != found[0].group


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give pocket, a JSONL file, a folder, or hf:NAME"):
        open_data(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="split=train, val or test"):
        open_data("pocket:split=all")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="no JSONL file: write one JSON object a line"):
        open_data(str(tmp_path / "x.txt"))
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [])
    with pytest.raises(ValueError, match="holds 2 JSONL files"):
        open_data(str(tmp_path))


# -- Hugging Face, offline ---------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return found


def test_a_saved_data_set_with_a_broken_picture(datasets: Any, folder: Path, tmp_path: Path) -> None:
    whole = (folder / "red.png").read_bytes()
    table = {
        "image": [{"bytes": data, "path": None} for data in (whole, whole, whole[:40])],
        "question": ["q0", "q1", "q2"],
        "answer": ["a", None, "c"],
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    data = datasets.Dataset.from_dict(table, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=data, val=data.select([0])).save_to_disk(tmp_path / "two")
    for spec in (str(tmp_path / "one"), f"hf:{tmp_path / 'two'},split=test"):
        first, second, third = open_data(spec)
        assert isinstance(first, Sample) and first.picture().getpixel((0, 0)) == (255, 0, 0)
        assert isinstance(second, Bad) and second.reason == "no answer"
        assert isinstance(third, Sample) and third.group != first.group
        with pytest.raises(BadPictureError, match=r"truncated|cannot identify"):
            third.picture()
    with pytest.raises(ValueError, match="has the splits test, val: name one"):
        open_data(str(tmp_path / "two"))


def test_json_and_imagefolder_builders_stream(datasets: Any, folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "q.json", [{"image": str(folder / "red.png"), "question": "q", "answer": "a"}])
    (sample,) = good(iter(open_data(f"hf:json,data_files={tmp_path / 'q.json'},split=train")))
    assert sample.picture().size == (8, 6)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("x.png", "y.png"):
        (pictures / name).write_bytes((folder / "red.png").read_bytes()[: 40 if name == "y.png" else None])
    (pictures / "metadata.csv").write_text("file_name,question,answer\nx.png,q0,a0\ny.png,q1,a1\n")
    first, second = good(iter(open_data(str(pictures))))
    assert (first.question, first.answers, first.picture().size) == ("q0", ("a0",), (8, 6))
    with pytest.raises(BadPictureError):
        second.picture()
    with pytest.raises(ValueError, match="cannot load data set no-such-builder"):
        open_data(f"hf:no-such-builder,data_dir={tmp_path},split=train")
