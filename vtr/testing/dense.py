"""A slow dense reference of reduced runs, written from the description of the policies alone.

It reads the weights of an untouched transformers model and runs its own loop over the decoder layers: one row, all
tokens in all layers, full attention matrices, original positions. A dropped token is a key that an additive -inf mask
hides from every other token from its layer on. A token made of others is one more row, behind all vision tokens; one
that takes no part in a layer's attention has its row of it set to zero, or its column hidden. Nothing here knows how
the engine packs rows or keeps its cache. ``row`` and ``run`` are differentiable if asked to be.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Keep = int | float
TIE = 1e-6
"""Scores closer than this may be ranked either way by two correct computations in float32."""


@dataclass
class Row:
    """One prompt as the text model gets it: embeddings [n, d], and which of its slots are vision tokens.

    positions: int64 [3, n] (time, row, column) for models with M-RoPE; None: 0, 1, 2, ….
    behind: for each of the first layers, [vision tokens, d] that are added to the vision tokens behind it.
    """

    embeds: Tensor
    vision: Tensor
    positions: Tensor | None = None
    behind: tuple[Tensor, ...] = ()

    @property
    def slots(self) -> list[int]:
        """Slots of the vision tokens."""
        return self.vision.nonzero().squeeze(1).tolist()


@dataclass
class Rank:
    """Before layer l the ``keeps[l]`` best vision tokens by attention in layer l - 1 stay; ``queries`` says whose."""

    keeps: dict[int, Keep]
    queries: str
    """"last", "text" or "ahead": the last one's, in the very layer that the cut is in front of."""
    renumber: bool = False
    """Positions close up over what is dropped."""

    def count(self, layer: int, total: int) -> int:
        """How many of ``total`` tokens may enter: a count, or a ratio rounded down (0.3 of 10 is 3), one at least."""
        keep = self.keeps.get(layer, 1.0)
        return max(int(total * keep + 1e-9), int(keep > 0)) if isinstance(keep, float) else keep


@dataclass
class Part:
    """Who takes no part in a layer's attention: slots that do not ask, and slots that nobody sees there."""

    silent: Collection[int] = ()
    unseen: Collection[int] = ()


@dataclass
class Made:
    """New tokens: of which slots each is made, and their states; None: of each the mean of these slots'."""

    groups: list[list[int]]
    states: Tensor | None = None


@dataclass
class Given:
    """The kept slots of every layer, as somebody else chose them, and what else there is to a run.

    merged: what new tokens are made before a layer. The first one that is ever made is called slot -1, the next one -2,
        …; ``kept`` names them as it does the others.
    attend: who takes no part in the attention of a layer; text slots too.
    """

    kept: list[list[int]]
    renumber: bool = False
    merged: dict[int, Made] = field(default_factory=dict)
    attend: dict[int, Part] = field(default_factory=dict)


Rule = Rank | Given | None


@dataclass
class Dense:
    """What the reference says of one row: logits [n, vocab] of all slots, kept slots of every layer.

    last: [vocab], the logits of what stands last.
    paid: of every layer its slots, attention probabilities [heads, n, n] and additive mask.
    """

    logits: Tensor
    kept: list[list[int]]
    last: Tensor
    paid: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)


def row(model: Any, inputs: dict[str, Tensor], grad: bool = False) -> Row:
    """The one row of a batch-1 input without padding, image and video features put at their placeholders."""
    with torch.set_grad_enabled(grad):
        return _row(model, inputs)


def _row(model: Any, inputs: dict[str, Tensor]) -> Row:
    ids = inputs["input_ids"][0]
    embeds = model.get_input_embeddings().weight[ids].clone()
    images = ids == model.config.image_token_id
    videos = ids == getattr(model.config, "video_token_id", -1)
    if bool(images.any()):
        given = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        embeds[images] = torch.cat(list(model.model.get_image_features(**given).pooler_output))
    if bool(videos.any()):
        embeds[videos] = torch.cat(list(model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output))
    return Row(embeds, images | videos)


