"""SparseVLM v1.5 and SparseVLM+ against the numbers of the official code (Gumpest/SparseVLMs), and beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import official
from tests.official import close
from tests.policies import inside
from vtr.policies.decoder._lists import between
from vtr.policies.decoder._sparse import clusters, gravity, raters, relevance, taken_of

BOTH = {"sparsevlm": vtr.SparseVLM, "sparsevlm_plus": vtr.SparseVLMPlus}
ALL = [(method, case) for method in BOTH for case in official.meta(method)["cases"]]
cases = pytest.mark.parametrize(("method", "case"), ALL, ids=lambda v: v if isinstance(v, str) else f"c{v['case']}")


def embedded(method: str, case: inside.Case) -> tuple[Tensor, Tensor, Tensor]:
    """Vision tokens and text as they enter layer 0, and which of the text stands behind the image."""
    made, mine = inside.model(method, case["model"]), inside.of(method, case)
    with torch.no_grad():
        text = made.get_input_embeddings()(mine["text_ids"])
    return mine["vision"], text, torch.arange(len(text)) >= case["start"]


@cases
def test_who_rates(method: str, case: inside.Case) -> None:
    vision, text, behind = embedded(method, case)
    close(relevance(vision, text, behind)[case["start"] :], inside.of(method, case)["rater_scores"])
    assert (raters(vision, text, behind) - case["start"]).tolist() == case["raters_idx"]


def at(method: str, case: inside.Case) -> dict[int, dict[str, Tensor]]:
    """The official numbers of each cut, by the layer that is cut on entering."""
    mine = inside.of(method, case)
    return {
        after + 1: {name.removeprefix(f"s{s}."): t for name, t in mine.items() if name.startswith(f"s{s}.")}
        for s, after in enumerate(case["pruning_loc"])
    }


def policy_of(method: str, case: inside.Case) -> Any:
    """The official settings; a cut behind the last layer cuts nothing. v1.5 gets the official random numbers."""
    depth = len(case["entering_lengths"])
    cuts = [(after + 1, keep) for after, keep in zip(case["pruning_loc"], case["keep_list"], strict=True)]
    layers, keeps = zip(*[cut for cut in cuts if cut[0] < depth], strict=True)
    given: dict[str, Any] = {"keeps": list(keeps), "layers": list(layers), "placement": "official"}
    made = Watched(**given) if method == "sparsevlm" else WatchedPlus(**given)
    made.at = at(method, case)
    return made


@dataclass
class Watched(vtr.SparseVLM):
    """Draws given numbers, and notes scores and answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, tuple[Tensor, Any]] = {}

    def noise(self, tokens: vtr.Tokens, count: int) -> Tensor:
        return self.at[tokens.layer]["noise"]

    def cut(self, tokens: vtr.Tokens, count: int) -> Any:
        answer = super().cut(tokens, count)
        self.seen[tokens.layer] = (tokens.scores.clone(), answer)
        return answer


@dataclass
class WatchedPlus(vtr.SparseVLMPlus):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.at: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, tuple[Tensor, Any]] = {}

    def cut(self, tokens: vtr.Tokens, count: int) -> Any:
        answer = super().cut(tokens, count)
        self.seen[tokens.layer] = (answer.scores, answer)  # type: ignore[assignment]
        return answer


@cases
def test_prefill_and_decoding(method: str, case: inside.Case) -> None:
    policy = policy_of(method, case)
    inside.agrees(method, case, policy)
    for layer, (scores, answer) in policy.seen.items():
        want = at(method, case)[layer]
        close(scores, want["scores"], 1e-4 if method == "sparsevlm_plus" else 1e-5)  # divided by what comes near 0
        kept = answer.keep if isinstance(answer, vtr.Merged) else answer.indices()
        assert kept.tolist() == want["kept"].tolist()
        if isinstance(answer, vtr.Merged):
            close(answer.states, want["merged"])
            assert len(answer.sources) == len(answer.states)
            gone = [token for made in answer.sources for token in made]
            assert len(gone) == len(set(gone)) == len(want["noise"]) and not set(gone) & set(kept.tolist())
    assert policy.entering(len(case["entering_lengths"]), case["vision"]) == [
        n - case["start"] - case["text"] for n in case["entering_lengths"]
    ]


