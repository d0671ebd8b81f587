"""An environment for each peer: what it pins goes in, torch is borrowed from the environment that runs this."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

import torch
from vtr.eval.peers.catalogue import Peer
from vtr.eval.peers.channel import PeerError

READY = "vtr-ready.json"


def default_folder() -> Path:
    """``vtr/peers`` in the user's cache folder."""
    import os

    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vtr" / "peers"


def python_of(peer: Peer, folder: Path, timeout: float = 1800) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there; this one's if it needs nothing.

    The environment sees the packages beside our torch behind its own, so that both sides run the same torch and pip
    fetches only what the peer pins differently; that of a peer which stays ``alone`` sees none.

    Raises:
        PeerError: it cannot be installed; the message is pip's.
    """
    if not peer.requirements and not peer.bare:
        return Path(sys.executable)
    wanted = [list(peer.requirements), list(peer.bare), "alone" if peer.alone else torch.__version__]
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:10]
    home = folder / f"{peer.name.replace(' ', '-')}-{digest}"
    python = home / "bin" / "python"
    if (home / READY).is_file():
        return python
    venv.create(home, clear=True, with_pip=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not peer.alone:
        (site / "zz-borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    for packages, options in ((peer.requirements, []), (peer.bare, ["--no-deps"])):
        if packages:
            _pip(python, [*options, *packages], timeout)
    (home / READY).write_text(json.dumps(wanted))
    return python


def _pip(python: Path, arguments: list[str], timeout: float) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PeerError(f"pip install {' '.join(arguments)}: not done within {timeout:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise PeerError(f"pip install {' '.join(arguments)}: {lines[-1] if lines else 'failed'}")
