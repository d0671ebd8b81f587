"""The ratios of ``vtr bench engine`` in words and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHAT = {
    "no_policy_prefill": "prefill, patched and no policy ÷ unpatched",
    "no_policy_decode": "decoded token, patched and no policy ÷ unpatched",
    "pruned_over_limit_cut": "prefill under FastV (a quarter from layer 2 on) ÷ stock layers on the kept lengths",
    "pruned_over_limit_stairs": "prefill under G-Search with four cuts ÷ stock layers on the kept lengths",
    "pruned_over_limit_every_layer": "prefill under G-Search with a cut at every layer ÷ stock layers on those lengths",
    "mixed_over_rows": "prefill of 8 rows with mixed policies ÷ the sum of the rows alone",
    "mixed_over_padded": "the same batch ÷ the unpatched padded batch",
    "decode_equal_lengths": "decoded token on a ragged cache that lacks nothing ÷ unpatched",
    "decode_keep_50": "decoded token after FastV keep=0.5 ÷ unpatched",
    "decode_keep_25": "decoded token after FastV keep=0.25 ÷ unpatched",
    "decode_keep_10": "decoded token after FastV keep=0.1 ÷ unpatched",
    "decode_over_unpatched_64": "the first {} decoded tokens after FastV keep=0.25 ÷ unpatched",
    "decode_over_unpatched_512": "the first {} decoded tokens after FastV keep=0.25 ÷ unpatched",
    "decode_over_unpatched_2048": "the first {} decoded tokens after FastV keep=0.25 ÷ unpatched",
    "kv_ratio": "bytes of keys and values after the prompt under FastV keep=0.25 ÷ unpatched",
    "kv_allocated_ratio": "the storage that holds them ÷ unpatched",
    "peak_memory_ratio": "peak memory growth of a forward under FastV keep=0.25 ÷ unpatched",
}
"""Key of the result → what is divided by what."""
COUNTED = {
    "counted_no_policy": "{counted} of a prefill, patched and no policy ÷ unpatched",
    "counted_fastv": "{counted} of a prefill under FastV (a quarter from layer 2 on) ÷ stock layers on those lengths",
    "counted_gsearch": "{counted} of a prefill under G-Search, a cut at every layer ÷ stock layers on those lengths",
    "counted_pyramid": "{counted} of a prefill under PyramidDrop ÷ stock layers on those lengths",
}
"""The same for what ``--count`` gives."""


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """A measured result as table rows: key, ratio, min–max, what over what."""
    out = []
    for key in (key for key in result if f"{key}_min" in result):
        name = key.removesuffix("_flash_attention_2")
        if name in COUNTED:
            what = COUNTED[name].format(**result)
        else:
            what = WHAT[name].format(result["decode_tokens"].get(name.rsplit("_", 1)[-1]))
        low, high = result[f"{key}_min"], result[f"{key}_max"]
        out.append((key, f"{result[key]:.3f}", "exact" if low == high else f"{low:.3f}–{high:.3f}", what))
    return out


def footer(result: Mapping[str, Any]) -> list[str]:
    """What the table was measured on, in words."""
    said = (
        counted(result)
        if "counted" in result
        else "Both sides of a prefill take merged embeddings and fill a cache. A decode ratio is one of sums, its "
        "spread that of eighths of the run."
    )
    lines = [
        "{device}, {dtype}, {threads} threads; Llama {layers} × {hidden_size}, {vision_tokens} vision + {text_tokens} "
        "text tokens; torch {torch}, transformers {transformers}, vtr {vtr}".format(**result),
        said,
    ]
    return [*lines, result["note"]] if "note" in result else lines


def counted(result: Mapping[str, Any]) -> str:
    """What was counted in turns, how many there were, and what the intervals are."""
    turns = {
        key.removeprefix("counted_").removesuffix("_turns"): result[key] for key in result if key.endswith("_turns")
    }
    if set(turns.values()) == {1}:
        return f"Counted: {result['counted']}, which are the same in every run."
    quartiles = [
        f"{name} {turns[name]} ({low:.3f}–{high:.3f})"
        for name in turns
        for low, high in [result[f"counted_{name}_quartiles"]]
    ]
    return (
        f"Counted: {result['counted']}; both sides in turns, medians of the turns' ratios with their 95 % intervals "
        f"(bootstrap). Turns (quartiles): {', '.join(quartiles)}."
    )
