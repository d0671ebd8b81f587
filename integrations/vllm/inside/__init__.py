"""Policies inside the decoder on vLLM, a policy per request, off unless the engine is started for them.

========================= =====================================================================================
:mod:`.options`           what the engine was started with, and which private places of vLLM this stands on
:mod:`.asked`             what a request may ask for, and how many tokens each layer then holds at most
:mod:`.admission`         the frontend: requests that cannot be served are refused before the engine sees them
:mod:`.scheduler`         a reduced prompt is computed in one step; prefix caches are left alone
:mod:`.blocks`            cache blocks by what each part of the depth holds
:mod:`.worker`, `.step`   one forward: whose tokens enter which layer
========================= =====================================================================================

Nothing of vLLM is imported here.
"""

from __future__ import annotations

from vtr.integrations.vllm.inside.options import engine_args

__all__ = ["engine_args"]
