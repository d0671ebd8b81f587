"""transformers' pipeline, chat templates, processor batches and streamers, used as their documentation uses them."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, pipeline

import vtr

F, M3 = "fastv:keep=0.1,layer=2", "m3:tokens=36"
SHOWN = {F: "fastv:keep=0.1", M3: "m3:tokens=36"}
RUN: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, processor = vtr.pocket.load()
    return vtr.patch(model), processor


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    return vtr.patch(loaded[0])  # with no default


@pytest.fixture(scope="module")
def processor(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@pytest.fixture
def pipe(model: Any, processor: Any) -> Any:
    return pipeline("image-text-to-text", model=model, processor=processor)


def chat(i: int) -> list[dict[str, Any]]:
    image, question, _ = vtr.pocket.sample(i)
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def texts(said: Any) -> list[str]:
    flat = [one[0] if isinstance(one, list) else one for one in said]
    return [one["generated_text"].strip() for one in flat]


def specs(model: Any) -> list[str | None]:
    return [row.policy for row in vtr.report(model).rows]


def encoded(processor: Any, *which: int) -> Any:
    """A chat template that tokenizes, pictures and all: one padded batch."""
    return processor.apply_chat_template(
        [chat(i) for i in which], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip


def answers(model: Any, processor: Any, inputs: Any, **kwargs: Any) -> list[str]:
    out = model.generate(**inputs, **RUN, **kwargs)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


# ------------------------------------------------------------------------------------------------------------- pipeline
@pytest.mark.parametrize("policy", [F, M3])
def test_a_pipeline_with_a_policy_per_call(pipe: Any, model: Any, processor: Any, policy: str) -> None:
    want = answers(model, processor, encoded(processor, 0), policy=policy)
    given = {"policy": policy, **RUN}
    assert texts(pipe(text=chat(0), return_full_text=False, generate_kwargs=given)) == want
    assert specs(model) == [SHOWN[policy]]
    with vtr.use(model, policy):
        assert texts(pipe(text=chat(0), return_full_text=False, generate_kwargs=RUN)) == want
        assert specs(model) == [SHOWN[policy]]
    assert texts(pipe(text=chat(0), return_full_text=False, generate_kwargs=RUN)) == ["orange"]
    assert specs(model) == [None]


def test_a_pipeline_with_a_policy_of_its_own(model: Any, processor: Any) -> None:
    own = pipeline("image-text-to-text", model=model, processor=processor, generate_kwargs={"policy": F, **RUN})
    image, question, answer = vtr.pocket.sample(1)
    assert texts(own(images=image, text=f"<image>{question}", return_full_text=False)) == [answer]
    assert specs(model) == [SHOWN[F]]
    vtr.patch(model, policy=M3)
    default = pipeline("image-text-to-text", model=model, processor=processor)
    default(text=chat(1), generate_kwargs=RUN)
    assert specs(model) == [SHOWN[M3]]


def test_a_pipeline_with_a_batch_of_several_policies(pipe: Any, model: Any, processor: Any) -> None:
    alone = [answers(model, processor, encoded(processor, i), policy=p)[0] for i, p in enumerate((F, None, M3))]
    given = {"policy": [F, None, M3], **RUN}
    said = pipe(text=[chat(i) for i in range(3)], return_full_text=False, batch_size=3, generate_kwargs=given)
    assert texts(said) == alone == [vtr.pocket.sample(i)[2] for i in range(3)]
    assert specs(model) == [SHOWN[F], None, SHOWN[M3]]


# ------------------------------------------------------------------------------------------- templates, processor calls
def test_a_template_and_a_processor_call_give_the_same(model: Any, processor: Any) -> None:
    pictures, questions, _ = zip(*(vtr.pocket.sample(i) for i in range(2)), strict=True)
    prompts = [processor.apply_chat_template(chat(i), add_generation_prompt=True) for i in range(2)]
    assert questions[0] in prompts[0]
    apart = processor(
        text=prompts, images=[[p] for p in pictures], padding=True, padding_side="left", return_tensors="pt"
    )
    together = encoded(processor, 0, 1)
    assert torch.equal(apart["input_ids"], together["input_ids"])
    said = answers(model, processor, apart, policy=[F, M3])
    assert said == answers(model, processor, together, policy=[F, M3])
    assert specs(model) == [SHOWN[F], SHOWN[M3]]
    with vtr.use(model, [F, M3]):
        assert answers(model, processor, apart) == said


def test_a_batch_with_several_pictures_and_none(model: Any, processor: Any) -> None:
    pictures = [vtr.pocket.sample(i)[0] for i in range(3)]
    prompts = ["<image> <image> what color is the star", "what color is the star", "<image> which word is purple"]
    batch = processor(
        text=prompts, images=[pictures[:2], [], pictures[2:]], padding=True, padding_side="left", return_tensors="pt"
    )
    answers(model, processor, batch, policy=F)
    counts = [row.vision_tokens for row in vtr.report(model).rows]
    assert [row[0] for row in counts] == [1488, 0, 744] and [row[-1] for row in counts] == [148, 0, 74]


# ------------------------------------------------------------------------------------------------------------ streamers
def streamed(model: Any, processor: Any, inputs: Any, **kwargs: Any) -> str:
    """As transformers documents it: generate in a thread, read the words here."""
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **RUN, **kwargs, "streamer": streamer})
    thread.start()
    said = "".join(streamer)
    thread.join()
    return said.strip()


@pytest.mark.parametrize("policy", [F, M3])
def test_a_streamer_with_a_policy_per_call(model: Any, processor: Any, policy: str) -> None:
    inputs = encoded(processor, 0)
    want = answers(model, processor, inputs, policy=policy)[0]
    assert streamed(model, processor, inputs, policy=policy) == want
    vtr.patch(model, policy=policy)
    assert streamed(model, processor, inputs) == want


def test_a_streamer_and_use(model: Any, processor: Any) -> None:
    """``vtr.use`` is of this thread; a thread that is started in a copy of the context has it, too."""
    inputs, seen = encoded(processor, 0), []

    def ask(streamer: Any) -> None:
        model.generate(**inputs, **RUN, streamer=streamer)
        seen.append(specs(model))

    with vtr.use(model, F):
        for target in (ask, contextvars.copy_context().run):
            streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
            args = (streamer,) if target is ask else (ask, streamer)
            thread = threading.Thread(target=target, args=args)
            thread.start()
            assert "".join(streamer)
            thread.join()
    assert seen == [[None], [SHOWN[F]]]


def test_an_async_streamer(model: Any, processor: Any) -> None:
    import asyncio

    inputs = encoded(processor, 1)

    async def listen() -> str:
        streamer = AsyncTextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        asking = asyncio.to_thread(model.generate, **inputs, **RUN, policy=F, streamer=streamer)
        task, words = asyncio.create_task(asking), [word async for word in streamer]
        await task
        return "".join(words).strip()

    assert asyncio.run(listen()) == answers(model, processor, inputs, policy=F)[0]
