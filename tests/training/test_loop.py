"""The training loop on a tiny random Llama and a file of thirty rows."""

import dataclasses
import hashlib
import json
import math
import shutil
from typing import get_args

import pytest
import torch
from runs import STEPS, all_tensors, rows_of
from transformers.trainer_utils import SchedulerType

from dylora.config import DataConfig, Schedule
from dylora.training.loop import train, train_step
from dylora.training.optim import named_parameters, state_by_name
from dylora.training.resume import last_good, random_state, restore_random_state
from dylora.training.setup import prepare


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_steps_and_five_resumed_equal_ten_bit_for_bit(make_config, dtype):
    whole = train(make_config("whole", dtype=dtype, save_steps=5))
    parts = make_config("parts", dtype=dtype, save_steps=5)
    source = whole.folder.parent / "parts"
    shutil.copytree(whole.folder, source)
    shutil.rmtree(source / "checkpoint-10")
    train(parts, "latest")
    expected = all_tensors(whole.folder / "checkpoint-10")
    found = all_tensors(source / "checkpoint-10")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert rows_of(source) == rows_of(whole.folder)


def test_a_resumed_run_takes_the_newest_checkpoint_that_verifies(make_config, capsys):
    run = train(make_config(save_steps=4))
    weights = run.folder / "checkpoint-10" / "router.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    resumed = train(make_config(save_steps=4), "latest")
    printed = capsys.readouterr().out
    assert f"skipped {run.folder / 'checkpoint-10'}: {weights} has changed" in printed
    assert f"resumed {run.folder / 'checkpoint-8'} at step 8" in printed
    assert resumed.progress.step == STEPS


@pytest.mark.parametrize("state", ["optimizer.pt", "rng_state.pt", "scheduler.pt"])
def test_missing_state_is_an_error_that_names_it(make_config, state):
    run = train(make_config(max_steps=1))
    (run.folder / "checkpoint-1" / state).unlink()
    with pytest.raises(ValueError, match=f"{state} is missing"):
        train(make_config(max_steps=2), str(run.folder / "checkpoint-1"))


def test_resuming_with_other_moe_settings_names_the_field(make_config):
    run = train(make_config(max_steps=1))
    with pytest.raises(ValueError, match=r"moe\.router_temperature = 2\.0, this run has 3\.0"):
        train(make_config(moe={"router_temperature": 3.0}), str(run.folder / "checkpoint-1"))


def test_resuming_on_other_data_is_refused(make_config, tmp_path):
    run = train(make_config(max_steps=1))
    config = make_config()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"question": "q{n}", "answer": "a{n}"}}\n' for n in range(30)))
    source = dataclasses.replace(config.data.sources[0], path=str(other))
    config = dataclasses.replace(config, data=DataConfig(sources=[source], max_length=64))
    with pytest.raises(ValueError, match="trained on other data"):
        train(config, str(run.folder / "checkpoint-1"))


def test_a_moved_file_with_the_same_rows_is_the_same_data(make_config, tmp_path, rows_file):
    run = train(make_config(max_steps=1))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows_file, moved)
    config = make_config(max_steps=2)
    source = dataclasses.replace(config.data.sources[0], path=str(moved))
    config = dataclasses.replace(config, data=DataConfig(sources=[source], max_length=64))
    assert train(config, str(run.folder / "checkpoint-1")).progress.step == 2


def test_a_refused_resume_leaves_the_resolved_config_of_the_run_alone(make_config):
    run = train(make_config(max_steps=1))
    before = (run.folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="router_temperature"):
        train(make_config(moe={"router_temperature": 3.0}), "latest")
    assert (run.folder / "config.yaml").read_text() == before


def test_a_fresh_run_does_not_write_over_another(make_config):
    train(make_config(max_steps=1))
    with pytest.raises(FileExistsError, match="already holds checkpoints"):
        train(make_config(max_steps=1))


