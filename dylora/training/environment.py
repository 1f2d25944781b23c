"""Seeds, versions and hardware of a run."""

import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or what dylora is installed in


def seed_everything(seed: int) -> None:
    """torch (every device), numpy and random."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """While entered, torch takes deterministic kernels, and raises RuntimeError where it has none;
    as before afterwards. If not wanted, what the caller has set is left alone."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def tf32_products(wanted: bool, device: torch.device) -> Iterator[None]:
    """While entered, products of float32 matrices may be taken in TensorFloat-32; as before
    afterwards. Raises ValueError where the device has none."""
    if not wanted:
        yield
        return
    if device.type != "cuda":
        raise ValueError(f"train.tf32 is true, but the run is on {device.type}: it needs CUDA")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, command and hardware, for env.json. `commit` and `dirty` (files differ from it) are
    of dylora's repository, None where it is installed without one."""
    import transformers

    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    described = describe_repository(ROOT)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dylora": sys.modules["dylora"].__version__,
        "device": named,
        "threads": str(torch.get_num_threads()),
        "command": shlex.join(sys.argv),
        "commit": described and described.removesuffix("-dirty"),
        "dirty": described and described.endswith("-dirty"),
    }


def describe_repository(root: Path) -> str | None:
    """The commit of the checkout at `root`, with -dirty after it where tracked files differ.

    None without git, and in a repository of somebody else: one that holds `root` further down, or
    whose project has another name.
    """
    try:
        if 'name = "dylora"' not in (root / "pyproject.toml").read_text(encoding="utf-8"):
            return None
        top, commit = (
            subprocess.run(
                ["git", *arguments],
                cwd=root,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--show-toplevel"],
                ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            )
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return commit if Path(top).resolve() == root else None
