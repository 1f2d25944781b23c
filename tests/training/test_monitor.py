import json
import sys
import types

import pytest
import torch

from dylora.config import LogConfig
from dylora.losses import RoutingStatistics
from dylora.training.monitor import RunLog, routing_metrics, summarize


def statistics(gate_NE: list[list[float]], tokens: float) -> RoutingStatistics:
    gate = torch.tensor(gate_NE)
    zeros = torch.zeros(len(gate_NE))
    return RoutingStatistics(gate, zeros, gate, gate, gate, zeros, zeros, torch.tensor(tokens))


def test_an_expert_with_less_than_a_hundredth_of_a_site_is_dead_there():
    metrics = routing_metrics(
        summarize(statistics([[0.995, 0.005], [0.5, 0.5]], 1.0)), ["first", "second"]
    )
    assert metrics["router/dead_experts/first"] == 1
    assert metrics["router/dead_experts/second"] == 0
    assert metrics["router/dead_experts"] == 1
    assert metrics["router/max_usage"] == pytest.approx(0.995)


@pytest.fixture
def refusing_wandb(monkeypatch):
    """A wandb that refuses at the given call."""

    def install(at: str) -> None:
        def refuse(*args, **kwargs):
            raise RuntimeError("the server said no")

        run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
        module = types.ModuleType("wandb")
        module.api = types.SimpleNamespace(api_key=None)
        module.init = lambda **kwargs: run
        setattr(module if at == "init" else run, at, refuse)
        monkeypatch.setitem(sys.modules, "wandb", module)

    return install


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_refusing_wandb_changes_nothing_and_is_told(refusing_wandb, tmp_path, capsys, at):
    refusing_wandb(at)
    log = RunLog(tmp_path, LogConfig(wandb=True), "run", {})
    log.write(1, 10, {"train/loss": 2.0})
    log.write(2, 20, {"train/loss": 1.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == [2.0, 1.0]
    assert "the server said no" in capsys.readouterr().out


def test_wandb_that_is_not_installed_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLog(tmp_path, LogConfig(wandb=True), "run", {})


def test_a_half_written_last_line_is_forgotten_on_resume(tmp_path):
    log = RunLog(tmp_path, LogConfig(), "run", {})
    for step in (1, 2, 3):
        log.write(step, step, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    log.forget_after(2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
