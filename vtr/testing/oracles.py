"""What must hold for every policy. Each function raises ``Fault`` (it does not) or ``Skip`` (it says nothing here)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vtr import settings as known
from vtr.accounting import Report, RowReport, report
from vtr.base import CHOOSING, QUESTIONS, Policy
from vtr.chain import policy as policy_of
from vtr.policies import FastV, UniformGrid
from vtr.testing import dense, tiny
from vtr.testing.bench import NOISE, ROWS, Bench, Fault, Said, Skip, seeded
from vtr.testing.keeps import keep
from vtr.testing.purity import counts, fresh, in_place, memory
from vtr.testing.tiny import IMAGE
from vtr.testing.watched import Watched


def settings(bench: Bench) -> None:
    """Registered, and the same again from its spec string and from a folder."""
    policy, cls = bench.policy, type(bench.policy)
    if known._POLICIES.get(policy.name) is not cls:
        raise Fault(
            f"{cls.__name__} is not registered, so it has no name for spec strings and files",
            'decorate it: @vtr.register_policy("my-name") above @dataclass',
        )
    mend = (
        "settings must be dataclass fields that hold plain data (numbers, strings, lists); __post_init__ may check "
        "them, but what it derives belongs in attributes that are no fields"
    )
    try:
        spec = policy.spec
        if policy_of(spec) != policy:
            raise Fault(f"vtr.policy({spec!r}) is not equal to the policy it was made from", mend)
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            again = Policy.from_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise Fault(f"its settings cannot be written and read again: {error}", mend) from error
    if again != policy:
        raise Fault(f"saved and loaded again it is another policy: {again.spec}", mend)


def answers(bench: Bench) -> None:
    """Every row can be answered, and something is reduced."""
    policy = bench.policy
    if not any(map(policy.asks, QUESTIONS)):
        raise Fault(
            f"{type(policy).__name__} answers none of the six questions",
            "define compress(image), prune(layer, tokens), route(layer, tokens), attend(layer, tokens, attention) or "
            "remember(layer, token); are the names spelt like this?",
        )
    with bench.asked():
        policy.check(len(bench.stock.get_decoder().layers))
    said = bench.generate(bench.batch, policy)
    reduces = any(n < row.total for row in said.report.rows for n in row.vision_tokens) or (
        any(map(policy.asks, ("attend", "remember", *CHOOSING)))
    )
    if not reduces and bench.must_reduce:
        raise Fault(
            "it keeps every vision token in every layer",
            "does its layer exist, and is keep below 1.0? If that is meant, say check_policy(…, must_reduce=False)",
        )


def determinism(bench: Bench) -> None:
    """The same call says the same, whatever the global random generators hold, and these are left alone."""
    with seeded(0) as touched:
        first = bench.generate(bench.batch, bench.policy)
        disturbed = touched()
    with seeded(0):
        second = bench.generate(bench.batch, bench.policy)
    with seeded(1):
        third = bench.generate(bench.batch, bench.policy)
    if first.kept != second.kept:
        raise Fault(
            f"the same call made twice keeps other tokens: {_difference(first, second)}",
            "a policy object is shared by rows, calls and threads: keep nothing on self that a call changes",
        )
    if first.kept != third.kept or not torch.equal(first.logits, third.logits):
        raise Fault(
            f"with another seed of the global random generator it keeps other tokens: {_difference(first, third)}",
            "draw from a generator of your own that is seeded by settings: torch.randperm(n, "
            "generator=torch.Generator().manual_seed(self.seed))",
        )
    if disturbed:
        raise Fault(
            "it draws from the global random generator, or seeds it; the sampling of other rows changes with that",
            "use a torch.Generator() of your own",
        )


def row_invariance(bench: Bench) -> None:
    """A row is in any batch, under any neighbours, what it is alone."""
    policy, last = bench.policy, len(bench.stock.get_decoder().layers) - 1
    other = FastV(0.5, layer=min(2, last)) if last else None
    for mix in ([policy] * len(ROWS), [policy, None, UniformGrid(0.3), policy], [other, policy, policy, None]):
        together = bench.generate(bench.batch, mix)
        for b in (b for b, one in enumerate(mix) if one is policy):
            inputs = tiny.single(bench.batch, b, bench.stock)
            alone = bench.generate(inputs, policy)
            where = f"row {b} ({_words(ROWS[b])}) of a batch of {len(ROWS)}"
            if together.kept[b] != alone.kept[0]:
                raise Fault(
                    f"{where} keeps other tokens than alone: {_difference(together, alone, b, 0)}",
                    "an answer may depend on the settings and on what is handed over (this row's tokens), not on how "
                    "often, in which order or together with whom the policy is asked",
                )
            noise = float((together.logits[:, b] - alone.logits[:, 0]).abs().max())
            if not noise <= NOISE:
                raise Fault(
                    f"{where} keeps the tokens it keeps alone, but says something else (logits differ by {noise:.1e})",
                    "new features of compress, weights of route and answers of remember may depend on this row alone",
                )
    unreduced = bench.generate(tiny.single(bench.batch, 1, bench.stock), None)
    reduced = bench.generate(tiny.single(bench.batch, 1, bench.stock), policy)
    if not policy.asks("remember") and not float((reduced.logits - unreduced.logits).abs().max()) <= NOISE:
        raise Fault("a row without an image changes under it", "text is not the policy's business: return None for it")


def question(bench: Bench) -> None:
    """What depends on the question says so."""
    said = []
    for words in ("what", "zzky"):
        inputs = tiny.batch(bench.stock, [["ab", IMAGE, words]])
        said.append(bench.generate(inputs, bench.policy))
    depth = range(len(said[0].kept[0]))
    ranks = [layer for layer in depth if bench.policy.needs(layer)]
    guided = said[0].kept != said[1].kept or bool(ranks)
    if guided and not bench.policy.question_guided and not any(map(bench.policy.asks, CHOOSING)):
        why = f"needs({ranks[0]}) asks for attention" if ranks else _difference(said[0], said[1])
        raise Fault(
            f"what it keeps depends on the question ({why}), which the class does not say",
            "write question_guided: ClassVar[bool] = True into the class, so that users are warned when a later turn "
            "meets tokens chosen for an earlier question",
        )


def dense_mask(bench: Bench) -> None:
    """A token that is gone is a token that nobody sees."""
    if bench.policy.asks("compress") or bench.policy.asks("route"):
        raise Skip("it does not only prune")
    if not bench.policy.asks("prune") and not bench.policy.asks("attend"):
        raise Skip("it does not prune")
    for name, logits, row, prompt, watched in _with_images(bench):
        how = watched.given(prompt, len(row.vision_tokens))
        if not how.merged:
            how.kept = [row.kept(layer) for layer in range(len(row.vision_tokens))]
        want = dense.run(bench.stock, prompt, how).logits
        there = [slot for slot in range(len(want)) if slot not in prompt.slots or slot in how.kept[-1]]
        _close(logits[there], want[there], f"{name} is not the model with the dropped tokens masked")


def shorter_prompt(bench: Bench) -> None:
    """Tokens left out before the decoder might as well never have been there."""
    if not bench.policy.asks("compress"):
        raise Skip("it does not compress")
    for name, logits, row, prompt, _ in _with_images(bench):
        if any(n != row.vision_tokens[0] for n in row.vision_tokens):
            raise Skip("it also prunes in the decoder")
        if any(len(made) != 1 for made in row.sources(0)):
            raise Skip("it makes new tokens, which nothing else can tell the values of")
        slots = sorted(set(range(len(logits))) - set(prompt.slots) | {made[0] for made in row.sources(0)})
        want = dense.run(bench.stock, dense.Row(prompt.embeds[slots], prompt.vision[slots])).logits
        _close(logits[slots], want, f"{name} is not the prompt without the dropped tokens")


def cache(bench: Bench) -> None:
    """With and without a cache the same is said."""
    with_cache = bench.generate(bench.batch, bench.policy)
    without = bench.generate(bench.batch, bench.policy, use_cache=False)
    mend = (
        "without a cache the words decoded so far come by again: rank by the prompt's tokens only, and let remember "
        "say the same whenever it is asked about a token"
    )
    if with_cache.kept != without.kept:
        raise Fault(f"without a cache it keeps other tokens: {_difference(with_cache, without)}", mend)
    noise = float((with_cache.logits - without.logits).abs().max())
    if not noise <= NOISE or not torch.equal(with_cache.tokens, without.tokens):
        raise Fault(f"without a cache it says something else (logits differ by {noise:.1e})", mend)


def accounting(bench: Bench) -> None:
    """Report, cache and torch's own count of FLOPs agree."""
    inputs, config = bench.batch, bench.stock.config.text_config
    out, done = bench.forward(inputs, use_cache=True)
    text = (inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.IMAGE_ID)).sum(1).tolist()
    for depth, layer in enumerate(out.past_key_values.layers):
        want = [t + row.seen[depth] for t, row in zip(text, done.rows, strict=True)]
        less = bench.policy.asks("attend") and all(n <= m for n, m in zip(layer.lengths(), want, strict=True))
        if layer.lengths() != want and not less:  # (of the text attend may leave some out)
            raise Fault(
                f"layer {depth} caches {layer.lengths()} tokens of the rows, the report says {want}",
                "this is vtr's own business: please report it with the policy's code",
            )
    _check_bytes(done, sum(sum(layer.lengths()) for layer in out.past_key_values.layers), config)
    with bench.asked(), FlopCounterMode(display=False) as counter, torch.no_grad():
        bench.eager(**inputs, policy=bench.policy)
    counts = counter.get_flop_counts()
    torchs = sum(sum(flops.values()) for name, flops in counts.items() if name.endswith(".language_model"))
    done = report(bench.eager)
    missing = torchs - done.flops - done.selector_flops
    if missing > 0:
        raise Fault(
            f"it computes {missing:,} FLOPs of matrix products that the report does not know of",
            "add what it computes to what it is handed: tokens.flops += 2 · rows · inner · columns of each product",
        )
    if missing < 0:
        raise Fault(
            f"it reports {-missing:,} FLOPs more than it computes", "count 2 · rows · inner · columns a product"
        )


