"""The playground as a Hugging Face Space; ``python app.py`` runs it here. What the variables mean: README.md."""

from __future__ import annotations

import os

from vtr.play.ask import Player
from vtr.play.page import build, launch

demo = build(Player(os.environ.get("VTR_MODEL"), seconds=float(os.environ.get("VTR_TIME_LIMIT", "60"))))

if __name__ == "__main__":
    launch(demo, max_upload_mb=int(os.environ.get("VTR_MAX_UPLOAD_MB", "10")))
