"""What policies before the tower save: tower and prefill, of pictures of several sizes, on the pocket LLaVA-NeXT.

``python -m vtr.eval.studies.before_tower --out docs/results``: FLOPs as torch counts them, CPU time of whole forwards
in turns, beside no policy and a policy behind the tower.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from vtr.eval.cost.interleave import in_turns, keep_freed_memory, median_ratio
from vtr.eval.report.results import hardware, versions

import vtr
from vtr.chat import encode

NONE = "none"
SPECS = (NONE, "fewer_crops", "downsample:0.5", "globalcom2:0.25", "fewer_crops+globalcom2:0.25")
SIZES = ((192, 192), (100, 98), (192, 100), (96, 100), (130, 120), (300, 100))
"""(width, height) in pixels; a tile has 96, and there are at most 2 × 2. A picture of the first fills them."""
QUESTION = "what color is the star"


def _picture(size: tuple[int, int]) -> Image.Image:
    """The first shipped sample, scaled."""
    return vtr.pocket.sample(0)[0].resize(size, Image.Resampling.LANCZOS)


@torch.inference_mode()
def measured(model: Any, processor: Any, size: tuple[int, int], repeats: int) -> dict[str, dict[str, Any]]:
    """Each policy's row for a picture of a size: tiles, vision tokens into the first layer, FLOPs of tower and decoder,
    and CPU time ÷ that of no policy."""
    rows: dict[str, dict[str, Any]] = {}
    runs = {}
    for spec in SPECS:
        before, rest = vtr.split(None if spec == NONE else spec)
        inputs = encode(processor, [QUESTION], [_picture(size)], before)

        def run(inputs: Any = inputs, rest: Any = rest) -> float:
            start = time.process_time()
            model(**inputs, policy=rest, logits_to_keep=1, use_cache=True)
            return time.process_time() - start

        run()
        entering = vtr.report(model).rows[0].vision_tokens
        with FlopCounterMode(display=False) as all_of_it:
            run()
        tower = model.get_encoder(modality="image")
        pixels = inputs["pixel_values"].flatten(0, 1)
        with FlopCounterMode(display=False) as of_tower:
            tower(pixels)
        total, seen = all_of_it.get_total_flops(), of_tower.get_total_flops()
        runs[spec] = run
        rows[spec] = {"tiles": len(pixels), "tokens": entering[0], "tower_flops": seen, "flops": total}
    times = in_turns(runs, repeats)
    for spec, row in rows.items():
        ratio = median_ratio(times[spec], times[NONE])
        row |= {"cpu_time": ratio.value, "low": ratio.low, "high": ratio.high}
    return rows


def main(
    out: Annotated[Path, typer.Option(help="the folder that gets before-tower.json")] = Path("docs/results"),
    repeats: Annotated[int, typer.Option(min=3, help="rounds, each policy once")] = 15,
) -> None:
    """Tower and prefill under policies before the tower, a policy behind it, and both."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model, processor = vtr.pocket.load()
    vtr.patch(model)
    found = []
    for size in tqdm(SIZES, desc="sizes"):
        found.append({"size": list(size), "rows": measured(model, processor, size, repeats)})
    out.mkdir(parents=True, exist_ok=True)
    body = {"model": "pocket", "repeats": repeats, "hardware": hardware(), "versions": versions(), "sizes": found}
    (out / "before-tower.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    Console(width=100).print(table(found))


def table(found: list[dict[str, Any]]) -> Table:
    """A row per size and policy."""
    shown = Table("picture", "policy", "tiles", "tokens", "tower MFLOPs", "all MFLOPs", "CPU time ÷ none")
    for one in found:
        for spec, row in one["rows"].items():
            shown.add_row(
                "×".join(map(str, one["size"])), spec, str(row["tiles"]), str(row["tokens"]),
                f"{row['tower_flops'] / 1e6:.0f}", f"{row['flops'] / 1e6:.0f}",
                f"{row['cpu_time']:.2f} ({row['low']:.2f}–{row['high']:.2f})",
            )  # fmt: skip
    return shown


if __name__ == "__main__":
    typer.run(main)
