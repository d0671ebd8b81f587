"""ZipVL against reference numbers of the same equations, made without vtr; official code there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official, oracle
from tests.official import close
from tests.policies.given_text import attention_of, generated, hidden_of, prompt, text_model
from vtr.policies.decoder import zipvl
from vtr.policies.decoder.zipvl import fewest, normalised, probe_rows

META, DATA = official.meta("zipvl"), official.tensors("zipvl", "reference")
CONFIG, STATE = META["config"], official.tensors("zipvl", "weights")
DEPTH, VOCAB = CONFIG["num_hidden_layers"], CONFIG["vocab_size"]
cases = pytest.mark.parametrize("case", META["cases"])


def numbers(case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}."): t for name, t in DATA.items() if name.startswith(f"{case}.")}


def policy_of(case: str) -> vtr.ZipVL:
    said = META["cases"][case]
    return vtr.ZipVL(said["tau"], scope=said["scope"])


@pytest.fixture
def given_probes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Probes are the fixtures' own, whoever asks."""
    return lambda probes: monkeypatch.setattr(zipvl, "probe_rows", lambda *args: probes)


def parts(n: dict[str, Tensor]) -> dict[int, oracle.Part]:
    """Of each layer who takes no part: all but T."""
    slots = range(len(n["vision"]))
    out = [[slot for slot in slots if slot not in n[f"L{layer}.T"].tolist()] for layer in range(DEPTH)]
    return {layer: oracle.Part(without, without) for layer, without in enumerate(out)}


@cases
def test_sums_choice_and_states(case: str, given_probes: Any) -> None:
    """Layer by layer, on the reference's own states: sums, normalised sums, who takes part, and what comes of it."""
    n, policy = numbers(case), policy_of(case)
    vision, probes = n["vision"], n["probes"]
    given_probes(probes)
    model = text_model(CONFIG, STATE, n["inputs_embeds"], vision)
    row = oracle.Row(n["inputs_embeds"], vision)
    entering = [row.embeds, *(n[f"L{layer}.hidden"] for layer in range(DEPTH - 1))]
    place, text_place = vision.nonzero().squeeze(1), (~vision).nonzero().squeeze(1)
    for layer, states in enumerate(entering):
        paid = attention_of(model, row, states, layer).mean(0)
        sums = paid[probes].sum(0)
        close(sums, n[f"L{layer}.sums"])
        close(normalised(sums, probes), n[f"L{layer}.normalised"])
        assert fewest(sums, policy.tau, len(probes)) == n["p"][layer]
        tokens: Any = Shown(place, text_place)
        attention: Any = SimpleNamespace(received=lambda rows, paid=paid: paid[rows].sum(0))
        answer = policy.attend(layer, tokens, attention)
        assert answer is not None and answer.asks is not None and answer.seen is not None
        assert torch.equal(answer.asks, answer.seen)
        text = text_place if answer.text is None else text_place[answer.text]
        taking_part = torch.cat([place[answer.asks], text]).sort().values
        assert torch.equal(taking_part, n[f"L{layer}.T"]) and len(taking_part) == n["kept"][layer]
    kept = [row.slots] * DEPTH
    for layer, states in enumerate(hidden_of(model, row, oracle.Given(kept, attend=parts(n)))):
        close(states, n[f"L{layer}.hidden"])


@cases
def test_the_slow_reference_says_the_same(case: str) -> None:
    n = numbers(case)
    model = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"])
    row = oracle.Row(n["inputs_embeds"], n["vision"])
    how = oracle.Given([row.slots] * DEPTH, attend=parts(n))
    never = list(range(VOCAB, model.config.text_config.vocab_size))
    tokens, logits = oracle.greedy(model, row, how, len(n["ids"]), never)
    assert tokens == n["ids"].tolist()
    close(logits[:, :VOCAB], n["logits"])


@cases
def test_the_model(case: str, given_probes: Any) -> None:
    n = numbers(case)
    given_probes(n["probes"])
    model = text_model(CONFIG, STATE, n["inputs_embeds"], n["vision"])
    inputs, outs = prompt(model, n["inputs_embeds"], n["vision"]), []
    hooks = [layer.register_forward_hook(lambda m, a, out: outs.append(out)) for layer in model.get_decoder().layers]
    with torch.no_grad():
        out = model(**inputs, policy=policy_of(case), use_cache=True)
    for hook in hooks:
        hook.remove()
    for layer, states in enumerate(outs):
        close(states[0], n[f"L{layer}.hidden"])
    assert [layer.lengths()[0] for layer in out.past_key_values.layers] == n["kept"].tolist()
    tokens, logits = generated(model, inputs, policy_of(case), len(n["ids"]), VOCAB)
    assert torch.equal(tokens, n["ids"])
    close(logits, n["logits"])


# ------------------------------------------------------------------------------------------------ what is decided here
class Shown:
    """As much of a row's tokens as the policy looks at."""

    def __init__(self, place: Tensor, text_place: Tensor) -> None:
        self.place, self.text_place = place, text_place

    def __len__(self) -> int:
        return len(self.place)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)


def test_probes_are_the_last_rows_and_some_others() -> None:
    def draw(n: int, seed: int = 0) -> Tensor:
        return probe_rows(n, 64, 64, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(100), torch.arange(100))
    assert torch.equal(draw(128), torch.arange(128))
    rows = draw(1000)
    assert len(rows.unique()) == len(rows) == 128 and torch.equal(rows, rows.sort().values)
    assert torch.equal(rows[64:], torch.arange(936, 1000))
    assert torch.equal(rows, draw(1000)) and not torch.equal(rows, draw(1000, 1))


def test_near_one_nothing_is_lost_to_rounding() -> None:
    for n in (10, 1000):
        flat = torch.full((n,), 128 / n)
        assert fewest(flat, 1.0, 128) == n
    assert fewest(torch.tensor([2.0, 1.0, 1.0]), 0.75, 4) == 2
    assert fewest(torch.tensor([4.0, 0.0]), 1.0, 4) == 1


def test_importance_counts_the_probes_that_can_see_a_token() -> None:
    sums, probes = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1, 3])
    close(normalised(sums, probes), torch.tensor([2.0, 1.5, 2.0, 1.0]))
    close(normalised(sums, probes, "all"), torch.tensor([1.0, 1.0, 1.0, 1.0]))


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"tau": 0.0}, {"tau": 1.5}, {"recent": 0}, {"kv": "quantise"}, {"scope": "text"}):
        with pytest.raises(ValueError, match=r"choose|share|recent"):
            vtr.ZipVL(**settings)
    with pytest.raises(ValueError, match="not known"):
        vtr.ZipVL().entering(32, 576)
