"""What hangs on a run between its steps."""

import os
import signal

import pytest

from dylora.training.callbacks import Callback
from dylora.training.loop import train
from runs import STEPS, all_tensors, rows_of


class Diary(Callback):
    """Notes every hook with the step at which it came."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_start(self, run):
        self.lines.append(f"start {run.progress.step}")

    def after_step(self, run, result):
        assert any(p.grad is not None for _, p in run.model.named_expert_parameters())
        self.lines.append(f"step {run.progress.step}")

    def on_evaluate(self, run, scores):
        assert scores["rows"].loss > 0
        self.lines.append(f"evaluated {run.progress.step}")

    def on_save(self, run, folder):
        assert (folder / "manifest.json").exists()
        self.lines.append(f"saved {folder.name}")

    def on_end(self, run):
        self.lines.append(f"end {run.progress.step}")


def test_the_hooks_come_in_the_order_of_the_run(make_config):
    diary = Diary()
    train(make_config(max_steps=3, eval_steps=2, save_steps=2), callbacks=[diary])
    assert diary.lines == [
        *("start 0", "step 1", "step 2", "evaluated 2", "saved checkpoint-2", "step 3"),
        *("evaluated 3", "saved checkpoint-3", "end 3"),
    ]
    again = Diary()
    checkpoint = "runs/a/checkpoint-2"
    folder = make_config(max_steps=3).output_dir.removesuffix("runs")
    train(make_config(max_steps=3), folder + checkpoint, callbacks=[again])
    assert again.lines[:2] == ["start 2", "step 3"]


def test_a_run_with_callbacks_that_only_look_is_the_run_without(make_config):
    plain = train(make_config("plain")).folder
    seen = train(make_config("seen"), callbacks=[Diary(), Callback()]).folder
    one, other = (all_tensors(folder / f"checkpoint-{STEPS}") for folder in (plain, seen))
    assert all(one[key].equal(other[key]) for key in one)
    assert rows_of(plain) == rows_of(seen)


def test_every_callback_hears_of_the_save_that_a_signal_asked_for(make_config):
    class Stops(Callback):
        def after_step(self, run, result):
            if run.progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_save(self, run, folder):
            run.interruption.check()

    diary = Diary()
    with pytest.raises(SystemExit):
        train(make_config(), callbacks=[Stops(), diary])
    assert diary.lines[-1] == "saved checkpoint-2"


def test_a_callback_may_grow_the_pool_and_change_the_routing_between_steps(make_config):
    class Grows(Callback):
        def after_step(self, run, result):
            if run.progress.step == 2:
                run.model.experts.create_expert(share=0.2)
                run.model.set_routing(mode="dense")

    run = train(make_config(max_steps=4), callbacks=[Grows()])
    assert len(run.model.experts) == 4
    assert run.model.experts.table[3].steps == 2
    assert run.model.config.routing_mode == "dense"
