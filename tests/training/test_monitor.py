import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dylora
from dylora import DyLoRA_MoE
from dylora.evaluation.report import report_run
from dylora.routing.losses import RoutingStatistics, routing_statistics
from dylora.routing.metrics import find_collapses, information_metrics, routing_metrics
from dylora.run_config import EvalConfig, LogConfig
from dylora.training import callbacks, loggers
from dylora.training.callbacks import CollapseWarning
from dylora.training.environment import describe_repository
from dylora.training.log import RunLog
from dylora.training.loop import evaluate, train
from dylora.training.run import prepare
from dylora.training.step import run_step
from dylora.training.validation import COST_ROWS, overall_loss, sparse_cost, validate
from runs import STEPS, rows_of


def statistics(gate_NE: list[list[float]], tokens: float) -> RoutingStatistics:
    gate = torch.tensor(gate_NE)
    zeros = torch.zeros(len(gate_NE))
    return RoutingStatistics(gate, zeros, gate, gate, gate, zeros, zeros, torch.tensor(tokens))


def test_an_expert_with_less_than_a_hundredth_of_a_site_is_dead_there():
    metrics = routing_metrics(
        statistics([[0.995, 0.005], [0.5, 0.5]], 1.0),
        ["first", "second"],
        torch.tensor([[True, True], [True, True]]),
    )
    assert metrics["router/dead_experts/first"] == 1
    assert metrics["router/dead_experts/second"] == 0
    assert metrics["router/dead_experts"] == 1
    assert metrics["router/max_usage"] == pytest.approx(0.995)


def test_an_expert_that_takes_no_part_is_not_dead():
    found = statistics([[0.5, 0.0, 0.5, 0.0]], 1.0)
    everyone_NE = torch.ones(1, 4, dtype=torch.bool)
    assert routing_metrics(found, ["site"], everyone_NE)["router/dead_experts"] == 2
    metrics = routing_metrics(found, ["site"], torch.tensor([[True, False, True, True]]))
    assert metrics["router/dead_experts"] == 1
    assert metrics["router/dead_experts/site"] == 1
    assert metrics["router/usage/site/1"] == 0


def test_a_shared_expert_has_no_part_in_what_is_said_of_choices():
    gate_NE = [[100.0, 97.0, 3.0], [100.0, 99.5, 0.5]]
    found, everyone_NE = statistics(gate_NE, 100.0), torch.ones(2, 3, dtype=torch.bool)
    metrics = routing_metrics(found, ["first", "second"], everyone_NE, shared=1)
    assert metrics["router/max_usage/first"] == pytest.approx(0.97)
    assert metrics["router/max_usage"] == pytest.approx(0.995)
    assert metrics["router/dead_experts"] == metrics["router/dead_experts/second"] == 1
    assert metrics["router/usage/first/0"] == pytest.approx(0.5)  # of all gates
    gates = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.5]])[None, :, None]  # [B, S, N, E]
    entropy = routing_statistics(gates, gates, gates, None, top_k=1, shared=1).entropy_N
    assert entropy.tolist() == pytest.approx([math.log(2)])


def test_of_many_experts_that_are_used_alike_none_is_dead():
    even, everyone_NE = [[1.0] * 150], torch.ones(1, 150, dtype=torch.bool)
    assert routing_metrics(statistics(even, 150.0), ["a"], everyone_NE)["router/dead_experts"] == 0
    assert find_collapses({}, torch.tensor(even) / 150, everyone_NE, ["a"], 1) == []
    one = [[0.05] + [1.0] * 149]
    assert routing_metrics(statistics(one, 150.0), ["a"], everyone_NE)["router/dead_experts"] == 1


def test_a_collapse_beside_a_shared_expert_is_seen():
    usage_NE, everyone_NE = torch.tensor([[0.5, 0.45, 0.05]]), torch.ones(1, 3, dtype=torch.bool)
    assert "has 90% of the gate sum" in find_collapses({}, usage_NE, everyone_NE, ["a"], 1, 1)[0]
    assert find_collapses({}, usage_NE, everyone_NE, ["a"], 1) == []


EVEN, COLLAPSED = [0.3, 0.4, 0.3], [0.9, 0.05, 0.05]