def scores(probs: Tensor, mask: Tensor, vision: Tensor, queries: str) -> Tensor:
    """What the text paid to each slot ([n]), from a layer's attention probabilities [heads, n, n] under ``mask``."""
    mean, slots = probs.amax(0) if queries.endswith("-max") else probs.mean(0), torch.arange(len(vision))
    text = ~vision
    if queries.startswith("last"):
        return mean[slots[text][-1]]
    asking = text & (slots > slots[vision][0])
    out = torch.zeros(len(vision))
    for j in slots[vision].tolist():
        seeing = asking & (mask[:, j] == 0)
        if not bool(seeing.any()):
            continue
        out[j] = mean[seeing, j].mean()
    return out


def requested(
    paid: tuple[list[int], Tensor, Tensor], rows: Sequence[int], here: Sequence[int], heads: str, over: str
) -> Tensor:
    """What the slots ``rows`` paid to the slots ``here`` in a layer of which :class:`Dense` has noted this.

    Args:
        heads: "mean", "max" or "each" (taken first). over: the rows' "mean" (over those that see the slot), "sum",
            "max" or "each".

    Returns:
        [n], with a leading axis for "each" of both: [heads, rows, n].
    """
    line, probs, mask = paid
    asking, seen = ([line.index(slot) for slot in slots] for slots in (rows, here))
    got = probs[:, asking][:, :, seen]
    got = got.mean(0) if heads == "mean" else got.amax(0) if heads == "max" else got
    if over == "each":
        return got
    if over == "sum" or not rows:
        return got.sum(-2)
    if over == "max":
        return got.amax(-2)
    return got.sum(-2) / (mask[asking][:, seen] == 0).sum(0).clamp_min(1)


def best(score: Tensor, here: list[int], count: int, hint: list[int] | None) -> list[int]:
    """The ``count`` best slots of ``here``, ascending, ties to the lower slot; in a near tie the hint decides."""
    order = sorted(here, key=lambda slot: (-float(score[slot]), slot))
    own = sorted(order[:count])
    if hint is None or hint == own or len(hint) != count or not set(hint) <= set(here):
        return own
    edge = float(score[order[count - 1]])
    disputed = set(hint) ^ set(own)
    return hint if all(abs(float(score[slot]) - edge) < TIE for slot in disputed) else own


def norm(module: Any, x: Tensor) -> Tensor:
    normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight
    return normed


def axes(config: Any, count: int) -> Tensor:
    """Which of M-RoPE's axes each of ``count`` frequencies turns with: blocks, or (Qwen3-VL) in turns."""
    sections = config.rope_parameters["mrope_section"]
    if config.model_type == "qwen3_vl_text":
        return torch.tensor([i % 3 if i < 3 * sections[i % 3] else 0 for i in range(count)])
    return torch.arange(3).repeat_interleave(torch.tensor(sections))


