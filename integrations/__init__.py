"""Model families and clients. Importing this package makes the families known to :func:`vtr.patch`."""

from vtr.integrations.idefics3 import Idefics3
from vtr.integrations.internvl import InternVL
from vtr.integrations.internvl_chat import InternVLChat
from vtr.integrations.llava import Llava
from vtr.integrations.llava_next import LlavaNext
from vtr.integrations.llava_onevision import LlavaOnevision
from vtr.integrations.llava_original import LlavaOriginal
from vtr.integrations.qwen_vl import Qwen3VL, Qwen25VL
from vtr.integrations.structural import Structural

from vtr.engine.adapters import register_adapter

FAMILIES = (Llava, LlavaNext, LlavaOnevision, LlavaOriginal, InternVL, InternVLChat, Qwen25VL, Qwen3VL, Idefics3)
register_adapter(Structural())  # the first to be made known is the last to be asked
for family in FAMILIES:
    register_adapter(family())

__all__ = [
    "Idefics3",
    "InternVL",
    "InternVLChat",
    "Llava",
    "LlavaNext",
    "LlavaOnevision",
    "LlavaOriginal",
    "Qwen3VL",
    "Qwen25VL",
    "Structural",
]