def watched(steps: int, *usages: list[list[float]], active=(True, True, True)) -> list[list[str]]:
    """The lines of each step; a usage is [site][expert]."""
    counts: dict[str, int] = {}
    names = [f"site_{index}" for index in range(len(usages[0]))]
    active_NE = torch.tensor(active).expand(len(names), -1)
    return [
        find_collapses(counts, torch.tensor(usage), active_NE, names, steps) for usage in usages
    ]


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
    assert "one expert has 90% of the gate sum" in line
    for remedy in ("router_aux_loss_coef", "router_temperature", "router_learning_rate"):
        assert remedy in line
    [[line]] = watched(1, [[0.5, 0.495, 0.005]])
    assert "1 of 3 experts have hardly any of it" in line


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
    with (pathlib.Path(settings["dir"]) / "runs.jsonl").open("a") as runs:
        runs.write(json.dumps([settings["id"], settings["resume"]]) + "\\n")
    return run
"""


FAKE_SERVICES = """
import json, os, types

def record(name):
    def call(*args, **kwargs):
        with open(os.environ["FAKE_FILE"], "a") as file:
            file.write(json.dumps([name, args, kwargs]) + "\\n")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="77"))
    return call

init, log, finish = record("init"), record("log"), record("finish")
set_experiment, start_run, log_dict = map(record, ("set_experiment", "start_run", "log_dict"))
log_metrics, end_run = record("log_metrics"), record("end_run")
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
    monkeypatch.setattr(loggers, "SECONDS", 1.0 if how == "hangs" else 30.0)
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
    monkeypatch.setattr(loggers, "SECONDS", 30.0)
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


def test_wandb_goes_on_with_its_run_after_a_resume_and_begins_one_with_another_run(
    fake_wandb, tmp_path, monkeypatch
):
    fake_wandb("none", "none")
    monkeypatch.setattr(loggers, "SECONDS", 30.0)
    for fresh in (True, False, True):
        log = RunLog(tmp_path, LogConfig(report_to=["wandb"]), "run", {})
        if fresh:
            log.set_aside_earlier()
        log.start(0, 1)
        log.write(1, 10, {"train/loss": 3.0})
        log.close()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [resume for _, resume in runs] == ["allow"] * 3
    first, resumed, other = [number for number, _ in runs]
    assert first == resumed != other


def test_tensorboard_has_the_rows_of_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "SECONDS", 60.0)
    log = RunLog(tmp_path, LogConfig(report_to=["tensorboard"]), "run", {"train": {"seed": 3}})
    log.start(0, 2)
    log.write(1, 10, {"train/loss": 2.0})
    log.write(2, 20, {"train/loss": 1.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2), (2, 1)]


@pytest.mark.parametrize("service", ["trackio", "mlflow"])
def test_services_get_every_row_of_this_run_and_know_it_again(service, tmp_path, monkeypatch):
    package = tmp_path / "site" / service
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_SERVICES)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("FAKE_FILE", str(tmp_path / "calls.jsonl"))
    monkeypatch.setattr(loggers, "SECONDS", 30.0)
    for step in (1, 2):
        log = RunLog(tmp_path, LogConfig(report_to=[service], project="p"), "run", {"seed": 3})
        log.start(0, 1)
        log.write(step, 10, {"train/loss": 3.0})
        log.close()
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    rows = [call for call in calls if call[0] in ("log", "log_metrics")]
    assert [call[1:] for call in rows] == [
        [[{"tokens": 10, "train/loss": 3.0}], {"step": 1}],
        [[{"tokens": 10, "train/loss": 3.0}], {"step": 2}],
    ]
    begun = [call[2] for call in calls if call[0] in ("init", "start_run")]
    if service == "mlflow":
        assert begun == [{"run_id": None, "run_name": "run"}, {"run_id": "77", "run_name": None}]
    else:
        assert {one["resume"] for one in begun} == {"allow"}
        assert {(one["project"], one["name"]) for one in begun} == {("p", "run")}


def test_a_run_leaves_what_it_said_in_a_file_with_the_time(tmp_path, capsys):
    log = RunLog(tmp_path, LogConfig(), "run", {})
    log.info("one of two")
    assert not (tmp_path / "run.log").exists()  # what is refused before its start changes no folder
    log.start(0, 1)
    log.info("two of two")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[21:] for line in lines] == ["one of two", "two of two"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line[:21]) for line in lines)
    assert capsys.readouterr().out == "one of two\ntwo of two\n"


def test_a_hanging_wandb_changes_no_loss(fake_wandb, make_config, monkeypatch):
    plain = train(make_config("plain", max_steps=3))
    fake_wandb("init", "hangs")
    monkeypatch.setattr(loggers, "SECONDS", 0.2)
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
        patch.setattr(Path, "open", lambda self, mode, **_: Full(original(self, "ab")))
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


