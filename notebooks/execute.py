"""Run notebooks on the pocket model and save their outputs: python notebooks/execute.py [NAME.ipynb …] (default: all).

One thread, so that times can be compared; pictures are stored with 256 colors, to keep every notebook under 1 MB.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
WIDTH = 1100
"""Pixels of the widest picture."""


def smaller(data: dict[str, Any]) -> None:
    """One PNG of few colors instead of a PNG and a JPEG."""
    if "image/png" not in data:
        return
    data.pop("image/jpeg", None)
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
        buffer, wide = io.BytesIO(), max(1.0, picture.width / WIDTH)
        small = picture.convert("RGB").resize((round(picture.width / wide), round(picture.height / wide)))
        small.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def execute(path: Path) -> None:
    """Run one notebook and write it back."""
    book, start = nbformat.read(path, as_version=4), time.perf_counter()
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
    seconds = time.perf_counter() - start
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        outputs = cell.get("outputs", [])
        cell.outputs = [out for out in outputs if out.get("name") != "stderr"] if cell.cell_type == "code" else []
        for out in outputs:
            smaller(out.get("data", {}))
        if cell.cell_type != "code":
            del cell["outputs"]
    nbformat.write(book, path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in sys.argv[1:] or sorted(str(path) for path in HERE.glob("*.ipynb")):
        execute(Path(name))
