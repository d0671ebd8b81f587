"""Code of the docs as it is written where an older transformers is installed."""

from __future__ import annotations

import re

from transformers import LlavaForConditionalGeneration

from vtr.engine.compat import cache_name

CACHE = re.compile(r"(?<=\.)cache\b|\bcache(?==(?:out|vtr)\b)")
"""Where a page reads a cache off an output, or hands one over."""


def as_named_here(code: str) -> str:
    """With the name that the cache has here; the pages say that it was another one."""
    return CACHE.sub(cache_name(LlavaForConditionalGeneration), code)
