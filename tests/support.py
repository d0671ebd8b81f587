"""Which policy works on which family: cells of ``tests/integrations/test_support.py``, the table of docs/families.md.

``python -m tests.support`` runs the tests and prints the table made of their outcomes; ``--write`` puts it into
the page. A cell is green only if its test passed; the others say why not, in the adapter's words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from torch import Tensor
from vtr.eval.cost.contenders import shipped

import vtr
from tests import learned, oracle, shorter
from tests.families import FAMILIES, Chat, Family, Inputs
from tests.tiny import IMAGE, IMAGE_ID, NEVER
from vtr.base import Policy
from vtr.engine import compression
from vtr.engine.adapters import find_adapter
from vtr.engine.prompt import read_prompt
from vtr.image import Layout, Pooled, scales
from vtr.settings import policy_class

__all__ = ["IMAGE_ID", "NEVER", "POLICIES", "ROWS", "STEPS", "Models"]
STEPS = 4
ROWS = [["ab", IMAGE, "what"], ["abcdef"], [IMAGE, "cde"], ["a", IMAGE, "bc", IMAGE, "whichone"], [IMAGE, "xy"]]
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
OPEN, CLOSE = "<!-- vtr:families -->\n", "<!-- /vtr:families -->"


@dataclass
class Models:
    """A family's tiny model untouched, patched, and the one whose weights the slow reference reads."""

    family: Family
    stock: Any
    patched: Any
    native: Any = None
    """For InternVL's remote code: transformers' class with the same weights, patched."""

    @classmethod
    def from_family(cls, family: Family, attn: str = "sdpa") -> Models:
        stock = family.make(attn)
        native = vtr.patch(copy.deepcopy(family.twin(stock))) if isinstance(family, Chat) else None
        return cls(family, stock, vtr.patch(copy.deepcopy(stock)), native)

    @property
    def twin(self) -> Any:
        return self.family.twin(self.stock)

    def inputs(self, padding: str = "left") -> Inputs:
        return self.family.batch(self.stock, ROWS, padding)

    def row(self, inputs: Inputs, b: int) -> oracle.Row:
        return self.family.row(self.twin, self.family.single(self.stock, inputs, b))

    def layouts(self, inputs: Inputs) -> list[list[Layout]]:
        return read_prompt(find_adapter(self.stock), self.stock, inputs["input_ids"], None, inputs).layouts

    def mixed(self, name: str, inputs: Inputs) -> list[Policy | None]:
        """One policy per row: of a name, but for one row without and one under another."""
        made = POLICIES[name]
        return [made(self, inputs, 0), made(self, inputs, 1), None, made(self, inputs, 3), vtr.FastV(0.5, layer=1)]


def _scales(models: Models, inputs: Inputs, b: int) -> list[int]:
    """Of each image of row b the finest scale but one."""
    return [sorted(scales(layout.grid))[-2] for layout in models.layouts(inputs)[b]]


def _positions(models: Models) -> Any:
    """Of a policy that would renumber them: positions with several axes are kept."""
    rotary = find_adapter(models.stock).text_model(models.stock).rotary_emb
    return "keep" if hasattr(rotary, "mrope_section") else "reindex"


def _sparsevlm(models: Models) -> Policy:
    """With two cuts, that new tokens are made again of some that were made."""
    return vtr.SparseVLM(keeps=[0.6, 0.3], layers=[1, 3], positions=_positions(models))


PMOD, DYNAMIC = learned.pmod(), learned.dynamic()
OWN: dict[str, Callable[[Models, Inputs, int], Policy]] = {
    "autoscale": lambda m, i, b: vtr.AutoScale(threshold=1.0 if b else 0.01),
    "dynamic-llava": lambda m, i, b: DYNAMIC,
    "gsearch": lambda m, i, b: vtr.GSearch([1.0, 0.8, 0.5, 0.5, 0.2], queries="last" if b else "text"),
    "m3": lambda m, i, b: vtr.Matryoshka(_scales(m, i, b) or [1]),
    "pmod": lambda m, i, b: PMOD,
    "mustdrop": lambda m, i, b: vtr.MustDrop(positions=_positions(m)),
    "pyramid": lambda m, i, b: vtr.Pyramid(positions=_positions(m)),
    "random": lambda m, i, b: vtr.Random(0.4, seed=b),
    "tops": lambda m, i, b: vtr.TOPS(0.3, positions=_positions(m)),
    "sparsevlm": lambda m, i, b: _sparsevlm(m),
    "uniform": lambda m, i, b: vtr.UniformGrid(0.4, layer=2 if b else 0),
}
"""What stands for a policy in the tests, for row b of a batch, where its settings depend on row, weights or family."""


