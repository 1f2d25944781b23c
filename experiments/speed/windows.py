"""Do rows drawn from windows by length teach as much as rows drawn freely?

    python experiments/speed/windows.py --rows code_alpaca.json \
        --out experiments/results/windows.json

Method: `data.bucket_steps` 1 and 8 on CodeAlpaca rows and the embedded base, the same steps, seeds
and rows a step; validation loss (nats) on held-out rows, after the same number of steps. Decision:
as much, if the mean difference is within the spread over seeds of window 1.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", required=True, help="a file of CodeAlpaca's format")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {window: [] for window in options.windows}
    for seed in range(options.seeds):
        for window in options.windows:  # in turns, so that a busy hour hits both
            runs[window].append(one_run(options, window, seed))
            print(window, seed, runs[window][-1], flush=True)
    result = {"steps": options.steps, "batch_size": options.batch_size, "torch": torch.__version__}
    result["windows"] = {str(window): summary(found) for window, found in runs.items()}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def one_run(options: argparse.Namespace, window: int, seed: int) -> dict[str, float]:
    """Train once; the last validation loss and what the run took."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            RunConfig(
                name="windows",
                output_dir=folder,
                model=ModelConfig(base="tiny-code-llama", dtype="float32"),
                moe=MoELoraConfig(num_experts=4, top_k_experts=2, r=16, lora_alpha=128),
                data=DataConfig(
                    sources=[SourceConfig(name="code_alpaca", path=options.rows, split="90/10")],
                    max_length=512,
                    bucket_steps=window,
                    seed=seed,
                ),
                train=TrainConfig(
                    max_steps=options.steps,
                    batch_size=options.batch_size,
                    learning_rate=1e-3,
                    lr_scheduler_type="cosine",
                    warmup_steps=5,
                    seed=seed,
                ),
                eval=EvalConfig(eval_subset=200, batch_size=16),
                log=LogConfig(logging_steps=1),
            )
        )
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    steps = [row for row in rows if "train/loss" in row]
    return {
        "validation loss": next(row["val/loss"] for row in reversed(rows) if "val/loss" in row),
        "target tokens": run.progress.targets,
        "seconds of steps": sum(row["train/step_time_s"] for row in steps),
    }


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Means, and the spread of the loss."""
    losses = [run["validation loss"] for run in found]
    return {
        "validation loss, mean": statistics.mean(losses),
        "validation loss, deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "target tokens per second": sum(run["target tokens"] for run in found)
        / sum(run["seconds of steps"] for run in found),
        "runs": found,
    }


if __name__ == "__main__":
    main()
