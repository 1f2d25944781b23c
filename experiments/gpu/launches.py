"""Question: what does a training step launch, and how long does the host take to launch it?

Method: torch's profiler over one forward and backward pass of a random base of codegemma's width;
kernels and host time a layer, for the frozen base, ours and a peft LoRA of equal rank.

    python experiments/gpu/launches.py --device cuda --dtype bfloat16 --layers 18 \
        --out experiments/results/gpu/launches.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.speed import models
from experiments.speed.timing import synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    models.quiet()
    config = models.codegemma(options.layers, vocabulary=8192)
    base = models.build(config, device, dtype)
    ids = torch.randint(config.vocab_size, (1, options.tokens), device=device)
    ours = models.mixture(base, 8)
    sparse = models.mixture(base, 64, mature=True)
    ways: dict[str, Callable[[], None]] = {
        "floor": models.floor_step(base, ids),
        "ours, E=8": models.train_step(ours, lambda: ours(ids, labels=ids).loss),
        "ours, E=64 mature, K=2": models.train_step(sparse, lambda: sparse(ids, labels=ids).loss),
    }
    for name, model in models.with_peft(
        {"peft LoRA r=128": lambda: models.peft_lora(base, 128)}
    ).items():
        ways[name] = models.train_step(
            model, lambda m=model: m(input_ids=ids, labels=ids, use_cache=False).loss
        )
    results = {name: measure(way, options.layers, device) for name, way in ways.items()}
    print(
        json.dumps(
            {n: {k: v for k, v in r.items() if k != "by name"} for n, r in results.items()},
            indent=1,
        )
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(way: Callable[[], None], layers: int, device: torch.device) -> dict[str, Any]:
    """Operators and kernels a layer of one step; its time with and without waiting for the end."""
    for _ in range(3):
        way()
    synchronize(device)
    started = time.perf_counter()
    way()
    launched = time.perf_counter() - started
    synchronize(device)
    whole = time.perf_counter() - started
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        way()
        synchronize(device)
    events = record.key_averages()
    operators = sum(e.count for e in events if e.key.startswith("aten::"))
    kernels = sum(
        e.count
        for e in events
        if e.key
        in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cuLaunchKernel")
    )
    busy = sum(e.self_device_time_total for e in events) / 1e3
    top = sorted(events, key=lambda e: -e.self_cpu_time_total)[:40]
    return {
        "host ms": launched * 1e3,
        "whole ms": whole * 1e3,
        "device busy ms": busy,
        "operators a layer": operators / layers,
        "kernels a layer": kernels / layers,
        "by name": {e.key: [e.count, e.self_cpu_time_total / 1e3] for e in top},
    }


if __name__ == "__main__":
    main()
