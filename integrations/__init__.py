"""Model families and clients. Importing this package makes the families known to :func:`vtr.patch`."""

from vtr.integrations.llava import Llava
from vtr.integrations.llava_next import LlavaNext

from vtr.engine.adapters import register_adapter

register_adapter(Llava())
register_adapter(LlavaNext())

__all__ = ["Llava", "LlavaNext"]
