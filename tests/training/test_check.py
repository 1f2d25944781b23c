"""`train --check` and `info --estimate`: of every config that runs here, and as training would."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.run_config import DataConfig, LogConfig, StageConfig
from dylora.training import check as module
from dylora.training import loggers, memory
from dylora.training.check import check

CONFIGS = Path(__file__).parents[2] / "configs"
ON_A_CPU = [
    file for file in sorted(CONFIGS.glob("*.yaml")) if "base: tiny-code-llama" in file.read_text()
]
SKILLS = ("lists", "strings", "sql", "regex", "json", "arithmetic")


def smaller(file: Path) -> list[str]:
    """Words by which a config reads as many sources, generated and of a few short rows."""
    config = load_run_config(file)
    names = SKILLS[: len(config.data.sources)]
    sources = [{"name": f"skill/{name}", "rows": 60} for name in names]
    words = ["--data.max_length", "96", "--eval.eval_subset", "20", "--train.batch_size", "4"]
    if config.stages:
        return words
    return [*words, "--data.sources", json.dumps(sources)]


@pytest.mark.parametrize("file", ON_A_CPU, ids=lambda file: file.stem)
def test_every_config_for_a_cpu_passes_its_check_and_is_estimated(file, capsys, tmp_path):
    words = ["--config", str(file), *smaller(file)]
    assert main(["train", "--check", *words, "--output_dir", str(tmp_path)]) == 0
    assert "nothing was kept" in capsys.readouterr().out
    if not load_run_config(file).stages:  # experts come one by one
        assert main(["info", "--estimate", *words]) == 0
        assert "total" in capsys.readouterr().out


def test_a_step_of_a_check_out_of_memory_names_the_settings_to_change(make_config, monkeypatch):
    def fail(run):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "run_step", fail)
    monkeypatch.setattr(memory, "remedies", lambda config: f"Less than {config.train.batch_size}")
    with pytest.raises(ValueError, match=r"^out of memory \(CUDA out.*\. Less than 2$"):
        check(make_config())


def test_a_check_steps_with_the_kernels_of_a_deterministic_run(make_config, monkeypatch):
    seen, step = [], module.run_step

    def watched(run):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(run)

    monkeypatch.setattr(module, "run_step", watched)
    check(make_config(deterministic=True))
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("log", [{"wandb": True}, {"report_to": ["trackio"]}], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["run", "stream"])
def test_a_check_refuses_a_service_that_is_not_installed(make_config, monkeypatch, log, stream):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    moe = {"router_scope": "prompt", "expert_dropout": 0.0} if stream else {}
    config = dataclasses.replace(make_config(moe=moe), log=LogConfig(**log))
    if stream:
        monkeypatch.setattr(module, "begin", pytest.fail)
        stages = [StageConfig(name="a", sources=config.data.sources)]
        config = dataclasses.replace(config, data=DataConfig(), stages=stages)
    with pytest.raises(ValueError, match="which is not installed"):
        check(config)


def test_a_check_starts_no_service(make_config, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(loggers.Mirror, "start", pytest.fail)
    check(dataclasses.replace(make_config(), log=LogConfig(wandb=True)))
