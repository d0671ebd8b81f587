"""Which tables a result file becomes: the same cells become HTML, Markdown and CSV."""

from __future__ import annotations

from vtr.eval.report import counted
from vtr.eval.report.page import benches, leaderboards
from vtr.eval.report.page.cells import Table
from vtr.eval.report.page.data import Result

MAKERS = {
    "eval": (leaderboards.leaderboard, leaderboards.by_kind),
    "policies": (benches.bench_policies,),
    "batch": (benches.batch,),
    "scale": (benches.scale,),
    "serve": (benches.serve,),
    "engine": (benches.engine,),
    "launches": (benches.launches,),
    "decode": (benches.decode,),
    "peers": (benches.peers,),
}

MORE = {
    "eval": (leaderboards.short,),
    "launches": tuple(map(benches.counts_of, counted.PARTS)),
    "decode": (benches.decode_short, benches.decode_ways),
}
"""Tables that Markdown files can have, and the page has not."""


def tables_of(result: Result) -> list[Table]:
    """The page's tables of a result file, the main one first."""
    return [make(result) for make in MAKERS[result.kind]]


def all_of(result: Result) -> list[Table]:
    """All tables of a result file, the main one first."""
    return tables_of(result) + [make(result) for make in MORE.get(result.kind, ())]
