"""The examples run, and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules that the core has to do without.
WITHOUT = ("peft", "datasets", "matplotlib", "jsonargparse", "pyarrow", "wandb")
RUN = """
import runpy, sys
for name in {without}:
    sys.modules[name] = None
sys.argv = ["minimal_loop.py", "--steps", "12"]
runpy.run_path("examples/minimal_loop.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed() -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(without=WITHOUT)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_minimal_loop_learns_with_the_core_alone(printed):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 4


def test_the_minimal_loop_ends_with_the_table_of_its_experts(printed):
    table = printed.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["expert", "state", "rank", "alpha", "maturity", "steps"]
    assert [line.split()[:3] for line in table[1:]] == [
        [f"expert_{n}", "active", "8"] for n in range(4)
    ]
    assert {line.split()[5] for line in table[1:]} == {"12"}
