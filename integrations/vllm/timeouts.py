"""How long the gate waits for clients that say nothing. Needs uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_SECONDS = 10.0
"""Within how long a connection must have sent the head of a request, from its first byte or from its beginning on."""
SWITCH = 0.0005
"""Seconds after which a thread that reads a body lets the event loop go on (``sys.setswitchinterval``, where the gate
has the process for itself). Python's own 0.005 may be lost at every call of the loop to the system."""


def protocol() -> type:
    """uvicorn's protocol for HTTP/1.1, which by itself waits for a request's head for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is None or self.cycle.response_complete:
                self._wait()
            else:
                self._wait_no_more()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_more()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self.waiting is None:
                self.waiting = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

        def _wait_no_more(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Patient
