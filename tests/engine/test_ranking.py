"""Rows are ranked together: the same tokens stay as if each row were ranked alone, whatever the policies answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtr
from tests import tiny
from tests.tiny import IMAGE
from vtr.engine import ranking

CPU = torch.device("cpu")
ROWS = [["ab", IMAGE, "what"], ["abcdef"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, "cde"], ["cde", IMAGE, "x"]]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[ranking.Kept], list[int]]:
    """What some rows keep: the best by scores with ties and infinities, indices, or everything."""
    kept: list[ranking.Kept] = []
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    if draw(st.booleans()):
        counts = counts[:1] * len(counts)
    score = st.sampled_from([0.0, 1.0, -1.0, 2.5, float("inf"), float("-inf")])
    for n in counts:
        how = draw(st.sampled_from(["best", "best", "indices", "all"]))
        some = draw(st.integers(0, n))
        scores = torch.tensor(draw(st.lists(score, min_size=n, max_size=n)))
        chosen = torch.tensor(sorted(draw(st.permutations(range(n)))[:some]), dtype=torch.int64)
        kept.append({"best": (scores, some), "indices": chosen, "all": None}[how])  # type: ignore[arg-type]
    return kept, counts


@given(rows())
def test_rows_together_keep_what_each_keeps_alone(drawn: tuple[list[ranking.Kept], list[int]]) -> None:
    kept, counts = drawn
    want, start = [], 0
    for one, n in zip(kept, counts, strict=True):
        mine = torch.arange(n) if one is None else vtr.top(*one) if isinstance(one, tuple) else one
        want.append(mine + start)
        start += n
    got, left = ranking.keep(kept, counts, CPU)
    assert got.tolist() == torch.cat(want).tolist()
    assert left == [len(mine) for mine in want]


def test_scores_may_be_of_several_kinds() -> None:
    """Counts of one row, half precision of another: ranked as they are."""
    scores = [torch.tensor([3, 1, 2]), torch.tensor([0.5, 2.0], dtype=torch.bfloat16), torch.tensor([True, False])]
    got, left = ranking.keep([(scores[0], 2), (scores[1], 1), (scores[2], 1)], [3, 2, 2], CPU)
    assert got.tolist() == [0, 2, 4, 5] and left == [2, 1, 1]


@dataclass
class Norm(vtr.Policy):
    """The largest hidden states, answered as asked for."""

    answer: str = "best"

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        if layer != 2:
            return None
        scores = tokens.hidden.norm(dim=-1)
        return vtr.Best(scores, 9) if self.answer == "best" else vtr.top(scores, 9)


@dataclass
class Ahead(vtr.Policy):
    """PyramidDrop's ranking, called or handed back."""

    called: bool = False

    question_guided: ClassVar[bool] = True

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        return vtr.Best(tokens.ahead() if self.called else tokens.ahead, 11) if layer == 3 else None


@dataclass
class Around(vtr.Policy):
    """Goes around a layer, and ranks by that layer's attention for the next."""

    question_guided: ClassVar[bool] = True

    def needs(self, layer: int) -> vtr.base.Scores | None:
        return "text" if layer == 3 else None

    def route(self, layer: int, tokens: vtr.Tokens) -> vtr.Route | None:
        return vtr.Route(vtr.Best(tokens.hidden.norm(dim=-1), 20)) if layer == 2 else None

    def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
        return vtr.Best(tokens.scores, 5) if layer == 3 and tokens.scores is not None else None


def kept(model: Any, inputs: Any, policy: Any) -> tuple[list[list[list[int]]], torch.Tensor]:
    with torch.no_grad():
        logits = model(**inputs, policy=policy).logits
    return [[row.kept(layer) for layer in range(5)] for row in vtr.report(model).rows], logits


