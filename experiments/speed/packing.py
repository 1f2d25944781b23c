"""Are packed rows faster than micro-batches of rows of similar length?

    python experiments/speed/packing.py --code_alpaca code_alpaca.json --mbpp mbpp.jsonl \
        --out experiments/results/packing.json

Two runs of one configuration, `data.packing` false and true, draw the same rows; a step of one and
one of the other take turns, in an order that turns, too. Tokens are those of rows, without padding;
seconds are of the processor (`--clock wall`: of the clock). Decision: packing becomes the default
if the median ratio of tokens per second is above 1 on every set.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora.config import MoELoraConfig
from dylora.run_config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from dylora.training.run import Run, prepare
from dylora.training.step import next_batches, run_step
from experiments.speed.models import quiet
from experiments.speed.timing import synchronize

CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--code_alpaca", required=True)
    parser.add_argument("--mbpp", required=True)
    parser.add_argument("--base", default="tiny-code-llama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--bucket_steps", type=int, default=1)
    parser.add_argument("--attention", help="sdpa, flash_attention_2, flex_attention, …")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    sources = {
        "code_alpaca": SourceConfig(name="code_alpaca", path=options.code_alpaca),
        "mbpp": SourceConfig(name="mbpp", path=options.mbpp),
        "skills": SourceConfig(name="skill/sql", rows=1000),
    }
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}}
    result["settings"] |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, source in sources.items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = compare(options, source, Path(folder))
        print(json.dumps({name: result[name]}, indent=1), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(options: argparse.Namespace, source: SourceConfig, folder: Path) -> dict[str, Any]:
    """Steps of both kinds in turns."""
    runs = {
        name: prepare(configure(options, source, folder / name, packing), fresh=True)
        for name, packing in (("padded", False), ("packed", True))
    }
    found: dict[str, list[float]] = {name: [] for name in runs}  # tokens per second of each step
    for step in range(options.steps + 2):
        for name in list(runs)[:: 1 if step % 2 else -1]:
            tokens, seconds = timed(runs[name], options.clock)
            if step >= 2:
                found[name].append(tokens / seconds)
    pairs = zip(found["packed"], found["padded"], strict=True)
    low, middle, high = statistics.quantiles([ours / theirs for ours, theirs in pairs], n=4)
    return {
        "tokens per second": {name: statistics.median(rates) for name, rates in found.items()},
        "packed / padded, median of steps": middle,
        "quartiles": [low, high],
        "passes and computed tokens of a step": {name: computed(run) for name, run in runs.items()},
    }


def timed(run: Run, clock: str) -> tuple[int, float]:
    """Tokens and seconds of one step."""
    synchronize(run.model.device)
    started = CLOCKS[clock]()
    result = run_step(run)
    synchronize(run.model.device)
    return result.tokens, CLOCKS[clock]() - started


def computed(run: Run) -> dict[str, float]:
    """Of the step that comes next."""
    batches, totals = next_batches(run)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {"passes": len(batches), "computed / own tokens": tokens / float(totals.tokens or 1)}


def configure(
    options: argparse.Namespace, source: SourceConfig, folder: Path, packing: bool
) -> RunConfig:
    """Four experts of rank 16."""
    return RunConfig(
        name="packing",
        output_dir=str(folder),
        model=ModelConfig(
            base=options.base,
            dtype=options.dtype,
            device=options.device,
            attn_implementation=options.attention,
        ),
        moe=MoELoraConfig(num_experts=4, top_k_experts=2, r=16, lora_alpha=32),
        data=dataclasses.replace(
            DataConfig(bucket_steps=options.bucket_steps, packing=packing), sources=[source]
        ),
        train=TrainConfig(
            max_steps=options.steps + 3,
            batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
        ),
    )


if __name__ == "__main__":
    main()
