"""The common model tests of transformers' source distribution over the supported families.

`.ci/upstream` unpacks that distribution's ``tests`` as ``transformers_tests`` and runs this file twice, with
``VTR_UPSTREAM=patched`` and without: patched models without a policy must pass and fail the same tests.
"""

from __future__ import annotations

import functools
import os
import unittest
from typing import Any, ClassVar

import torch
from transformers import (
    InternVLForConditionalGeneration,
    InternVLModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers_tests.test_modeling_common import ModelTesterMixin

import vtr
from tests import tiny

CLASSES = (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    InternVLForConditionalGeneration,
)


def patch_on_construction(cls: type) -> None:
    """Every model of ``cls`` is patched as soon as it is built."""
    build = cls.__init__  # type: ignore[misc]

    @functools.wraps(build)
    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        vtr.patch(self)

    cls.__init__ = patched  # type: ignore[misc]


if os.environ.get("VTR_UPSTREAM") == "patched":
    for _cls in CLASSES:
        patch_on_construction(_cls)


class Tester:
    """What the common tests ask of a family: a small config and a batch for it."""

    is_training, seq_length, num_hidden_layers, hidden_size, num_attention_heads = True, 0, 2, 48, 4

    def __init__(self, family: str) -> None:
        self.family = family
        model = getattr(tiny, family)(layers=self.num_hidden_layers)
        self.config = model.config
        self.inputs = tiny.batch(model, [["ab", tiny.IMAGE, "what"], ["abc", tiny.IMAGE, "how"]])
        self.batch_size, self.seq_length = self.inputs["input_ids"].shape
        self.encoder_seq_length = self.seq_length

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = type(self.config)(**self.config.to_dict())
        return config, {name: value.clone() for name, value in self.inputs.items()}


class Common(ModelTesterMixin):
    family: ClassVar[str]
    all_model_classes: ClassVar[tuple[type, ...]]
    _is_composite = True
    test_missing_keys = False
    skip_test_image_features_output_shape = True

    def setUp(self) -> None:
        self.model_tester = Tester(self.family)


class LlavaCommon(Common, unittest.TestCase):
    family, all_model_classes = "llava", (LlavaModel, LlavaForConditionalGeneration)


class LlavaNextCommon(Common, unittest.TestCase):
    family, all_model_classes = "llava_next", (LlavaNextModel, LlavaNextForConditionalGeneration)


class LlavaOnevisionCommon(Common, unittest.TestCase):
    family, all_model_classes = "llava_onevision", (LlavaOnevisionModel, LlavaOnevisionForConditionalGeneration)


class InternVLCommon(Common, unittest.TestCase):
    family, all_model_classes = "internvl", (InternVLModel, InternVLForConditionalGeneration)
