"""What a call did, noted while it runs as cheaply as possible; ``vtr.accounting`` turns it into a report afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from vtr.base import UnsupportedError


class Sizes(NamedTuple):
    """The attention of one decoder layer.

    Attributes:
        heads: of queries. key, value: numbers a head has of a query or key, and of a value.
        cached: numbers that the cache holds of a token.
    """

    heads: int
    key: int
    value: int
    cached: int

    @property
    def pair(self) -> int:
        """FLOPs of one query over one key."""
        return 2 * self.heads * (self.key + self.value)

    @classmethod
    def of_attention(cls, attn: Any, config: Any) -> Sizes:
        """Read off an attention module and the config of its layer."""
        heads = config.num_attention_heads
        if hasattr(attn, "expand_kv"):  # the cache holds latents, of which keys and values are made
            return cls(heads, attn.qk_head_dim, attn.v_head_dim, attn.kv_lora_rank + attn.qk_rope_head_dim)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, head_dim, head_dim, 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim)


@dataclass(frozen=True)
class Geometry:
    """The decoder's sizes, read off its modules once. Where layers differ, ``heads``, … are those of the first."""

    num_hidden_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_flops: tuple[int, ...]
    """Per decoder layer: FLOPs of all its Linear modules for one token (2 · in · out each)."""
    attends: tuple[bool, ...] = ()
    """Per decoder layer: whether it has attention; empty: all have."""
    attentions: tuple[Sizes, ...] = ()
    """Per decoder layer; empty where all have the sizes above."""

    def attending(self, of_layers: Sequence[Any]) -> list[Any]:
        """Of something for each layer, that of those which have attention."""
        return [one for one, has in zip(of_layers, self.attends, strict=True) if has] if self.attends else [*of_layers]

    @classmethod
    def from_text_model(cls, text: Any) -> Geometry:
        flops, configs = linear_flops(text, all), layer_configs(text.config, len(text.layers))
        sizes = [Sizes.of_attention(layer.self_attn, c) for layer, c in zip(text.layers, configs, strict=True)]
        return cls(
            num_hidden_layers=len(text.layers),
            heads=sizes[0].heads,
            kv_heads=getattr(configs[0], "num_key_value_heads", None) or sizes[0].heads,
            head_dim=sizes[0].key,
            linear_flops=flops,
            attentions=tuple(sizes),
        )

    def attention(self, layer: int) -> Sizes:
        """The sizes of a layer's attention."""
        if self.attentions:
            return self.attentions[layer]
        return Sizes(self.heads, self.head_dim, self.head_dim, 2 * self.kv_heads * self.head_dim)


