"""Fixtures: result files of every kind with plausible numbers drawn by a seed. Nothing here was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from vtr.eval.cost import engine, midsize
from vtr.eval.report import results

NOTE = "fixture: numbers drawn by a seed, not measured"
KINDS = ["color", "shape", "count", "where", "letter", "find", "digit", "word"]
LAYERS, TOKENS = 10, 744
SHAPE = {
    "family": "llava",
    "text": {"num_hidden_layers": 10, "hidden_size": 512},
    "crops": [0, 0],
    "vision_tokens": 744,
}
STAIRS = "gsearch:schedule=[1.0,1.0,0.5,0.25,0.1,0.05,0.05,0.05,0.05,0.05]"
POLICIES = {  # spec → (keep, first cut layer, how much of the lost accuracy it saves)
    "none": (1.0, 0, 0.0),
    "fastv:keep=0.25,layer=2": (0.25, 2, 0.5),
    "fastv:keep=0.1,layer=2": (0.1, 2, 0.5),
    "fastv:keep=0.05,layer=2": (0.05, 2, 0.5),
    STAIRS: (0.14, 2, 0.8),
    "pyramid:keeps=[0.5,0.25,0.125]": (0.22, 2, 0.7),
    "globalcom2:keep=0.1": (0.1, 0, 0.65),
    "m3:scale=36": (0.05, 0, 0.6),
    "pmod:capacity=0.3": (0.3, 1, 0.45),
    "dynamic-llava:keep=0.2,layer=2": (0.2, 2, 0.75),
    "pool:grid=6": (0.06, 0, 0.4),
    "downsample:factor=2": (0.25, 0, 0.35),
    "uniform:keep=0.1,layer=2": (0.1, 2, 0.35),
    "uniform:keep=0.05,layer=2": (0.05, 2, 0.3),
    "random:keep=0.1,layer=2": (0.1, 2, 0.1),
    "random:keep=0.05,layer=2": (0.05, 2, 0.0),
}


def ms(rng: np.random.Generator, median: float) -> dict[str, float]:
    return {
        "median": median,
        "low": median * (1 - 0.06 * float(rng.random())),
        "high": median * (1 + 0.15 * float(rng.random())),
    }


def tokens(keep: float, layer: int) -> list[float]:
    return [float(TOKENS)] * layer + [float(round(TOKENS * keep))] * (LAYERS - layer)


def evaluation(seed: int = 0, n: int = 2000) -> dict[str, Any]:
    """Kind eval."""
    rng = np.random.default_rng(seed)
    out = []
    for spec, (keep, layer, saves) in POLICIES.items():
        entering = tokens(keep, layer)
        mean = sum(entering) / LAYERS / TOKENS
        lost = 0.0 if spec == "none" else 0.034 * (1 - saves) ** 1.5 * np.log(1 / keep) * (1.3 - 0.15 * layer)
        accuracy = float(0.991 - lost + rng.normal(0, 0.004) * (spec != "none"))
        half = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
        losses = round((0.991 - accuracy) * n) + int(rng.integers(2, 9))
        wins = max(losses - round((0.991 - accuracy) * n), 0)
        gflops = 0.45 + 6.6 * mean
        out.append(
            {
                "policy": spec, "name": spec.split(":")[0], "accuracy": accuracy,
                "low": accuracy - half, "high": min(accuracy + half, 1.0),
                "indispensable": accuracy - 0.004 - lost * 0.12,
                "by_kind": {k: float(np.clip(accuracy + rng.normal(0, 0.3 * lost + 0.004), 0.05, 1.0)) for k in KINDS},
                "gain": accuracy - 0.102, "gray_gain": accuracy - 0.109, "leakage": None,
                "vision_tokens": entering, "mean_keep": mean,
                "gflops": gflops, "kv_mib": 9.2 * mean + 0.1, "prefill_ms": ms(rng, 16 + 9.2 * gflops),
                "selector_ms": 0.0 if spec == "none" else float(0.4 + 5 * saves * rng.random()),
                "versus_none": {
                    "difference": accuracy - 0.991, "low": accuracy - 0.991 - half * 1.1,
                    "high": accuracy - 0.991 + half * 1.1,
                    "p_mcnemar": 1.0 if spec == "none" else float(min(1.0, np.exp(-abs(losses - wins) / 4))),
                    "wins": wins, "losses": losses,
                },
            }
        )  # fmt: skip
    return {
        "note": NOTE,
        "model": "pocket (fixture)",
        "data": {"name": "pocket tasks, held out (fixture)", "samples": n, "bad": 3, "kinds": KINDS},
        "reference": {"none": 0.991, "no_image": 0.102, "gray": 0.109, "base_lm": None, "majority": 0.082},
        "policies": out,
        "rows": "samples.jsonl",
    }


def policies(seed: int = 0) -> dict[str, Any]:
    """Kind policies."""
    rng = np.random.default_rng(seed)
    rows = []
    for spec, (keep, layer, saves) in POLICIES.items():
        entering = tokens(keep, layer)
        mean = sum(entering) / LAYERS / TOKENS
        flops, prefill = int(3e9 + 46e9 * mean), 60 + 640 * mean
        rows.append(
            {
                "policy": spec, "name": spec.split(":")[0], "budget": None if spec == "none" else keep,
                "mean_keep": mean, "vision_tokens": entering, "prefill_ms": ms(rng, prefill),
                "first_token_ms": ms(rng, prefill + 32), "decode_ms": ms(rng, 9 + 6 * mean),
                "throughput": {str(b): 1000 / prefill * (1 + 0.1 * np.log2(b)) for b in (1, 8, 32)},
                "selector_ms": 0.0 if spec == "none" else 8 * saves, "flops_counted": flops,
                "flops_closed": flops + 1000, "kv_bytes": int(48e6 * mean), "kv_bytes_tensors": int(48e6 * mean),
                "peak_bytes": None if spec.startswith("pool") else int(90e6 * (0.4 + mean)),
            }
        )  # fmt: skip
    return {"note": NOTE, "model": SHAPE, "rows": rows}


def batch(seed: int = 0) -> dict[str, Any]:
    """Kind batch."""
    rng = np.random.default_rng(seed)
    mixes = {
        "eight alike": ["fastv:keep=0.1,layer=2"] * 8,
        "half and half": ["none"] * 4 + ["fastv:keep=0.25,layer=2"] * 4,
        "a server's mix": ["none", "none", STAIRS, "pool:grid=6", *["random:keep=0.05,layer=2"] * 4],
    }
    rows = [
        {"name": name, "policies": specs, "ms": ms(rng, 900.0), "over_rows": 0.93, "over_padded": 0.4 + 0.1 * i}
        for i, (name, specs) in enumerate(mixes.items())
    ]
    return {"note": NOTE, "model": SHAPE, "rows": rows}


def scale(seed: int = 0) -> dict[str, Any]:
    """Kind scale."""
    rng = np.random.default_rng(seed)
    series = []
    sizes = {"vision_tokens": [576, 1152, 2880, 7500, 15000, 30000], "batch": [1, 2, 4, 8, 16, 32, 64]}
    sizes["answer"] = [16, 64, 256, 1024, 2048]
    for axis, xs in sizes.items():
        specs = {"none": 1.0, "fastv:keep=0.25,layer=2": 0.34, "pool:grid=6": 0.09, "random:keep=0.05,layer=2": 0.2}
        for spec, part in specs.items():
            linear = {"vision_tokens": 0.09, "batch": 55.0, "answer": 9.0}[axis]
            square = 6e-6 if axis == "vision_tokens" else 0.0
            times = [20 + part * linear * x + square * (part * x) ** 2 for x in xs]
            slope = float(np.polyfit(np.log(xs), np.log(times), 1)[0])
            entry = {"axis": axis, "policy": spec, "x": xs, "ms": [ms(rng, t) for t in times], "slope": slope}
            series.append(entry)
    return {"note": NOTE, "model": SHAPE, "series": series}


def serve(seed: int = 0) -> dict[str, Any]:
    """Kind serve."""
    rng = np.random.default_rng(seed)
    contenders = {"none": ["none"], "fixed": ["m3:tokens=36"], "mixed": ["none", "m3:tokens=9"]}
    rows = []
    for at, answer in ((1, 16), (8, 16), (8, 128)):
        for i, name in enumerate(contenders):
            gain = 1.0 + 0.2 * i * float(rng.random())
            rows.append(
                {
                    "contender": name, "concurrency": at, "requests": 8 * at, "tokens": answer,
                    "per_second": 6 * gain, "gain": {"median": gain, "low": 0.97 * gain, "high": 1.04 * gain},
                    "ttft_ms": {"median": 80 / gain, "p90": 140 / gain}, "tpot_ms": {"median": 6.5, "p90": 9.0},
                    "prompt_tokens": [740.0, 190.0, 420.0][i], "kv_blocks": None if at == 1 else 12 * at // (i + 1),
                }
            )  # fmt: skip
    server = {"vllm": "0.32.0", "blocks": 640, "block_size": 128, "prefix_caching": "False"}
    about = {"note": NOTE, "model": "pocket (fixture)", "side": 192, "rounds": 3, "contenders": contenders}
    return {**about, "server": server, "rows": rows}


def engine_ratios(seed: int = 0) -> dict[str, Any]:
    """Kind engine: flat, as ``vtr bench engine --json`` writes it."""
    import torch

    rng = np.random.default_rng(seed)
    out = engine.facts(midsize.SMALL, "cpu", torch.float32, 5, seed)
    for key in engine.WHAT:
        value = float(rng.uniform(0.95, 1.12) if "over_limit" in key or "no_policy" in key else rng.uniform(0.3, 1.0))
        spread = 0.0 if key.startswith(("kv", "peak")) else 0.05
        out |= {key: value, f"{key}_min": value * (1 - spread), f"{key}_max": value * (1 + 2 * spread)}
    return {**out, "fixture": NOTE}


def peers(seed: int = 0) -> dict[str, Any]:
    """Kind peers."""
    rng = np.random.default_rng(seed)
    ours = {"ours": "fastv:keep=0.1,layer=2", "ours_accuracy": 0.952, "ours_prefill_ms": ms(rng, 31.0)}
    ran = {**ours, "accuracy": 0.949, "prefill_ms": ms(rng, 77.0), "error": None}
    failed = {**ours, "accuracy": None, "prefill_ms": None}
    rows = [
        {"peer": "kvpress 0.4.0", "method": "SnapKV", **ran},
        {
            "peer": "visionzip 0.1.2",
            "method": "VisionZip",
            **failed,
            "error": "ValueError: <image> tokens do not match",
        },
        {"peer": "llava-prune 1.0", "method": "FastV", **failed, "error": "batch > 1: not implemented"},
    ]
    return {"note": NOTE, "rows": rows}


def launches(seed: int = 0) -> dict[str, Any]:
    """Kind launches."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, factor in (("unpatched", 1), ("fastv", 2), ("gsearch", 8)):
        for batch, ragged in ((1, False), (8, False), (8, True)):
            prefill = {"launches": 300 * factor * batch // 4 + 300, "waits": 0, "copies": 13 * batch}
            token = {"launches": 310 + 200 * ragged, "waits": 84 * ragged, "copies": int(rng.integers(0, 9))}
            rows.append({"policy": name, "batch": batch, "ragged": ragged, "prefill": prefill, "token": token})
    shape = {"layers": 8, "vision_tokens": 576, "text_tokens": 64, "dtype": "bfloat16"}
    return {"note": NOTE, **shape, "policies": {"fastv": "fastv:keep=0.25,layer=2"}, "rows": rows}


def decode(seed: int = 0) -> dict[str, Any]:
    """Kind decode: the last way is refused in the last case."""
    rng = np.random.default_rng(seed)
    factors = {"hf": 1.0, "hf_static_compiled": 0.6, "vtr": 0.8, "vtr_static": 0.75, "vtr_static_compiled": 0.5}
    rows = []
    for name, batch in (("fastv", 1), ("fastv", 8), ("mixed", 8)):
        ways: dict[str, Any] = {}
        for way, factor in factors.items():
            value = factor * (1 + 0.05 * float(rng.random()) * (way != "hf"))
            ratio, compiled = {"value": value, "low": 0.95 * value, "high": 1.1 * value}, way.endswith("compiled")
            ways[way] = {
                "refused": None, "ms": ms(rng, 20 * value), "ratio": ratio,
                "over_hf_static": {key: one / 0.6 for key, one in ratio.items()}, "same_tokens": way.startswith("vtr"),
                "kv_live": 2**22 * batch, "kv_allocated": 5 * 2**20 * batch, "compile_s": 31.0 if compiled else None,
                "graphs": int(compiled), "graphs_while_timed": 0,
            }  # fmt: skip
        specs = ["fastv:keep=0.25"] if name == "fastv" else ["none", "fastv:keep=0.25"] * 4
        about = {"policy": name, "specs": specs, "batch": batch, "tokens": 64, "prompt_tokens": [640] * batch}
        rows.append({**about, "ways": ways})
    rows[-1]["ways"]["vtr_static_compiled"] = {"refused": "UnsupportedError: cannot be had"}
    model = {**SHAPE, "text_tokens": 64}
    shape = {"model": model, "dtype": "float32", "threads": 1, "clock": "CPU time"}
    return {"note": NOTE, **shape, "rows": rows}


MADE = {
    "eval": evaluation, "policies": policies, "batch": batch, "scale": scale, "serve": serve,
    "engine": engine_ratios, "launches": launches, "decode": decode, "peers": peers,
}  # fmt: skip


COMMANDS = {
    "eval": "vtr eval --policies all --limit 2000 --out eval.json",
    "policies": "vtr bench policies --json policies.json",
    "batch": "vtr bench batch --json batch.json",
    "scale": "vtr bench scale --json scale.json",
    "serve": "vtr bench serve --json serve.json",
    "engine": "vtr bench engine --small --json engine.json",
    "launches": "vtr bench launches --json launches.json",
    "decode": "vtr bench decode --out decode.json",
    "peers": "vtr bench peers --json peers.json",
}


def write(folder: Path, *kinds: str) -> list[Path]:
    """Result files of these kinds (all by default) in ``folder``."""
    paths = []
    for kind in kinds or MADE:
        path = folder / f"{kind}.json"
        data = results.save(path, kind, MADE[kind](), seed=0)  # type: ignore[arg-type]
        path.write_text(json.dumps({**data, "command": COMMANDS[kind]}, indent=1))
        paths.append(path)
    return paths
