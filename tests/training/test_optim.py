"""The optimizers that a run may name."""

import dataclasses
import importlib.util
import shutil

import pytest
import torch

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.run_config import TrainConfig
from dylora.training.callbacks import Callback
from dylora.training.loop import train
from dylora.training.optim import build_optimizer
from dylora.training.run import prepare
from dylora.training.step import run_step
from runs import all_tensors, rows_of


@pytest.mark.parametrize("optim", ["lora_plus", "lion", "sgd"])
def test_a_run_with_any_optimizer_is_resumed_bit_for_bit(make_config, optim):
    settings = {"optim": optim, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    whole = train(make_config("whole", **settings))
    parts = whole.folder.with_name("parts")
    shutil.copytree(whole.folder, parts)
    shutil.rmtree(parts / "checkpoint-4")
    train(make_config("parts", **settings), "latest")
    expected = all_tensors(whole.folder / "checkpoint-4")
    found = all_tensors(parts / "checkpoint-4")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert rows_of(parts) == rows_of(whole.folder)


@pytest.mark.parametrize("optim", ["lora_plus", "lion", "sgd"])
def test_experts_are_frozen_and_created_in_mid_run_with_any_optimizer(make_config, optim):
    run = prepare(make_config(optim=optim), fresh=True)
    run_step(run)
    run.model.experts.freeze(0)
    new = run.model.experts.create_expert(share=0.5)

    def tensors(expert: int) -> list[torch.Tensor]:
        adapters = run.model.mixture.adapters.values()
        return [t.clone() for one in adapters for t in one.expert_tensors(expert).values()]

    before = {expert: tensors(expert) for expert in (0, 1, new)}
    run_step(run)
    moved = {
        expert: not all(map(torch.equal, tensors(expert), one)) for expert, one in before.items()
    }
    assert moved == {0: False, 1: True, new: True}


def test_lora_plus_steps_the_Bs_so_many_times_as_far_as_the_As(llama):
    model = DyLoRA_MoE.from_base(llama(), MoELoraConfig(num_experts=2, r=2))
    config = TrainConfig(optim="lora_plus", learning_rate=1e-3, router_learning_rate=5e-3)
    optimizer = build_optimizer(model, dataclasses.replace(config, lora_plus_ratio=8.0))
    named = {id(parameter): name for name, parameter in model.own_parameters()}
    rates = {
        named[id(parameter)]: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {rate for name, rate in rates.items() if name.endswith("lora_A")} == {1e-3}
    assert {rate for name, rate in rates.items() if name.endswith("lora_B")} == {8e-3}
    assert {rate for name, rate in rates.items() if "lora" not in name} == {5e-3}


def test_an_optimizer_whose_state_has_no_row_for_an_expert_is_refused_by_name():
    with pytest.raises(ValueError, match="optim is 'adafactor', but must be one of adamw"):
        TrainConfig(optim="adafactor")


def test_a_ratio_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"lora_plus_ratio is 4\.0, but must be unset without"):
        TrainConfig(lora_plus_ratio=4.0)


def test_a_package_that_is_missing_is_named_with_the_extra(make_config, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name: None if name == "lion_pytorch" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'dylora\[optim\]'"):
        train(make_config(optim="lion"))


def test_deterministic_holds_for_the_steps_of_a_run_and_no_longer(make_config, monkeypatch):
    seen = []

    class Look(Callback):
        def after_step(self, run, result):
            seen.append(torch.are_deterministic_algorithms_enabled())

    for wanted in (True, False):
        train(make_config(str(wanted), max_steps=1, deterministic=wanted), callbacks=[Look()])
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