def _check_bytes(done: Report, tokens: int, config: Any) -> None:
    want = tokens * 2 * config.num_key_value_heads * config.head_dim * 4
    if done.kv_bytes != want:
        raise Fault(
            f"the report says {done.kv_bytes} bytes of keys and values, the cache holds {want}",
            "this is vtr's own business: please report it with the policy's code",
        )


def off_is_off(bench: Bench) -> None:
    """After it, the model gives without a policy the bits it gave before."""
    bench.generate(bench.batch, bench.policy)
    mend = "do not change the tensors handed over, nor the model: compute new ones"
    for (name, mine), theirs in zip(bench.model.named_parameters(), bench.stock.parameters(), strict=True):
        if not torch.equal(mine, theirs):
            raise Fault(f"it has changed the model's weight {name}", mend)
    with torch.no_grad():
        if not torch.equal(bench.model(**bench.batch).logits, bench.stock(**bench.batch).logits):
            raise Fault("after it, the model gives other logits without a policy than before", mend)


ALL: dict[str, Callable[[Bench], None]] = {
    "settings": settings,
    "answers": answers,
    "memory": memory,
    "in place": in_place,
    "counts": counts,
    "keep": keep,
    "determinism": determinism,
    "row invariance": row_invariance,
    "question": question,
    "dense mask": dense_mask,
    "shorter prompt": shorter_prompt,
    "cache": cache,
    "accounting": accounting,
    "off is off": off_is_off,
}


