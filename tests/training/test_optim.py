"""The optimizers that a run may name."""

import copy
import dataclasses
import importlib.util
import shutil
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit as TheirAdamW8bit
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers.optimization import Adafactor as TheirAdafactor

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.run_config import TrainConfig
from dylora.training.adafactor import Adafactor
from dylora.training.adamw_8bit import AdamW8bit
from dylora.training.callbacks import Callback
from dylora.training.loop import train
from dylora.training.muon import Muon
from dylora.training.optim import build_optimizer, load_state_by_name, state_by_name
from dylora.training.run import prepare
from dylora.training.schedule_free import ScheduleFree
from dylora.training.step import run_step
from runs import all_tensors, rows_of

OTHERS = ["adamw_8bit", "lora_plus", "muon", "adafactor", "lion", "schedule_free", "sgd"]
CONSTANT = {"schedule_free": {"lr_scheduler_type": "constant"}}  # what it asks for


@pytest.mark.parametrize("optim", OTHERS)
def test_a_run_with_any_optimizer_is_resumed_bit_for_bit(make_config, optim):
    settings = {"optim": optim, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    settings |= CONSTANT.get(optim, {})
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


@pytest.mark.parametrize("optim", OTHERS)
def test_experts_are_frozen_and_created_in_mid_run_with_any_optimizer(make_config, optim):
    run = prepare(make_config(optim=optim, **CONSTANT.get(optim, {})), fresh=True)
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


def test_adafactor_moves_one_expert_as_that_of_transformers_does():
    theirs = {"scale_parameter": False, "relative_step": False}
    apart = [nn.Parameter(torch.randn(4, 6) / 4) for _ in range(3)]
    stacked = nn.Parameter(torch.stack([p.detach() for p in apart]))
    ours = Adafactor([stacked], lr=0.01, weight_decay=0.1)
    others = [TheirAdafactor([p], lr=0.01, weight_decay=0.1, **theirs) for p in apart]
    for _ in range(5):
        gradient = torch.randn(3, 4, 6) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
        stacked.grad = gradient.clone()
        for p, its, other in zip(apart, gradient, others, strict=True):
            p.grad = its.clone()
            other.step()
        ours.step()
    torch.testing.assert_close(stacked, torch.stack(list(apart)))
    assert ours.state[stacked]["exp_avg_sq_col"].shape == (3, 6)


def beside(ours, theirs, shape, steps=5):
    """A stack [E, R, D] moved by one optimizer, and by another one of its own for each matrix."""
    stacked = nn.Parameter(torch.randn(shape) / 4)
    apart = [nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    ours, others = ours([stacked]), [theirs([p]) for p in apart]
    for _ in range(steps):
        stacked.grad = torch.randn(shape) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
        for p, gradient, other in zip(apart, stacked.grad, others, strict=True):
            p.grad = gradient.clone()
            other.step()
        ours.step()
    return stacked.detach(), torch.stack([p.detach() for p in apart])


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4)])
def test_muon_moves_each_expert_as_that_of_torch_does(shape, monkeypatch):
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours = partial(Muon, **settings)
    theirs = partial(torch.optim.Muon, **settings, adjust_lr_fn="match_rms_adamw")
    torch.testing.assert_close(*beside(ours, theirs, shape), rtol=0, atol=1e-3)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # in which theirs multiplies
    torch.testing.assert_close(*beside(ours, theirs, shape))


def test_muon_leaves_an_expert_that_a_step_has_no_gradient_for_as_it_is():
    stack = nn.Parameter(torch.randn(2, 4, 6))
    optimizer = Muon([stack], lr=0.01, weight_decay=0.1)
    stack.grad = torch.randn(2, 4, 6)
    optimizer.step()
    first = [t.detach()[0].clone() for t in (stack, optimizer.state[stack]["momentum_buffer"])]
    other = stack.detach()[1].clone()
    stack.grad[0] = 0
    optimizer.step()
    assert torch.equal(stack[0], first[0])
    assert torch.equal(optimizer.state[stack]["momentum_buffer"][0], first[1])
    assert not torch.equal(stack[1], other)


@pytest.mark.parametrize("shape", [(3, 8, 512), (3, 9, 500)], ids=["whole blocks", "and a part"])
def test_adamw_of_8_bits_moves_each_expert_to_the_bit_as_that_of_bitsandbytes_does(shape):
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours, theirs = (
        lambda p, kind=kind: kind(p, **settings) for kind in (AdamW8bit, TheirAdamW8bit)
    )
    assert torch.equal(*beside(ours, theirs, shape))


