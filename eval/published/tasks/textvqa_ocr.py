"""What the task file beside this points to: lmms-eval's own TextVQA. Loaded by lmms-eval, never imported by vtr."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_doc_to_visual, textvqa_process_results


def process_results(doc: dict[str, Any], result: Any) -> dict[str, Any]:
    """The VQA accuracy, without lines for the challenge's server."""
    return {"exact_match": textvqa_process_results(doc, result)["exact_match"]}


__all__ = ["process_results", "textvqa_doc_to_text", "textvqa_doc_to_visual"]
