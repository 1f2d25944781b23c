"""What tests read from the folder of a run."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = 10  # of the run that make_config describes


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: adapters, routers, maturity and moments."""
    tensors = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        found = load_file(file).items()
        tensors |= {f"{file.relative_to(checkpoint)}: {key}": value for key, value in found}
    for name, state in torch.load(checkpoint / "optimizer.pt", weights_only=True).items():
        found = {f"optimizer.pt: {name} {key}": value for key, value in state.items()}
        tensors |= {key: torch.as_tensor(value) for key, value in found.items()}
    return tensors


def rows_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("train/tokens_per_s", "train/step_time_s", "system/mem_gb")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows]