def rotated(x: Tensor, config: Any, positions: Tensor) -> Tensor:
    """Rotary embedding of [heads, n, dim] at ``positions`` [n], or [3, n] for M-RoPE."""
    dim, theta = x.shape[2], config.rope_parameters["rope_theta"]
    if positions.dim() == 2:
        positions = positions[axes(config, dim // 2)].T
    else:
        positions = positions[:, None]
    angles = positions.float() * theta ** (-torch.arange(0, dim, 2).float() / dim)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    turned: Tensor = x * cos + torch.cat([-b, a], -1) * sin
    return turned


def queries_keys(module: Any, x: Tensor, positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys [heads, n, dim] of grouped-query attention, keys repeated for their group."""
    n, dim = len(x), module.head_dim
    q, k = (p(x).view(n, -1, dim) for p in (module.q_proj, module.k_proj))
    if hasattr(module, "q_norm"):
        q, k = norm(module.q_norm, q), norm(module.k_norm, k)
    groups = config.num_attention_heads // config.num_key_value_heads
    q, k = (rotated(t.transpose(0, 1), config, positions) for t in (q, k))
    return q, k.repeat_interleave(groups, 0)


def attention(
    module: Any, x: Tensor, mask: Tensor, positions: Tensor, config: Any, silent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [n, d] and probabilities [heads, n, n] of grouped-query attention under an additive mask.

    Those that are ``silent`` (bool [n]), and those that the mask shows nothing, get nothing.
    """
    n, dim = len(x), module.head_dim
    q, k = queries_keys(module, x, positions, config)
    v = (
        module.v_proj(x)
        .view(n, -1, dim)
        .transpose(0, 1)
        .repeat_interleave(len(q) * dim // module.v_proj.out_features, 0)
    )
    probs = (q @ k.transpose(1, 2) * dim**-0.5 + mask).softmax(-1)
    none = (mask == -torch.inf).all(-1) if silent is None else silent | (mask == -torch.inf).all(-1)
    if bool(none.any()):
        probs = probs.masked_fill(none[:, None], 0.0)
    out = module.o_proj((probs @ v).transpose(0, 1).reshape(n, -1))
    return out if silent is None else out.masked_fill(silent[:, None], 0.0), probs


def window(config: Any, layer: int) -> int | None:
    """How many positions back layer ``layer`` sees, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and (kinds is None or kinds[layer] == "sliding_attention")
    return config.sliding_window if slides else None


def hidden_keys(alive: Tensor, positions: Tensor, window: int | None, unseen: Tensor | None = None) -> Tensor:
    """Additive causal mask without dropped keys, and without those that are ``unseen`` (bool [n]).

    A dropped token still sees itself: its row must stay a number.
    """
    n = len(alive)
    seen = torch.ones(n, n).tril().bool() & (alive if unseen is None else alive & ~unseen)
    if window is not None:
        seen &= positions[:, None] - positions[None] < window
    return torch.zeros(n, n).masked_fill(~(seen | torch.diag(~alive)), -torch.inf)


def block(
    layer: Any,
    x: Tensor,
    mask: Tensor,
    positions: Tensor,
    config: Any,
    weights: Tensor | None = None,
    silent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One decoder layer: hidden states [n, d] and attention probabilities. ``weights`` ([n]) scale the MLP's output."""
    out, probs = attention(layer.self_attn, norm(layer.input_layernorm, x), mask, positions, config, silent)
    x, mlp = x + out, layer.mlp
    y = norm(layer.post_attention_layernorm, x)
    z = mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    return x + (z if weights is None else weights[:, None] * z), probs


def run(model: Any, prompt: Row, how: Rule = None, hint: list[list[int]] | None = None, grad: bool = False) -> Dense:
    """One row through the whole decoder. ``hint`` are the engine's kept slots, believed in near ties only."""
    with torch.set_grad_enabled(grad):
        return _run(model, prompt, how, hint)


def _run(model: Any, prompt: Row, how: Rule, hint: list[list[int]] | None) -> Dense:
    config, text = model.config.text_config, model.get_decoder()
    x, kept, vision = prompt.embeds, [], prompt.slots
    here = vision
    line = list(range(len(x)))  # the slots in their order; new tokens are below 0
    probs = torch.zeros(0)  # nothing ranks in layer 0
    positions = torch.arange(len(x)) if prompt.positions is None else prompt.positions
    alive = torch.ones(len(x)).bool()
    mask, paid = torch.zeros(0), []
    behind = [torch.zeros_like(x).index_add(0, torch.tensor(vision, dtype=torch.int64), one) for one in prompt.behind]
    for depth, layer in enumerate(text.layers):
        part = None
        if isinstance(how, Given):
            before, here = here, how.kept[depth]
            if (made := how.merged.get(depth)) is not None:
                at, in_front = places(line, before, here, vision)
                groups = [marked(line, group) for group in made.groups]
                states = [x[group].mean(0) for group in groups] if made.states is None else made.states
                x = torch.cat([x[:at], *(state[None] for state in states), x[at:]])
                for i, more in enumerate(behind):
                    behind[i] = torch.cat([more[:at], *(more[group].mean(0)[None] for group in groups), more[at:]])
                copies = positions[..., in_front : in_front + 1].expand(*positions.shape[:-1], len(groups))
                positions = torch.cat([positions[..., :at], copies, positions[..., at:]], -1)
                first = min([0, *line]) - 1
                line = [*line[:at], *range(first, first - len(groups), -1), *line[at:]]
            part = how.attend.get(depth)
        elif isinstance(how, Rank) and (count := how.count(depth, len(vision))) < len(here):
            if how.queries == "ahead":  # what this layer would do if nothing were dropped in front of it
                y, mask = norm(layer.input_layernorm, x), hidden_keys(alive, positions, window(config, depth))
                probs = attention(layer.self_attn, y, mask, positions, config)[1]
            score = scores(probs.detach(), mask, prompt.vision, "last" if how.queries == "ahead" else how.queries)
            here = best(score, here, count, hint[depth] if hint else None)
        kept.append(here)
        alive = (~marked(line, vision) & (torch.tensor(line) >= 0)) | marked(line, here)
        if how is not None and how.renumber:
            positions = alive.cumsum(0) - 1
        silent, unseen = (marked(line, part.silent), marked(line, part.unseen)) if part else (None, None)
        mask = hidden_keys(alive, positions, window(config, depth), unseen)
        x, probs = block(layer, x, mask, positions, config, silent=silent)
        paid.append((line, probs.detach(), mask))
        if depth < len(behind):
            x = x + behind[depth]
    given = torch.tensor(line) >= 0
    logits = model.lm_head(norm(text.norm, x))[standing_in(alive)]
    return Dense(logits[given], kept, logits[-1], paid)


def marked(line: Sequence[int], slots: Collection[int]) -> Tensor:
    """bool [n]: which of ``line`` are among ``slots``."""
    chosen = set(slots)
    return torch.tensor([slot in chosen for slot in line], dtype=torch.bool)


def places(line: list[int], before: list[int], here: list[int], vision: list[int]) -> tuple[int, int]:
    """Where new tokens come in, behind the last vision token of ``before``; and where what is in front of them, text or
    one of ``here``, stands."""
    at = max(line.index(slot) for slot in before) + 1
    stays = [(slot not in vision and slot >= 0) or slot in here for slot in line[:at]]
    return at, at - 1 - stays[::-1].index(True)


def standing_in(alive: Tensor) -> Tensor:
    """For each slot the slot whose output it shows: itself, or the last survivor before it (itself without one)."""
    shown = torch.where(alive, torch.arange(len(alive)), -1).cummax(0).values
    return torch.where(shown >= 0, shown, torch.arange(len(alive)))


@torch.no_grad()
def greedy(
    model: Any, prompt: Row, kept: list[list[int]] | Given, steps: int, never: list[int], renumber: bool = False
) -> tuple[list[int], Tensor]:
    """Greedy decoding, every step recomputed from scratch; the prompt's kept slots stay what they are. What is decoded
    takes part everywhere.

    Returns the tokens and the logits [steps, vocab] that chose them; the tokens ``never`` are not chosen.
    """
    table, logits = model.get_input_embeddings().weight, []
    tokens: list[int] = []
    for _ in range(steps):
        new = table[torch.tensor(tokens, dtype=torch.long)]
        vision = torch.cat([prompt.vision, torch.zeros(len(tokens)).bool()])
        at = prompt.positions
        if at is not None:  # the last slot of a prompt is text, where all axes agree
            at = torch.cat([at, at[:, -1:] + 1 + torch.arange(len(tokens))], 1)
        longer = Row(torch.cat([prompt.embeds, new]), vision, at, prompt.behind)
        last = run(model, longer, kept if isinstance(kept, Given) else Given(kept, renumber)).last
        logits.append(last)
        tokens.append(int(last.index_fill(0, torch.tensor(never), -torch.inf).argmax()))
    return tokens, torch.stack(logits)
