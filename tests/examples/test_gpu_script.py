"""The script that measures what only a GPU shows, at toy sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "gpu" / "run.sh"


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end_and_writes_every_section(tmp_path):
    variables = {"DEVICE": "cpu", "DTYPE": "float32", "TOY": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)],
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = SCRIPT.read_text().splitlines()
    sections = [line for line in lines if line.startswith("section ")]  # what is compiled is not
    written = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert len(written) == len(sections) > 9
    failures = [v for v in written["loop"].values() if isinstance(v, str) and "Error" in v]
    assert not failures