def _derived(name: str) -> Callable[[Models, Inputs, int], Policy]:
    """A policy set to a mean budget as its class says, or as it is by default."""
    cls = policy_class(name)

    def make(models: Models, inputs: Inputs, b: int) -> Policy:
        side = min((min(layout.grid) for row in models.layouts(inputs) for layout in row), default=6)
        try:
            return cls(**cls.settings_at(0.5, 5, side))
        except NotImplementedError:
            return cls()

    return make


def policies() -> dict[str, Callable[[Models, Inputs, int], Policy]]:
    """What stands for each policy of vtr in the tests, for row b of a batch."""
    return {name: OWN.get(name) or _derived(name) for name in sorted(shipped())}


POLICIES = policies()


def image_lengths(models: Models, inputs: Inputs, b: int) -> list[int]:
    """Vision tokens of each image of row b."""
    return [len(layout) for layout in models.layouts(inputs)[b]]


# ------------------------------------------------------------------------------------- images that really get shorter
@contextmanager
def answers() -> Iterator[list[list[Pooled | None]]]:
    """What compress policies answer of the images of each row, in the order of the rows that are asked in the block."""
    found: list[list[Pooled | None]] = []

    def asked(policy: Policy, images: Any) -> Any:
        made = own(policy, images)
        found.append([pooled for _, pooled in made])
        return made

    own, compression.asked = compression.asked, asked
    try:
        yield found
    finally:
        compression.asked = own


DERIVED = (vtr.GlobalCom2, vtr.ClsTop, vtr.Pool, vtr.Matryoshka)
"""Policies whose choice among whole grids is written down here once more; fixtures of official code say the others'."""


def compressed(
    models: Models, inputs: Inputs, b: int, policy: Policy, row: oracle.Row, made_of: list[list[int]],
    said: Sequence[Pooled | None] = (),
) -> oracle.Row:  # fmt: skip
    """Row b after ``policy``, its new tokens derived here where images are whole grids.

    Args:
        made_of: the reported sources (slots of the row) of the new tokens, checked against what is derived.
        said: what the policy answered of the row's images: where its new tokens are no means, what they are.
    """
    if not isinstance(policy, DERIVED):
        pooled = [one.features for one in said if one is not None]
        assert len(pooled) in (0, len(said))
        return merged(row, made_of, torch.cat(pooled) if pooled else None)
    single = models.family.single(models.stock, inputs, b)
    grids = models.family.grids(single)
    if grids is None:
        if isinstance(policy, vtr.Matryoshka):
            with torch.no_grad():
                return shorter.row(models.twin, single, shorter.matryoshka(models.twin, single, list(policy.tokens)))  # type: ignore[arg-type]
        return merged(row, made_of)  # tests/policies/test_pool.py and tests/engine/test_compress.py derive these
    want, slots = [], row.slots
    for i, (height, width) in enumerate(grids):
        mine, slots = slots[: height * width], slots[height * width :]
        for some in derived(policy, i, height, width, row.embeds[mine]):
            want.append([mine[at] for at in some])
    assert made_of == want
    return merged(row, want)


