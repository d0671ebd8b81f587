"""Results of ``vtr eval`` from before its multi-modal gain and leakage were MMStar's.

Their ``blind`` is the gray picture, and stood for S_wv. Their ``text_only`` is the base language model where one was
given, else the model itself without an image: S_wv as MMStar has it. So nothing needs to be asked again, but S_wv where
there was a base language model. ``python -m vtr.eval.report.older FILE …`` writes files anew and says what moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtr.files import read_json


def renewed(data: dict[str, Any]) -> dict[str, Any]:
    """A result as it would be written now; anything but an older evaluation as it is.

    ``no_image`` and ``gain`` are None where the model was not asked without an image; ``leakage`` is None in any case:
    S_wv and S_t were never measured both.
    """
    old = data.get("reference")
    if data.get("kind") != "eval" or not isinstance(old, dict) or "blind" not in old:
        return data
    gray, text = old["blind"], old.get("text_only")
    no_image, base_lm = (text, None) if data.get("base_lm") is None else (None, text)
    reference = {"none": old["none"], "no_image": no_image, "gray": gray, "base_lm": base_lm}
    return {
        **data,
        "reference": {**reference, "majority": old["majority"]},
        "policies": [_row(row, data["data"], gray, no_image) for row in data["policies"]],
    }


def _row(row: Mapping[str, Any], data: Mapping[str, Any], gray: float, no_image: float | None) -> dict[str, Any]:
    everywhere = row["gain"] + gray if data.get("only_indispensable") else row["accuracy"]
    figures = {
        "gain": None if no_image is None else everywhere - no_image, "gray_gain": everywhere - gray, "leakage": None,
    }  # fmt: skip
    out: dict[str, Any] = {}
    for key, value in row.items():
        out.update(figures if key == "gain" else {} if key == "leakage" else {key: value})
    return out


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In words: S_wv, gain without reduction and leakage, before and after."""
    was, now = old["reference"], new["reference"]
    first, second = (next(row for row in one["policies"] if row["policy"] == "none") for one in (old, new))
    return (
        f"S_wv {_percent(was['blind'])} → {_percent(now['no_image'])}, gain without reduction "
        f"{_percent(first['gain'])} → {_percent(second['gain'])}, leakage {_percent(first['leakage'])} → –"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write evaluations from before multi-modal gain and leakage were MMStar's as they would be written now."""
    parser = argparse.ArgumentParser("python -m vtr.eval.report.older", description=main.__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="results of vtr eval; others are left alone"
    )
    try:
        for path in parser.parse_args(arguments).files:
            old = read_json(path, "a result file")
            new = renewed(old) if isinstance(old, dict) else old
            if new is not old:
                path.write_text(json.dumps(new, indent=1) + "\n")
                print(f"{path}: {moved(old, new)}")
    except (ValueError, OSError, KeyError) as error:
        parser.exit(1, f"{type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
