import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from dylora.routing.losses import RoutingStatistics
from dylora.run_config import LogConfig
from dylora.training import loggers
from dylora.training.log import RunLog
from dylora.training.loop import train
from dylora.training.metrics import CollapseDetector, routing_metrics, summarize
from runs import rows_of


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
    watch = CollapseDetector(steps)
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


FAKE_WANDB = """
import json, os, pathlib, signal, time, types
api = types.SimpleNamespace(api_key=None)
AT, HOW = os.environ["FAKE_WANDB"].split(",")

def act(name):
    if name == AT:
        if HOW == "refuses":
            raise RuntimeError("the server said no")
        if HOW == "fills the disk":
            raise OSError(28, "No space left on device")
        if HOW == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if HOW == "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)

class Run:
    def log(self, row, step):
        act("log")
        self.file.write(json.dumps({"step": step, **row}) + "\\n")
    def finish(self):
        act("finish")
        self.file.close()

def init(**settings):
    act("init")
    run = Run()
    run.file = (pathlib.Path(settings["dir"]) / "mirrored.jsonl").open("w")
    return run
"""


@pytest.fixture
def fake_wandb(monkeypatch, tmp_path):
    """A wandb that misbehaves in a given way at a given call; `none` never."""

    def install(at: str, how: str) -> None:
        package = tmp_path / "site" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE_WANDB)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setenv("FAKE_WANDB", f"{at},{how}")

    return install


@pytest.mark.parametrize("at", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["refuses", "fills the disk", "crashes", "hangs"])
def test_whatever_wandb_does_the_rows_are_there_and_it_is_told(
    fake_wandb, tmp_path, monkeypatch, capsys, at, how
):
    fake_wandb(at, how)
    monkeypatch.setattr(loggers, "WANDB_SECONDS", 1.0 if how == "hangs" else 30.0)
    log = RunLog(tmp_path, LogConfig(wandb=True), "run", {})
    log.start(0, 2)
    log.write(1, 10, {"train/loss": 2.0})
    log.write(2, 20, {"train/loss": 1.0})
    began = time.monotonic()
    log.close()
    if how == "hangs":
        assert time.monotonic() - began < 5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows] == [2.0, 1.0]
    said = {
        "refuses": "the server said no",
        "fills the disk": "No space left on device",
        "crashes": "wandb stopped",
        "hangs": "wandb did not finish in 1 s",
    }
    assert said[how] in capsys.readouterr().out


def test_wandb_gets_every_row_of_this_run_and_none_of_before(fake_wandb, tmp_path, monkeypatch):
    fake_wandb("none", "none")
    monkeypatch.setattr(loggers, "WANDB_SECONDS", 30.0)
    log = RunLog(tmp_path, LogConfig(wandb=True), "run", {})
    log.write(1, 10, {"train/loss": 3.0})  # of the run that is resumed
    log.start(1, 3)
    log.write(2, 20, {"train/loss": 2.0})
    log.write(3, 30, {"train/loss": 1.0})
    log.close()
    mirrored = [json.loads(line) for line in (tmp_path / "mirrored.jsonl").read_text().splitlines()]
    assert mirrored == [
        {"step": 2, "tokens": 20, "train/loss": 2.0},
        {"step": 3, "tokens": 30, "train/loss": 1.0},
    ]


def test_a_hanging_wandb_changes_no_loss(fake_wandb, make_config, monkeypatch):
    plain = train(make_config("plain", max_steps=3))
    fake_wandb("init", "hangs")
    monkeypatch.setattr(loggers, "WANDB_SECONDS", 0.2)
    mirrored = train(make_config("mirrored", max_steps=3, wandb=True))
    assert rows_of(plain.folder) == rows_of(mirrored.folder)


def test_a_full_disk_costs_whole_rows_and_nothing_else(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, LogConfig(), "run", {})
    log.write(1, 1, {"train/loss": 1.0})
    original = Path.open

    class Full(io.TextIOWrapper):
        def write(self, text):
            super().write(text[:7])
            self.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Full(original(self, "ab")))
        log.write(2, 2, {"train/loss": 1.0})
        log.write(3, 3, {"train/loss": 1.0})
    log.write(4, 4, {"train/loss": 1.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4]
    printed = capsys.readouterr().out
    assert "metrics.jsonl lacks rows from step 2 on" in printed
    assert "metrics.jsonl lacks 2 rows" in printed


def test_a_closed_standard_output_stops_no_run(make_config, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Gone())
    assert train(make_config(max_steps=2)).progress.step == 2


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
