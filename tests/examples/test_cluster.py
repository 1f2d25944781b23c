"""The scripts for clusters, run as far as a machine without one can."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from dylora.cli.config_file import load_run_config
from dylora.cli.options import read_options
from dylora.cli.train import TrainOptions

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
CONFIG = "configs/code_alpaca_mbpp.yaml"
FAKES = {
    "torchrun": 'printf "%s\\n" "$@"',
    "srun": 'exec "$@"',
    "scontrol": "echo host1; echo host2",
}


def started(command: list[str], tmp_path: Path, **variables: str) -> list[str]:
    """The words of torchrun that a script ends in; the cluster's own programs are fakes."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    variables["PATH"] = os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"])
    ended = subprocess.run(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, check=True)
    return ended.stdout.decode().splitlines()


def slurm(tmp_path: Path) -> list[str]:
    variables = {"SLURM_JOB_NODELIST": "host[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"}
    return started(["bash", str(CLUSTER / "slurm.sh"), CONFIG], tmp_path, **variables)


def skypilot(tmp_path: Path) -> list[str]:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    variables = {"SKYPILOT_NODE_IPS": "host1\nhost2", "SKYPILOT_NUM_NODES": "2"}
    variables |= {"SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_TASK_ID": "sky-17"}
    return started(["bash", "-euc", task["run"]], tmp_path, **task["envs"], **variables)


def hosts(tmp_path: Path) -> list[str]:
    variables = {"HEAD": "host1", "HOSTS": "2", "GPUS": "4"}
    return started([str(CLUSTER / "torchrun.sh"), CONFIG], tmp_path, **variables)


@pytest.mark.parametrize("start", [hosts, slurm, skypilot])
def test_each_script_ends_in_one_torchrun_that_resumes_by_itself(start, tmp_path):
    torchrun = get_args_parser().parse_args(start(tmp_path))
    assert (torchrun.nnodes, torchrun.nproc_per_node) == ("2", "4")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "host1:29500")
    assert torchrun.max_restarts == 3
    assert torchrun.training_script == "run.py"
    command, *words = torchrun.training_script_args
    assert command == "train"
    options, overrides = read_options(TrainOptions, words)
    assert options.resume_from_checkpoint == "auto"
    config = load_run_config(ROOT / options.config, overrides)
    assert config.train.parallel == "ddp"
    assert config.train.gradient_accumulation_steps % 8 == 0


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.*")), ids=lambda path: path.name)
def test_every_example_is_short_and_its_syntax_is_valid(path):
    assert len(path.read_text().splitlines()) < 30
    if path.suffix == ".sh":
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_task_of_skypilot_asks_for_spot_machines_and_keeps_its_runs_in_a_bucket():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task.keys() <= {
        *("name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run")
    }
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT"
    assert "--output_dir /runs" in task["run"]
    assert (ROOT / task["envs"]["CONFIG"]).exists()