def test_the_moments_of_8_bits_have_two_bytes_a_value_and_scales_in_a_checkpoint(make_config):
    run = train(make_config(optim="adamw_8bit", max_steps=1))
    moments = torch.load(run.folder / "checkpoint-1" / "optimizer.pt", weights_only=True)
    for name, parameter in run.model.own_parameters():
        size = sum(t.nbytes for t in moments[name].values() if torch.is_tensor(t) and t.ndim)
        values, experts = parameter.numel(), len(parameter)
        if parameter.ndim < 3:
            assert size == 8 * values
        else:
            assert size == 2 * values + 8 * experts * -(-values // experts // 256)


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("exp_avg", lambda codes: codes.float(), "exp_avg, which must be uint8"),
        ("exp_avg", lambda codes: codes[:, :1], "exp_avg of the shape"),
        ("exp_avg_scale", lambda scale: -scale - 1, "exp_avg_scale, which must be finite"),
        ("exp_avg_sq_scale", lambda scale: scale / 0, "exp_avg_sq_scale, which must be finite"),
        ("exp_avg_sq_scale", lambda scale: scale.repeat(1, 2), "exp_avg_sq_scale of the shape"),
        ("step", lambda step: -1, "step, which must be a number of at least 0"),
    ],
)
def test_damaged_moments_of_8_bits_are_refused(key, change, problem, llama):
    model = DyLoRA_MoE.from_base(llama(), MoELoraConfig(num_experts=2, r=2))
    optimizer = build_optimizer(model, TrainConfig(optim="adamw_8bit"))
    for _, parameter in model.own_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = copy.deepcopy(state_by_name(optimizer, model))
    load_state_by_name(optimizer, model, saved)
    damaged = next(state for name, state in saved.items() if name.endswith("lora_B"))
    damaged[key] = change(damaged[key])
    with pytest.raises(ValueError, match=f"lora_B has {problem}"):
        load_state_by_name(optimizer, model, saved)


def test_schedule_free_trains_and_averages_as_that_of_its_authors():
    one, other = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
    ours = ScheduleFree([one], lr=0.01, weight_decay=0.1)
    theirs = AdamWScheduleFree([other], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        theirs.train()
        one.grad = torch.randn(4, 6)
        other.grad, kept = one.grad.clone(), one.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(one.grad, kept)
        torch.testing.assert_close(one, other)
        trained = one.detach().clone()
        ours.eval()
        theirs.eval()
        torch.testing.assert_close(one, other)
        averaged = one.detach().clone()
        ours.train()
        assert torch.equal(one, trained)
    assert (averaged - trained).abs().max() > 1e-4


def test_schedule_free_saves_averages_and_saving_changes_no_bit_of_the_run(make_config):
    settings = {"optim": "schedule_free", "lr_scheduler_type": "constant", "max_steps": 4}
    often = train(make_config("often", save_steps=1, **settings))
    once = train(make_config("once", **settings))
    found = [all_tensors(run.folder / "checkpoint-4") for run in (often, once)]
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []
    name, router = next(iter(often.model.router_parameters()))
    state = often.optimizer.state[router]
    assert state["y"].allclose(0.9 * router + 0.1 * state["z"])
    assert not torch.equal(state["y"], router)
    saved = DyLoRA_MoE.from_pretrained(often.folder / "checkpoint-4")
    assert torch.equal(dict(saved.router_parameters())[name], router)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adam_8bit"}, "optim is 'adam_8bit', but must be one of adamw, adamw_8bit"),
        ({"optim": "schedule_free"}, "lr_scheduler_type is 'cosine', but must be constant or"),
        ({"optim": "adafactor", "adam_beta2": 0.9}, "adam_beta2 is 0.9, but must be unset with"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_ratio_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"lora_plus_ratio is 4\.0, but must be unset without"):
        TrainConfig(lora_plus_ratio=4.0)


@pytest.mark.parametrize(
    ("optim", "package"), [("lion", "lion_pytorch"), ("adamw_8bit", "bitsandbytes")]
)
def test_a_package_that_is_missing_is_named_with_the_extra(
    optim, package, make_config, monkeypatch
):
    find = importlib.util.find_spec
    missing = lambda name: None if name == package else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'dylora\[optim\]'"):
        train(make_config(optim=optim))


def test_deterministic_holds_for_the_steps_of_a_run_and_no_longer(make_config, monkeypatch):
    seen = []

    class Look(Callback):
        def after_step(self, run, result):
            seen.append(torch.are_deterministic_algorithms_enabled())

    for wanted in (True, False):
        train(make_config(str(wanted), max_steps=1, deterministic=wanted), callbacks=[Look()])
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"adapter_type": "loha"}, "whose matrices are no A and B"),
        ({"freeze_A": True}, "which trains no A"),
    ],
)
def test_lora_plus_is_refused_where_there_is_no_rate_of_an_A(make_config, moe, said):
    with pytest.raises(ValueError, match=rf"train\.optim is 'lora_plus', but must be .*{said}"):
        prepare(make_config(moe=moe, optim="lora_plus"), fresh=True)
