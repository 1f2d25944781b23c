"""The training loop on a tiny random Llama and a file of thirty rows."""

import dataclasses
import hashlib
import json
import math
import shutil
from typing import get_args

import pytest
import torch
from transformers.trainer_utils import SchedulerType

from dylora import DyLoRA_MoE
from dylora.data.batching import collate
from dylora.evaluation.report import report_run
from dylora.kernels.cross_entropy import target_positions
from dylora.run_config import DataConfig, Schedule
from dylora.storage.checkpoint import Checkpoint
from dylora.training.callbacks import Callback, row_of_metrics
from dylora.training.environment import seed_everything
from dylora.training.loop import train
from dylora.training.metrics import window_row
from dylora.training.optim import named_parameters, state_by_name
from dylora.training.random_state import random_state, restore_random_state
from dylora.training.resume import check_same_settings, last_good, resume, save
from dylora.training.run import prepare
from dylora.training.step import next_batches, run_step
from runs import STEPS, all_tensors, asked_of_the_device, rows_of


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


def test_resuming_on_a_base_quantised_otherwise_is_refused(make_config):
    run = train(make_config(max_steps=1))
    folder = run.folder / "checkpoint-1"
    checkpoint = Checkpoint.open(folder)
    checkpoint.description["quantization"] = "bnb-8bit"
    with pytest.raises(ValueError, match=r"model\.quantization = 'bnb-8bit'.*'none'"):
        check_same_settings(run, checkpoint)


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
        return run, [run_step(run) for _ in range(3)]

    whole, whole_results = three_steps("whole", 8, 1)
    split, split_results = three_steps("split", batch_size, parts)
    for one, other in zip(whole_results, split_results, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-5)
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


def tensor_versions(run) -> dict[str, object]:
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
            output.loss = output.loss * value
            return output

        monkeypatch.setattr(type(run.model), "forward", broken)

    return install


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_whose_loss_is_not_finite_updates_nothing(make_config, break_losses, value):
    run = prepare(make_config(), fresh=True)
    break_losses(run, {1: value})
    before = tensor_versions(run)
    result = run_step(run)
    assert result.nonfinite == "loss"
    torch.testing.assert_close(tensor_versions(run), before, rtol=0, atol=0, equal_nan=True)


def test_a_step_whose_gradient_is_not_finite_updates_nothing(make_config):
    run = prepare(make_config(), fresh=True)
    _, parameter = next(run.model.named_expert_parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = tensor_versions(run)
    assert run_step(run).nonfinite == "gradient"
    torch.testing.assert_close(tensor_versions(run), before, rtol=0, atol=0, equal_nan=True)


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
        run_step(run)
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


@pytest.mark.parametrize("damaged", [False, True])
def test_a_best_checkpoint_that_is_gone_is_no_more_the_best_of_a_resumed_run(
    make_config, monkeypatch, capsys, damaged
):
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    settings = {"eval_steps": 1, "save_steps": 1, "load_best_at_end": True}
    folder = train(make_config(max_steps=2, **settings)).folder
    if damaged:
        (folder / "checkpoint-1" / "config.json").write_text("{}")
    else:
        shutil.rmtree(folder / "checkpoint-1")
    run = train(make_config(max_steps=3, **settings), str(folder / "checkpoint-2"))
    assert "checkpoint-1 had the lowest validation loss" in capsys.readouterr().out
    assert (run.progress.best_step, run.progress.best_loss) == (3, 2.0)
    assert json.loads((folder / "best.json").read_text())["checkpoint"] == "checkpoint-3"


@pytest.mark.parametrize("best", [False, True])
def test_the_weights_of_the_results_are_named_and_may_be_the_best(
    make_config, monkeypatch, capsys, best
):
    losses = iter([3.0, 1.0, 2.5, 2.4])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "load_best_at_end": best}
    run = train(make_config(**settings))
    monkeypatch.undo()
    report_run(run)
    results = json.loads((run.folder / "results.json").read_text())
    assert (results["step"], results["best_step"]) == (2 if best else 4, 2)
    note = "the results are of the last weights, but those of checkpoint-2 have the lowest"
    assert (note in capsys.readouterr().out) == (not best)
    saved = DyLoRA_MoE.from_pretrained(run.folder / f"checkpoint-{results['step']}")
    for (name, one), (_, other) in zip(
        run.model.own_parameters(), saved.own_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("change", ["create", "merge", "retire"])
def test_a_pool_that_has_changed_since_its_best_is_again_what_it_was(
    make_config, monkeypatch, change
):
    class Changes(Callback):
        def after_step(self, run, result):
            experts = run.model.experts
            if run.progress.step == 2 and change == "create":
                experts.create_expert(share=0.2)
            elif run.progress.step == 2:
                experts.merge(0, 2) if change == "merge" else experts.retire(1)

    losses = iter([1.0, 2.5, 2.4])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    config = make_config(max_steps=3, eval_steps=1, load_best_at_end=True)
    run = train(config, callbacks=[Changes()])
    monkeypatch.undo()
    saved = DyLoRA_MoE.from_pretrained(run.folder / "checkpoint-1").eval()
    assert run.model.training_record["step"] == 1
    assert run.model.experts.state_dict() == saved.experts.state_dict()
    ids = torch.arange(12)[None]
    found, expected = (model.eval()(ids, labels=ids) for model in (run.model, saved))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


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


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("cosine_with_restarts", "num_cycles", -1),
        ("cosine_with_restarts", "num_cycles", 0),
        ("cosine", "num_cycles", -0.5),
        ("polynomial", "power", -1.0),
        ("cosine_with_min_lr", "min_lr", -1e-4),
    ],
)
def test_a_setting_of_a_schedule_out_of_range_is_refused(make_config, kind, key, value):
    config = make_config(lr_scheduler_type=kind, lr_scheduler_kwargs={key: value})
    with pytest.raises(ValueError, match=rf"lr_scheduler_kwargs: {key} is .*, but must be"):
        train(config)


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


