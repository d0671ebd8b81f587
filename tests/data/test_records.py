"""One reader of one's own data: ``vtr eval``, ``vtr search`` and ``vtr train`` find the same in the same file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner
from vtr.eval.accuracy.answers import question_of
from vtr.eval.accuracy.data import Bad, BadPictureError, Sample, open_data
from vtr.eval.accuracy.metrics import METRICS

import vtr
from tests.data.test_pictures import broken
from vtr.cli import app
from vtr.commands.search import _sides
from vtr.data.choices import BY_LETTER, letter_of
from vtr.search import Example, Split, examples
from vtr.training.data import read_samples

Said = list[tuple[str, str | None]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("p.png", "red"), ("q.png", "blue")):
        Image.new("RGB", (16, 16), color).save(tmp_path / name)
    return tmp_path


def ask(**fields: Any) -> dict[str, Any]:
    return {"image": "p.png", "question": "what", "answer": "a", **fields}


def evaluated(path: Path, **how: Any) -> Said:
    found = list(open_data(str(path), **how))
    if bad := [one.reason for one in found if isinstance(one, Bad)]:
        raise ValueError("\n".join(bad))
    return [(question_of(one), one.answer) for one in found if isinstance(one, Sample) and one.picture()]


def searched(path: Path, **how: Any) -> Said:
    return [(one.question, one.answer) for one in examples(path, **how)]


def by_command(path: Path, images: Path | None = None) -> Said:
    """What ``vtr search`` splits."""
    taken: list[Any] = []

    def split(made: Any, *how: Any) -> Any:
        taken.extend(made)
        return Split([Example(Image.new("RGB", (1, 1)), "q")], [Example(Image.new("RGB", (2, 2)), "q")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtr.search.split", split)
        _sides((str(path), images, ""), (9, 9), 0)
    return [(one.question, one.answer) for one in taken]


def trained(path: Path, **how: Any) -> Said:
    return [(one["question"], one["answer"]) for one in read_samples(path, **how)]


READERS: list[Callable[..., Said]] = [evaluated, searched, by_command, trained]


def written(folder: Path, text: str | bytes, name: str = "d.jsonl") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


TURNS = [
    {"from": "human", "value": "<image>\nwhat"},
    {"from": "gpt", "value": "a"},
    {"from": "human", "value": "sure"},
    {"from": "gpt", "value": "yes"},
]
TALK = {"id": "7", "image": "p.png", "conversations": TURNS}
CHOICE = f"what\nA. red\nB. blue\n{BY_LETTER}"
TWO = [("what", "a"), ("who", "b")]
BLUE = ask(question="who", answer="b", image="q.png")
GOOD: dict[str, tuple[str | bytes, Said]] = {
    "lines": (lines(ask(), BLUE), TWO),
    "blank lines": ("\n \t\n" + lines(ask()) + "\r\n\n" + lines(BLUE), TWO),
    "Windows": (lines(ask(), BLUE).replace("\n", "\r\n"), TWO),
    "no last newline": (lines(ask(), BLUE).rstrip(), TWO),
    "a byte-order mark": (lines(ask(), BLUE).encode("utf-8-sig"), TWO),
    "two files joined": (lines(ask()).encode("utf-8-sig") + lines(BLUE).encode("utf-8-sig"), TWO),
    "U+2028": (lines(ask(question="a\u2028b\u2029c\u0085d\x0be")), [("a\u2028b\u2029c\u0085d\x0be", "a")]),
    "not ASCII": (lines(ask(question="où ça?", answer="là 🐈")), [("où ça?", "là 🐈")]),
    "an array": (json.dumps([ask(), BLUE]), TWO),
    "an indented array": ("\n " + json.dumps([ask(), BLUE], indent=2), TWO),
    "an array with a mark": (json.dumps([ask(), BLUE]).encode("utf-8-sig"), TWO),
    "a number": (lines(ask(answer=3)), [("what", "3")]),
    "people": (lines(ask(answers=["unsure", "red", {"answer": "red"}])), [("what", "red")]),
    "people who disagree": (lines(ask(answers=["red", "blue", "blue", "red"])), [("what", "red")]),
    "people who are silent": (lines(ask(answer=["", None, " ", "blue"])), [("what", "blue")]),
    "null beside an answer": (lines(ask(answers=None, answer=None, label="red")), [("what", "red")]),
    "choices, index": (lines(ask(choices=["red", "blue"], answer=1)), [(CHOICE, "B")]),
    "choices, text": (lines(ask(choices=["red", "blue"], answer="Blue")), [(CHOICE, "B")]),
    "choices, letter": (lines(ask(options=["red", "blue"], answer="B")), [(CHOICE, "B")]),
    "choices, people": (lines(ask(choices=["red", "blue"], answers=[0, 1, 1])), [(CHOICE, "B")]),
    "choices, columns": (lines(ask(A="red", B="blue", answer="B")), [(CHOICE, "B")]),
    "choices, by letter": (lines(ask(choices={"A": "red", "B": "blue"}, answer="A")), [(CHOICE, "A")]),
    "choices, as ARC has them": (
        lines(ask(choices={"text": ["red", "blue"], "label": ["A", "B"]}, answer="A")), [(CHOICE, "A")],
    ),
    "no choices": (lines(ask(choices=[])), [("what", "a")]),
    "a mark in the question": (lines(ask(question="<image>\nwhat")), [("what", "a")]),
    "a conversation": (lines(TALK), [("what", "a"), ("sure", "yes")]),
    "conversations, array": (json.dumps([TALK, TALK]), [("what", "a"), ("sure", "yes")] * 2),
    "other names": (lines({"img": ["q.png"], "query": "what", "label": "a"}), [("what", "a")]),
    "a picture's bytes and path": (lines(ask(image={"bytes": None, "path": "p.png"})), [("what", "a")]),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", GOOD)
def test_all_read_the_same(name: str, reader: Callable[..., Said], folder: Path) -> None:
    text, said = GOOD[name]
    for file in ("d.jsonl", "d.json", "d.txt"):
        assert reader(written(folder, text, file)) == said
        (folder / file).unlink()
    written(folder, text)
    assert reader(folder) == said  # a folder with one JSONL file


@pytest.mark.parametrize("reader", READERS)
def test_pictures_in_another_folder_and_absolute_ones(reader: Callable[..., Said], folder: Path) -> None:
    (folder / "text").mkdir()
    path = written(folder / "text", lines(ask(), {**BLUE, "image": str(folder / "q.png")}))
    assert reader(path, images=folder) == TWO


DEEP = "[" * 100_000
NESTED = "[" * 800 + "]" * 800
BAD: dict[str, tuple[str | bytes, str]] = {
    "half a line": ('\n{"image": "p.png", ', "line 2 is not JSON"),
    "no object": ("[1, 2]", "line 1 is no JSON object"),
    "text": ('"text"', "line 1 is no JSON object"),
    "nothing but brackets": (DEEP, "line 1 is not JSON that can be read: it is nested too deeply"),
    "a deep answer": (f'{{"image": "p.png", "question": "q", "answer": {DEEP}', "nested too deeply"),
    "an answer nested": (f'{{"image": "p.png", "question": "q", "answer": {NESTED}}}', "an answer must be text"),
    "choices nested": (f'{{"image": "p.png", "question": "q", "answer": 0, "choices": {NESTED}}}', "a choice must be"),
    "a picture nested": (f'{{"image": {NESTED}, "question": "q", "answer": "a"}}', "no picture"),
    "a long number": (f'{{"image": "p.png", "question": "q", "answer": {"9" * 5000}}}', "line 1 is not JSON"),
    "UTF-16": (lines(ask()).encode("utf-16"), "is not UTF-8"),
    "UTF-16, no mark": (lines(ask()).encode("utf-16-le"), "is not UTF-8"),
    "Latin-1": (lines(ask(), ask(question="où")).encode("latin-1"), "line 2 is not UTF-8"),
    "Latin-1, array": (json.dumps([ask(), ask(question="où")], ensure_ascii=False, indent=0).encode("latin-1"),
                       "line 7: the question is no valid text"),
    "half a surrogate": ('{"image": "p.png", "question": "\\ud83d", "answer": "a"}', "line 1: the question is no"),
    "no answer": (lines({"image": "p.png", "question": "q"}), "line 1: no answer"),
    "an empty answer": (lines(ask(answer=" ")), "line 1: an empty answer"),
    "empty answers": (lines(ask(answer=["", ""])), "line 1: an empty answer"),
    "an answer that is an object": (lines(ask(answer=[{"answer": {"x": 1}}])), "line 1: an answer must be text"),
    "a mark in the answer": (lines(ask(answer="<image>")), "line 1: an answer has an <image> mark"),
    "no question": (lines({"image": "p.png", "answer": "a"}), "line 1: no question"),
    "an empty question": (lines(ask(question="<image>\n")), "line 1: no question"),
    "a number for a question": (lines(ask(question=5)), "line 1: the question must be text, got int"),
    "two marks": (lines(ask(question="<image> or <image>")), "line 1: the question has 2 <image> marks"),
    "no picture": (lines({"question": "q", "answer": "a"}), "line 1: no picture"),
    "a number for a picture": (lines(ask(image=5)), "line 1: no picture: a file's name is text, got int"),
    "text for bytes": (lines(ask(image={"bytes": "x"})), "line 1: no picture: its bytes are text"),
    "two pictures": (lines(ask(image=["p.png", "q.png"])), "line 1: 2 pictures"),
    "an index too far": (lines(ask(choices=["a", "b"], answer=2)), "line 1: answer 2 is no index"),
    "text for choices": (lines(ask(choices="ab")), "line 1: choices must be a list"),
    "null for a choice": (lines(ask(choices=["a", None])), "line 1: a choice is null"),
    "too many choices": (lines(ask(choices=list(map(str, range(27))))), "line 1: 27 choices"),
    "a cut array": (json.dumps([ask(), ask()], indent=0)[:-30], "line 7 is not JSON"),
    "an array without an end": (json.dumps([ask(), ask()])[:-1], "is not JSON: the array has no end"),
    "an array without commas": (json.dumps([ask(), ask()], indent=0).replace("},", "}"), "line 7 is not JSON: a comma"),
    "more than an array": (json.dumps([ask()]) + lines(ask()), "something stands behind the array's end"),
    "a deep array": (f"[{lines(ask())}, {{\"image\": {DEEP}", "line 2 is not JSON that can be read"),
    "a conversation of one": (lines({**TALK, "conversations": TURNS[:1]}), "line 1: the last turn has no answer"),
    "a conversation of the deaf": (lines({**TALK, "conversations": TURNS[::2]}), "line 1: turn 2 is from 'human'"),
    "no conversation": (lines({**TALK, "conversations": "hello"}), "line 1: conversations must be a list"),
    "a conversation of numbers": (lines({**TALK, "conversations": [{"from": "human", "value": 1}]}), "turn 1 must be"),
    "a conversation without a picture": (lines({"conversations": TURNS}), "line 1: no picture"),
    "a name with a null": (lines(ask(image="a\0b")), "line 1: .*null byte"),
    "a name too long": (lines(ask(image="x" * 5000)), "line 1: .*too long"),
    "a folder": (lines(ask(image=".")), "line 1: .*no regular file"),
    "no such picture": (lines(ask(), ask(image="none.png")), "line 2: picture: FileNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_all_name_the_file_and_line(name: str, reader: Callable[..., Said], folder: Path) -> None:
    text, told = BAD[name]
    path = written(folder, text)
    if reader is searched and name == "no answer":
        assert reader(path)[0][1] is None  # it may do without answers
        return
    with pytest.raises(ValueError, match=told) as error:
        reader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("reader", READERS)
def test_all_name_pictures_that_are_none(reader: Callable[..., Said], folder: Path) -> None:
    for told, picture in broken(folder).items():
        path = written(folder, lines(ask(), ask(image=picture.name)))
        with pytest.raises(ValueError, match=f"line 2: .*{picture.name}.*{told}"):
            reader(path)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_nothing_for_data(reader: Callable[..., Said], folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    for path in (folder / "pipe.jsonl", folder / "none.jsonl"):
        with pytest.raises(FileNotFoundError, match="no data at"):
            reader(path)
    with pytest.raises(ValueError, match="no JSONL file"):
        reader(written(folder, "image,question\n", "d.csv"))


def test_one_bad_record_ends_no_evaluation(folder: Path) -> None:
    path = written(folder, lines(ask()) + DEEP + "\n" + lines(TALK) + "{\n" + lines(BLUE))
    found = list(open_data(str(path)))
    assert [one.index for one in found] == list(range(6))
    assert [one.id for one in found] == ["0", "1", "7-0", "7-1", "4", "5"]
    assert [one.index for one in found if isinstance(one, Bad)] == [1, 4]
    assert len(list(open_data(str(path), limit=3))) == 3
    array = json.dumps([ask(), 5, BLUE], indent=0)
    assert [type(one) for one in open_data(str(written(folder, array)))] == [Sample, Bad, Sample]


def test_many_bad_records_are_counted_and_some_named(folder: Path) -> None:
    path = written(folder, lines(ask(), *[ask(answer="")] * 7))
    with pytest.raises(
        ValueError, match=r"7 of 8 records cannot be used:\n.*line 2: .*\n.*line 3: .*\n.*line 4.*\n.* 4 more"
    ):
        read_samples(path)
    with pytest.raises(ValueError, match=r"2 of 3 records cannot be used:\nrecord 1: .*\nrecord 2: "):
        examples([(Image.new("RGB", (2, 2)), "q"), ("none.png", ""), ("none.png", 5)])


def test_the_right_letter() -> None:
    assert [letter_of(answer, ["<", ">", "= "]) for answer in ("<", ">", "C", "b")] == ["A", "B", "C", "B"]
    with pytest.raises(ValueError, match="'x' is none of the choices"):
        letter_of("x", ["a", "b"])


def test_an_answer_that_is_no_choice_is_refused_where_one_is_needed(folder: Path) -> None:
    path = written(folder, lines(ask(choices=["red", "blue"], answer="green")))
    for reader in (searched, by_command, trained):
        with pytest.raises(ValueError, match="line 1: the answer 'green' is none of the choices"):
            reader(path)
    (sample,) = open_data(str(path))
    assert isinstance(sample, Sample)
    assert METRICS["auto"].problem(sample.answers, sample.choices)  # bad in an evaluation by choice


def test_a_search_measures_choices_by_letter_or_text(folder: Path) -> None:
    from vtr.eval.studies import schedule_report

    model, processor = vtr.pocket.load()
    (one,) = examples(written(folder, lines(ask(choices=["red", "blue"], answer=1))))
    assert (one.question, one.answer, one.choices) == (CHOICE, "B", ("red", "blue"))
    said = iter(["blue", "A", "(B)"])
    for right in (1.0, 0.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "vtr.eval.accuracy.answers.Bench.say",
                lambda self, inputs, policy: self.model(**inputs) and [next(said)],
            )
            (line,) = schedule_report.measure(vtr.patch(model), processor, {"none": None}, [one])
        assert line.scores == [right]


def test_data_sets_of_the_hub_are_read_too(folder: Path) -> None:
    pytest.importorskip("datasets")
    path = written(folder, lines(ask(), BLUE), "q.json")
    spec = f"hf:json,data_files={path},split=train"
    for reader in (evaluated, searched, trained):
        assert reader(spec, images=folder) == TWO  # type: ignore[arg-type]


# -- the commands ------------------------------------------------------------------------------------------------------
COMMANDS = {
    "train": lambda path, out: ["train", "pmod", str(path), str(out), "--steps", "1"],
    "search": lambda path, out: ["search", "gsearch", "--data", str(path), "--out", str(out), "--calibration", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["nothing but brackets", "UTF-16", "text for bytes", "no such picture"])
def test_commands_refuse_in_words_before_anything_is_made(command: str, name: str, folder: Path) -> None:
    text, _ = BAD[name]
    path = written(folder, text)
    result = CliRunner().invoke(app, COMMANDS[command](path, folder / "out"))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "d.jsonl" in "".join(result.output.split())
    assert not (folder / "out").exists()


def test_an_evaluation_counts_and_shows_them(folder: Path) -> None:
    broken(folder)
    names = ["p.png", "cut.jpg", "pipe.png", "bomb.png"]
    path = written(folder, lines(*[ask(image=name) for name in names]) + DEEP)
    result = CliRunner().invoke(
        app, ["eval", "-p", "none", "--data", str(path), "--out", str(folder / "out"), "--processes", "1"]
    )
    assert result.exit_code == 0, result.output
    body = json.loads((folder / "out" / "results.json").read_text())
    assert (body["data"]["samples"], body["data"]["bad"]) == (1, 4)
    reasons = [one["reason"] for one in body["data"]["bad_examples"]]
    assert [reason.startswith(f"{path}, line {n}") for n, reason in enumerate(reasons, 2)] == [True] * 4
    assert "1 samples, 4 bad" in " ".join(result.output.split())


# -- anything at all ---------------------------------------------------------------------------------------------------
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["p.png", "<image>"]),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(
            st.sampled_from(["bytes", "path", "text", "answer", "A", "B", "from", "value"]), some, max_size=3
        )
    ),
    max_leaves=8,
)
NAMES = ["id", "image", "question", "answer", "answers", "choices", "conversations", "A", "B", "kind", "image_id"]


@settings(max_examples=150, deadline=None)
@given(record=st.dictionaries(st.sampled_from(NAMES), ANYTHING) | ANYTHING, junk=st.binary(max_size=20))
def test_whatever_a_line_holds_it_is_a_sample_or_bad(
    record: Any, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "anything"
    folder.mkdir(exist_ok=True)
    text = json.dumps(record).encode()
    for body in (text + b"\n" + junk, b"[" + text + b"," + junk, b"[{}," + text + b"]" + junk):
        path = written(folder, body)
        try:
            found = list(open_data(str(path)))
        except ValueError as error:
            assert str(path) in str(error)
            continue
        for one in found:
            if isinstance(one, Bad):
                assert one.reason.startswith(str(path)) and len(one.reason) < len(str(path)) + 400
                continue
            assert one.question and one.answers and all(one.answers)
            with pytest.raises(BadPictureError, match="line"):
                one.picture()  # there is none in that folder
