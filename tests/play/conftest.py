"""The pocket model, as the playground asks it."""

from __future__ import annotations

import pytest

from vtr.play.ask import Player


@pytest.fixture(scope="session")
def player() -> Player:
    return Player("pocket", "cpu")
