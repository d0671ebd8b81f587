"""Folders that hold only what a training changed: LoRA as LLaVA's training saves it, or a projector; put on their base.

W + scale · B · A, scale = alpha / r (rsLoRA: alpha / √r), worked out in float32 and rounded once to the base's dtype.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtr.convert.checkpoint import State, check_numbers, has_tensors, listed, read_config, read_file, read_tensors
from vtr.convert.settings import flag, integer, read_json, real, shown

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REST = ("non_lora_trainables.bin", "mm_projector.bin")
"""What learnt without LoRA, and a projector that learnt alone."""
PARTS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings that change the base's weights, so that an adapter does not belong to the base as it is."""
REFUSED = {
    "use_dora": "DoRA", "layer_replication": "layers that stand twice", "lora_bias": "a bias of LoRA's own",
    "trainable_token_indices": "single trained tokens", "target_parameters": "LoRA on bare parameters",
    "megatron_config": "Megatron layers", "alora_invocation_tokens": "aLoRA", "use_qalora": "QALoRA",
    "arrow_config": "Arrow", "use_bdlora": "BD-LoRA",
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter or a projector, and no whole model."""
    return not has_tensors(folder) and any((folder / name).is_file() for name in (CONFIG, *WEIGHTS, *REST))


def read_merged(folder: Path, base: str | Path | None) -> tuple[dict[str, Any], State]:
    """Settings and tensors of the model that an adapter folder and its base are together.

    Raises:
        FileNotFoundError: a file that is needed is not there.
        ValueError: no base, another kind of adapter than LoRA, or tensors that do not fit the base (they are listed).
    """
    lora = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    what = "a LoRA adapter" if lora is not None else "a projector or other parts"
    if base is None:
        said = (lora or {}).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds {what}, not a whole model: name the folder of the model it was trained on "
            f"(vtr convert … --base FOLDER{f'; it says {said}' if isinstance(said, str) and said else ''})"
        )
    under = Path(base)
    if lora is not None:
        _check_kind(lora, folder / CONFIG)
    if is_adapter(under):
        raise ValueError(f"--base {under} is an adapter itself: name the whole model it was trained on")
    config = read_config(folder if (folder / "config.json").is_file() else under)
    for where, said in ((folder, config), (under, read_config(under))):
        if said.get("quantization_config"):
            raise ValueError(
                f"{where / 'config.json'} has a quantization_config (QLoRA): what was learnt belongs to the quantized "
                "weights; merge it with peft on the model as it was loaded for training, and convert the result"
            )
    rest = _rest(folder)
    state = _named(read_tensors(under), under) | rest
    if lora is not None:
        _merge(state, lora, folder, rest)
    if lora is not None and not any("mm_projector." in name for name in state):
        raise FileNotFoundError(
            f"neither {folder} nor its base has a projector: copy {REST[0]} beside the adapter as well, or name the "
            "LLaVA that was trained as base"
        )
    return config, state


def _plain(name: str) -> str:
    """A parameter's name as a whole LLaVA checkpoint has it, without what peft and p-MoD's layers put around it."""
    name = name.removeprefix("base_model.model.").removeprefix("base_model.")
    name = name.removeprefix("model.") if name.startswith("model.model.") else name
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    return name.replace(".base_layer.", ".").replace(".decoder_layer.", ".")


def _rest(folder: Path) -> State:
    """What learnt without LoRA."""
    found: State = {}
    for name in REST:
        if (folder / name).is_file():
            found |= _named(read_file(folder / name), folder / name)
    return found


def _named(found: State, where: Path) -> State:
    """Tensors under plain names."""
    named = {_plain(name): tensor for name, tensor in found.items()}
    if len(named) < len(found):
        names = [_plain(name) for name in found]
        raise ValueError(f"{where} holds tensors twice: {listed(sorted({n for n in names if names.count(n) > 1}))}")
    return named


def _check_kind(lora: Mapping[str, Any], where: Path) -> None:
    kind = lora.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type={shown(kind)}, and only LORA can be merged: merge it with peft first")
    begun = lora.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(f"{where}: init_lora_weights={begun!r} changes the base itself: merge it with peft first")
    if wrong := [f"{name} ({said})" for name, said in REFUSED.items() if lora.get(name)]:
        raise ValueError(f"{where}: {listed(wrong)} cannot be merged here: merge it with peft first")
    if lora.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias={shown(lora['bias'])}: only adapters without trained biases can be merged")


def _merge(state: State, lora: Mapping[str, Any], folder: Path, rest: State) -> None:
    """Add B · A to the base's weights, and take over what the adapter holds whole.

    Raises:
        FileNotFoundError: no adapter's weights.
        ValueError: LoRA matrices that are missing, unknown or do not fit (all are listed).
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} lacks the adapter's weights: copy {' or '.join(WEIGHTS)} there as well")
    pairs, saved, wrong = _sorted(read_file(path))
    check_numbers({f"{path.name}: {name}{part}": t for name, both in pairs.items() for part, t in both.items()})
    state |= {name: tensor for name, tensor in saved.items() if name not in rest}
    wrong += _misfits(state, pairs, lora, folder / CONFIG)
    wrong += _left_out(state, pairs, lora)
    if wrong:
        raise ValueError(f"{path} does not fit its base: {listed(sorted(wrong))}{_hint(state)}")
    turned = flag(lora, "fan_in_fan_out", folder / CONFIG)
    for name, both in pairs.items():
        weight, delta = state[name], both["B"].float() @ both["A"].float()
        delta = delta.T if _is_turned(both, turned) else delta
        merged = weight.float() + scale(lora, name.removesuffix(".weight"), len(both["A"]), folder / CONFIG) * delta
        state[name] = merged.to(weight.dtype)


