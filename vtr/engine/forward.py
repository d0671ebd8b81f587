"""The pre-hook of the module that merges images into the text: what a forward asks of the text model.

Every way of calling a model goes through that module: ``model(…)``, ``model.forward(…)`` (peft), ``model.model(…)``,
and each step of ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vtr.base import Policy, UnsupportedError
from vtr.engine.answers import answer_labels
from vtr.engine.call import PIXELS, Generation, pending_request, refuse_replica
from vtr.engine.captures import begin
from vtr.engine.choice import MISSING
from vtr.engine.compat import cache_in
from vtr.engine.dense import dense_forward
from vtr.engine.prompt import ids_of, read_prompt
from vtr.engine.refusals import check_call, check_mask, check_pixels, refuse_compiled, warn_on_labels
from vtr.engine.request import Request, may_forget_answer
from vtr.engine.short_cache import is_reduced
from vtr.engine.static import takes_static_step
from vtr.engine.turns import go_on, new_turn, refuse_new_pictures
from vtr.image import CROP_GRIDS

if TYPE_CHECKING:
    from vtr.engine.hooks import Patch


def names_of(module: Any) -> list[str]:
    """The parameters of a module's forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


class ForwardHooks:
    """Decides for each forward which policies apply, and where its vision tokens and images are."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.names, self.inner_names = names_of(patch.entry), names_of(patch.inner)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if takes_static_step(cache_in(kwargs), kwargs):
            return args, kwargs
        if torch.compiler.is_compiling():
            if "vtr_request" not in kwargs and self.check_compiling(kwargs):
                kwargs["vtr_request"] = None
            return args, kwargs
        if module.__dict__.get("_is_replica"):
            refuse_replica(self.patch.key, kwargs.get("policy", self.patch.choice.default))
        if self.patch.inner is not self.patch.model:
            left = pending_request.get()
            if (left is not None and left[0] is self.patch.key) or self.patch.choice.generation() is None:
                return args, kwargs  # the model's own forward has asked; by itself, the inner one is not reduced
        elif self.patch.path == "padded" and (left := pending_request.get()) is not None and left[0] is self.patch.key:
            return args, kwargs  # the model around this one has asked
        names = self.names if module is self.patch.entry else names_of(module)
        args, kwargs, request = self.make_request(names, args, kwargs, steps=True)
        if self.patch.request_by_context:
            pending_request.set((self.patch.key, request))
        elif request is not None or self.patch.choice.applies():
            kwargs["vtr_request"] = request
        return args, kwargs

    def make_request(
        self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], steps: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any], Request | None]:
        """A forward's arguments without what is ours, and what it asks of the text model.

        Args:
            names: of the forward's parameters, in order. steps: whether a running generate's steps come this way.
        """
        given = kwargs.pop("policy", MISSING)
        ends, grids = kwargs.pop("vtr_queries_end", None), kwargs.pop(CROP_GRIDS, None)
        if args:
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, ()
        cache = cache_in(kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        rows = None if source is None else source.shape[0]
        generation = self.patch.choice.generation() if given is MISSING else None
        self._goes_on(cache, generation, None if source is None else source.shape[1], kwargs)
        if generation is not None and generation.policies is None:
            return args, kwargs, None
        by_hand = False
        if generation is None:
            policies = self.patch.choice.policies(given, rows)
        elif steps and (self.patch.inner is not self.patch.model or generation.owns(ids, kwargs, cache)):
            if generation.started and is_reduced(cache):
                return args, kwargs, None
            policies = generation.policies
        else:  # a callback of that generate runs the model
            if ids is not None and not bool(torch.isin(ids.cpu(), self.marks()).any()):
                return args, kwargs, None  # text without pictures
            by_hand, policies = True, generation.policies_for(rows or 0)
        if policies is None:
            if is_reduced(cache):
                check_mask(kwargs)
            else:
                self.patch.publish(None if ids is None else dense_forward(self.patch, ids, kwargs))
            return args, kwargs, None
        check_call(kwargs, [self.patch.model.config, self.patch.decoder.text.config], self.patch.path)
        own = generation is not None and not by_hand
        asked = [p for p in policies if p is not None and (p.asks("resolve") or (p.asks("accept") and not own))]
        if asked:
            when = "before generate runs" if asked[0].asks("resolve") else "while generate reads the prompt"
            raise UnsupportedError(
                f"{type(asked[0]).__name__} chooses {when}: call model.generate(…), or give this forward a fixed policy"
            )
        if generation is not None and not by_hand:
            return args, kwargs, self._generation_request(generation, kwargs, source.shape)  # type: ignore[union-attr]
        return args, kwargs, self._direct_request(policies, ids, embeds, kwargs, ends, generation, grids)

    def _goes_on(self, cache: Any, generation: Generation | None, length: int | None, kwargs: dict[str, Any]) -> None:
        """If a cache goes on: whom that may surprise, said once a turn. length: columns of the forward."""
        owned = generation is not None and generation.owns_cache(cache)
        if generation is not None and owned and generation.started:
            return
        refuse_new_pictures(cache, kwargs)
        if not owned:
            go_on(self.patch.entry, cache, None)
        if owned or length != 1 or any(kwargs.get(name) is not None for name in PIXELS):
            new_turn(cache)  # one token by hand is a decoded one

    def _direct_request(
        self, policies: list[Policy | None], ids: torch.Tensor | None, embeds: torch.Tensor | None,
        kwargs: dict[str, Any], ends: Any, generation: Generation | None, grids: Any,
    ) -> Request:  # fmt: skip
        """Of a forward that is no step of a generate.

        Args:
            ends: the call's ``vtr_queries_end``. generation: the one inside which it is made by hand, or None.
            grids: its ``crop_grids``.
        """
        if ids is None:
            assert embeds is not None
            ids = ids_of(self.patch.adapter, self.patch.model, embeds)
        check_pixels(kwargs)
        if ends is None and generation is not None and generation.starts_with_prompt(ids):
            ends = generation.ids.shape[1]  # type: ignore[union-attr]
        labels = answer_labels(ends, kwargs, type(self.patch.model), ids)
        given = {**kwargs, "labels": labels, CROP_GRIDS: grids}
        prompt = read_prompt(self.patch.adapter, self.patch.model, ids, kwargs.get("attention_mask"), given)
        starts, lacking = prompt.answer_starts()
        if ends is None and lacking:  # labels of plain language modeling
            starts = [prompt.is_vision.shape[1] if b in lacking else start for b, start in enumerate(starts)]
            warn_on_labels([policies[b] for b in lacking])
        captures = self.patch.vision.wanted(policies, prompt)
        if captures is not None:
            begin(captures)
        request = Request(policies, prompt, starts, None, captures)
        if cache_in(kwargs) is None and may_forget_answer(request):
            kwargs["use_cache"] = False
        return request

    def _generation_request(self, generation: Generation, kwargs: dict[str, Any], shape: Sequence[int]) -> Request:
        """Of the first forward of a generate, or any without a cache. shape: rows, tokens."""
        assert generation.prompt is not None and generation.policies is not None
        rows, length = shape[:2]
        mask, asked = kwargs.get("attention_mask"), generation.prompt.is_vision.shape[1]
        beams = rows // len(generation.policies)  # beam search and num_return_sequences repeat each prompt
        prompt = generation.prompt.repeated(beams).extended(length)
        if prompt.valid is None and mask is not None and mask.dim() == 2:  # transformers derived it from pad tokens
            prompt.valid = mask[:, -length:].bool().cpu()
        generation.trace.beams = beams
        offset = max(generation.length - asked, 0) if not generation.started else 0
        expanded = [p for p in generation.policies for _ in range(beams)]
        return Request(expanded, prompt, [asked] * rows, generation, generation.captures, offset)

    def marks(self) -> torch.Tensor:
        """The ids that stand for vision tokens."""
        return torch.tensor(self.patch.adapter.placeholders(self.patch.model), dtype=torch.int64)

    # -- calls that do not come this way ---------------------------------------------------------------------------
    def check_unasked(self, kwargs: dict[str, Any]) -> None:
        """Refuse a call of the text model that no pre-hook has seen, though a policy applies.

        Text alone may pass: word ids hold no picture.

        Raises:
            UnsupportedError: naming the way out.
        """
        named = kwargs.pop("policy", None) is not None
        if named or (kwargs.get("inputs_embeds") is not None and self.patch.choice.applies()):
            raise UnsupportedError(
                f"a policy applies, but this call reached {type(self.patch.decoder.text).__name__} on a way that does "
                f"not say where the images are: call {type(self.patch.model).__name__}(…) or its generate, with "
                "input_ids and pixel_values, or run it without a policy (policy=None, or outside vtr.use and defaults)"
            )

    def check_compiling(self, kwargs: dict[str, Any]) -> bool:
        """While torch compiles, context variables cannot be read: let calls pass in which no policy can apply.

        Returns:
            Whether one would apply, had the call not said policy=None.

        Raises:
            UnsupportedError: one may.
        """
        given, choice = kwargs.pop("policy", MISSING), self.patch.choice
        others = choice.default is not None or choice.users > 0
        if given is not None and (given is not MISSING or others):
            refuse_compiled()
        return others
