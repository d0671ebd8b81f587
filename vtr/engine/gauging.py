"""How much of the attention on a picture is left at a policy's cuts: what one that chooses may judge a try by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import UnsupportedError
from vtr.engine.attention import Probe
from vtr.engine.trace import RowTrace

if TYPE_CHECKING:
    from vtr.engine.probes import Probes


class Gauge:
    """The rows of a forward whose cuts are gauged (``Row.gauged``) by the attention that goes.

    It is what the row's last text token pays in the layer before the cut, the last one in which all were there: mean
    over heads. It is worked out where something is cut and nowhere else. Until then the keys of a layer are held, and
    a query of each row. Rows that are ranked by it anyway get it for nothing.

    Args:
        probes: by which it is found.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.rows = [i for i, row in enumerate(probes.rows) if row.gauged and row.asks("prune")]
        self._later: dict[int, Any] = {}
        self._paid: torch.Tensor | None = None

    def asked(self, past: Sequence[int], known: Sequence[int]) -> list[Probe]:
        """What a layer is to note. past: cached tokens of each row. known: rows that ask for the same themselves."""
        rows = [i for i in self.rows if self.probes.rows[i].vision.count and i not in known]
        groups = [[i] for i in rows] if past else [rows] if rows else []
        return [Probe(self.probes.asked("last", group), group[0] if past else None, later=True) for group in groups]

    def take(self, found: dict[int, Any]) -> None:
        """Which probe → what works out its scores, of the layer that has just run."""
        self._later, self._paid = found, None

    def cut(
        self, index: int, rows: Sequence[int], chosen: torch.Tensor, left: Sequence[int], traces: Sequence[RowTrace]
    ) -> None:  # fmt: skip
        """Some rows are about to be cut at layer ``index``: note what stays.

        Args:
            chosen, left: of all rows, as :func:`vtr.engine.ranking.keep` says it.

        Raises:
            UnsupportedError: there was no attention yet.
        """
        mine = [i for i in rows if i in self.rows]
        spans = self.probes.packed.vision_spans() if mine else []
        parts = chosen.split(list(left)) if mine else ()
        for i in mine:
            got = self._got(i, index)
            share = got.index_select(0, parts[i] - spans[i].start).sum() / got.sum().clamp_min(1e-12)
            before = traces[i].stayed
            traces[i].stayed = share if before is None else share * before.to(share.device)

    def _got(self, i: int, index: int) -> torch.Tensor:
        """float32 [vision tokens of row ``i``]: what they got in the layer before ``index``."""
        probes = self.probes
        later = any(i in probes.of(n).asked.rows for n in self._later)
        if later and self._paid is None:
            self._paid = probes.of_all({n: probes.now(n, one) for n, one in self._later.items()})
        got = self._paid if later else probes.scores if i in probes.ranked else None
        if got is None:
            policy = probes.rows[i].policy
            raise UnsupportedError(
                f"{policy.spec if policy else None!r} drops tokens at layer {index}, where no attention before says "
                "how much they had: let it cut at a later layer, or judge by signal='confidence'"
            )
        return got.index_select(0, probes.packed.vision[probes.packed.vision_spans()[i]])


def stayed(traces: Sequence[RowTrace], device: torch.device) -> torch.Tensor:
    """float32 [rows]: see :attr:`vtr.base.Began.stayed`; 1 where nothing was cut."""
    one = torch.ones((), device=device)
    return torch.stack([one if trace.stayed is None else trace.stayed.to(device) for trace in traces])
