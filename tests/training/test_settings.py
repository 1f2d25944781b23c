"""What a run that goes on may change: every setting is taken and said, or refused by its name."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dylora.base_models import BaseSpec
from dylora.fields import FieldError, field_types
from dylora.run_config import TrainConfig
from dylora.storage.checkpoint import Checkpoint
from dylora.train_config import Schedule
from dylora.training.loop import train
from dylora.training.optim import build_optimizer
from dylora.training.resume import resume
from dylora.training.run import prepare
from dylora.training.schedule import build_scheduler
from dylora.training.step import run_step


def another(value: Any, annotation: Any) -> Any:
    """A valid value of a setting that is not this one."""
    choices = [word for word in get_args(annotation) if isinstance(word, str) and word != value]
    if type(value) is bool or annotation == bool | None:
        return not value
    if choices:
        return choices[0]
    if type(value) in (int, float):
        return value * 0.5 + 0.25 if type(value) is float else value + 8
    if value is None:
        kinds = get_args(annotation)
        return 7 if int in kinds else 0.5 if float in kinds else "other"
    return {str: "other", dict: {"num_cycles": 2}, list: []}[type(value)]


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_every_changed_setting_is_taken_and_said_or_refused_by_name(make_config, section):
    from dylora.training.settings import find_changes

    config = make_config(max_steps=1)
    checkpoint = Checkpoint.open(train(config).folder / "checkpoint-1")
    names = [item.name for item in dataclasses.fields(getattr(config, section))]
    for name in names:
        settings = getattr(config, section)
        other = another(getattr(settings, name), field_types(type(settings))[name])
        needed = {"train_experts": {"init_from": "x"}, "lora_plus_ratio": {"optim": "lora_plus"}}
        alone = needed.get(name, {})
        settings = dataclasses.replace(settings, **{name: other} | alone)
        try:
            changed = dataclasses.replace(config, **{section: settings})
            [line] = find_changes(checkpoint, changed)
        except ValueError as error:
            line = str(error)
        assert f"{section}.{next(iter(alone), name)} " in line


def test_every_changed_setting_of_the_mixture_is_refused_by_name(make_config):
    run = train(make_config(max_steps=1))
    with pytest.raises(ValueError, match=r"moe\.router_aux_loss_coef = 0\.01, this run has 0\.5"):
        train(make_config(moe={"router_aux_loss_coef": 0.5}), str(run.folder / "checkpoint-1"))


def rates_alone(make_config, steps: int, **settings) -> list[float]:
    """The rates of the next step after so many steps of a run that had these settings all along."""
    run = prepare(make_config("alone", **settings), fresh=True)
    for _ in range(steps):
        run_step(run)
    return [group["lr"] for group in run.optimizer.param_groups]


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    ],
    ids=lambda settings: settings["lr_scheduler_type"],
)
def test_changed_learning_rates_take_effect_and_are_said(make_config, capsys, schedule):
    first = train(make_config(max_steps=8, save_steps=4, **schedule))
    shutil.rmtree(first.folder / "checkpoint-8")
    lower = {"learning_rate": 1e-3, "router_learning_rate": 5e-3} | schedule
    run = prepare(make_config(max_steps=8, **lower), fresh=False)
    resume(run, "latest")
    found = [group["lr"] for group in run.optimizer.param_groups]
    assert found == pytest.approx(rates_alone(make_config, 4, max_steps=8, **lower), rel=1e-12)
    assert run.scheduler.get_last_lr() == found
    printed = capsys.readouterr().out
    assert "train.learning_rate is 0.001 from here on, it was 0.01" in printed
    assert "train.router_learning_rate is 0.005 from here on, it was None" in printed


def test_the_settings_of_before_a_resume_are_kept(make_config):
    run = train(make_config(max_steps=1))
    before = (run.folder / "config.yaml").read_text()
    train(make_config(max_steps=2, learning_rate=1e-3), "latest")
    assert (run.folder / "config.yaml.until-step-1").read_text() == before
    train(make_config(max_steps=3, learning_rate=1e-3), "latest")
    assert (run.folder / "config.yaml.until-step-2").exists()


def test_another_schedule_is_refused_by_name(make_config):
    run = train(make_config(max_steps=1))
    with pytest.raises(ValueError, match=r"train\.lr_scheduler_type = 'cosine', this run has 'gr"):
        train(make_config(lr_scheduler_type="greedy"), str(run.folder / "checkpoint-1"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_goes_on_in_another_precision_and_back(make_config, capsys, dtype):
    train(make_config(max_steps=1))
    train(make_config(max_steps=2, dtype=dtype), "latest")
    run = train(make_config(max_steps=3), "latest")
    assert run.progress.step == 3
    assert f"model.dtype is '{dtype}' from here on, it was 'float32'" in capsys.readouterr().out


def test_a_checkpoint_that_records_no_settings_goes_on_and_says_so(make_config, capsys):
    from harm import in_json, seal

    run = train(make_config(max_steps=1))
    checkpoint = run.folder / "checkpoint-1"
    in_json("training", to=lambda record: record.pop("settings") and record)(
        checkpoint / "config.json"
    )
    seal(checkpoint)
    train(make_config(max_steps=2), "latest")
    assert "does not record the settings" in capsys.readouterr().out


# Schedules


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("cosine_with_min_lr", {"min_lr": 1e-5}), ("polynomial", {"lr_end": 1e-5})],
)
def test_a_schedule_ends_at_the_absolute_rate_it_was_given(make_config, kind, settings):
    config = make_config(max_steps=4, lr_scheduler_type=kind, lr_scheduler_kwargs=settings)
    run = prepare(config, fresh=True)
    for _ in range(4):
        run_step(run)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_the_optimizer_knows_the_rate_of_the_experts(make_config):
    run = prepare(make_config(), fresh=True)
    settings = TrainConfig(learning_rate=3e-4, router_learning_rate=1e-3)
    assert build_optimizer(run.model, settings).defaults["lr"] == 3e-4


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_warm_up_that_a_schedule_has_not_is_refused(kind):
    said = f"warmup_steps is 3, but must be 0 with lr_scheduler_type {kind}, .*constant_with_warmup"
    with pytest.raises(ValueError, match=said):
        TrainConfig(lr_scheduler_type=kind, warmup_steps=3).check_acts()
    TrainConfig(lr_scheduler_type="constant_with_warmup", warmup_steps=3).check_acts()


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup"])
def test_settings_that_a_schedule_does_not_take_are_refused(kind):
    said = rf"lr_scheduler_kwargs is \{{'power': 2.0\}}, but must be empty with .*type {kind}$"
    with pytest.raises(ValueError, match=said):
        TrainConfig(lr_scheduler_type=kind, lr_scheduler_kwargs={"power": 2.0}).check_acts()


def test_a_run_that_began_with_a_warm_up_that_its_schedule_has_not_goes_on(
    make_config, monkeypatch
):
    config = make_config(lr_scheduler_type="constant", max_steps=2, save_steps=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warmup_steps=2))
    with pytest.raises(ValueError, match=r"train\.warmup_steps is 2, but must be 0 with"):
        train(config)
    with monkeypatch.context() as patch:  # as it was before this was asked
        patch.setattr(type(config), "check_acts", lambda self: None)
        begun = train(config)
    shutil.rmtree(begun.folder / "checkpoint-2")
    assert train(config, "latest").progress.step == 2


@pytest.mark.parametrize("kind", get_args(Schedule))
def test_every_schedule_follows_the_warm_up_and_the_settings_that_are_not_refused(kind):
    """Or refuses them: none leaves a setting unread."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with contextlib.suppress(FieldError):
        config = TrainConfig(lr_scheduler_type=kind, warmup_steps=4)
        config.check_acts()
        kwargs = {"warmup_stable_decay": {"num_decay_steps": 4}}.get(kind, {})
        kwargs |= {"min_lr": 0.1} if kind.endswith("with_min_lr") else {}
        config = dataclasses.replace(config, lr_scheduler_kwargs=kwargs)
        assert build_scheduler(optimizer, config, 20).get_last_lr()[0] < 0.5
    with contextlib.suppress(FieldError):
        config = TrainConfig(lr_scheduler_type=kind, lr_scheduler_kwargs={"no_such_setting": 1})
        config.check_acts()
        with pytest.raises(ValueError, match="do not fit"):
            build_scheduler(optimizer, config, 20)


