"""Question: what does a second process cost, and what would 8 or 64 GPUs give?

Measured: weak scaling, the same rows for each process: 4 micro-batches of 4 in one process, 8 in
two (gloo, one thread each). A step in one process and one in two take turns, so that both meet the
same load of the machine; CPU seconds a token hardly depend on that load.

Projected: a step of codegemma-2b with 8 experts of rank 16, from the bytes that are sent (as
tests/training/test_distributed.py counts them) and 4 flops a base weight and token (forward, and
the gradient of activations; the base has no other), 6 an expert's weight.

    OMP_NUM_THREADS=1 python experiments/speed/scaling.py --out experiments/results/scaling.json
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora.config import MoELoraConfig
from dylora.run_config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from dylora.training.distributed import join_processes
from dylora.training.run import prepare
from dylora.training.step import run_step

STEPS, WARM = 12, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {"weak_scaling": weak_scaling(), "projection": projection()}
    print(json.dumps(found, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


# Measured


def weak_scaling() -> dict[str, Any]:
    """Seconds a step in one process and in each of two, and the CPU's."""
    context = multiprocessing.get_context("fork")
    turn, results = context.Barrier(3), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            output_dir=folder,
            model=ModelConfig(base="tiny-code-llama", dtype="float32", device="cpu"),
            moe=MoELoraConfig(num_experts=4, r=8),
            data=DataConfig(sources=[SourceConfig(name="skill/lists", rows=200)], max_length=128),
            train=TrainConfig(batch_size=4, gradient_accumulation_steps=4, max_steps=1000),
        )
        jobs = [(config, 1, 0), (in_two(config), 2, 0), (in_two(config), 2, 1)]
        children = [context.Process(target=work, args=(*job, turn, results)) for job in jobs]
        for child in children:
            child.start()
        rows = [results.get(timeout=3000) for _ in children]
        for child in children:
            child.join()
    one = next(row for row in rows if row["size"] == 1)
    two = [row for row in rows if row["size"] == 2]
    return {
        "steps": STEPS,
        "load": round(os.getloadavg()[0], 1),
        "seconds": {"1": one["seconds"], "2": max(row["seconds"] for row in two)},
        "cpu_seconds_per_1000_tokens": {
            "1": one["cpu"],
            "2": statistics.mean(row["cpu"] for row in two),
        },
    }


def in_two(config: RunConfig) -> RunConfig:
    """The same rows for each of two processes."""
    train = replace(config.train, parallel="ddp", gradient_accumulation_steps=8)
    return replace(config, train=train, name="two")


def work(config: RunConfig, size: int, rank: int, turn: Any, results: Any) -> None:
    """One process: its own steps, while those of the other job wait."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ |= address | {name: str(number) for name, number in numbers.items()}
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        join_processes(config) as processes,
    ):
        run = prepare(config, fresh=True, processes=processes)
        seconds, cpu, tokens = [], 0.0, 0
        for step in range(WARM + STEPS):
            for job in (1, 2):
                turn.wait()
                if job != size:
                    continue
                began, used = time.perf_counter(), time.process_time()
                result = run_step(run)
                if step >= WARM:
                    seconds.append(time.perf_counter() - began)
                    cpu += time.process_time() - used
                    tokens += result.tokens / size
    found = {"size": size, "seconds": statistics.median(seconds), "cpu": 1000 * cpu / tokens}
    results.put(found)


# Projected

LAYERS, WIDTH, KEYS, BASE = 18, 2048, 256, 2.51e9  # codegemma-2b
EXPERTS, RANK, TOKENS = 8, 16, 8192  # TOKENS: of a process's step, in one pass
FLOPS = 0.4 * 989e12  # of a H100 in bfloat16, at 40 % of its peak
LINKS = {8: 300e9, 64: 40e9}  # bytes a second of a GPU: within a host, between hosts


def projection() -> list[dict[str, Any]]:
    """Seconds of a step and the share of them that computes, if nothing overlaps."""
    pairs = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH)]
    adapters = LAYERS * EXPERTS * RANK * sum(wide + long for wide, long in pairs)
    trained = adapters + LAYERS * EXPERTS * (WIDTH + 1)
    compute = TOKENS * (4 * BASE + 6 * adapters) / FLOPS
    rows = []
    for size, link in LINKS.items():
        sent = {"ddp": 2 * 4 * trained * (size - 1) / size}
        sent["fsdp2"] = sent["ddp"] + 2 * 2 * BASE * (size - 1) / size  # bfloat16, gathered twice
        for parallel, number in sent.items():
            seconds = number / link
            rows.append(
                {
                    "gpus": size,
                    "parallel": parallel,
                    "sent_MB": round(number / 1e6),
                    "compute_ms": round(1000 * compute),
                    "send_ms": round(1000 * seconds, 1),
                    "efficiency": round(compute / (compute + seconds), 3),
                }
            )
    return rows


if __name__ == "__main__":
    main()
