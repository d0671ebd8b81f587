"""``vtr train``: train p-MoD's routers or Dynamic-LLaVA's predictors into a model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def train_command(
    policy: Annotated[
        str, typer.Argument(help="`pmod` or `dynamic-llava`, with settings, or `weights=FOLDER` to go on from")
    ],
    data: Annotated[
        str, typer.Argument(help="a JSON file (lines, an array, LLaVA's conversations), a folder, `hf:NAME,split=…`")
    ],
    out: Annotated[Path, typer.Argument(help="for `model/`, `policy/`, `log.jsonl` and the state to go on from")],
    model: Annotated[
        str | None,
        typer.Option(help="folder, hub name, `pocket-joint`, `pocket-internvl`", show_default="the pocket model"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="the folder of a JSON file's pictures", show_default="its own")
    ] = None,
    columns: Annotated[str, typer.Option(help="the data's names of things: `question=query,answers=label`")] = "",
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="samples a process takes at a time")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="batches per step")] = 1,
    lr: Annotated[float, typer.Option(help="of the model's decoder and projector; 0 leaves them as they are")] = 5e-6,
    policy_lr: Annotated[float, typer.Option(help="of the policy's weights")] = 2e-4,
    min_answer: Annotated[int, typer.Option(min=0, help="dynamic-llava: shorter answers are remembered whole")] = 50,
    text_keep: Annotated[
        float, typer.Option(min=0, max=1, help="dynamic-llava: the share of an answer that is to stay")
    ] = 0.5,
    mixed_precision: Annotated[str, typer.Option(help="`no`, `bf16` or `fp16`")] = "no",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="spend time to save memory")] = False,
    save_every: Annotated[int, typer.Option(min=0, help="steps between states; 0: only at the end")] = 200,
    seed: Annotated[int, typer.Option(help="of the samples' order and the objective's noise")] = 0,
) -> None:
    """Train a policy with weights into a model: the decoder learns along, the vision tower stays.

    `data` is read as `vtr eval` reads it: `{"image": file, "question": …, "answer": …}`, with `choices` if any. Of
    several answers the most frequent is learnt, of choices the letter; each question and answer of a conversation is a
    sample of its own, without the turns before.
    Records that cannot be used are counted and named, with file and line, and nothing is trained.

    The same command goes on where an interrupted or killed run was, and ends with the same bytes as if nothing had
    happened; other settings, data or model are refused. On many GPUs: `accelerate launch -m vtr.cli train …`.

    * `vtr train pmod data.jsonl out --model llava-hf/llava-1.5-7b-hf --lr 2e-5 --policy-lr 2e-5 --mixed-precision bf16`

    * `vtr train dynamic-llava:keep=0.2,width=32,heads=4,inner=64 data.jsonl out` — the pocket model

    * `vtr train pmod:weights=pocket data.jsonl out` — on from the shipped routers
    """
    from vtr.commands._console import check_folder, console, fail

    try:
        check_folder(out, "OUT")
        import torch

        import vtr
        from vtr.data.sources import settings_of
        from vtr.learned import Learned
        from vtr.models import check_name, load
        from vtr.training import loop, state
        from vtr.training.data import Collate, read_samples
        from vtr.training.dynamic_llava import DynamicLLaVATraining
        from vtr.training.pmod import PModTraining

        made = vtr.policy(policy)
        if not isinstance(made, Learned):
            raise ValueError(f"{policy!r} has no weights to train: choose pmod or dynamic-llava")
        settings = loop.Settings(
            steps, lr, policy_lr, accumulate=accumulate, mixed_precision=mixed_precision, save_every=save_every,
            seed=seed,
        )  # fmt: skip
        check_name(model)
        samples = read_samples(data, images, settings_of(columns))
        net, processor = load(model, "cpu")  # accelerate moves it
        also = {"model": state.digest(net.named_parameters()), "data": _digest(samples)}
        vtr.patch(net)
        if made.module is None:
            torch.manual_seed(seed)
            made.init_weights(net)
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        loop.freeze_tower(net)
        objective: torch.nn.Module
        if isinstance(made, vtr.DynamicLLaVA):
            objective = DynamicLLaVATraining(net.train(), made, text_keep, min_answer)
        else:
            objective = PModTraining(net.train(), made)  # type: ignore[arg-type]
        loader: Any = torch.utils.data.DataLoader(
            samples,  # type: ignore[arg-type]
            batch_size=batch,
            shuffle=True,
            collate_fn=Collate(processor),
            generator=torch.Generator().manual_seed(seed),
        )
        log = loop.run(objective, loader, out, settings, also)
        processor.save_pretrained(out / "model")
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise fail(error) from error
    if log:
        console.print(f"last step: {', '.join(f'{k} {v}' for k, v in log[-1].items())}", highlight=False)
    console.print(f"use it as: --model {out / 'model'} --policy {made.name}:weights={out / 'policy'}", soft_wrap=True)


def _digest(samples: Sequence[dict[str, Any]]) -> str:
    """Of questions, answers and the names and sizes of pictures, in order; moving the whole folder changes nothing."""
    from vtr.training.state import digest

    def said(sample: dict[str, Any]) -> str:
        image: Any = sample["image"]
        if isinstance(image, str):
            image = Path(image).name, Path(image).stat().st_size if Path(image).is_file() else None
        elif isinstance(image, bytes):
            image = zlib.crc32(image)
        else:
            image = getattr(image, "size", None)
        return repr((image, sample["question"], sample["answer"]))

    return digest((said(sample), None) for sample in samples)