@pytest.mark.parametrize(("batch_size", "parts"), [(4, 2), (2, 4), (1, 8)])
def test_how_a_batch_is_split_changes_nothing(make_config, batch_size, parts):
    """Three steps in float64, balance and z losses included, against one batch of eight."""
    plain = {"lora_dropout": 0.0, "expert_dropout": 0.0, "router_aux_loss_coef": 0.5}

    def three_steps(name: str, size: int, count: int):
        config = make_config(
            name, moe=plain, batch_size=size, gradient_accumulation_steps=count, warmup_steps=0
        )
        run = prepare(config, fresh=True)
        run.model.double()
        results = []
        for _ in range(3):
            results.append(train_step(run))
            run.progress.step += 1
            run.optimizer.zero_grad()
        return run, results

    whole, whole_results = three_steps("whole", 8, 1)
    split, split_results = three_steps("split", batch_size, parts)
    for one, other in zip(whole_results, split_results, strict=True):
        assert other.aux_loss == pytest.approx(one.aux_loss, rel=1e-5)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    for name, parameter in named_parameters(whole.model).items():
        other = named_parameters(split.model)[name]
        torch.testing.assert_close(other, parameter, rtol=1e-6, atol=1e-8, msg=name)
    torch.testing.assert_close(split.model.maturity, whole.model.maturity, rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_changes_neither_weights_nor_counters(make_config):
    plain = train(make_config("plain", max_steps=3))
    again = train(make_config("again", max_steps=3, gradient_checkpointing=True))
    for name, parameter in named_parameters(plain.model).items():
        other = named_parameters(again.model)[name]
        torch.testing.assert_close(other, parameter, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(again.model.maturity, plain.model.maturity, rtol=1e-4, atol=1e-6)


def state_of(run) -> dict[str, object]:
    """What only a good step may change."""
    return {
        "parameters": {n: p.detach().clone() for n, p in named_parameters(run.model).items()},
        "moments": {n: dict(s) for n, s in state_by_name(run.optimizer, run.model).items()},
        "maturity": run.model.maturity,
        "steps": [row.steps for row in run.model.experts.table],
        "rate": run.scheduler.get_last_lr(),
    }


@pytest.fixture
def break_losses(monkeypatch):
    """Makes the losses of the given steps of a run infinite or not a number."""

    def install(run, values: dict[int, float]) -> None:
        forward = type(run.model).forward

        def broken(model, *args, **kwargs):
            output = forward(model, *args, **kwargs)
            value = values.get(run.progress.step + 1)
            if value is None or not model.training:
                return output
            return output._replace(loss=output.loss * value)

        monkeypatch.setattr(type(run.model), "forward", broken)

    return install


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_whose_loss_is_not_finite_updates_nothing(make_config, break_losses, value):
    run = prepare(make_config(), fresh=True)
    break_losses(run, {1: value})
    before = state_of(run)
    result = train_step(run)
    assert result.trouble == "loss"
    torch.testing.assert_close(state_of(run), before, rtol=0, atol=0, equal_nan=True)


def test_a_step_whose_gradient_is_not_finite_updates_nothing(make_config):
    run = prepare(make_config(), fresh=True)
    _, parameter = next(run.model.expert_parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = state_of(run)
    assert train_step(run).trouble == "gradient"
    torch.testing.assert_close(state_of(run), before, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def train_broken(make_config, break_losses, monkeypatch):
    """A whole run some of whose losses are NaN; settings as make_config takes them."""

    def start(broken: tuple[int, ...], resume: str | None = None, **settings):
        found = []

        def prepare_broken(*args, **kwargs):
            found.append(prepare(*args, **kwargs))
            break_losses(found[-1], dict.fromkeys(broken, float("nan")))
            return found[-1]

        monkeypatch.setattr("dylora.training.loop.prepare", prepare_broken)
        train(make_config(**settings), resume)
        return found[-1]

    return start


def test_steps_that_were_left_out_are_counted_and_in_the_log(train_broken, capsys):
    run = train_broken((3, 4, 6))
    assert run.progress.skipped_steps == 3
    rows = {row["step"]: row for row in rows_of(run.folder) if "train/loss" in row}
    assert [rows[step]["train/skipped_steps"] for step in (2, 3, 4, 5, 6, 10)] == [0, 1, 2, 2, 3, 3]
    assert [math.isnan(rows[step]["train/loss"]) for step in (2, 3, 4, 5)] == [0, 1, 1, 0]
    printed = capsys.readouterr().out
    assert "step 4: the loss is not finite (loss nan, gradient norm nan); nothing was" in printed
    assert "(2 in a row, stopping at 3)" in printed


def test_bad_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(train_broken):
    with pytest.raises(ValueError, match=r"step 7: .* 3 steps in a row.*checkpoint-6\."):
        train_broken((3, 5, 6, 7), save_steps=2, max_nonfinite_steps=3, save_total_limit=2)


def test_a_damaged_checkpoint_is_not_named_as_the_last_good_one(make_config):
    run = train(make_config(max_steps=4, save_steps=2))
    (run.folder / "checkpoint-4" / "optimizer.pt").unlink()
    assert last_good(run) == f"The last good checkpoint is {run.folder / 'checkpoint-2'}."


def test_the_count_in_a_row_outlives_a_resume(train_broken):
    with pytest.raises(ValueError, match="step 4"):
        train_broken((2, 3, 4), save_steps=1)
    with pytest.raises(ValueError, match=r"step 4: .* 3 steps in a row"):
        train_broken((4,), resume="latest", save_steps=1)


def test_training_never_changes_a_base_weight(make_config):
    run = prepare(make_config(), fresh=True)
    ours = set(map(id, named_parameters(run.model).values()))

    def digest() -> str:
        frozen = [p for p in run.model.base.parameters() if id(p) not in ours]
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in frozen)).hexdigest()

    before = digest()
    for _ in range(3):
        train_step(run)
        run.progress.step += 1
        run.optimizer.zero_grad()
    assert digest() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_and_routers_stay_float32_on_a_half_precision_base(make_config, dtype):
    run = train(make_config(dtype=dtype))
    assert {p.dtype for p in named_parameters(run.model).values()} == {torch.float32}
    assert run.model.base.lm_head.weight.dtype == getattr(torch, dtype)
    assert run.progress.skipped_steps < STEPS  # of float16: the scaler starts too high
    assert all(p.grad is None for p in run.model.base.parameters() if not p.requires_grad)
    moved = [state["exp_avg"].any() for state in state_by_name(run.optimizer, run.model).values()]
    assert all(moved)


def test_the_loss_falls(make_config):
    run = train(make_config(max_steps=40))
    losses = [row["train/lm_loss"] for row in rows_of(run.folder) if "train/lm_loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_last_step_is_evaluated_and_saved(make_config):
    run = train(make_config(max_steps=3, eval_steps=2))
    evaluated = [row["step"] for row in rows_of(run.folder) if "val/loss" in row]
    assert evaluated == [2, 3]
    assert (run.folder / "checkpoint-3" / "manifest.json").exists()


def test_early_stopping_stops_after_its_patience(make_config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    run = train(make_config(eval_steps=1, early_stopping_patience=2))
    assert run.progress.step == 4
    assert run.progress.best_step == 2


def test_the_best_checkpoint_outlives_its_age(make_config, monkeypatch):
    losses = iter([3.0, 1.0, 2.5, 2.4, 2.3, 2.2])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    run = train(make_config(max_steps=6, eval_steps=1, save_steps=1, save_total_limit=2))
    kept = sorted(path.name for path in run.folder.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert json.loads((run.folder / "best.json").read_text())["checkpoint"] == "checkpoint-2"


def test_a_line_of_metrics_has_every_promised_name(make_config):
    run = train(make_config(max_steps=1))
    training, validation = rows_of(run.folder)
    site = run.model.site_names[0]
    expected = {
        *(f"train/{name}" for name in ("loss", "lm_loss", "aux_loss", "z_loss", "lr", "grad_norm")),
        *(f"router/{name}" for name in ("entropy", "max_usage", "dead_experts", "top1_share")),
        *(f"router/{name}/{site}" for name in ("entropy", "max_usage", "dead_experts")),
        f"router/usage/{site}/0",
        *(f"expert/2/{name}" for name in ("maturity", "grad_norm", "load")),
    }
    assert expected <= training.keys()
    assert {"val/loss", "val/ppl", "val/loss/rows"} <= validation.keys()


def test_the_schedules_are_those_of_transformers():
    assert set(get_args(Schedule)) == {item.value for item in SchedulerType}


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_of_transformers_trains_and_resumes(make_config, name):
    kwargs = {
        "cosine_with_restarts": {"num_cycles": 2},
        "cosine_with_min_lr": {"min_lr": 1e-4},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
        "warmup_stable_decay": {"num_decay_steps": 1},
    }.get(name, {})
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "eval_steps": 1}
    first = train(make_config(max_steps=3, save_steps=2, **options))
    shutil.rmtree(first.folder / "checkpoint-3")
    second = train(make_config(max_steps=3, save_steps=2, **options), "latest")
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()


def test_schedule_settings_that_do_not_fit_are_an_error_that_names_them(make_config):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        train(make_config(lr_scheduler_kwargs={"cycles": 3}))


def test_the_random_state_round_trips_through_a_safe_file(tmp_path):
    file = tmp_path / "rng.pt"
    torch.save(random_state(), file)
    import random

    import numpy

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    expected = draw()
    draw()
    restore_random_state(torch.load(file, weights_only=True))
    assert draw() == expected


def test_checkpoints_hold_adapters_only(make_config):
    run = train(make_config(max_steps=1))
    frozen = {tuple(p.shape) for p in run.model.base.parameters() if not p.requires_grad}
    vocabulary = run.model.base.get_input_embeddings().weight.shape[0]
    shapes = {tuple(t.shape) for t in all_tensors(run.folder / "checkpoint-1").values()}
    assert frozen
    assert not any(vocabulary in shape for shape in shapes)
