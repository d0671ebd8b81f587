"""Groups of policies, as ``vtr list`` has them, to filter a leaderboard by."""

from __future__ import annotations

from vtr.eval.report.page.data import Result

from vtr.groups import OTHERS, TOGETHER, brief, grouped


def of(result: Result) -> dict[str, str]:
    """Name of a policy (not of no reduction) → the short title of its group; groups in the order of ``vtr list``."""
    titled = {name: title for title, names in grouped().items() for name in names} | {"chain": TOGETHER}
    order = list(dict.fromkeys(titled.values()))
    names = dict.fromkeys(row["name"] for row in result.rows if row["policy"] != "none")
    found = {name: titled.get(name, OTHERS) for name in names}
    order += [title for title in found.values() if title not in order]
    return {name: brief(found[name]) for name in sorted(found, key=lambda name: order.index(found[name]))}