@pytest.mark.parametrize("case", official.meta("sparsevlm")["cases"], ids=lambda c: f"c{c['case']}")
def test_a_first_cut_from_given_scores(case: inside.Case) -> None:
    """The arithmetic alone: who stays, and what becomes of some of the others."""
    first = min(at("sparsevlm", case))
    made, inputs = inside.prompt("sparsevlm", case)
    want, n, start = at("sparsevlm", case)[first], case["vision"], case["start"]
    seen: list[Tensor] = []
    hook = made.get_decoder().layers[first].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        made(**inputs)
    hook.remove()
    fields = {"hidden": seen[0][0, start : start + n]}
    tokens = vtr.Tokens(first, 6, n, n, fields.__getitem__, want["scores"], lambda: want["scores"])
    tokens.memo["words"] = torch.tensor(case["raters_idx"])
    answer = policy_of("sparsevlm", case).prune(first, tokens)
    assert answer.keep.tolist() == want["kept"].tolist() and len(answer.sources) == case["clusters"][0]
    close(answer.states, want["merged"])
    assert taken_of(n - len(answer.keep)) == (len(want["noise"]), len(want["merged"]))


# ------------------------------------------------------------------------------------------------- beyond the official
@pytest.mark.parametrize("kind", BOTH.values())
def test_the_official_lists(kind: type[vtr.SparseVLM]) -> None:
    for retain, counts in kind.lists.items():
        assert between(kind.lists, retain) == [*counts] == between(kind.lists, retain / 576)
        assert kind(retain).stages(32, 576) == dict(zip((3, 7, 16), counts, strict=True))
        assert list(kind(retain).stages(32, 2880).values()) == [5 * count for count in counts]
    assert vtr.policy("sparsevlm:64") == vtr.SparseVLM(64)
    assert vtr.SparseVLM(192).entering(32, 576)[2:4] == [576, 300 + 9]
    assert vtr.SparseVLM(576).entering(32, 576) == vtr.SparseVLM(1.0).entering(32, 576) == [576] * 32


@pytest.mark.parametrize("kind", BOTH.values())
@pytest.mark.parametrize("depth", [2, 3, 5, 12, 28, 32, 80])
@pytest.mark.parametrize("total", [1, 2, 9, 300, 2880])
def test_any_depth_and_number(kind: type[vtr.SparseVLM], depth: int, total: int) -> None:
    for retain in (1, 64, 100, 500, 0.01, 0.9):
        counts = kind(retain).entering(depth, total)
        assert counts == sorted(counts, reverse=True) and counts[0] == total and counts[-1] >= 1


@pytest.mark.parametrize("kind", BOTH.values())
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.7])
def test_set_to_a_budget(kind: type[vtr.SparseVLM], share: float) -> None:
    made = kind(**kind.settings_at(share, 32, 24))
    assert abs(sum(made.entering(32, 576)) / 576 / 32 - share) < 0.003


def test_a_cut_that_would_leave_more_than_there_is() -> None:
    """It is none; official code cuts one token, which comes back behind the others."""
    given: Any = {"keeps": [40, 16, 10], "layers": [1, 2, 3]}
    policy, official_one = vtr.SparseVLM(**given), vtr.SparseVLM(**given, placement="official")
    assert policy.entering(5, 16) == official_one.entering(5, 16) == [16, 16, 16, 11, 11]
    assert policy.split(1, 5, 16, 16) is None and official_one.split(1, 5, 16, 16) == 15
    assert official_one.split(1, 5, 1, 1) is None


def test_nobody_above_the_mean_then_all_of_the_text_behind() -> None:
    vision, text = torch.ones(4, 2), torch.ones(3, 2)
    assert raters(vision, text, torch.tensor([False, True, True])).tolist() == [1, 2]
    assert raters(vision, text, torch.tensor([False, False, False])).tolist() == [0, 1, 2]


def test_clusters_of_plain_heaps() -> None:
    heaps = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [9.0, 9], [9.1, 9]])
    centres, owner = clusters(heaps, torch.tensor([0.5, 0.1, 0.2, 0.4, 0.3]), 2)
    assert owner[0] == owner[1] == owner[2] != owner[3] == owner[4] and len(set(centres.tolist())) == 2


def test_rope_alone() -> None:
    turn = torch.arange(6)[:, None] * torch.tensor([1.0, 0.3])
    rope = torch.cat([turn, turn], -1).cos(), torch.cat([turn, turn], -1).sin()
    want = (turn[:, None] - turn[None]).cos().mean(-1)
    close(gravity(rope, rope), want * 2)
    assert gravity(rope, rope, 0.1).amin() >= 0.2


def test_what_it_refuses() -> None:
    for bad, told in (
        ({"retain": 0}, "share in"), ({"retain": 577}, "share in"), ({"retain": 1.5}, "ratio"),
        ({"keeps": [3]}, "one keep for each"), ({"keeps": [3, 0, 1]}, "leaves something"),
        ({"layers": [0, 1, 2]}, "begin at 1"), ({"layers": [3, 2, 5]}, "must ascend"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            vtr.SparseVLM(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose 1…4"):
        vtr.SparseVLM(layers=[1, 2, 9]).check(5)