# Rows


def test_the_same_rows_in_another_order_are_other_data(make_config, tmp_path, rows_file):
    run = train(make_config(max_steps=1))
    lines = Path(rows_file).read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    config = make_config(max_steps=2)
    source = dataclasses.replace(config.data.sources[0], path=str(turned))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[source]))
    with pytest.raises(ValueError, match="source 'rows' has its rows in another order"):
        train(config, str(run.folder / "checkpoint-1"))


# The schedule of an untrusted file


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("cosine", "base_lrs", float("inf")),
        ("cosine", "base_lrs", 1e30),
        ("cosine", "base_lrs", -1.0),
        ("cosine", "_last_lr", -1.0),
        ("cosine", "last_epoch", 10**9),
        ("cosine", "last_epoch", -5),
        ("reduce_lr_on_plateau", "_last_lr", 1.0),
        ("reduce_lr_on_plateau", "factor", 50.0),
        ("reduce_lr_on_plateau", "num_bad_epochs", -1),
        ("greedy", "max_lrs", 1e30),
        ("greedy", "_last_lr", 1e30),
    ],
)
def test_a_schedule_out_of_range_is_refused(make_config, kind, key, value):
    from harm import seal

    config = make_config(max_steps=2, save_steps=1, lr_scheduler_type=kind)
    checkpoint = train(dataclasses.replace(config)).folder / "checkpoint-1"
    state = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    old = state["scheduler"][key]
    state["scheduler"][key] = [value] * len(old) if isinstance(old, list) else value
    torch.save(state, checkpoint / "scheduler.pt")
    seal(checkpoint)
    with pytest.raises(ValueError, match=rf"scheduler\.pt: scheduler\.{key} is"):
        train(config, str(checkpoint))


