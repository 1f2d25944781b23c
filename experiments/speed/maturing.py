"""Does a run become faster as its experts mature, without a restart?

    python experiments/speed/maturing.py --out experiments/results/maturing.json

Method: 64 experts of rank 16, K = 2, on the embedded base and skills; `maturity_mode: schedule`
makes them mature from 40 % of the run on, so that by 60 % all are. Tokens per second come from the
run's own metrics.jsonl. Decision: yes, if the median of the last third is twice that of the first.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from dylora.config import MoELoraConfig
from dylora.run_config import (
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from dylora.training.loop import train

WANTED = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--base", default="tiny-code-llama")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, folder)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train once; tokens per second before, while and after the experts mature."""
    run = train(
        RunConfig(
            name="maturing",
            output_dir=folder,
            model=ModelConfig(base=options.base, dtype=options.dtype, device=options.device),
            moe=MoELoraConfig(
                num_experts=options.experts,
                top_k_experts=2,
                r=16,
                lora_alpha=32 * options.experts,
                maturity_mode="schedule",
                maturity_schedule=(0.4, 0.6),
                expert_capacity_factor=None,
            ),
            data=DataConfig(
                sources=[SourceConfig(name=f"skill/{n}", rows=400) for n in ("lists", "sql")],
                max_length=256,
            ),
            train=TrainConfig(max_steps=options.steps, batch_size=16, learning_rate=5e-4),
            eval=EvalConfig(eval_subset=8),
            log=LogConfig(logging_steps=1),
        )
    )
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for line in lines if "train/tokens_per_s" in (row := json.loads(line))]
    curve = [
        {
            "step": row["step"],
            "tokens_per_s": round(row["train/tokens_per_s"], 1),
            "mean_maturity": round(
                statistics.mean(row[f"expert/{i}/maturity"] for i in range(options.experts)), 4
            ),
            "loss": round(row["train/loss"], 4),
        }
        for row in rows
    ]
    third = len(curve) // 3
    first, last = (
        statistics.median(row["tokens_per_s"] for row in part)
        for part in (curve[1:third], curve[-third:])
    )
    return {
        "median tokens/s, first third": first,
        "median tokens/s, last third": last,
        "ratio": last / first,
        "faster": last >= WANTED * first,
        "device": options.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve,
    }


if __name__ == "__main__":
    main()
