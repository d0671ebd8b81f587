"""Whether this tree may be released as a tag says: python .ci/release.py v0.2.0 [--repository URL].

The tag, vtr.__version__ and CITATION.cff must name one version; CHANGELOG.md must begin with a dated section for it.
If the repository is named, the addresses in pyproject.toml and CITATION.cff must be its own.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def found(pattern: str, file: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)


def faults(tag: str, repository: str | None) -> list[str]:
    """What stands in the way, in words."""
    version, out = tag.removeprefix("v"), []
    said = {
        "the tag": [version] if tag.startswith("v") else [],
        "vtr/__init__.py": found(r'^__version__ = "(.+)"$', "vtr/__init__.py"),
        "CITATION.cff": found(r"^version: (.+)$", "CITATION.cff"),
        "CHANGELOG.md (a section with a date)": found(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", "CHANGELOG.md")[:1],
    }
    out += [f"{where} names {' '.join(names) or 'no version'}, not {version}" for where, names in said.items()
            if names != [version]]  # fmt: skip
    if repository is not None:
        urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
        cited = " ".join(found(r'^repository-code: "(.+)"$', "CITATION.cff"))
        addresses = {"pyproject.toml": urls["Repository"], "CITATION.cff": cited}
        out += [
            f"{where} says {url}, but this is {repository}" for where, url in addresses.items() if url != repository
        ]
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag")
    parser.add_argument("--repository")
    given = parser.parse_args()
    if problems := faults(given.tag, given.repository):
        raise SystemExit("\n".join(problems))
    print(f"{given.tag}: the versions agree")