def derived(policy: Any, i: int, height: int, width: int, features: Tensor) -> list[list[int]]:
    """Which tokens of the i-th image, a grid of these rows and columns, each new token is made of."""
    if isinstance(
        policy, (vtr.GlobalCom2, vtr.ClsTop)
    ):  # one tile, a tower without CLS: those least like the mean token
        mean = features.mean(0)
        score = -(features @ mean) / features.norm(dim=1) / mean.norm()
        share = policy.retention if isinstance(policy, vtr.GlobalCom2) else policy.keep
        return [[at] for at in sorted(score.argsort(descending=True)[: int(height * width * share)].tolist())]
    if isinstance(policy, vtr.Pool):
        down = across = policy.grid
    else:
        k = round((height * width / policy.tokens[i]) ** 0.5)
        down, across = height // k, width // k
    cells: list[list[int]] = [[] for _ in range(down * across)]
    for at in range(height * width):
        cells[at // width * down // height * across + at % width * across // width].append(at)
    return cells


def merged(row: oracle.Row, made_of: list[list[int]], features: Tensor | None = None) -> oracle.Row:
    """``row`` with its vision tokens replaced by the means of these slots' (M-RoPE: also of their positions), or by
    ``features``, one for each."""
    runs, end = {}, -2  # the first slot of every image → the new tokens that stand there
    for slot in row.slots:
        if slot != end + 1:
            first = slot
            runs[first] = []
        end = slot
        runs[first] += [some for some in made_of if some and some[0] == slot]
    if features is not None:  # in the order of the answer, which need not be that of the slots
        runs = {first: sorted(several, key=made_of.index) for first, several in runs.items()}
    order: list[tuple[list[int], bool]] = []
    for slot in range(len(row.vision)):
        if slot in runs:
            order += [(some, True) for some in runs[slot]]
        if not row.vision[slot]:
            order.append(([slot], False))
    number = {slot: at for at, slot in enumerate(row.slots)}
    new = [some for some, vision in order if vision]
    behind = tuple(torch.stack([one[[number[s] for s in some]].mean(0) for some in new]) for one in row.behind)
    positions = row.positions
    if positions is not None:
        positions = torch.stack([positions[:, some].sum(1) // len(some) for some, _ in order], 1)
    embeds = torch.stack([row.embeds[some].mean(0) for some, _ in order])
    if features is not None:
        embeds[[at for at, (_, vision) in enumerate(order) if vision]] = features
    return oracle.Row(embeds, torch.tensor([vision for _, vision in order]), positions, behind)


# ---------------------------------------------------------------------------------------------------------- the table
TESTS = {"test_a_policy_on_a_family": "works", "test_what_does_not_work_says_so": "refused"}
"""What it means for a cell that its test passed."""


class Outcomes:
    """A pytest plugin: what became of each cell, by (kind of family, policy)."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, _, parameters = report.nodeid.partition("::")[2].partition("[")
        if name in TESTS and (report.when == "call" or not report.passed):
            kind, _, policy = parameters.rstrip("]").partition("-")
            self.of[kind, policy] = TESTS[name] if report.passed else report.outcome


def why_not(family: Family, name: str) -> str | None:
    """Why a policy, with its default settings, cannot work on a family, as its adapter says; None: it can."""
    cls = policy_class(name)
    return family.adapter.why_not(cls if isinstance(cls.wants, tuple) else cls())  # type: ignore[arg-type]


def declared() -> dict[tuple[str, str], str]:
    """The outcomes that the adapters promise."""
    return {
        (family.kind, policy): "refused" if why_not(family, policy) else "works"
        for family in FAMILIES
        for policy in POLICIES
    }


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """Markdown: a row per policy, a column per family, below it why cells are empty."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"<sup>{notes.index(text) + 1}</sup>"

    known = {f.name: [g for g in FAMILIES if g.name == f.name] for f in FAMILIES}
    names = [*known]
    lines = [f"| policy | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for policy in POLICIES:
        cells = []
        for several in known.values():
            found = {outcomes.get((family.kind, policy), "not run") for family in several}
            why, limit = why_not(several[0], policy), several[0].limits.get(policy)
            if found == {"works"}:
                cells.append("✓" + (note(limit) if limit else ""))
            elif found == {"refused"}:
                cells.append("–" + note(str(why)))
            else:
                cells.append(", ".join(sorted(found)))
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    numbered = [f"<sup>{i}</sup> {text}" for i, text in enumerate(notes, 1)]
    return "\n".join([*lines, "", "  \n".join(numbered), ""])


def in_page() -> str:
    """What stands between the marks in docs/families.md."""
    return PAGE.read_text(encoding="utf-8").partition(OPEN)[2].partition(CLOSE)[0].strip("\n") + "\n"


def main(
    write: Annotated[
        bool, typer.Option("--write", help="put the table into docs/families.md; refused if a cell failed")
    ] = False,
) -> None:
    """Run the oracles of every policy on every family (minutes), and make the table of their outcomes."""
    outcomes = Outcomes()
    file = str(Path(__file__).parent / "integrations" / "test_support.py")
    pytest.main(
        [file, "-q", "-k", " or ".join(TESTS), "-m", "slow or not slow", "-p", "no:cacheprovider"], plugins=[outcomes]
    )
    made = table(outcomes.of)
    print(made)
    if wrong := sorted(cell for cell, said in declared().items() if outcomes.of.get(cell) != said):
        print("not as the adapters say:", ", ".join(f"{policy} on {kind}" for kind, policy in wrong))
        raise typer.Exit(1)
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(OPEN)
        _, mark, after = rest.partition(CLOSE)
        if not mark:
            raise typer.BadParameter(f"docs/families.md has no {OPEN.strip()} … {CLOSE} to write the table between")
        PAGE.write_text(f"{before}{OPEN}\n{made}\n{mark}{after}", encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    typer.run(main)
