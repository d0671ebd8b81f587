"""What every policy must show of batches: a row is what it is alone, and a cache changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.conftest import Pair

Close = Callable[[Tensor, Tensor], None]


def check_decoding(
    model: Any, inputs: dict[str, Tensor], policies: list[Any], run: dict[str, Any], close: Close
) -> Any:
    """Every row decodes what it decodes alone, with the same logits; returns the batch's outcome and each row's."""
    steps = run["max_new_tokens"]
    together, rows = tiny.generate(model, inputs, policy=policies, **run), []
    for b, policy in enumerate(policies):
        alone = tiny.generate(model, tiny.single(inputs, b, model), policy=policy, **run)
        assert torch.equal(together.sequences[b, -steps:], alone.sequences[0, -steps:])
        close(torch.stack([step[b] for step in together.logits]), torch.cat(alone.logits))
        rows.append(alone)
    return together, rows


def check_beams(pair: Pair, rows: list[Any], policies: list[Any], returned: int, steps: int) -> None:
    """Every row has the beams it has alone."""
    inputs, search = tiny.batch(pair.stock, rows), {"num_beams": 3, "num_return_sequences": returned}
    together = tiny.generate(pair.patched, inputs, policy=policies, max_new_tokens=steps, **search)
    for b, policy in enumerate(policies):
        row = tiny.single(inputs, b, pair.stock)
        alone = tiny.generate(pair.patched, row, policy=policy, max_new_tokens=steps, **search)
        assert torch.equal(together[b * returned : (b + 1) * returned, -steps:], alone[:, -steps:])


def check_no_cache(pair: Pair, rows: list[Any], policies: list[Any], run: dict[str, Any], close: Close) -> None:
    """Decoding without a cache gives the same ids and logits."""
    inputs = tiny.batch(pair.stock, rows)
    cached = tiny.generate(pair.patched, inputs, policy=policies, **run)
    plain = tiny.generate(pair.patched, inputs, policy=policies, use_cache=False, **run)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))
