"""Names that other people's adapters and policies may know from older versions: they warn, and work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vtr.integrations.llava import Llava
from vtr.integrations.llava import tile_layout as layout

import vtr
from tests import tiny
from vtr.engine import adapters


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    yield


class OldLlava(Llava):
    says_answer_only = True

    def merger(self, model: Any) -> Any:
        return model.model


def test_an_adapter_with_old_names_warns_and_works(known: None) -> None:
    adapter = OldLlava()
    with pytest.warns(DeprecationWarning) as seen:
        adapters.register_adapter(adapter)
    assert [str(w.message) for w in seen] == [
        "OldLlava.says_answer_only is now called returns_new_tokens_only",
        "OldLlava.merger is now called multimodal_module",
    ]
    model = tiny.llava()
    assert adapter.returns_new_tokens_only and adapter.multimodal_module(model) is model.model
    assert vtr.engine.install.patch_of(vtr.patch(model)).entry is model.model


def test_an_adapter_with_todays_names_does_not_warn(known: None, recwarn: pytest.WarningsRecorder) -> None:
    adapters.register_adapter(Llava())
    assert not recwarn.list


def test_whole_layouts_have_all_patches() -> None:
    with pytest.warns(DeprecationWarning, match="has_all_patches"):
        assert layout(2, 3).whole
    assert layout(2, 3).has_all_patches
