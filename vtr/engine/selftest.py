"""Is a model that no test has seen computed rightly? Asked when it is patched, by its own answers.

Rows of random words around placeholders say a few tokens: one of them reduced before the decoder, one inside of it, one
not at all. What the last says, and where positions have one axis what the first says, the model as it was says too:
without pictures all placeholders are alike, so a reduced row is a shorter prompt. Row invariance alone would not do: a
decoder can be run wrongly in a way that all rows share.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import UnsupportedError
from vtr.engine.call import last_traces
from vtr.engine.rotary import many_axes

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch

STEPS = 3
"""Tokens that each row says: what is in a cache shows only behind the prompt."""
VISION, BEFORE, BEHIND = 16, 4, 6
"""Placeholders of a row, and words in front of them and behind."""
WORDS, FEW_WORDS = (1000, 2000), (10, 60)
"""From where words are drawn, of a usual vocabulary and of a tiny one."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF = 0.1
"""By how much logits may differ, as a share of the largest: kernels differ by less, a wrong decoder by more. In half
precision a router of experts may choose anew, which is no fault."""
COMPRESSED, PRUNED = "random:keep=0.5,before_decoder=true", "uniform:keep=0.5"

_passed: dict[tuple[Any, ...], float] = {}
"""What was found of models alike, by class, config, precision, attention and path."""


def self_test(patch: Patch) -> float | None:
    """Compare the patched model with itself without a policy, on the model's device and in its precision.

    Returns:
        The largest difference of logits, as a share of the largest logit; None where the weights are not loaded yet. Of
        models that are alike it is found once.

    Raises:
        UnsupportedError: they differ, or the model cannot be run on placeholders without pictures.
    """
    model, name = patch.model, type(patch.model).__name__
    if any(p.is_meta for p in model.parameters()) and not hasattr(model, "hf_device_map"):
        return None
    config, kernel = model.config, patch.decoder.text.config._attn_implementation
    key = type(model), config.to_json_string(use_diff=False), model.dtype, kernel, patch.path
    if key not in _passed:
        try:
            with _quiet(patch):
                off = _difference(patch)
        except Exception as error:  # whatever a stranger's model raises
            raise UnsupportedError(
                f"{name} cannot be tested on a prompt without pictures, so nobody knows whether vtr runs it rightly "
                f"({type(error).__name__}: {error}). vtr.patch(model, self_test=False) patches it untested"
            ) from error
        limit = TOLERANCE.get(model.dtype, HALF)
        if not off <= limit:
            raise UnsupportedError(
                f"{name}: with tokens reduced, its answers differ from the model's own by {off:.1e} of the largest "
                f"logit (allowed: {limit:.0e}), so its decoder does something vtr does not know of"
            )
        _passed[key] = off
    return _passed[key]


def _difference(patch: Patch) -> float:
    """The largest difference of logits, as a share of the largest logit. Not a number if there is one among them."""
    marks = patch.adapter.placeholders(patch.model)
    mark, draw = marks[0], torch.Generator().manual_seed(0)
    low, high = WORDS if patch.model.get_input_embeddings().weight.shape[0] > 2 * WORDS[1] else FEW_WORDS

    def words(count: int) -> list[int]:
        found = torch.randint(low, high, (2 * count + len(marks),), generator=draw).tolist()
        return [word for word in found if word not in marks][:count]

    begin, end = words(BEFORE), words(BEHIND)
    full, short = ([*begin, *[mark] * count, *end] for count in (VISION, VISION // 2))
    packed = patch.path == "packed"
    policies = [COMPRESSED, None, *[PRUNED] * packed]
    said = _logits(patch, [full] * len(policies), policies)
    wanted = {1: _logits(patch, [full], None)[:, 0]}
    if not many_axes(getattr(patch.decoder.text, "rotary_emb", None)):
        wanted[0] = _logits(patch, [short], None)[:, 0]
    # an answer that goes another way is compared up to there
    return max(_apart(said[:, row], own) for row, own in wanted.items())


def _apart(said: torch.Tensor, own: torch.Tensor) -> float:
    """Of the logits of one row, [steps, vocabulary] each, while both have said the same."""
    same = (said.argmax(-1) == own.argmax(-1)).cumprod(0)
    steps = min(int(same.sum()) + 1, len(own))
    finite = own.isfinite()  # some models rule tokens out
    differs = torch.where(finite, said - own, 0.0)[:steps]
    return float(differs.abs().max() / own[finite].abs().max())


def _logits(patch: Patch, rows: Sequence[list[int]], policies: Sequence[str | None] | None) -> torch.Tensor:
    """float32 [steps, rows, vocabulary]: what the rows' answers were chosen from."""
    model = patch.model
    ids = torch.tensor(rows, device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = torch.isin(ids, torch.tensor(patch.adapter.placeholders(model), device=ids.device)).long()
    known = inspect.signature(type(model).forward).parameters
    inputs |= {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in known}
    out = model.generate(
        **inputs, policy=policies, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True, cache_implementation=None,
    )  # fmt: skip
    return torch.stack(out.logits).float().cpu()


@contextmanager
def _quiet(patch: Patch) -> Iterator[None]:
    """The model as it answers: no dropout, no gradients; afterwards as it was, with nothing to report."""
    model, traces = patch.model, last_traces.get()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        last_traces.set(traces)
        patch.last = None