def linear_flops(text: Any, needed: Callable[[Iterable[Any]], bool]) -> tuple[int, ...]:
    """Per decoder layer of a text model: FLOPs of its Linear modules for one token.

    Args:
        needed: ``all`` or ``any``: which of the layers must have some.

    Raises:
        UnsupportedError: they have none.
    """
    linears = [[m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in text.layers]
    if not needed(linears):
        raise UnsupportedError(
            f"the decoder layers of {type(text).__name__} hold no torch.nn.Linear, by which FLOPs are counted: "
            "load a checkpoint whose quantization leaves them (or an unquantized one)"
        )
    return tuple(sum(2 * m.in_features * m.out_features for m in layer) for layer in linears)


def layer_configs(config: Any, depth: int) -> list[Any]:
    """The config of each decoder layer: where layers have some of their own, they are asked for one by one."""
    own = getattr(config, "per_layer_config", None)
    if own is None or not hasattr(own, "__getitem__"):
        return [config] * depth
    return [own[index] for index in range(depth)]


class Clock:
    """Time spent choosing tokens: a wall clock on the CPU, CUDA events (read later, no stall) on a GPU.

    Attributes:
        device: where what is timed next runs. Each GPU has a stream of its own, and events on it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        end = self._now()
        if isinstance(end, float):
            self._seconds += end - self._start
        else:
            self._events.append((self._start, end))

    def _now(self) -> Any:
        """Seconds, or an event on the device's stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ms(self) -> float:
        """Milliseconds so far (waits for the GPUs)."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._events = []
        return self._seconds * 1e3


@dataclass(frozen=True)
class Sources:
    """What the new tokens of one compressed image were made from, spelt out when somebody asks."""

    slots: torch.Tensor
    """int64 on the CPU: the image's slots, or those of its kept tokens."""
    made_of: Sequence[Sequence[int]] | None
    """Per new token, which of ``slots``; None: each is one of them."""

    def lists(self) -> list[list[int]]:
        """Per new token the slots it was made from."""
        slots = self.slots.tolist()
        if self.made_of is None:
            return [[slot] for slot in slots]
        return [[slots[i] for i in some] for some in self.made_of]


class Merge(NamedTuple):
    """Tokens that a policy made inside the decoder.

    Attributes:
        first: what ``alive`` calls the first of them; the others follow. before: int64 [n], what it called the row's
            vision tokens then. made_of: of each new token, which of these.
    """

    first: int
    before: torch.Tensor
    made_of: Sequence[Sequence[int]]


@dataclass
class RowTrace:
    """One prompt of the call: per layer, how many vision tokens entered, and which."""

    spec: str | None
    slots: torch.Tensor
    """int64 [n] on the CPU: logical slot of each vision token that entered the text model, -1 for a pooled one."""
    first: int
    """What ``alive`` calls the first of them."""
    sources: list[Sources] | None = None
    """For compressed rows, per image: the slots each of those tokens was made from."""
    counts: list[int] = field(default_factory=list)
    alive: list[torch.Tensor] = field(default_factory=list)
    """Per layer, int64 [count]: which vision tokens entered, counted through all rows of the forward."""
    original: int = 0
    """Vision tokens of the prompt before anything was reduced."""
    merges: list[Merge] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    """Per layer, how many vision tokens were queries, and keys, of its attention."""
    tries: list[tuple[str | None, int]] = field(default_factory=list)
    """Of each option that was tried in the same forward and not taken: its spec, and the vision tokens that entered."""
    stayed: torch.Tensor | None = None
    """float32 []: where cuts are gauged, the share of the attention on vision tokens that stayed; None: nothing cut."""


@dataclass(eq=False)
class Tried:
    """What was tried before a call, so that its policies could be chosen.

    Attributes:
        clock: time of all of it. traces: of each try, with the rows it was for.
    """

    clock: Clock
    traces: list[tuple[Trace | DenseTrace, set[int]]] = field(default_factory=list)


@dataclass
class Trace:
    """Everything noted of one call. Holds small index tensors and numbers, never the model."""

    geometry: Geometry
    path: str = "packed"
    """How its rows went through the decoder: "packed" or "padded"."""
    rows: list[RowTrace] = field(default_factory=list)
    beams: int = 1
    prefill_flops: int = 0
    selector_flops: int = 0
    decode_flops: int = 0
    """Of forwards after the first; attention over the cache is added from ``attended``."""
    decode_steps: int = 0
    """Forwards after the first."""
    attended: list[Any] = field(default_factory=list)
    """Per layer: keys attended to while decoding, summed over rows and steps (an int, or a tensor on the device)."""
    kv_tokens: list[Any] = field(default_factory=list)
    """Per layer: cached tokens when the call ended, summed over rows."""
    kv_bytes: int | None = None
    """Bytes of them, where rows are padded; None: as ``kv_tokens`` says."""
    kv_allocated: int = 0
    kv_itemsize: int = 0
    remembered: dict[int, list[torch.Tensor | None]] = field(default_factory=dict)
    """Layer → per decoded step, whether each row's token stays in its cache (bool [rows]; None: all of them do)."""
    clocks: list[Clock] = field(default_factory=list)
    tried: Tried | None = None

    def note_packed(self, rows: list[RowTrace], lengths: list[list[int]], flops: int) -> None:
        """Add a packed forward: ``lengths[layer][row]`` tokens, and the FLOPs of their attention.

        The first one is the prompt; later ones of the same call decode without a cache, or check a draft.
        """
        flops += sum(each * sum(here) for each, here in zip(self.geometry.linear_flops, lengths, strict=True))
        if self.rows:
            self.decode_flops += flops
            self.decode_steps += 1
        else:
            self.rows, self.prefill_flops = rows, flops

    def note_padded(self, rows: list[RowTrace], batch: int, columns: int, held: Sequence[int]) -> None:
        """Add a padded forward, in which padding is computed as tokens are.

        Args:
            batch: rows that were computed. columns: of each. held: per layer, columns that its cache had.
        """
        g = self.geometry
        pairs = sum(columns * (before + columns) for before in g.attending(held))
        flops = batch * (columns * sum(g.linear_flops) + 4 * g.heads * g.head_dim * pairs)
        if self.rows:
            self.decode_flops += flops
            self.decode_steps += 1
        else:
            self.rows, self.prefill_flops = rows, flops

    def note_decode(self, rows: int) -> None:
        """Add one decoded token per row (its attention is counted from what the cache says it attended to)."""
        self.decode_steps += 1
        self.decode_flops += rows * sum(self.geometry.linear_flops)


class PackedTrace:
    """What is noted of one packed forward until it has run.

    Args:
        trace: of the call, which gets it then.

    Attributes:
        rows: what is noted of each; filled when they are packed.
        lengths: per layer and row, the tokens that passed it. flops: of their attention, less what of the layers'
            projections was not done. narrowed: whether in some layer not all tokens took part in it.
    """

    def __init__(self, trace: Trace, device: torch.device) -> None:
        self.trace, self.clock = trace, Clock(device)
        self.rows: list[RowTrace] = []
        self.lengths: list[list[int]] = []
        self.flops, self.narrowed = 0, False
        self._alive: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def note(
        self, lengths: list[int], past: list[int], counts: list[int], alive: torch.Tensor, taking: Any, layer: Any
    ) -> None:  # fmt: skip
        """Add a layer.

        Args:
            past: tokens that its cache held before, per row; empty without one.
            counts: the vision tokens of each row that passed it; alive: which ones, of all rows.
            taking: who took part in its attention; None: all.
        """
        if self._alive is None or alive is not self._alive[0]:  # most layers keep what the layer before kept
            self._alive = alive, alive.split(counts)
        asked, seen = (counts, counts) if taking is None else (taking.vision_asks, taking.vision_seen)
        for row, count, kept, asks, sees in zip(self.rows, counts, self._alive[1], asked, seen, strict=True):
            row.counts.append(count)
            row.alive.append(kept)
            row.asked.append(asks)
            row.seen.append(sees)
        self.lengths.append(lengths)
        pair, before = self.trace.geometry.attention(len(self.lengths) - 1).pair, past or [0] * len(lengths)
        if taking is None:
            self.flops += sum(pair * n * (n + p) for n, p in zip(lengths, before, strict=True))
        else:
            self.narrowed = True
            self.flops += pair * taking.products(past) - taking.saved(layer)

    def finish(self) -> None:
        self.trace.note_packed(self.rows, self.lengths, self.flops)
        self.trace.clocks.append(self.clock)


@dataclass
class DenseTrace:
    """What an unreduced call of a patched model did: nothing is noted while it runs, all follows from its inputs."""

    geometry: Geometry
    input_ids: torch.Tensor
    """[rows, tokens] as passed."""
    placeholders: tuple[int, ...]
    """Ids that stand for a vision token."""
    itemsize: int
    cached: bool
    path: str = "packed"
    """How a reduced call of this model would go through its decoder."""
    past: int = 0
    """Tokens that were in the cache before."""
    steps: int = 0
    """Tokens decoded after the prompt's forward."""
    beams: int = 1
    tried: Tried | None = None
    windows: tuple[int | None, ...] = ()
    """Per layer: the sliding window whose tokens alone its cache holds, or None; empty where no layer has one."""


def held_windows(windows: tuple[int | None, ...], cache: Any) -> tuple[int | None, ...]:
    """Of the layers' sliding ``windows``, those that ``cache`` (None: one that transformers makes) is cut to."""
    if cache is None or not any(windows):
        return windows
    cut = [getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", [])]
    if len(cut) != len(windows):
        return ()
    return tuple(w if here else None for w, here in zip(windows, cut, strict=True))
