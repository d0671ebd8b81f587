"""Files that somebody sent: whatever is wrong with one is a ValueError, soon, and before much memory is taken."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from vtr.eval.accuracy.journal import Journal
from vtr.eval.report import page, results

import vtr
from tests import learned
from vtr.files import read_json
from vtr.pocket import POLICIES
from vtr.policies.trained._router import ROUTER
from vtr.search.state import Trials
from vtr.settings import policy_class

SECONDS, MIB = 5, 300
CONFIG, WEIGHTS = "vtr_policy.json", "vtr_policy.safetensors"


@contextmanager
def bounded() -> Iterator[None]:
    """Neither long nor large."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MIB


def router() -> vtr.AutoScale:
    made = vtr.AutoScale("router", scales=[1, 9, 36])
    shapes = [(6,), (6,), (4, 6), (4,), (2, 4), (2,)]
    made.load_tensors({name: torch.ones(shape) for name, shape in zip(ROUTER, shapes, strict=True)})
    return made


WITH_WEIGHTS: dict[str, Callable[[], vtr.Policy]] = {
    "pmod": learned.pmod,
    "dynamic-llava": learned.dynamic,
    "autoscale": router,
    "chain": lambda: vtr.Pool(2) + learned.pmod(),
}


@pytest.fixture(params=WITH_WEIGHTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    WITH_WEIGHTS[request.param]().save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, match: str | None = None) -> None:
    with bounded(), pytest.raises(ValueError, match=match):
        vtr.Policy.from_pretrained(folder)


def about_of(data: Any) -> Any:
    """What is said about the weights of a Learned policy, alone or in the chain."""
    return data["weights"].get("1", data["weights"])


# -------------------------------------------------------------------------------------------------------------- sizes
SIZES = [10**5, 10**7, 10**30, -1, 0, 47, True, False, 48.0, 48.5, "48", None, [48], {"a": 1}, 1e308, float("nan")]