def _with_images(bench: Bench) -> Iterator[tuple[str, Tensor, RowReport, dense.Row, Watched]]:
    """Every row with an image, by itself under the policy.

    Yields:
        What it is called, its logits [n, vocab], what was kept, the prompt as the text model gets it, and what the
        policy answered.
    """
    for b in (b for b, row in enumerate(ROWS) if IMAGE in row):
        inputs, policy = tiny.single(bench.batch, b, bench.stock), fresh(bench.policy)
        watched = Watched(policy)
        out, done = bench.forward(inputs, policy)
        yield f"row {b} ({_words(ROWS[b])})", out.logits[0], done.rows[0], dense.row(bench.stock, inputs), watched


def _close(got: Tensor, want: Tensor, what: str) -> None:
    noise = float((got - want).abs().max())
    if not noise <= NOISE:
        raise Fault(
            f"{what} (logits differ by {noise:.1e})",
            "do not change hidden states, scores or features in place; clone() what you compute with",
        )


def _difference(a: Said, b: Said, row: int | None = None, other: int | None = None) -> str:
    """The first layer in which two calls (or two of their rows) keep other tokens."""
    pairs = [(row, other)] if row is not None else [(i, i) for i in range(len(a.kept))]
    for i, j in pairs:
        for layer, (x, y) in enumerate(zip(a.kept[i], b.kept[j], strict=True)):  # type: ignore[index]
            if x != y:
                return f"into layer {layer} go {_short(x)} and {_short(y)}"
    return "the same tokens, but other logits"


def _short(made: list[list[int]]) -> str:
    flat = [token[0] if len(token) == 1 else token for token in made]
    return f"{len(flat)} tokens, slots [{', '.join(map(str, flat[:6]))}{', …' * (len(flat) > 6)}]"


def _words(row: list[str]) -> str:
    return " ".join(part if part == IMAGE else "text" for part in row)
