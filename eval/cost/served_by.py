"""The processes of a server on this machine: what time of the processor and what memory they have taken."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

HERE = ("127.0.0.1", "localhost", "::1")


class Processes:
    """A server's process and all that it has started: vLLM's scheduler and worker are processes of their own.

    Args:
        pids: of all of them.
    """

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids

    @classmethod
    def behind(cls, url: str) -> Processes | None:
        """Those of who listens at ``url``; None where it is another machine, or psutil is not installed here."""
        try:
            import psutil
        except ImportError:
            return None
        parts = urlsplit(url)
        if parts.hostname not in HERE or not (found := _listening(psutil, parts.port or 80)):
            return None
        first = psutil.Process(min(found))
        return cls([first.pid, *(child.pid for child in first.children(recursive=True))])

    def seconds(self) -> float:
        """Time of the processor, of all of them together."""
        times = [one.cpu_times() for one in self._alive()]
        return float(sum(one.user + one.system for one in times))

    def resident(self) -> dict[str, float]:
        """Memory of each, MiB, by number and name."""
        return {f"{one.pid} {one.name()}": one.memory_info().rss / 2**20 for one in self._alive()}

    def _alive(self) -> list[Any]:
        import psutil

        return [psutil.Process(pid) for pid in self.pids if psutil.pid_exists(pid)]


def _listening(psutil: Any, port: int) -> set[int]:
    try:
        there = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # of other users' processes, on some systems
        return set()
    return {one.pid for one in there if one.status == "LISTEN" and one.laddr.port == port and one.pid}
