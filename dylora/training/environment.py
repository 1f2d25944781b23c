"""Seeds, versions and hardware of a run."""

import platform
import random
import subprocess
from pathlib import Path

import numpy
import torch


def seed_everything(seed: int) -> None:
    """torch (every device), numpy and random."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for env.json."""
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": named,
        "threads": str(torch.get_num_threads()),
        "commit": commit or "unknown",
    }
