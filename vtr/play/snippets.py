"""What can be copied: the same question under the same policy in Python, and as a request to ``vtr serve``."""

from __future__ import annotations

import json

import vtr
from vtr.integrations.vllm.inside.asked import divided
from vtr.integrations.vllm.specs import NONE, RequestError, spec_of
from vtr.pocket import NAMES, POLICIES, UNSERVED, UNSERVED_BECAUSE
from vtr.settings import parse

PICTURE, FILM = "picture.png", "film.mp4"


def python(model: str, spec: str, question: str, new_tokens: int, video: bool = False) -> str:
    """A script that asks this; its picture lies in ``picture.png``, its video in ``film.mp4``.

    Args:
        model: a pocket model's name, a folder or a hub name. spec: a spec string, or "none".
    """
    before, inside = (None, None) if spec == NONE else vtr.split(spec)
    given = None if inside is None else inside.spec if before is not None else spec
    media = "videos" if video else "pictures"
    imports = ["from vtr.data.videos import read_video" if video else "from PIL import Image"]
    if model in NAMES:
        load = [f"model, processor = vtr.pocket.load({json.dumps(NAMES[model])})"]
    else:
        imports.append("from transformers import AutoModelForImageTextToText, AutoProcessor")
        load = [
            f"processor = AutoProcessor.from_pretrained({json.dumps(model)})",
            f'model = AutoModelForImageTextToText.from_pretrained({json.dumps(model)}, dtype="auto")',
        ]
    encode = "encode_videos" if video else "encode"
    read = f'read_video("{FILM}")' if video else f'Image.open("{PICTURE}")'
    acting = "" if before is None else f", {json.dumps(before.spec, ensure_ascii=False)}"
    policy = None if given is None else json.dumps(given, ensure_ascii=False)
    return "\n".join(
        [
            *sorted(imports),
            "",
            "import vtr",
            "",
            *load,
            "vtr.patch(model)",
            f"questions, {media} = [{json.dumps(question, ensure_ascii=False)}], [{read}]",
            f"inputs = vtr.chat.{encode}(processor, questions, {media}{acting}).to(model.device)",
            f"out = model.generate(**inputs, policy={policy}, max_new_tokens={new_tokens}, do_sample=False)",
            'print(vtr.chat.decode(processor, out, inputs["input_ids"].shape[1])[0])',
            "print(vtr.report(model).table())",
            "",
        ]
    )


def curl(model: str, spec: str, question: str, new_tokens: int, depth: int) -> str:
    """A request to ``vtr serve``, behind a comment that says how that is started, or why it does not take this.

    Args:
        depth: decoder layers of the model.
    """
    if model in UNSERVED:
        return f"# vtr serve does not take {model}:\n# {UNSERVED_BECAUSE}\n"
    weights = _shipped(spec)
    try:
        before, within = divided(spec, depth, weights)
        spec_of(before, depth)
    except RequestError as error:
        return "\n".join(f"# {line}" for line in f"vtr serve does not take {spec}:\n{error}".splitlines()) + "\n"
    inside = "" if within == NONE else " --decoder-policies"
    inside += "".join(f" --weights {name}=FOLDER" for name in weights)
    content = [{"type": "image_url", "image_url": {"url": "PICTURE"}}, {"type": "text", "text": question}]
    body = {
        "model": model, "max_tokens": new_tokens, "temperature": 0, "vtr": spec,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in body.items()) + "\n}"
    for mark in "\\$`":  # the shell reads the lines below, to put the picture in
        text = text.replace(mark, f"\\{mark}")
    picture = f"data:image/png;base64,$(base64 < {PICTURE} | tr -d '\\n')"
    text = text.replace('"url": "PICTURE"', f'"url": "{picture}"', 1)
    return (
        f"# vtr serve {model}{inside}\n"
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d @- <<JSON\n"
        f"{text}\nJSON\n"
    )


def _shipped(spec: str) -> dict[str, str]:
    """The shipped weights that a spec names, and their folders; a server is started with those that requests name."""
    named = {} if spec == NONE else {settings.get("weights"): name for name, settings in parse(spec)}
    return {weights: str(POLICIES[weights] / name) for weights, name in named.items() if weights in POLICIES}