@pytest.mark.parametrize("kind", ["pmod", "dynamic-llava", "chain"])
@pytest.mark.parametrize("value", SIZES, ids=repr)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_sizes_that_the_tensors_do_not_have(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    WITH_WEIGHTS[kind]().save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    about_of(data)[key] = value
    (tmp_path / CONFIG).write_text(json.dumps(data))
    if kind == "dynamic-llava" and key == "num_hidden_layers" and value == 47 and value is not True:
        assert vtr.Policy.from_pretrained(tmp_path).sizes["num_hidden_layers"] == 47  # type: ignore[attr-defined]
        return  # none of its tensors says how deep the model is: check() does, on the model
    refused(tmp_path)


HUGE = [
    ("dynamic-llava", "width", 2**40), ("dynamic-llava", "width", 10**30 * 4), ("dynamic-llava", "inner", 10**12),
    ("dynamic-llava", "blocks", 10**9), ("dynamic-llava", "blocks", 3), ("dynamic-llava", "heads", 10**9),
    ("pmod", "ratios", [0.5] * 4), ("pmod", "ratios", [0.5] * 100_000), ("pmod", "high", 0.2),
    ("pmod", "period", 10**30),
    ("autoscale", "scales", [1, 2, 3, 4]), ("autoscale", "scales", list(range(1, 100_000))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value"), HUGE, ids=lambda v: repr(v)[:30])
def test_settings_that_ask_for_other_tensors(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    WITH_WEIGHTS[kind]().save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    data["settings"][key] = value
    (tmp_path / CONFIG).write_text(json.dumps(data))
    refused(tmp_path)


def test_a_header_is_read_before_the_values(tmp_path: Path) -> None:
    """A gigabyte of tensors that the policy does not have is refused by what its header says."""
    learned.pmod().save_pretrained(tmp_path)
    size = 2**30
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # sparse: takes no room
    refused(tmp_path, r"unknown x \[268435456\]")
    vtr.FastV().save_pretrained(tmp_path / "plain")
    shutil.move(tmp_path / WEIGHTS, tmp_path / "plain" / WEIGHTS)
    refused(tmp_path / "plain", "FastV has no weights")


# ------------------------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, f"NaN or infinite values in {name}")


def test_a_converted_checkpoint_with_nan_is_refused() -> None:
    made = learned.pmod()
    bad = {name: tensor * float("nan") for name, tensor in made.tensors().items()}
    with pytest.raises(ValueError, match=r"NaN or infinite values in routers\.1\.bias"):
        learned.pmod().load_tensors(bad, made.about())
    with pytest.raises(ValueError, match="NaN or infinite values in mean"):
        router().load_tensors(router().tensors() | {"mean": torch.full((6,), torch.inf)})
    with pytest.raises(ValueError, match="std, which its inputs are divided by"):
        router().load_tensors(router().tensors() | {"std": torch.zeros(6)})


def raw_header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


FILES = {
    "empty": b"", "seven bytes": b"\0" * 7, "zeros": b"\0" * 64, "noise": bytes(range(256)) * 4,
    "a header of 2**60": raw_header(b"{}", 2**60), "a header of 50 MB": raw_header(b"{}", 50 * 2**20),
    "no header": raw_header(b"not json"), "a list": raw_header(b"[]"), "no tensors": raw_header(b"{}"),
    "deep": raw_header(b"[" * 100_000), "no UTF-8": raw_header(b'{"\xff": 1}'),
    "beyond its end": raw_header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "other bytes": raw_header(b'{"x":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}') + b"\0" * 4,
    "overflowing": raw_header(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "strange dtype": raw_header(b'{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}') + b"\0" * 4,
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_files_that_hold_no_tensors(folder: Path, what: str) -> None:
    (folder / WEIGHTS).write_bytes(FILES[what])
    refused(folder)


def changed(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    one = tensors[name]
    return {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "extra": tensors | {"more": torch.zeros(2)},
        "shape": tensors | {name: torch.zeros(3, 7, 2)},
        "scalar": tensors | {name: torch.zeros(())},
        "nothing in it": tensors | {name: torch.zeros(0)},
        "ints": tensors | {name: one.long()},
        "bools": tensors | {name: one.bool()},
        "all ints": {k: v.int() for k, v in tensors.items()},
        "flat": {k: v.flatten() if v.dim() == 2 else v for k, v in tensors.items()},
    }[how]  # fmt: skip


HOW = ["missing", "extra", "shape", "scalar", "nothing in it", "ints", "bools", "all ints", "flat"]


@pytest.mark.parametrize("how", HOW)
def test_tensors_that_are_not_the_policys(folder: Path, how: str) -> None:
    save_file(changed(load_file(folder / WEIGHTS), how), folder / WEIGHTS)
    refused(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_dtypes_load(folder: Path, dtype: torch.dtype) -> None:
    save_file({k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    vtr.Policy.from_pretrained(folder)


BASES = [[], "x", 3, {"a": None}, {"a": [1.0]}, {"a": ["1", "2"]}, {"a": [1.0, True]}, {"a": {"0": 1}}]


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_a_fingerprint_that_is_none(base: Any, tmp_path: Path) -> None:
    learned.pmod().save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    data["weights"]["base"] = base
    (tmp_path / CONFIG).write_text(json.dumps(data))
    refused(tmp_path, "fingerprint")


# ----------------------------------------------------------------------------------------------------------- settings
FASTV = '{"policy": "fastv", "settings": {"keep": 0.5}}'
CHAIN = '{"policy": "chain", "settings": {"policies": ['
TEXTS: dict[str, Any] = {
    "empty": "", "cut off": FASTV[:-3], "a list": "[]", "a number": "3", "null": "null", "a string": '"fastv"',
    "no policy": '{"settings": {}}', "no settings": '{"policy": "fastv"}', "unknown": '{"policy": "x", "settings": {}}',
    "a list for a name": '{"policy": ["fastv"], "settings": {}}', "null for a name": '{"policy": null, "settings": {}}',
    "settings as pairs": '{"policy": "fastv", "settings": [["keep", 0.5]]}',
    "null for settings": '{"policy": "fastv", "settings": null}',
    "unknown setting": '{"policy": "fastv", "settings": {"kept": 0.5}}',
    "deep": "[" * 100_000, "deep closed": "[" * 50_000 + "]" * 50_000,
    "deep inside": '{"policy": "fastv", "settings": {"keep": ' + "[" * 900 + "]" * 900 + "}}",
    "deep objects": '{"a":' * 100_000, "digits": '{"policy": "fastv", "settings": {"keep": ' + "9" * 100_000 + "}}",
    "digits in weights": FASTV[:-1] + ', "weights": ' + "9" * 4000 + "}", "too long": "[" + " " * 9 * 2**20 + "]",
    "UTF-16": FASTV.encode("utf-16"), "no UTF-8": b'{"policy": "\xff", "settings": {}}', "zeros": b"\0" * 100,
    "weights of its own": '{"policy": "pmod", "settings": {"weights": "."}}',
    "shipped weights": '{"policy": "pmod", "settings": {"weights": "pocket"}}',
    "a file": '{"policy": "gsearch", "settings": {"schedule": "/etc/passwd"}}',
    "a chain of files": CHAIN + '{"policy": "pmod", "settings": {"weights": "."}}]}}',
    "a chain of strings": CHAIN + '"fastv"]}}',
    "a chain of a number": '{"policy": "chain", "settings": {"policies": 3}}', "a chain of nothing": CHAIN + "]}}",
    "a chain without settings": '{"policy": "chain", "settings": {}}',
    "a chain of halves": CHAIN + '{"policy": "fastv"}]}}',
    "a long chain": CHAIN + ",".join(['{"policy": "chain", "settings": {}}'] * 9999) + "]}}",
    "a deep chain": CHAIN * 90_000,
    "a chain in a chain": CHAIN * 240 + FASTV + "]}}" * 240,
    "weights of a plain policy": FASTV[:-1] + ', "weights": {"hidden_size": 3}}',
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_settings_that_cannot_be(what: str, tmp_path: Path) -> None:
    text = TEXTS[what]
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    save_file({}, tmp_path / WEIGHTS)
    if what == "a chain in a chain" and _reads(tmp_path):
        return  # shallow enough for this Python
    refused(tmp_path)


def _reads(folder: Path) -> bool:
    try:
        return vtr.Policy.from_pretrained(folder) is not None
    except ValueError:
        return False


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a" / CONFIG).mkdir(parents=True)
    (tmp_path / "b").write_text("x")
    for folder in ("a", "b", "c"):
        with pytest.raises(FileNotFoundError):
            vtr.Policy.from_pretrained(tmp_path / folder)
    learned.pmod().save_pretrained(tmp_path / "d")
    (tmp_path / "d" / WEIGHTS).unlink()
    (tmp_path / "d" / WEIGHTS).mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks vtr_policy\.safetensors"):
        vtr.Policy.from_pretrained(tmp_path / "d")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(FASTV, encoding="utf-8-sig")
    assert vtr.Policy.from_pretrained(tmp_path) == vtr.FastV(0.5)


@pytest.mark.parametrize(
    "value", ["nowhere", "no/where", "x" * 300, "y/" * 3000, '"a\\u0000b"', "", "5", "null", '["a"]']
)
def test_weights_that_a_spec_names_and_nobody_has(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pmod", "dynamic-llava"):
        with pytest.raises((FileNotFoundError, ValueError)):
            vtr.policy(f"{name}:weights={value}")
    with pytest.raises(ValueError, match=r"allow_mismatch='no': say true or false"):
        vtr.policy("pmod:weights=pocket,allow_mismatch=no")
    with pytest.raises((FileNotFoundError, ValueError, TypeError)):
        vtr.policy(f"gsearch:schedule={value}")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**30, -(10**30), 10**400, 5e-324, 1e308, "", "0.5", "nan", "pocket", "/dev/zero"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4,
)  # fmt: skip
NAMES = [name for name in vtr.list_policies() if "test" not in name]
KNOWN = {name: {field.name for field in fields(policy_class(name)) if field.init} for name in NAMES}
FIELDS = sorted(set().union(*KNOWN.values()) | {"weights", "allow_mismatch"})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES), some=st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3), about=st.none() | ODD
)
def test_drawn_settings_load_or_are_refused(tmp_path: Path, name: str, some: dict[str, Any], about: Any) -> None:
    chosen = {key: value for key, value in some.items() if key in KNOWN[name]}
    data = {"policy": name, "settings": chosen, "weights": about}
    (tmp_path / CONFIG).write_text(json.dumps(data))
    save_file({"x": torch.zeros(2)}, tmp_path / WEIGHTS)
    if about is None:
        (tmp_path / WEIGHTS).unlink()
    with bounded():
        try:
            made = vtr.Policy.from_pretrained(tmp_path)
        except ValueError:
            return
    assert made.name == name and json.dumps(made.config())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.floats(0, 1),
    what=st.sampled_from([b"", b"\xff", b"9", b"-", b"[", b'"', b"NaN", b"null", b"true"]),
    cut=st.booleans(),
)
def test_spoilt_bytes_of_shipped_files(at: float, what: bytes, cut: bool, tmp_path: Path) -> None:
    whole = (POLICIES["pocket"] / "pmod" / CONFIG).read_bytes()
    place = int(at * len(whole))
    (tmp_path / CONFIG).write_bytes(whole[:place] + what + (b"" if cut else whole[place + 1 :]))
    shutil.copy(POLICIES["pocket"] / "pmod" / WEIGHTS, tmp_path / WEIGHTS)
    with bounded(), suppress(ValueError):
        vtr.Policy.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------- schedules, searches, results
LISTS = ["", "{}", "null", "3", '"x"', "[]", "[0]", "[0.0]", "[true]", "[null]", "[[1.0]]", "[1.0, 2.0]", "[NaN]",
         "[Infinity]", "[0.5, 0.6]", "[-1]", "[1.0, " + "9" * 5000 + "]", "[" * 60_000, "[" + "1," * 100_000 + "1]",
         b"\xff\xfe", b"\0"]  # fmt: skip


@pytest.mark.parametrize("text", LISTS, ids=lambda t: repr(t)[:20])
def test_schedules_that_are_none(text: Any, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (vtr.Schedule.load, vtr.GSearch, vtr.Schedule.named):
        with bounded(), pytest.raises(ValueError):
            read(path)
    with bounded(), pytest.raises(ValueError):
        vtr.GSearch(str(tmp_path))


def test_schedules_that_are_not_there(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "x", "x" * 5000, ""):
        with pytest.raises(FileNotFoundError):
            vtr.GSearch(str(name))
    with pytest.raises(FileNotFoundError):
        vtr.Schedule.load(tmp_path)


STATES = [
    "",
    "[]",
    "null",
    "3",
    '{"body": 3}',
    '{"version": 1, "sha256": "x", "body": {}}',
    "[" * 100_000,
    b"\xff",
    b"",
]


def spoilt_states() -> list[Any]:
    whole = {"identity": {"a": 1}, "scores": {"[1.0]": 0.5}, "spent": {}}
    parts = [{"identity": []}, {"identity": 3}, {"scores": []}, {"scores": {"[1.0]": "x"}}, {"scores": {"[1.0]": True}},
             {"scores": 3}, {"spent": 3}, {"spent": {"x": 1}}, {"spent": None}]  # fmt: skip
    return [whole | part for part in parts]


@pytest.mark.parametrize("state", [*STATES, *spoilt_states()], ids=lambda s: repr(s)[:40])
def test_states_of_searches_that_are_none(state: Any, tmp_path: Path) -> None:
    from vtr.search.state import _digest

    path = tmp_path / "state.json"
    if isinstance(state, dict):  # with a checksum that fits
        state = json.dumps({"version": 1, "sha256": _digest(state), "body": state})
    path.write_bytes(state if isinstance(state, bytes) else state.encode())
    before = path.read_bytes()
    with bounded(), pytest.raises(ValueError, match=r"state\.json"):
        Trials(path, {"a": 1})
    assert path.read_bytes() == before


HEAD: dict[str, Any] = {"kind": "eval", "command": "x", "hardware": {}, "versions": {}, "seed": 0}
CHANGED = [json.dumps(HEAD | {key: value}) for key in ("kind", "hardware", "versions") for value in (3.5, ["x"], None)]
RESULTS = ["", "[]", "null", "{}", "[" * 100_000, b"\xff\xfe", b"\0\0", '{"kind": 3}', *CHANGED]


@pytest.mark.parametrize("text", RESULTS, ids=lambda t: repr(t)[:60])
def test_result_files_that_are_none(text: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded(), pytest.raises(ValueError, match=r"r\.json"):
        results.load(path)
    with bounded(), pytest.raises(ValueError):
        page.write([path], tmp_path / "page")


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, b"\xff"], ids=lambda t: repr(t)[:20])
def test_settings_of_a_run_that_are_none(text: Any, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"index": 0}\n')
    (tmp_path / "settings.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded(), pytest.raises(ValueError, match=r"settings\.json"):
        Journal(tmp_path).begin({"a": 1}, resume=True)


def test_rows_that_are_none_are_made_again(tmp_path: Path) -> None:
    rows = ['{"index": 0}', '{"index": [1]}', '{"index": true}', '{"index": null}', "[" * 100_000, "3", '{"i": 1}']
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + "\n")
    journal = Journal(tmp_path)
    journal.read()
    assert list(journal.rows) == [0] and journal.redone == len(rows) - 1


@pytest.mark.parametrize(("key", "value"), [("name", []), ("policy", ["x"]), ("policy", 3), ("accuracy", None)])
def test_rows_of_results_that_cannot_be_shown(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    data = json.loads((Path(page.__file__).parents[2] / "results" / "pocket.json").read_text())
    data["policies"][1][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r\.json"):
        page.write([path], tmp_path / "page")
    del data["policies"][1], data["hardware"]["name"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r\.json"):
        page.write([path], tmp_path / "page")


LONG = [("[" * 9999, "nested too deeply"), ("{", "not JSON in UTF-8"), (" " * 10_001, "more than 10000 bytes")]


@pytest.mark.parametrize(("text", "why"), LONG, ids=["deep", "cut", "long"])
def test_the_reader_says_which_file_and_why(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.json is not a thing: .*{why}"):
        read_json(path, "a thing", 10_000)
