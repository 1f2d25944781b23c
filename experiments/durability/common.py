"""What the campaigns of this folder share: a small run, and everything it is as one digest."""

import argparse
import hashlib
import json
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
from dylora.training.optim import named_parameters, state_by_name
from dylora.training.random_state import random_state
from dylora.training.run import Run


def arguments(description: str | None) -> argparse.ArgumentParser:
    """--base, --work and --out, which every campaign takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="tiny-code-llama")
    parser.add_argument("--work", type=Path, required=True, help="a folder for runs; grows")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    return parser


def make_config(
    work: Path, base: str, name: str, *, dtype: str = "float32", seed: int = 0, **train: Any
) -> RunConfig:
    """Three experts of rank 2 with every source of randomness on; 23 rows: an epoch is 6 steps."""
    rows = work / "rows.jsonl"
    if not rows.exists():
        work.mkdir(parents=True, exist_ok=True)
        lines = [
            {"question": f"Add {n} and {n + 1}." + " Please." * (n % 3), "answer": f"{2 * n + 1}"}
            for n in range(26)
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig(
        name="rows", path=str(rows), instruction_column="question", output_column="answer"
    )
    settings = {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    return RunConfig(
        name=name,
        output_dir=str(work),
        model=ModelConfig(base=base, dtype=dtype, device="cpu"),  # type: ignore[arg-type]
        moe=MoELoraConfig(r=2, num_experts=3, lora_dropout=0.1, expert_dropout=0.2),
        data=DataConfig(sources=[source], max_length=64, seed=seed),
        train=TrainConfig(**{**settings, "seed": seed, "warmup_steps": 2, **train}),
        eval=EvalConfig(eval_steps=4, batch_size=2),
        log=LogConfig(logging_steps=1),
    )


def digest(run: Run) -> str:
    """SHA-256 of all that training changes: weights, moments, maturity, generators, progress."""
    hashed = hashlib.sha256()

    def take(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            contiguous = value.detach().cpu().contiguous().reshape(-1)
            value = hashlib.sha256(contiguous.view(torch.uint8).numpy().tobytes()).hexdigest()
        elif isinstance(value, dict):
            for key in sorted(value):
                take(f"{name}/{key}", value[key])
            return
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                take(f"{name}/{index}", item)
            return
        hashed.update(f"{name}={value}\n".encode())

    take("parameters", dict(named_parameters(run.model)))
    take("moments", state_by_name(run.optimizer, run.model))
    take("maturity", run.model.maturity._asdict())
    take("experts", run.model.experts.state_dict())
    take("schedule", run.scheduler.state_dict())
    take("generators", random_state())
    take("sampler", run.sampler.state_dict())
    progress = vars(run.progress)
    take("progress", {name: value for name, value in progress.items() if name != "sampler"})
    return hashed.hexdigest()
