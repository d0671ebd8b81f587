"""Model families and clients. Importing this package makes the families known to :func:`vtr.patch`."""

from vtr.integrations.internvl import InternVL
from vtr.integrations.llava import Llava
from vtr.integrations.llava_next import LlavaNext
from vtr.integrations.llava_onevision import LlavaOnevision
from vtr.integrations.llava_original import LlavaOriginal

from vtr.engine.adapters import register_adapter

for adapter in (Llava(), LlavaNext(), LlavaOnevision(), InternVL(), LlavaOriginal()):
    register_adapter(adapter)

__all__ = ["InternVL", "Llava", "LlavaNext", "LlavaOnevision", "LlavaOriginal"]
