"""Attention metadata and cache slots of a layer in which requests hold fewer tokens than they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Segment:
    """What layers of one KV cache group have in common that hold equally many tokens of each request.

    Attributes:
        metadata: per attention group. slots: int64 [at least the tokens], where keys and values go.
    """

    metadata: dict[int, Any]
    slots: torch.Tensor


class Segments:
    """Makes them, each once a step. Slots are compact: the token that a layer meets as its n-th has its n-th slot.

    Args:
        runner: vLLM's. names: of each decoder layer's attention.
    """

    def __init__(self, runner: Any, names: Sequence[str]) -> None:
        self.runner, self.names = runner, names
        place = {
            name: (gid, aid)
            for gid, groups in enumerate(runner.attn_groups)
            for aid, group in enumerate(groups)
            for name in group.layer_names
        }
        self.group_of = [place[name][0] for name in names]
        self.attention_of = [place[name][1] for name in names]
        self._known: dict[Any, Segment] = {}
        self._context: Any = None
        self._rows, self._padded = 0, 0

    def begin(self, context: Any, rows: int) -> None:
        """A forward begins. context: its forward context, whose metadata change as layers are entered."""
        self._known, self._context, self._rows = {}, context, rows
        self._padded = max(len(context.slot_mapping[name]) for name in self.names)

    def enter(self, index: int, queries: Sequence[int], past: Sequence[int]) -> None:
        """Layer ``index`` gets so many new tokens of each request, behind so many that it holds."""
        key = (self.group_of[index], tuple(queries), tuple(past))
        if key not in self._known:
            self._known[key] = self._made(*key)
        segment, name = self._known[key], self.names[index]
        self._context.attn_metadata[name] = segment.metadata[self.attention_of[index]]
        self._context.slot_mapping[name] = segment.slots

    def _made(self, gid: int, queries: tuple[int, ...], past: tuple[int, ...]) -> Segment:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch, rows = self.runner.input_batch, self._rows
        table = batch.block_table[gid]
        blocks, size = table.get_device_tensor(rows), table.block_size
        device = blocks.device
        q, before = torch.tensor(queries), torch.tensor(past)
        starts = torch.zeros(rows + 1, dtype=torch.int32)
        starts[1:] = q.cumsum(0)
        total, seen = int(starts[-1]), (q + before).int()
        row = torch.arange(rows).repeat_interleave(q)
        place = torch.arange(total) - starts[:-1].long()[row] + before[row]
        row, block, offset = torch.stack([row, place // size, place % size]).to(device, non_blocking=True)
        slots = blocks[row, block].long() * size + offset
        if len(slots) < self._padded:  # tokens of a captured or compiled step that are none
            slots = torch.cat([slots, slots.new_full((self._padded - total,), -1)])
        prompts = torch.tensor(batch.num_prompt_tokens[:rows] > batch.num_computed_tokens_cpu[:rows])
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=seen.to(device, non_blocking=True),
            seq_lens_cpu_upper_bound=seen,
            num_reqs=rows,
            num_actual_tokens=total,
            max_query_len=int(q.max()),
            max_seq_len=int(seen.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
            causal=True,
            is_prefilling=prompts,
        )
        groups = self.runner.attn_groups[gid]
        return Segment({i: group.build_metadata(common) for i, group in enumerate(groups)}, slots)
