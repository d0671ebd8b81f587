"""``python -m vtr.auto``: other people's scripts run reduced, without an edit."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import vtr
from tests import llava_package
from tests.versions import as_named_here
from vtr.chat import prompt
from vtr.commands.auto import main

ROOT = Path(__file__).parents[2]

EVALUATE = '''
"""An evaluation as people publish it."""
import argparse
import pickle
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


class Row:
    def __init__(self, text):
        self.text = text


def main():
    parser = argparse.ArgumentParser(description="their help")
    parser.add_argument("--model")
    parser.add_argument("--policy", help="of theirs, not ours")
    parser.add_argument("images", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, torch_dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": "how many shapes are pink"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for path in args.images:
        inputs = processor(text=text, images=Image.open(path).convert("RGB"), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
        print(out.logits[0].double().sum().item(), out.sequences[0].tolist()[-3:])
    print(pickle.loads(pickle.dumps(Row("pickled"))).text, sys.argv[1:3], __file__ == sys.argv[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def test_what_the_docs_show_works(auto: Any) -> None:
    text = (ROOT / "docs" / "ways-in.md").read_text()
    code = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "load_pretrained_model" not in block]
    names: dict[str, Any] = {}
    for block in code:
        exec(as_named_here(block), names)
    assert len(code) == 5 and names["answer"] == "orange" and not auto.patched()


def run(
    *args: str | Path, policy: str | None = None, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env.pop("VTR_POLICY", None)
    env |= {} if policy is None else {"VTR_POLICY": policy}
    env |= {} if path is None else {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "their eval" / "evaluate_vqa.py"
    path.parent.mkdir()
    path.write_text(EVALUATE)
    return path


def test_a_script_runs_reduced_without_an_edit(script: Path) -> None:
    from PIL import Image

    model, processor = vtr.pocket.load()
    paths = sorted(vtr.pocket.SAMPLES.glob("*.png"))[:2]
    text = prompt(processor, "how many shapes are pink")
    want = []
    for path in paths:
        inputs = processor(text=text, images=Image.open(path).convert("RGB"), return_tensors="pt")
        out = vtr.patch(model).generate(
            **inputs,
            policy="fastv:keep=0.1,layer=2",
            max_new_tokens=3,
            output_logits=True,
            return_dict_in_generate=True,
        )
        want.append((out.logits[0].double().sum().item(), out.sequences[0].tolist()[-3:]))
    own = ["--model", str(vtr.pocket.WEIGHTS), "--policy", "theirs", *map(str, paths)]
    done = run("-m", "vtr.auto", script, *own, policy="fastv:keep=0.1,layer=2", cwd=script.parent)
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    assert [eval(row.replace(" ", ",", 1)) for row in rows] == [(pytest.approx(total), ids) for total, ids in want]
    assert last == f"pickled ['--model', {str(vtr.pocket.WEIGHTS)!r}] True"
    assert "LlavaNextForConditionalGeneration is patched, default policy: fastv:keep=0.1" in done.stderr
    assert "kept 28.0 % of its vision tokens (fastv:keep=0.1)" in done.stderr


def test_a_module_and_its_own_help(
    auto: Any, script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("VTR_POLICY", "none")
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["--quiet", "-m", "evaluate_vqa", "--help"])
    out = capsys.readouterr()
    assert stopped.value.code == 0 and "their help" in out.out and "--policy POLICY" in out.out and not out.err
    main(["-m", "tests.alone"])
    assert capsys.readouterr().err.startswith("vtr.auto: no model of a known family was built: nothing was reduced")


def test_wrong_usage_is_told_at_once(script: Path) -> None:
    """Before anything of theirs runs."""
    wrong = run("-m", "vtr.auto", script, policy="fstv:keep=0.1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith(
        "vtr.auto: VTR_POLICY='fstv:keep=0.1': unknown policy 'fstv' (did you mean fastv?); known: auto, autoscale, "
    )


def test_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code, said in (
        (["--help"], 0, "torchrun"),
        (["--polcy", "x", "eval.py"], 2, "No such option"),
        (["evel.py"], 2, "there is no script 'evel.py'; to run a module put -m in front of it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        out = capsys.readouterr()
        assert stopped.value.code == code
        assert said in out.out + out.err


ORIGINAL = """
import sys

import torch
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image


def ask(path, picture):
    torch.set_num_threads(1)
    name = get_model_name_from_path(path)
    tokenizer, model, image_processor, context_len = load_pretrained_model(path, None, name, device="cpu")
    image = Image.open(picture).convert("RGB")
    images = [x.to(model.device, torch.float16) for x in process_images([image], image_processor, model.config)]
    ids = tokenizer_image_token("what color is <image> the star", tokenizer, return_tensors="pt").unsqueeze(0)
    with torch.inference_mode():
        return model, model.generate(
            ids, images=images, image_sizes=[image.size], do_sample=False, max_new_tokens=8, use_cache=True
        ).tolist()


if __name__ == "__main__":
    print(ask(*sys.argv[1:])[1])
"""


@pytest.mark.skipif(not llava_package.INSTALLED, reason=llava_package.WHY)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_script_on_llavas_own_package(auto: Any, tmp_path: Path) -> None:
    """Its loader makes a class that is defined after vtr.auto came in, and brings the tower when the model is there."""
    tokenizer = AutoTokenizer.from_pretrained(vtr.pocket.WEIGHTS)
    folder = llava_package.checkpoint(
        tmp_path / "llava-tiny", "anyres", words=len(tokenizer), mm_use_im_patch_token=False, mm_use_im_start_end=False
    )
    tokenizer.save_pretrained(folder)
    (tmp_path / "theirs.py").write_text(ORIGINAL)
    picture, policy = vtr.pocket.SAMPLES / "sample-1.png", "globalcom2:retention=0.25"
    theirs = runpy.run_path(str(tmp_path / "theirs.py"))["ask"]
    (model, plain), _ = theirs(str(folder), str(picture)), auto.enable(policy)
    assert vtr.report(model).rows[0].policy is None
    model, want = theirs(str(folder), str(picture))
    counts = vtr.report(model).rows[0].vision_tokens
    assert counts == [counts[0]] * 5 and 40 < counts[0] < 60 and want != plain
    auto.disable()
    done = run("-m", "vtr.auto", tmp_path / "theirs.py", folder, picture, policy=policy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(want)
    assert f"LlavaLlamaForCausalLM is patched, default policy: {policy}" in done.stderr
