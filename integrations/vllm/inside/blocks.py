"""Cache blocks for what each part of the decoder's depth holds of a request, not for what its first layer holds.

The layers are divided into KV cache groups (vLLM's own, made for models whose layers differ). All groups share one
pool, so what a reduced request does not take in the deeper parts is there for everybody. Importing this module makes
spec and manager known to vLLM's registry: the scheduler's process does so by unpickling the first spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

DROPPED: dict[str, list[int]] = {}
"""The scheduler's: request under a policy → tokens of its prompt that each part never holds."""


@dataclass(frozen=True, kw_only=True)
class PartSpec(FullAttentionSpec):
    """The cache of one part of the depth. part: which one, from 0."""

    part: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, part: int) -> PartSpec:
        """``spec`` as that of a layer in ``part``."""
        return cls(part=part, **{f.name: getattr(spec, f.name) for f in fields(spec)})

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one part; layers of several parts are several groups, which vLLM learns so."""
        assert len({spec.part for spec in specs}) == 1, "layers of several parts are several groups"
        return specs[0]

    def is_uniform_with_collection(self, others: Mapping[str, Any]) -> bool:
        """Whether all layers are of one part."""
        return len({spec.part for spec in others.values()}) == 1


class PartManager(FullAttentionManager):
    """Counts a part's blocks by what it holds, and keeps reduced requests out of the prefix cache."""

    def _held(self, request: str, tokens: int) -> int:
        dropped = DROPPED.get(request)
        return tokens if dropped is None else max(tokens - dropped[self.kv_cache_spec.part], 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """vLLM's own, of so many tokens as the part holds."""
        made: int = super().get_num_blocks_to_allocate(request_id, self._held(request_id, num_tokens), *args, **kwargs)
        return made

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """vLLM's own, for so many tokens as the part holds."""
        return super().allocate_new_blocks(request_id, self._held(request_id, num_tokens), num_tokens_main_model)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM's own, but nothing of a reduced request: which tokens a block holds, its question has decided."""
        if request.request_id not in DROPPED:
            return super().cache_blocks(request, num_tokens, *args, **kwargs)
        self.num_cached_block.setdefault(request.request_id, 0)


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PartSpec, PartManager, uniform_type_base_spec=PartSpec)
