"""Driver and worker processes talk in JSON lines. Standard library only: workers run in other environments."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOG_TAIL = 400
"""Characters of a dead worker's log that its error shows."""


class PeerError(RuntimeError):
    """A worker failed; the message is its own."""


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's side: answer requests on stdin until it closes. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"ok": handlers[request.pop("do")](**request)}
        except Exception as error:  # whatever it is, it belongs into the table
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """The driver's side: a process that runs ``script`` with ``python``.

    Args:
        log: file for all it prints. threads: CPU threads of its numerical libraries.
    """

    def __init__(self, python: Path, script: Path, log: Path, threads: int = 1) -> None:
        self.log = log
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, env=environment
            )
        self._read = b""

    def ask(self, do: str, timeout: float, **request: Any) -> Any:
        """One request, one answer.

        Raises:
            PeerError: the worker says what went wrong, has died, or has not answered within ``timeout`` seconds (it is
                ended then).
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, or was ended
            raise self._died() from None
        reply = json.loads(self._line(do, timeout))
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply["ok"]

    def _line(self, do: str, timeout: float) -> bytes:
        assert self.process.stdout is not None
        pipe, end = self.process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._read:
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0.0))[0]:
                self.close()
                raise PeerError(f"no answer to {do!r} within {timeout:.0f} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise self._died()
            self._read += piece
        line, self._read = self._read.split(b"\n", 1)
        return line

    def _died(self) -> PeerError:
        code = self.process.wait()
        said = self.log.read_text(errors="replace").strip()[-LOG_TAIL:]
        return PeerError(
            f"the process ended with status {code}: {said.splitlines()[-1] if said else 'nothing printed'}"
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self.alive:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # a request it never read
                    pipe.close()