@pytest.mark.parametrize("service", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_a_service_that_is_not_installed_is_a_clear_error(service, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(ValueError, match=rf"pip install .dylora\[{service}\]"):
        RunLog(tmp_path, LogConfig(report_to=[service]), "run", {})


def test_a_half_written_last_line_is_forgotten_on_resume(tmp_path):
    log = RunLog(tmp_path, LogConfig(), "run", {})
    for step in (1, 2, 3):
        log.write(step, step, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    log.forget_after(2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_a_resume_between_two_rows_of_metrics_changes_neither(make_config):
    config = make_config(save_steps=2)
    config = dataclasses.replace(config, log=LogConfig(logging_steps=4))
    whole = train(config).folder
    expected = rows_of(whole)
    for step in (8, 10):
        shutil.rmtree(whole / f"checkpoint-{step}")
    train(config, "latest")  # at step 6, in the middle of a row
    assert rows_of(whole) == expected


@pytest.mark.parametrize(("stop", "warned"), [(2, True), (6, False)])
def test_a_collapse_is_counted_across_a_resume_and_told_once(
    make_config, monkeypatch, capsys, stop, warned
):
    monkeypatch.setattr("dylora.routing.metrics.COLLAPSED_ABOVE", -1.0)
    config = make_config(save_steps=2)
    config = dataclasses.replace(config, log=LogConfig(collapse_steps=4))
    folder = train(config).folder
    assert "has been collapsed for 4 steps" in capsys.readouterr().out
    for step in range(stop + 2, STEPS + 1, 2):
        shutil.rmtree(folder / f"checkpoint-{step}")
    train(
        dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=stop + 2)),
        "latest",
    )
    assert ("has been collapsed for 4 steps" in capsys.readouterr().out) == warned


def test_gradient_norms_are_those_before_clipping_and_the_factor_is_logged(make_config):
    rows = [
        rows_of(train(make_config(str(limit), max_steps=1, max_grad_norm=limit)).folder)[0]
        for limit in (0.0, 0.01)
    ]
    free, clipped = rows
    norm = free["train/grad_norm"]
    assert clipped["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert (free["train/clip_factor"], norm > 0.01) == (1.0, True)
    assert clipped["train/clip_factor"] == pytest.approx(0.01 / norm, rel=1e-4)
    for expert in range(3):
        name = f"expert/{expert}/grad_norm"
        assert clipped[name] == pytest.approx(free[name], rel=1e-5)


# What is written beside


def test_a_machine_without_git_trains(make_config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run = train(make_config(max_steps=1))
    facts = json.loads((run.folder / "env.json").read_text())
    assert (facts["commit"], facts["dirty"]) == (None, None)
    assert facts["dylora"] == dylora.__version__
    assert facts["command"].split()


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_dyloras_repository_alone(tmp_path):
    package = tmp_path / "checkout"
    package.mkdir()
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "somebody else's")
    assert describe_repository(package) is None
    (package / "pyproject.toml").write_text('[project]\nname = "dylora"\n')
    assert describe_repository(package) is None  # a part of another repository
    git(package, "init")
    git(package, "add", ".")
    git(package, "commit", "-m", "ours")
    assert re.fullmatch("[0-9a-f]{40}", describe_repository(package))
    (package / "pyproject.toml").write_text('[project]\nname = "dylora" \n')
    assert re.fullmatch("[0-9a-f]{40}-dirty", describe_repository(package))
    (package / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    assert describe_repository(package) is None


def test_without_matplotlib_the_results_are_there_all_the_same(make_config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = train(make_config(max_steps=1))
    report_run(run)
    assert json.loads((run.folder / "results.json").read_text())["step"] == 1
    assert "plots are left out" in capsys.readouterr().out
    assert not list(run.folder.glob("*.png"))


def test_where_no_router_is_trained_no_collapse_is_told(make_config, monkeypatch):
    monkeypatch.setattr(callbacks, "find_collapses", lambda *rest: ["collapsed"])
    run = prepare(make_config(), fresh=True)
    result, moe = run_step(run), run.config.moe
    for scope in ("site", "prompt", "running_mean"):
        moe = dataclasses.replace(moe, router_scope=scope, expert_dropout=0.0)
        told: list[str] = []
        monkeypatch.setattr(run.log, "info", told.append)
        CollapseWarning().after_step(
            run._replace(config=dataclasses.replace(run.config, moe=moe)), result
        )
        assert bool(told) == (scope == "site")


@pytest.mark.parametrize("kind", ["learned_with_maturity", "learned", "threshold"])
def test_maturity_that_decides_nothing_is_not_warned_of(make_config, capsys, kind):
    moe = {"maturity_mode": "usage", "maturity_tau": 0.5, "maturity_threshold": 0.8}
    train(make_config(moe=moe | {"router_type": kind}))
    found = "of the run these experts became mature" in capsys.readouterr().out
    assert found == (kind == "learned_with_maturity")


@pytest.mark.parametrize(("tau", "warned"), [(0.5, True), (0.1, False)])
def test_experts_that_mature_in_the_last_fifth_of_a_run_are_warned_of(
    make_config, capsys, tau, warned
):
    """usage: an expert is mature when 1 - exp(-share / tau) is above 0.8, share being its own."""
    moe = {"maturity_mode": "usage", "maturity_tau": tau, "maturity_threshold": 0.8}
    run = train(make_config(moe=moe))
    assert (run.model.maturity.maturity == 1).all()
    found = "of the run these experts became mature" in capsys.readouterr().out
    assert found == warned


def test_a_run_tells_its_learning_rate_to_the_experts(make_config, monkeypatch):
    rates = []
    observe = DyLoRA_MoE.observe

    def record(self, *args, rate=1.0, **kwargs):
        rates.append(rate)
        observe(self, *args, rate=rate, **kwargs)

    monkeypatch.setattr(DyLoRA_MoE, "observe", record)
    train(make_config(max_steps=4, warmup_steps=0, learning_rate=3e-3, lr_scheduler_type="cosine"))
    expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected)


def test_the_sparse_cost_is_what_the_loss_grows_by_when_all_experts_are_mature(make_config):
    """Against the loss of the same rows once maturity is set to 1."""
    run = train(make_config(moe={"maturity_mode": "manual"}))
    model, rows = run.model, run.data.validation
    assert len(rows[0]) <= COST_ROWS  # so that it looks at all of them
    cost = sparse_cost(model, rows, run.pad_token_id, batch_size=2)
    assert rows_of(run.folder)[-1]["val/sparse_cost"] == pytest.approx(cost, abs=1e-6)
    losses = []
    for maturity in (0.0, 1.0):
        state = model.maturity
        model.set_maturity(state._replace(maturity=torch.full_like(state.maturity, maturity)))
        scores = validate(model, rows, batch_size=4, pad_token_id=run.pad_token_id)
        losses.append(overall_loss(scores))
    assert cost == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert abs(cost) > 1e-4
    assert sparse_cost(model, rows, run.pad_token_id, batch_size=2) is None  # all are mature now
    assert model.config.routing_mode == "maturity"


def test_no_pass_of_a_validation_has_more_rows_than_eval_batch_size(make_config):
    run = prepare(make_config(batch_size=1), fresh=True)
    rows, forward = [], run.model.forward
    run.model.forward = lambda *given, **inputs: (
        rows.append(len(inputs["input_ids"])) or forward(*given, **inputs)
    )
    run = run._replace(config=dataclasses.replace(run.config, eval=EvalConfig(batch_size=2)))
    assert len(run.data.validation[0]) > 2
    evaluate(run)
    assert max(rows) == 2


def test_information_is_that_of_the_table_of_sets_and_experts():
    """Against the definition, Σ p(s, e) log p(s, e) / (p(s) p(e)), of a table by hand."""
    one, other = torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([[0.2, 0.8, 0.0]])  # 0 is shared
    found = information_metrics([one, other], ["block"], 1)
    table = [[0.25, 0.25], [0.5, 0.0]]
    expected = sum(
        p * math.log(p / (sum(row) * sum(r[column] for r in table)))
        for row in table
        for column, p in enumerate(row)
        if p
    )
    assert found == {"val/information": pytest.approx(expected)} | {
        "val/information/block": pytest.approx(expected)
    }
    own = [torch.eye(3)[[expert, 0]] for expert in range(3)]  # the second block knows nothing
    found = information_metrics(own, ["a", "b"], 0)
    assert found["val/information/a"] == pytest.approx(math.log(3))
    assert found["val/information/b"] == pytest.approx(0, abs=1e-12)
    assert information_metrics(own[:1], ["a", "b"], 0) == {}


def test_a_run_of_two_sets_logs_what_its_routing_says_of_them(make_config):
    config = make_config()
    sources = [dataclasses.replace(config.data.sources[0], name=name) for name in ("one", "two")]
    data = dataclasses.replace(config.data, sources=sources)
    run = train(dataclasses.replace(config, data=data))
    last = next(row for row in reversed(rows_of(run.folder)) if "val/loss" in row)
    names = [f"val/information/{name}" for name in run.model.site_names]
    values = [last[name] for name in names]
    assert last["val/information"] == pytest.approx(sum(values) / len(values))
    assert all(0 <= value < math.log(2) for value in values)