@pytest.mark.parametrize(
    ("path", "value"), [(("step",), 10**12), (("sampler", "epoch"), 10**15), (("steps",), 0)]
)
def test_steps_and_epochs_out_of_range_are_refused(make_config, path, value):
    from harm import in_json, seal

    checkpoint = train(make_config(max_steps=1)).folder / "checkpoint-1"
    in_json(*path, to=value)(checkpoint / "trainer_state.json")
    seal(checkpoint)
    with pytest.raises(ValueError, match=rf"trainer_state\.json: {'.'.join(path)} is {value}"):
        train(make_config(max_steps=2), str(checkpoint))


@pytest.mark.parametrize(
    ("path", "value"),
    [("train.seed", -1), ("train.seed", 2**32), ("data.seed", -1)],
)
def test_a_seed_that_no_generator_or_checkpoint_takes_is_refused_by_its_key(
    make_config, path, value
):
    section, name = path.split(".")
    with pytest.raises(ValueError, match=rf"seed is {value}, but must be (at least|from) 0"):
        dataclasses.replace(getattr(make_config(), section), **{name: value})


def test_a_fresh_run_keeps_the_metrics_of_one_that_saved_nothing(make_config):
    config = make_config(max_steps=1)
    folder = Path(config.output_dir) / config.name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    train(config)
    assert (folder / "metrics.jsonl.earlier").read_text() == '{"step": 1}\n'
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"a": 1}', b'{"step": "x"}', b"\xff", b"[" * 100_000, b'{"step": 1, "a'],
)
def test_lines_of_metrics_that_are_no_rows_are_dropped_and_said(make_config, capsys, line):
    folder = train(make_config(max_steps=1)).folder
    file = folder / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + line + b"\n" + before.splitlines()[0].replace(b": 1,", b": 9,", 1))
    train(make_config(max_steps=2), "latest")
    assert f"warning: 1 lines of {file} are no rows, and are dropped" in capsys.readouterr().out
    steps = [json.loads(row)["step"] for row in file.read_bytes().splitlines()]
    assert steps == [1, 1, 2, 2]


def test_a_token_id_beyond_the_embeddings_is_refused_before_training(make_config, monkeypatch):
    config = make_config(max_steps=1)
    tokenizer = BaseSpec.resolve(config.model.base).tokenizer()
    rows = BaseSpec.resolve(config.model.base).config().vocab_size
    tokenizer.add_tokens(["Please"])
    monkeypatch.setattr("dylora.training.run.load_tokenizer", lambda *_: tokenizer)
    with pytest.raises(
        ValueError, match=rf"has the token id {len(tokenizer) - 1}, but .* {rows} rows"
    ):
        train(config)
    tokenizer.add_special_tokens({"pad_token": "<mine>"})
    with pytest.raises(ValueError, match="the tokenizer's padding has the token id"):
        train(config)


@pytest.mark.parametrize("output", ["runs", "deep/runs"])
def test_a_refused_training_leaves_no_folder(make_config, tmp_path, monkeypatch, output):
    config = dataclasses.replace(make_config(), output_dir=str(tmp_path / output))
    source = dataclasses.replace(config.data.sources[0], path=str(tmp_path / "none.jsonl"))
    data = dataclasses.replace(config.data, sources=[source])
    with pytest.raises(ValueError, match="does not exist"):
        train(dataclasses.replace(config, data=data))

    def full(run):
        raise ValueError("the disk is full")

    monkeypatch.setattr("dylora.training.loop.preflight_save", full)
    with pytest.raises(ValueError, match="the disk is full"):
        train(config)
    assert list(tmp_path.iterdir()) == []
