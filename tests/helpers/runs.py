"""What tests read from the folder of a run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 10  # of the run that make_config describes
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


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


def asked_of_the_device(run, step: Callable[[], object]) -> list[tuple[str, str]]:
    """What asks for numbers between a step's first pass and its read of them, and in which
    function: a method of tensors each."""
    asked, began = [], []

    def watch(name):
        method = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            caller = sys._getframe(1).f_code
            if began and "/dylora/" in caller.co_filename:
                asked.append((name, caller.co_name))
                if name == "cpu":
                    began.clear()
            return method(self, *args, **kwargs)

        patch.setattr(torch.Tensor, name, watched)

    with pytest.MonkeyPatch.context() as patch:
        real = run.model.forward
        patch.setattr(run.model, "forward", lambda *a, **k: began.append(1) or real(*a, **k))
        for name in (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "nonzero",
            "__bool__",
            "__int__",
            "__float__",
        ):
            watch(name)
        step()
    return asked