# Counters


def steps_of(run, count: int = 3) -> list:
    """What some steps measured, as the loop takes them."""
    return [run_step(run) for _ in range(count)]


def counters_of(run, results) -> list[torch.Tensor]:
    """Everything that a run counts: statistics and loads of each step, maturity after the last."""
    counted = [value.detach() for result in results for value in result.statistics]
    return counted + [result.gate_share_E for result in results] + list(run.model.maturity)


MIXED = {"lora_dropout": 0.0, "expert_dropout": 0.0, "maturity_mode": "usage", "maturity_tau": 1.0}


def test_gradient_checkpointing_counts_nothing_twice(make_config):
    """With every source of randomness on, the counters are the same to the bit."""
    random = MIXED | {"lora_dropout": 0.1, "expert_dropout": 0.2, "router_noise": 0.5}
    found = []
    for name in ("plain", "again"):
        config = make_config(name, moe=random, gradient_checkpointing=name == "again")
        run = prepare(config, fresh=True)
        found.append(counters_of(run, steps_of(run, 1)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][-5].min() > 0  # the maturity


@pytest.mark.parametrize(("batch_size", "parts"), [(4, 2), (1, 8)])
def test_counters_do_not_depend_on_how_a_batch_is_split(make_config, batch_size, parts):
    found = []
    for name, size, count in (("whole", 8, 1), ("split", batch_size, parts)):
        config = make_config(name, moe=MIXED, batch_size=size, gradient_accumulation_steps=count)
        run = prepare(config, fresh=True)
        run.model.double()
        found.append(counters_of(run, steps_of(run)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("extra", [1, 9])
def test_counters_do_not_see_extra_padding(make_config, monkeypatch, extra):
    def padded(examples, pad_token_id):
        batch = collate(examples, pad_token_id)
        fillers = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
        pad = torch.nn.functional.pad
        batch = {name: pad(batch[name], (0, extra), value=fillers[name]) for name in fillers}
        return batch | {"target_positions": target_positions(batch["labels"])}

    found = []
    for name, gather in (("plain", collate), ("padded", padded)):
        monkeypatch.setattr("dylora.data.batching.collate", gather)
        run = prepare(make_config(name, moe=MIXED), fresh=True)
        run.model.double()
        found.append(counters_of(run, steps_of(run)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, check_dtype=False)


# Experts that change in a live run


@pytest.mark.parametrize("emulated", [True, False])
def test_a_run_says_when_the_cpu_has_no_instructions_for_its_precision(
    emulated, make_config, monkeypatch, capsys
):
    monkeypatch.setattr("dylora.training.run.is_emulated", lambda dtype: emulated)
    train(make_config(dtype="bfloat16", max_steps=1))
    said = "no instructions for bfloat16" in capsys.readouterr().out
    assert said == emulated


def test_a_step_asks_the_device_for_numbers_once(make_config):
    """From the first pass to the update: every `.item()` on the way would empty a GPU's queue."""
    run = prepare(make_config(), fresh=True)
    steps_of(run, 1)
    asked = asked_of_the_device(run, lambda: steps_of(run, 1))
    assert asked == [("cpu", "to_numbers")]


def grow(run) -> None:
    run.model.experts.create_expert(rank=3, share=0.2, skill="new")


def change(run) -> None:
    run.model.experts.freeze(0)


def shrink(run) -> None:
    run.model.experts.merge(1, 2)


def late(run) -> None:
    run.model.experts.create_expert(share=0.3)
    run.model.experts.retire(1)


# Before which step what happens to a pool that begins with three experts.
EVENTS = {2: grow, 4: change, 6: shrink, 8: late}


def live_run(config, stops: tuple[int, ...]):
    """STEPS steps with EVENTS between them; at `stops` the run is saved, dropped and resumed."""
    run = prepare(config, fresh=True)
    losses = []
    for step in range(STEPS):
        if step in stops:
            save(run)
            run = prepare(config, fresh=False)
            resume(run, "latest")
        if step in EVENTS:
            EVENTS[step](run)
        [result] = steps_of(run, 1)
        losses.append((result.loss, result.grad_norm, result.gate_share_E.tolist()))
    return run, losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_whose_experts_change_resumes_bit_for_bit(make_config, dtype):
    """Stopped before an event, after one, and with a pool of every state."""
    settings = {"dtype": dtype, "moe": {"router_noise": 0.1, "expert_dropout": 0.2}}
    whole, expected = live_run(make_config("whole", **settings), ())
    parts, found = live_run(make_config("parts", **settings), (2, 3, 5, 7, 8, 9))
    assert found == expected
    save(whole)
    save(parts)
    tensors = [all_tensors(run.folder / f"checkpoint-{STEPS}") for run in (whole, parts)]
    assert tensors[0].keys() == tensors[1].keys()
    assert [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])] == []
    moments = [state_by_name(run.optimizer, run.model) for run in (whole, parts)]
    assert moments[0].keys() == moments[1].keys()
    assert any("experts_0-0" in name and state for name, state in moments[1].items())
    assert parts.model.experts.state_dict() == whole.model.experts.state_dict()
    assert torch.equal(parts.model.maturity.start_progress, whole.model.maturity.start_progress)


def test_a_frozen_expert_is_bit_identical_after_a_stop_and_a_growth(make_config):
    config = make_config(save_steps=2)
    run = prepare(config, fresh=True)
    steps_of(run, 2)
    run.model.experts.freeze(0)

    def values(run) -> dict[str, torch.Tensor]:
        pairs = run.model.expert_weights(0).items()
        return {f"{path} {i}": pair[i].clone() for path, pair in pairs for i in (0, 1)}

    before = values(run)
    save(run)
    run = prepare(config, fresh=False)
    resume(run, "latest")
    steps_of(run, 2)
    run.model.experts.create_expert(share=0.3)
    steps_of(run, 3)
    after = values(run)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_an_expert_created_after_a_resume_is_born_at_the_progress_of_the_run(make_config):
    config = make_config()
    run = prepare(config, fresh=True)
    steps_of(run, 5)
    save(run)
    run = prepare(config, fresh=False)
    resume(run, "latest")
    number = run.model.experts.create_expert()
    assert float(run.model.maturity.start_progress[number]) == 0.5
    assert run.model.experts[number].history == [{"event": "created", "step": 5}]


def test_a_retired_expert_is_not_counted_as_dead(make_config):
    run = prepare(make_config(moe=MIXED), fresh=True)
    run.model.experts.retire(1)
    [result] = steps_of(run, 1)
    run.progress.window.append(window_row(result))
    metrics = row_of_metrics(run, result)
    assert metrics["router/dead_experts"] == 0
    assert "expert/1/load" not in metrics


# Balance losses and noise


def test_both_balance_losses_are_trained_and_logged_with_their_own_coefficients(make_config):
    both = {"load_balance_loss_type": "aux_loss+switch", "router_z_loss_coef": 0.003}
    coefficients = {"router_aux_loss_coef": 0.2, "router_switch_loss_coef": 0.7}
    run = train(make_config(max_steps=3, moe=MIXED | both | coefficients))
    rows = [row for row in rows_of(run.folder) if "train/loss" in row]
    assert len(rows) == 3
    for row in rows:
        weighted = 0.2 * row["train/aux_loss"] + 0.7 * row["train/switch_loss"]
        weighted += 0.003 * row["train/z_loss"] + row["train/lm_loss"]
        assert row["train/loss"] == pytest.approx(weighted, rel=1e-5)
    # From the second step on the two have fractions of their own.
    assert rows[0]["train/aux_loss"] == pytest.approx(rows[0]["train/switch_loss"], rel=1e-6)
    assert rows[1]["train/aux_loss"] != pytest.approx(rows[1]["train/switch_loss"], rel=1e-6)


NOISY = MIXED | {"router_noise": 1.0}


def losses_with(make_config, name: str, seed: int, **moe) -> list[float]:
    run = prepare(make_config(name, moe=NOISY | moe, seed=seed), fresh=True)
    seed_everything(seed)  # the same draws whatever the initial values took
    return [result.loss for result in steps_of(run)]


def test_router_noise_follows_the_seed_of_the_run(make_config):
    one = losses_with(make_config, "one", 3)
    assert losses_with(make_config, "again", 3) == one
    assert losses_with(make_config, "other", 4) != one
    assert losses_with(make_config, "quiet", 3, router_noise=0.0) != one


def test_router_noise_is_off_in_evaluation(make_config):
    run = prepare(make_config(moe=NOISY), fresh=True)
    steps_of(run, 2)
    batch = next_batches(run)[0][0]
    gates = [run.model.eval()(**batch).routing.gates for _ in range(2)]
    assert torch.equal(*gates)
    gates = [run.model.train()(**batch).routing.gates for _ in range(2)]
    assert not torch.equal(*gates)


def test_noisy_routers_get_the_same_gradients_with_checkpointed_layers(make_config):
    """A layer that is computed again draws the noise of the first time."""
    found = []
    for name in ("plain", "again"):
        checkpointed = {"gradient_checkpointing": name == "again"}
        config = make_config(name, moe=NOISY, warmup_steps=0, **checkpointed)
        run = prepare(config, fresh=True)
        seed_everything(5)
        run_step(run)  # before it B is 0, and the routers learn from the balance loss alone
        seed_everything(6)
        run_step(run)
        named = named_parameters(run.model).items()
        found.append({key: value.grad for key, value in named})
    for key, gradient in found[0].items():
        assert gradient.any(), key
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-7, msg=key)


def test_frozen_routers_stay_as_drawn_over_a_resume_while_experts_are_trained(make_config):
    config = make_config("frozen", freeze_routers=True, save_steps=5)
    drawn = prepare(config, fresh=True).model
    routers = {name: p.clone() for name, p in drawn.router_parameters()}
    experts = sum(parameter.numel() for _, parameter in drawn.named_expert_parameters())
    assert drawn.count_parameters()[0] == experts
    folder = train(config).folder
    shutil.rmtree(folder / "checkpoint-10")
    resumed = train(config, "latest").model
    assert {name for name, p in resumed.router_parameters() if p.equal(routers[name])} == {*routers}
    assert any(
        not p.equal(q)
        for (_, p), (_, q) in zip(
            resumed.named_expert_parameters(), drawn.named_expert_parameters(), strict=True
        )
    )
    with pytest.raises(ValueError, match=r"was trained with train.freeze_routers = True"):
        train(
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, freeze_routers=False, max_steps=12)
            ),
            "latest",
        )


def test_frozen_routers_stay_so_when_an_expert_has_been_trained_alone(make_config):
    model = prepare(make_config("alone", freeze_routers=True), fresh=True).model
    model.experts.set_active_expert(0)
    model.experts.activate_all_experts()
    assert not any(parameter.requires_grad for _, parameter in model.router_parameters())


def test_frozen_routers_stay_so_when_the_pool_has_changed_before_a_resume(make_config):
    config = make_config("grown", freeze_routers=True)
    run = prepare(config, fresh=True)
    grow(run)
    steps_of(run, 1)
    save(run)
    routers = {name: p.clone() for name, p in run.model.router_parameters()}
    run = prepare(config, fresh=False)
    resume(run, "latest")
    steps_of(run, 2)
    for name, parameter in run.model.router_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, routers[name])