def _sorted(found: State) -> tuple[dict[str, State], State, list[str]]:
    """{the weight's name: {"A", "B"}}, what is saved whole, and the names that are neither."""
    pairs: dict[str, State] = defaultdict(dict)
    saved, wrong = {}, []
    for name, tensor in found.items():
        match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?", name)
        if match:
            pairs[_plain(match[1] + ".weight")][PARTS[match[2]]] = tensor
            if "embedding" in match[2]:
                pairs[_plain(match[1] + ".weight")]["embedding"] = tensor.new_zeros(())
        elif "lora_" in name or "token_adapter" in name:
            wrong.append(f"unknown {name} {list(tensor.shape)}")
        elif ".original_module." not in name:
            saved[_plain(name)] = tensor
    return dict(pairs), saved, wrong


def _is_turned(both: State, turned: bool) -> bool:
    """Whether B · A is the transpose of what is added: embeddings always, others where fan_in_fan_out says so."""
    return "embedding" in both or turned


def _misfits(state: State, pairs: dict[str, State], lora: Mapping[str, Any], where: Path) -> list[str]:
    """What is wrong with the matrices; empty if all can be added."""
    turned, wrong = flag(lora, "fan_in_fan_out", where), []
    for name, both in pairs.items():
        if lacks := {"A", "B"} - set(both):
            wrong.append(f"missing lora_{lacks.pop()} of {name}")
            continue
        if name not in state:
            wrong.append(f"unknown {name}: the base has no such weight")
            continue
        a, b, weight = both["A"], both["B"], state[name]
        if a.dim() != 2 or b.dim() != 2 or weight.dim() != 2 or len(a) != b.shape[1]:
            wrong.append(f"{name}: B {list(b.shape)} · A {list(a.shape)} is no product")
            continue
        shape = (a.shape[1], len(b)) if _is_turned(both, turned) else (len(b), a.shape[1])
        if shape != tuple(weight.shape):
            wrong.append(f"{name}: B · A is {list(shape)}, the base's weight {list(weight.shape)}")
        rank = _pattern(lora, "rank_pattern", name.removesuffix(".weight"), where)
        rank = integer(lora, "r", where) if rank is None else rank
        if rank != len(a):
            wrong.append(f"{name}: its rank is {len(a)}, {CONFIG} says {rank}")
    return wrong


def _left_out(state: State, pairs: dict[str, State], lora: Mapping[str, Any]) -> list[str]:
    """LoRA matrices that some layers lack though others have them, or that nothing has though they are targets."""
    targets = lora.get("target_modules")
    if not pairs:
        return ["missing all LoRA matrices"]
    if not isinstance(targets, list) or lora.get("exclude_modules"):
        return []
    names = [name.removesuffix(".weight") for name in pairs]
    wrong = [f"missing LoRA of {t}" for t in targets if not any(f".{n}".endswith(f".{t}") for n in names)]
    if lora.get("layers_to_transform") is not None or lora.get("layers_pattern"):
        return wrong
    for kind in {name.split(".", 3)[3] for name in pairs if re.match(r"model\.layers\.\d+\.", name)}:
        if not any(f".{kind}".endswith(f".{t}.weight") for t in targets if isinstance(t, str) and "." not in t):
            continue  # a target that names single layers
        every = [name for name in state if re.fullmatch(rf"model\.layers\.\d+\.{re.escape(kind)}", name)]
        wrong += [f"missing LoRA of {name}" for name in every if name not in pairs]
    return wrong


def scale(lora: Mapping[str, Any], module: str, rank: int, where: Any = CONFIG) -> float:
    """What B · A of a module is multiplied by.

    Raises:
        ValueError: no alpha, or a pattern that cannot be understood.
    """
    alpha = _pattern(lora, "alpha_pattern", module, where)
    alpha = real(lora, "lora_alpha", where) if alpha is None else alpha
    return alpha / (math.sqrt(rank) if flag(lora, "use_rslora", where) else rank)


def _pattern(lora: Mapping[str, Any], name: str, module: str, where: Any) -> float | None:
    """The first entry of rank_pattern or alpha_pattern whose expression is the module's name or its end."""
    patterns = lora.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{where}: {name}={shown(patterns)}, but an object is needed")
    for key in patterns:
        simple = key if isinstance(key, str) else ""
        # nothing whose matching could take long: an adapter may come from anybody
        if len(re.findall(r"[*+{?]", simple)) > 3 or len(simple) > 200 or re.search(r"\)\s*[*+{?]", simple):
            raise ValueError(f"{where}: {name} has {shown(key)}, which is too long an expression")
        try:
            if re.fullmatch(rf"(.*\.)?({simple})", module):
                return real(patterns, key, f"{where}, {name}")
        except re.error as error:
            raise ValueError(f"{where}: {name} has {shown(key)}, which is no expression ({error})") from error
    return None


def _hint(state: State) -> str:
    if any("language_model." in name for name in state):
        return ". The base has transformers' names: name the original one (LLaVA's own, or its language model)"
    return ""
