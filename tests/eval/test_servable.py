"""The checkpoint that a server is measured with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from typer.testing import CliRunner
from vtr.eval.cost import servable

import vtr


def test_it_is_written_and_loads(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(servable.main)
    run = CliRunner().invoke(app, [str(tmp_path / "m"), "--layers", "2", "--hidden-size", "256"])
    assert run.exit_code == 0 and "M parameters" in run.output
    model, processor = vtr.pocket.load(folder=tmp_path / "m")
    vtr.patch(model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w3 what w4"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.new("RGB", (96, 60))], return_tensors="pt")
    assert inputs["input_ids"][0].tolist().count(3) == 576 and inputs["input_ids"].shape == (1, 579)
    model.generate(**inputs, policy="m3:tokens=36", max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert vtr.report(model).rows[0].vision_tokens == [36, 36]
    assert CliRunner().invoke(app, [str(tmp_path / "n"), "--hidden-size", "200"]).exit_code == 2
