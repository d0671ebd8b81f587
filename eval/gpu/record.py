"""What a run is told, and what has come of its parts: written to a file after each of them."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vtr.eval.report import results

MOST_GB = 75.0
"""A card of 80 GB must do."""


@dataclass(frozen=True)
class Setup:
    """What a run is told.

    Attributes:
        small: tiny sizes, which a CPU runs in a minute. seconds: no part starts that may end later.
    """

    device: torch.device
    small: bool = False
    seconds: float = 450.0
    seed: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What is timed: bfloat16 on a GPU."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def repeats(self) -> int:
        return 1 if self.small else 5

    @property
    def tokens(self) -> int:
        """Decoded tokens that are timed."""
        return 3 if self.small else 24


@dataclass
class Record:
    """The parts of a run.

    Attributes:
        out: the file, or None for none. parts: name → state ("done", "failed", "left out"), seconds, error, what was
            found. faults: oracles that did not hold, in words.
    """

    setup: Setup
    out: Path | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the run should end."""
        return self.started + self.setup.seconds - time.monotonic()

    def run(self, name: str, measure: Callable[[dict[str, Any]], None], needs: float = 0.0) -> None:
        """Run one part if ``needs`` seconds are left; what it fills its dict with counts even if it fails later."""
        part = self.parts[name] = {"state": "left out", "seconds": 0.0, "found": {}}
        if self.left() >= needs:
            began = time.monotonic()
            self._reset_peak()
            try:
                measure(part["found"])
                part["state"] = "done"
            except Exception as error:  # the next part may well run
                part |= {"state": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "where": _where(error)}
            part |= {"seconds": round(time.monotonic() - began, 1), "peak_gb": self._peak_gb(name)}
        print(
            f"{name}: {part['state']}, {part['seconds']} s{': ' + part['error'] if 'error' in part else ''}", flush=True
        )
        self.save()

    def fault(self, what: str) -> None:
        """Note an oracle that did not hold."""
        self.faults.append(what)
        print(f"  does not hold: {what}", flush=True)

    def save(self) -> None:
        """Write the file as it stands."""
        if self.out is not None:
            results.save(self.out, "gpu", self.body(), seed=self.setup.seed, device=self.setup.device)

    def body(self) -> dict[str, Any]:
        """What is measured, as JSON has it."""
        told = {"small": self.setup.small, "budget_s": self.setup.seconds}
        return {**told, "parts": finite(self.parts), "faults": list(self.faults)}

    def headed(self) -> dict[str, Any]:
        """With what it is measured on, as the file has it."""
        return {**results.head("gpu", self.setup.seed, self.setup.device), **self.body()}

    def status(self) -> int:
        """The exit status: 1 if a part failed or an oracle did not hold, 2 if a part was left out, else 0."""
        states = {part["state"] for part in self.parts.values()}
        return 1 if self.faults or "failed" in states else 2 if "left out" in states else 0

    def _reset_peak(self) -> None:
        if self.setup.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.setup.device)

    def _peak_gb(self, name: str) -> float | None:
        """Most memory that tensors had during the part, in GB (10⁹ bytes); None on a CPU."""
        if not self.setup.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(self.setup.device) / 1e9
        if peak > MOST_GB:
            self.fault(f"{name} took {peak:.1f} GB of memory, more than {MOST_GB:.0f}")
        return round(peak, 2)


def _where(error: BaseException) -> list[str]:
    """The last lines that were running, innermost last, as "folder/file.py:line in function"."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}" for frame in frames]


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
