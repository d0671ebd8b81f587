"""A policy that is made of others: what they own, check and look at, put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vtr.base import Policy

if TYPE_CHECKING:
    import torch


class Parts(Policy):
    """Base of policies that let others act; a subclass says which, by :meth:`parts`."""

    def parts(self) -> list[Policy]:
        """The others, in the order in which their weights are saved."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is made of")

    @property
    def question_guided(self) -> bool:  # type: ignore[override]
        return any(p.question_guided for p in self.parts())

    @property
    def on_continue(self) -> str:
        return next((p.on_continue for p in self.parts() if p.question_guided and hasattr(p, "on_continue")), "warn")

    def check(self, num_hidden_layers: int) -> None:
        for p in self.parts():
            p.check(num_hidden_layers)

    def check_model(self, model: Any) -> None:
        for p in self.parts():
            p.check_model(model)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{n}": t for i, p in enumerate(self.parts()) for n, t in p.tensors().items()}

    def about(self) -> dict[str, Any] | None:
        found = {str(i): p.about() for i, p in enumerate(self.parts()) if p.about() is not None}
        return found or None

    def load_tensors(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        for p, mine, said in self._shared_out(tensors, about):
            p.load_tensors(mine, *said)

    def expect(self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
        for p, mine, said in self._shared_out(tensors, about):
            p.expect(mine, *said)

    def loaded_from(self, folder: str | None, allow_mismatch: bool) -> None:
        for p in self.parts():
            p.loaded_from(None, allow_mismatch)

    def _shared_out(
        self, tensors: dict[str, torch.Tensor], about: dict[str, Any] | None
    ) -> list[tuple[Any, dict[str, torch.Tensor], list[Any]]]:
        """Each part, its tensors, and what is known about them (none or one).

        Raises:
            ValueError: something belongs to none of them.
        """
        known = about if isinstance(about, dict) else {} if about is None else {"weights": about}
        parts = self.parts()
        places = [str(i) for i in range(len(parts))]
        if foreign := sorted({n for n in tensors if n.partition(".")[0] not in places} | {*known} - {*places}):
            raise ValueError(f"these tensors belong to no policy of the {self.name}: {', '.join(foreign)}")
        out = []
        for i, p in zip(places, parts, strict=True):
            mine = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == i}
            said = [known[i]] if known.get(i) is not None else []
            if mine or said:
                out.append((p, mine, said))
        return out


def members(policy: Policy | None) -> Iterator[Policy]:
    """The policies that ``policy`` is made of, and those that these are made of; itself, if it is made of none."""
    if isinstance(policy, Parts):
        for part in policy.parts():
            yield from members(part)
    elif policy is not None:
        yield policy
