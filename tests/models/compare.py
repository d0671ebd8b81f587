"""What differs between the outcomes of two releases of transformers."""

from __future__ import annotations

from typing import Any

from rich.console import Console

RANK = {"not built": 0, "refused": 1, "padded": 2, "packed": 3}
"""Paths, the better ones later."""
Data = dict[str, Any]


def report(old: Data, new: Data, console: Console, gone_is_fine: bool = False) -> bool:
    """Say it; returns whether something is worse.

    Args:
        old, new: contents of outcomes.json. gone_is_fine: classes that are in ``old`` only, or that only there can be
            built tiny, are no loss.
    """
    before, now = old["classes"], new["classes"]
    if gone_is_fine:
        now = {name: one for name, one in now.items() if one["path"] != "not built"}
    console.print(f"transformers {old['transformers']} → {new['transformers']}")
    lines, worse = [], False
    for name in sorted(now.keys() - before.keys()):
        lines.append(f"new: {name}: {now[name]['path']}{_why(now[name])}")
    for name in sorted(before.keys() - now.keys()):
        lines.append(f"gone: {name}")
        worse |= not gone_is_fine and before[name]["path"] in ("packed", "padded")
    for name in sorted(before.keys() & now.keys()):
        found, bad = changes(before[name], now[name])
        lines += [f"{name}: {line}" for line in found]
        worse |= bad
    for line in lines or ["nothing changed"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return worse


def changes(old: Data, new: Data) -> tuple[list[str], bool]:
    """What differs of one class, in lines, and whether something of it is worse."""
    lines, worse = [], False
    if old["path"] != new["path"]:
        lines.append(f"{old['path']} → {new['path']}{_why(new)}")
        worse |= RANK[new["path"]] < RANK[old["path"]]
    before, now = checks(old), checks(new)
    for check in sorted(before.keys() | now.keys()):
        was, is_now = before.get(check, "not asked"), now.get(check, "not asked")
        if was.split(":")[0] == is_now.split(":")[0] and not is_now.startswith(("fails", "raises")):
            continue  # refusals may be worded anew
        if was != is_now:
            lines.append(f"{check}: {was} → {is_now}")
            failed = [said.startswith(("fails", "raises")) for said in (was, is_now)]
            worse |= (was == "passes" and is_now != "not asked") or (failed[1] and not failed[0])
    return lines, worse


def checks(one: Data) -> dict[str, str]:
    """Every check of a class and its outcome, in words."""
    found = {name: "passes" if one[name] else "fails" for name in ("off", "unpatch") if name in one}
    found |= one.get("policies") or {}
    pictures = one.get("pictures") or {}
    return found | {f"{name} on pictures": said for name, said in pictures.get("policies", {}).items()}


def _why(one: Data) -> str:
    return f" ({one['why']})" if one.get("why") else ""