@pytest.mark.parametrize(("one", "other"), [(Norm("best"), Norm("indices")), (Ahead(False), Ahead(True))], ids=repr)
@pytest.mark.parametrize("lm", ["llama", "mistral"])
def test_however_a_policy_answers_the_same_stays(one: Any, other: Any, lm: str) -> None:
    model = vtr.patch(tiny.llava_next(lm=lm))
    inputs = tiny.batch(model, ROWS)
    for policies in ([one] * 5, [one, None, one, vtr.FastV(0.3), one]):
        others = [other if p is one else p for p in policies]
        mine, logits = kept(model, inputs, policies)
        theirs, want = kept(model, inputs, others)
        assert mine == theirs
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", [Norm(), Ahead(), Around()], ids=repr)
def test_a_row_is_the_same_in_any_batch(policy: Any) -> None:
    model = vtr.patch(tiny.llava_next())
    inputs = tiny.batch(model, ROWS)
    together, logits = kept(model, inputs, [policy, None, policy, vtr.Pyramid(), policy])
    for b in (0, 2, 4):
        alone, want = kept(model, tiny.single(inputs, b, model), policy)
        start = int(tiny.real(inputs, b)[0])
        assert [[slot - start for slot in layer] for layer in together[b]] == alone[0]
        torch.testing.assert_close(logits[b, tiny.real(inputs, b)], want[0], atol=1e-5, rtol=0)
    assert [len(layer) for layer in together[0]][-1] < len(together[0][0])


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda n: vtr.Best(torch.zeros(n + 1), 3), ValueError, "one for each of 36 tokens"),
        (lambda n: vtr.Best([0.0] * n, 3), ValueError, "one for each of 36 tokens"),  # type: ignore[arg-type]
        (lambda n: vtr.Best(torch.zeros(n), 0.5), TypeError, "vtr.keep_count makes one"),  # type: ignore[arg-type]
        (lambda n: vtr.Best(torch.zeros(n), -1), TypeError, "int of at least 0"),
    ],
)
def test_what_is_no_best_is_refused(answer: Any, error: type[Exception], match: str) -> None:
    @dataclass
    class Wrong(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
            return answer(len(tokens))

    model = vtr.patch(tiny.llava())
    with pytest.raises(error, match=f"Wrong.prune.*{match}"):
        model(**tiny.batch(model, ROWS[:1]), policy=Wrong())


def test_an_answer_for_each_row() -> None:
    @dataclass
    class Short(vtr.Policy):
        def prune(self, layer: int, tokens: vtr.Tokens) -> None: ...

        def prune_all(self, layer: int, tokens: Sequence[vtr.Tokens]) -> Any:
            return []

    model = vtr.patch(tiny.llava())
    with pytest.raises(ValueError, match=r"Short\.prune_all must answer for each of 1 rows"):
        model(**tiny.batch(model, ROWS[:1]), policy=Short())


@pytest.mark.parametrize("parent", [vtr.FastV, vtr.UniformGrid, vtr.Random])
def test_a_class_that_answers_anew_is_asked(parent: Any) -> None:
    """What the class above does for all rows at once must not go past it."""

    @dataclass
    class Pruning(parent):  # type: ignore[misc]
        def prune(self, layer: int, tokens: vtr.Tokens) -> Any:
            return torch.arange(4) if layer == self.layer else None

    @dataclass
    class Scoring(parent):  # type: ignore[misc]
        def score(self, tokens: vtr.Tokens) -> torch.Tensor:
            return -torch.arange(len(tokens)).float()

    model = vtr.patch(tiny.llava())
    inputs = tiny.batch(model, ROWS[:3])
    for policy in (Pruning(keep=9, layer=2), Scoring(keep=4, layer=2)):
        (first, *_), _ = kept(model, inputs, policy)
        assert [slot - first[0][0] for slot in first[3]] == [0, 1, 2, 3]


def test_best_says_its_indices() -> None:
    assert vtr.Best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).indices().tolist() == [1, 2]
    assert vtr.Best(lambda: torch.tensor([1.0, 3.0]), 5).indices().tolist() == [0, 1]
