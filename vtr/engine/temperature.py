"""Attention modules that scale their queries by where they take them to stand (Llama4's layers without rope).

They count columns from the first of the call on. Of packed rows that is wrong: what they did is taken back, and the
positions that the tokens have are used instead. Up to the length from which on a module scales at all, nothing is done.
"""

from __future__ import annotations

from typing import Any

import torch


def scales_by_column(module: Any) -> bool:
    """Whether an attention module does so."""
    tuned = getattr(module, "attn_temperature_tuning", False)
    return bool(tuned) and not getattr(module, "use_rope", True) and hasattr(module, "floor_scale")


def by_position(module: Any, query: torch.Tensor, positions: torch.Tensor | None, past: int, last: int) -> torch.Tensor:
    """Queries scaled by their positions, not by their columns.

    Args:
        query: [rows, heads, n, d]. positions: int64, of the n tokens, or of each row's one. past: columns before these.
        last: no column or position is as large as this.
    """
    if positions is None or not scales_by_column(module) or max(last, past + query.shape[2]) < module.floor_scale:
        return query
    columns = torch.arange(past, past + query.shape[2], device=query.device)
    right, wrong = (_scale(module, t.to(query.device)) for t in (positions, columns))
    each = (right / wrong).view(-1, 1, 1, 1) if len(query) > 1 or query.shape[2] == 1 else (right / wrong)[:, None]
    return (query * each).to(query.dtype)


def _scale(module: Any, positions: torch.Tensor) -> torch.Tensor:
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
    return torch.log1p(steps) * module.attn_scale + 1.0
