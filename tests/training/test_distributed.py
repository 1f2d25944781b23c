"""A run in several processes is the run in one, up to the order of its sums."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from dylora.cli.main import main
from dylora.config import MoELoraConfig
from dylora.storage.folders import checkpoints
from dylora.storage.manifest import verify
from dylora.training.distributed import Processes, check_parallel
from dylora.training.loop import train
from dylora.training.run import prepare
from dylora.training.step import next_batches
from parallel_runs import (
    Break,
    Grow,
    Hang,
    Signal,
    ask_here,
    count_here,
    train_apart,
    train_here,
    train_on_a_full_disk,
)
from processes import in_processes, results_of
from runs import all_tensors, rows_of

STEPS, SAVED = 30, 20
MOE = {"maturity_mode": "usage", "router_z_loss_coef": 1e-2}
LONG = {"max_steps": STEPS, "gradient_accumulation_steps": 4, "eval_steps": 10, "moe": MOE}


def close(one: list[float], other: list[float]) -> bool:
    """Equal within 1e-5."""
    return len(one) == len(other) and one == pytest.approx(other, rel=0, abs=1e-5)


@pytest.fixture(scope="module")
def alone(shared_config):
    """Thirty steps in one process: uneven rows, accumulation, dropout, balance and z losses,
    maturity; an expert is frozen and one added on the way."""
    return train_here(shared_config("alone", **LONG), None, (Grow,))


@pytest.fixture(scope="module")
def pair(shared_config):
    """The same in two processes, which recompute activations."""
    config = shared_config("ddp", parallel="ddp", gradient_checkpointing=True, **LONG)
    return results_of(2, train_here, config, None, (Grow,))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(alone, pair):
    assert close(alone.losses, pair[0].losses)
    assert close(alone.validation, pair[0].validation)
    assert alone.maturity == pytest.approx(pair[0].maturity, abs=1e-5)
    assert max(alone.maturity) > 0
    assert pair[0].experts == 4


@pytest.mark.slow
def test_all_processes_hold_the_same_bits(pair):
    """Weights, moments, maturity, fractions and generators."""
    assert pair[0] == pair[1]


@pytest.mark.slow
def test_a_base_in_parts_gives_the_losses_of_a_whole_one(alone, shared_config):
    config = shared_config("fsdp2", parallel="fsdp2", gradient_checkpointing=True, **LONG)
    both = results_of(2, train_here, config, None, (Grow,))
    assert close(alone.losses, both[0].losses)
    assert close(alone.validation, both[0].validation)
    assert both[0] == both[1]
    assert both[0].layer_bytes == pytest.approx(alone.layer_bytes / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "size"), [("ddp", 1), ("alone", 2), ("ddp", 4)])
def test_a_run_goes_on_in_another_number_of_processes(alone, pair, shared_config, begun, size):
    parallel = {"parallel": "ddp"} if size > 1 else {}
    config = shared_config(f"{begun}-{size}", **LONG, **parallel)
    folder = Path(config.output_dir)
    shutil.copytree(
        folder / begun / f"checkpoint-{SAVED}", folder / config.name / f"checkpoint-{SAVED}"
    )
    resumed = (
        train_here(config, "auto") if size == 1 else results_of(size, train_here, config, "auto")[0]
    )
    assert close(alone.losses[SAVED:], resumed.losses)
    assert close(alone.validation[-1:], resumed.validation)


@pytest.mark.slow
def test_a_checkpoint_has_the_same_files_whatever_the_number_of_processes(
    alone, pair, shared_config
):
    folder = Path(shared_config().output_dir)
    one, two = (folder / name / f"checkpoint-{STEPS}" for name in ("alone", "ddp"))
    verify(two)
    assert all_tensors(one).keys() == all_tensors(two).keys()
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (one, two)]
    assert names[0] == names[1]
    assert not list((folder / "ddp").glob(".*"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_packed_rows_that_the_processes_do_not_divide_give_the_losses_of_one(make_config, parallel):
    """And its statistics: a pass that only fills up the others counts in nothing."""
    changes = {"packing": True, "max_steps": 3, "gradient_accumulation_steps": 3, "moe": MOE}
    config = make_config("alone", **changes)
    drawn = prepare(dataclasses.replace(config, name="drawn"), fresh=True)
    passes = [len(next_batches(drawn)[0]) for _ in range(config.train.max_steps)]
    assert any(count % 2 for count in passes)
    alone = train_here(config)
    both = results_of(2, train_here, make_config("both", parallel=parallel, **changes))
    assert close(alone.losses, both[0].losses)
    assert both[0] == both[1]
    one, two = (rows_of(Path(config.output_dir) / name) for name in ("alone", "both"))
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "parallel"), [("adamw_8bit", "ddp"), ("muon", "fsdp2")])
def test_two_processes_have_the_losses_of_one_with_other_optimizers(make_config, optim, parallel):
    changes = {"optim": optim, "max_steps": 4, "learning_rate": 1e-2}
    alone = train_here(make_config("alone", **changes))
    both = results_of(2, train_here, make_config("both", parallel=parallel, **changes))
    assert close(alone.losses, both[0].losses)
    assert both[0] == both[1]


def test_statistics_of_one_process_alone_are_other_losses(make_config):
    """What adding them up is for: the fractions of the balance loss, maturity, the losses."""
    moe = MOE | {"router_aux_loss_coef": 1.0, "maturity_tau": 2.0}
    changes = {"max_steps": 4, "moe": moe, "parallel": "ddp"}
    right = results_of(2, train_here, make_config("right", **changes))
    apart = in_processes(2, train_apart, make_config("apart", **changes))
    assert right[0].digest == right[1].digest
    assert apart[0].digest != apart[1].digest
    assert apart[0].maturity != apart[1].maturity
    assert abs(apart[0].losses[-1] - right[0].losses[-1]) > 1e-3


def test_a_loss_that_is_not_finite_in_one_process_is_a_step_left_out_by_all(make_config):
    both = results_of(2, train_here, make_config(max_steps=3, parallel="ddp"), None, (Break,))
    assert [one.skipped for one in both] == [1, 1]
    assert both[0].digest == both[1].digest


def test_all_processes_stop_early_at_the_same_step(make_config):
    changes = {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 3.0}
    alone = train_here(make_config("alone", **changes))
    both = results_of(2, train_here, make_config("both", parallel="ddp", **changes))
    assert alone.step < 10
    assert [one.step for one in both] == [alone.step] * 2


def test_a_signal_in_one_process_saves_once_and_ends_all(make_config):
    config = make_config(parallel="ddp")
    ended = in_processes(2, train_here, config, None, (Signal,))
    assert [(type(one), one.code) for one in ended] == [(SystemExit, 143)] * 2
    (folder,) = checkpoints(Path(config.output_dir) / config.name)
    assert (
        folder.name == "checkpoint-4"
    )  # the signal came after step 3, and all hear it in the next
    verify(folder)
    resumed = train_here(dataclasses.replace(config, train=make_config().train), "latest")
    assert close(train_here(make_config("whole")).losses[4:], resumed.losses)


def test_a_process_that_hangs_ends_the_run_after_the_timeout(make_config):
    config = make_config(parallel="ddp", process_timeout=5, max_steps=4)
    first, _ = in_processes(2, train_here, config, None, (Hang,))
    assert isinstance(first, RuntimeError)
    assert "imed out" in str(first)


def test_an_error_is_told_by_one_process_and_ends_all(make_config):
    first, second = in_processes(2, train_on_a_full_disk, make_config(parallel="ddp"))
    assert isinstance(first, ValueError)
    assert "two do not fit" in str(first)
    assert isinstance(second, SystemExit)
    assert second.code == 2


def test_a_step_sends_each_gradient_once_and_one_vector_of_statistics(make_config):
    config = make_config(max_steps=3, gradient_accumulation_steps=4, parallel="ddp")
    gradients, others, trainable = results_of(2, count_here, config)[0]
    assert sum(gradients) == 4 * trainable
    blocks, experts = 2, 3
    # Votes, losses (the sum and four parts), three sums of the experts, the routing statistics.
    numbers = 2 + 5 + (2 * experts + 1) + (4 * blocks * experts + 3 * blocks + 1)
    assert others == [4 * numbers]


def test_each_of_two_processes_asks_its_device_for_numbers_once_a_step(make_config):
    both = results_of(2, ask_here, make_config(max_steps=2, parallel="ddp"))
    assert both == [[("cpu", "to_numbers")]] * 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_share_every_row_of_a_step_without_overlap(make_config, size):
    config = make_config(gradient_accumulation_steps=8)
    found = []
    for rank in range(size):
        run = prepare(config, fresh=True, processes=Processes(rank, size))
        batches, totals = next_batches(run)
        found += [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
        assert len(batches) == 8 // size
    whole = prepare(config, fresh=True)
    batches, expected = next_batches(whole)
    rows = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert sorted(found) == sorted(rows)
    assert (totals.tokens, totals.target_tokens) == (expected.tokens, expected.target_tokens)


# What is refused


REFUSED = {
    "none in two processes": (2, {}, "2 processes were started"),
    "accumulation": (2, {"parallel": "ddp", "gradient_accumulation_steps": 3}, "a multiple of 2"),
    "dora": (2, {"parallel": "fsdp2", "moe": {"use_dora": True}}, r"moe\.use_dora needs whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_processes_cannot_do_is_one_line(make_config, monkeypatch, name):
    size, changes, message = REFUSED[name]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=message):
        check_parallel(make_config(**changes), size)


def test_without_torchrun_a_parallel_run_is_refused_with_the_command(make_config):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        train(make_config(parallel="ddp"))


def test_other_commands_are_refused_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate"]) == 2
    assert "evaluate runs in one process" in capsys.readouterr().err


def test_a_stream_is_refused_in_several_processes(make_config):
    from dylora.run_config import StageConfig

    config = make_config(parallel="ddp")
    stage = StageConfig(name="one", sources=config.data.sources)
    moe = MoELoraConfig(router_scope="prompt")
    with pytest.raises(ValueError, match=r"train\.parallel.*none with stages"):
        dataclasses.replace(
            config, stages=[stage], moe=moe, data=dataclasses.replace(config.data, sources=[])
        )
