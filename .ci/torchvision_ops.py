"""Let torchvision's Python parts be imported where its compiled operators are for another build of torch.

PyPI's torchvision is built for CUDA. Beside torch for CPUs its operators do not load, and its import fails at the two
that it registers fakes for; declared, they are there and not usable, which is enough for transforms.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = '@torch.library.register_fake("torchvision::nms")'
DECLARED = "".join(
    f'torch.library.define("torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
    for name in ("nms", "qnms")
)


def main() -> None:
    """Edit the installed torchvision, once, if it needs it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None, "torch is not installed here"
    path = Path(found.origin).parents[1] / "torchvision" / "_meta_registrations.py"
    text = path.read_text()
    if DECLARED not in text and MARK in text and not _loads():
        path.write_text(text.replace(MARK, f"{DECLARED}\n\n{MARK}"))


def _loads() -> bool:
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError):
        return False
    return True


if __name__ == "__main__":
    main()
