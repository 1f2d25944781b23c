import json
import sys
import types

import pytest
import torch

from dylora.config import LogConfig
from dylora.losses import RoutingStatistics
from dylora.training.monitor import CollapseWatch, RunLog, routing_metrics, summarize


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


def test_an_expert_that_takes_no_part_is_not_dead():
    summary = summarize(statistics([[0.5, 0.0, 0.5, 0.0]], 1.0))
    assert routing_metrics(summary, ["site"])["router/dead_experts"] == 2
    metrics = routing_metrics(summary, ["site"], [True, False, True, True])
    assert metrics["router/dead_experts"] == 1
    assert metrics["router/dead_experts/site"] == 1
    assert metrics["router/usage/site/1"] == 0


EVEN, COLLAPSED = [0.3, 0.4, 0.3], [0.9, 0.05, 0.05]


def watched(steps: int, *usages: list[list[float]], active=(True, True, True)) -> list[list[str]]:
    """The lines of each step; a usage is [site][expert]."""
    watch = CollapseWatch(steps)
    names = [f"site_{index}" for index in range(len(usages[0]))]
    return [watch.observe(torch.tensor(usage), list(active), names) for usage in usages]


def test_a_collapse_is_told_at_exactly_the_nth_step_in_a_row_and_once():
    lines = watched(3, *[[COLLAPSED]] * 8)
    assert [len(step) for step in lines] == [0, 0, 1, 0, 0, 0, 0, 0]


def test_a_collapse_that_is_interrupted_counts_anew():
    lines = watched(3, [COLLAPSED], [COLLAPSED], [EVEN], [COLLAPSED], [COLLAPSED], [COLLAPSED])
    assert [len(step) for step in lines] == [0, 0, 0, 0, 0, 1]


def test_every_site_is_watched_by_itself():
    lines = watched(2, [COLLAPSED, EVEN], [COLLAPSED, COLLAPSED], [EVEN, COLLAPSED])
    assert [[line.split()[3] for line in step] for step in lines] == [[], ["site_0"], ["site_1"]]


def test_a_warning_of_collapse_says_what_is_wrong_and_what_helps():
    [[line]] = watched(1, [COLLAPSED])
    assert "one expert has 90% of the gate mass" in line
    for remedy in ("router_aux_loss_coef", "router_temperature", "router_learning_rate"):
        assert remedy in line
    [[line]] = watched(1, [[0.5, 0.495, 0.005]])
    assert "1 of 3 experts have under 1% of it" in line


def test_a_retired_expert_does_not_count_as_collapsed():
    dead = [[0.5, 0.5, 0.0]]
    assert watched(1, dead, active=(True, True, False)) == [[]]
    assert len(watched(1, dead)[0]) == 1


def test_a_pool_of_one_has_nothing_to_collapse():
    assert watched(1, [[0.0, 1.0, 0.0]], active=(False, True, False)) == [[]]


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
