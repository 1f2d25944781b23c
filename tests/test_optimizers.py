"""Optimizers through the experts' life: each expert moves as if it had one of its own, or the
optimizer is refused before anything is trained; and what is refused has changed nothing."""

import zlib

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from schedulefree import AdamWScheduleFree
from torch import nn, optim
from transformers.optimization import Adafactor

from dylora.training import adafactor
from dylora.training.adamw_8bit import AdamW8bit
from dylora.training.muon import Muon
from dylora.training.schedule_free import ScheduleFree


class Custom(optim.Optimizer):
    """An optimizer of somebody's own: `move(state, gradient, parameter)` gives the step."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.move(self.state[p], p.grad, p))


class Lion(Custom):
    def move(self, state, gradient, parameter):
        average = state.setdefault("exp_avg", torch.zeros_like(parameter))
        direction = (0.9 * average + 0.1 * gradient).sign()
        average.mul_(0.99).add_(0.01 * gradient)
        return direction


class Lamb(Custom):
    def move(self, state, gradient, parameter):
        momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
        momentum.mul_(0.9).add_(gradient)
        return momentum * parameter.norm() / momentum.norm()


def theirs_in_training(parameters):
    optimizer = AdamWScheduleFree(parameters)
    optimizer.train()
    return optimizer


RIGHT = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AMSGrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: optim.SGD(p, lr=0.01),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Lion": Lion,
    "Muon by expert": lambda p: Muon(p, lr=0.01, weight_decay=0.1),
    "AdamW of 8 bits by expert": lambda p: AdamW8bit(p, lr=0.01, weight_decay=0.1),
    "Adafactor by expert": lambda p: adafactor.Adafactor(p, lr=0.01, weight_decay=0.1),
    "schedule-free by parameter": lambda p: ScheduleFree(p, lr=0.01, weight_decay=0.1),
}
REFUSED = {  # and a word of the reason
    "Adafactor": (optim.Adafactor, "row_var"),
    "Adafactor of transformers": (Adafactor, "what the others of its tensor do"),
    "Adam of 8 bits": (bitsandbytes.optim.Adam8bit, "state1"),
    "Adagrad": (optim.Adagrad, "'sum'"),
    "ASGD": (optim.ASGD, "'ax'"),
    "Rprop": (optim.Rprop, "'prev'"),
    "LBFGS": (optim.LBFGS, "closure"),
    "LAMB": (Lamb, "what the others of its tensor do"),
    "schedule-free": (theirs_in_training, "'k' for a whole group"),
    "schedule-free, not in training": (AdamWScheduleFree, "train mode"),
}


def ours(model):
    return [parameter for _, parameter in model.own_parameters()]


def rows_of(model):
    """The rows of every expert, as views, by expert and name."""
    found = {}
    for path, adapter in model.mixture.adapters.items():
        for stack in adapter.stacks:
            for place, expert in enumerate(stack.experts):
                for name, parameter in stack.named_parameters():
                    found[expert, path, name] = parameter, slice(place, place + 1)
    return found


class OneByOne:
    """The slow oracle: a parameter and an optimizer of its own for each tensor of an expert, and
    for each router, of which the rows are compared that it began with."""

    def __init__(self, model, kind):
        self.model, self.kind, self.count = model, kind, 0
        self.own, self.compares_routers = {}, True

    def held(self, key, values):
        if key not in self.own:
            parameter = nn.Parameter(values.detach().clone())
            self.own[key] = parameter, self.kind([parameter])
        return self.own[key]

    def forget(self, *experts):
        self.own = {key: held for key, held in self.own.items() if key[0] not in experts}

    def gradient(self, key, shape):
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.count} {key}".encode()))
        return torch.randn(shape, generator=draw)

    def step(self, optimizer):
        """A step of both with the same gradients, and the comparison."""
        self.count += 1
        rows, compared = rows_of(self.model), []
        for key, (parameter, place) in rows.items():
            own, its = self.held(key, parameter[place])
            compared.append((key, parameter, place, own))
            if parameter.requires_grad:
                own.grad = self.gradient(key, own.shape)
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad[place] = own.grad
                its.step()
        for name, parameter in self.model.router_parameters():
            own, its = self.held(("router", name), parameter)
            place = slice(0, len(own))
            if self.compares_routers:
                compared.append((name, parameter, place, own))
            if parameter.requires_grad:
                own.grad = self.gradient(name, own.shape)
                parameter.grad = torch.ones_like(parameter)
                parameter.grad[place] = own.grad
                its.step()
        optimizer.step()
        optimizer.zero_grad()
        for key, parameter, place, own in compared:
            torch.testing.assert_close(
                parameter[place], own, rtol=1e-4, atol=1e-6, msg=f"{key}, step {self.count}"
            )


@pytest.mark.parametrize("kind", RIGHT)
def test_each_expert_moves_through_a_life_as_by_an_optimizer_of_its_own(kind, mixture):
    model = mixture(num_experts=5, maturity=[0.0] * 5, expert_ranks=[2, 2, 2, 2, 3])
    experts, kind = model.experts, RIGHT[kind]
    optimizer, oracle = kind(ours(model)), OneByOne(model, kind)
    experts.attach_optimizer(optimizer)
    assert not optimizer.state

    def train():
        for _ in range(3):
            oracle.step(optimizer)

    train()
    experts.freeze(0, 2)
    train()
    new = experts.create_expert(rank=3)
    before = {name: p.detach()[new].clone() for name, p in model.router_parameters()}
    train()
    for name, parameter in model.router_parameters():
        moved = (parameter.detach()[new] - before[name]).abs()
        assert 0 < moved.max() < 0.3, name  # neither pulled to 0 nor thrown far
    experts.unfreeze(2)
    train()
    experts.merge(1, 3)
    oracle.forget(1, 3)  # a merged expert begins without moments,
    oracle.compares_routers = False  # and in rows that the merge has changed
    train()
    experts.retire(4)
    experts.unfreeze(0)
    train()
    experts.set_active_expert(2)
    train()
    experts.activate_all_experts()
    train()


@pytest.mark.parametrize("kind", REFUSED)
def test_an_optimizer_whose_state_cannot_be_taken_along_is_refused_at_once(kind, mixture):
    build, reason = REFUSED[kind]
    model = mixture()
    before = optim.SGD(ours(model), lr=0.01)
    model.experts.attach_optimizer(before)
    values, random = [p.clone() for p in ours(model)], torch.get_rng_state()
    refused = build(ours(model))
    state = len(refused.state)
    with pytest.raises(ValueError, match=rf"(?s){reason}.*AdamW") as error:
        model.experts.attach_optimizer(refused)
    assert len(str(error.value).splitlines()) == 1
    assert model.experts.optimizer is before
    assert len(refused.state) == state
    assert all(map(torch.equal, ours(model), values))
    assert torch.equal(torch.get_rng_state(), random)


def test_muon_of_torch_takes_no_experts():
    """It says so itself."""
    with pytest.raises(ValueError, match="2D"):
        optim.Muon([nn.Parameter(torch.zeros(3, 2, 4))])


def test_a_schedule_does_not_count_the_steps_of_the_test(mixture):
    model = mixture()
    optimizer = optim.AdamW(ours(model), lr=0.01)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
    counted = []
    optimizer.register_step_post_hook(lambda *args: counted.append(args))
    before = [p.clone() for p in ours(model)]
    model.experts.attach_optimizer(optimizer)
    assert (schedule.last_epoch, counted, len(optimizer.state)) == (0, [], 0)
    assert not getattr(optimizer, "_opt_called", False)
    assert all(map(torch.equal, ours(model), before))


def test_accelerates_optimizer_is_taken_as_the_one_within(mixture):
    prepare, model = Accelerator(cpu=True).prepare_optimizer, mixture()
    wrapped = prepare(optim.AdamW(ours(model)))
    before = [p.clone() for p in ours(model)]
    model.experts.attach_optimizer(wrapped)
    assert all(map(torch.equal, ours(model), before))
    assert not wrapped.state
    with pytest.raises(ValueError, match="row_var"):
        model.experts.attach_optimizer(prepare(optim.Adafactor(ours(model))))


# A change that is refused


CHANGES = {
    "create": lambda experts: experts.create_expert(rank=3),
    "freeze": lambda experts: experts.freeze(0),
    "unfreeze": lambda experts: experts.unfreeze(3),
    "retire": lambda experts: experts.retire(1),
    "choose": lambda experts: experts.set_active_expert(2),
    "choose no more": lambda experts: experts.activate_all_experts(),
    "merge": lambda experts: experts.merge(0, 1),
}


def everything(model, optimizer):
    """All that a change may touch, by identity and value; as text, as NaN is not NaN."""
    experts, state = model.experts, model.mixture.state
    found = {
        "table": experts.state_dict(),
        "rows": [id(row) for row in experts.table],
        "parameters": [
            (n, id(p), p.requires_grad, p.tolist(), id(p.grad)) for n, p in model.own_parameters()
        ],
        "routing": [b.tolist() for b in state.buffers()] + [state.active, state.mature],
        "maturity": [part.tolist() for part in model.maturity],
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "moments": {
            id(p): {key: value.tolist() for key, value in s.items()}
            for p, s in optimizer.state.items()
        },
    }
    return {name: repr(value) for name, value in found.items()}


def spoil(model, optimizer):
    """A state that cannot be cut, of the last projection and of the last router."""
    for parameter in (list(model.named_expert_parameters())[-1][1], ours(model)[-1]):
        optimizer.state[parameter]["odd"] = torch.zeros(7)


@pytest.mark.parametrize("harm", [spoil, "no memory"], ids=["odd state", "no memory"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_half_way_has_changed_nothing(change, harm, mixture, ids, monkeypatch):
    model = mixture(num_experts=4, maturity=[1.0, 0.5, 0.0, 1.0])
    experts = model.experts
    optimizer = optim.AdamW(ours(model), lr=0.01)
    experts.attach_optimizer(optimizer)

    def train():
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    train()
    experts.freeze(3)
    if change == "choose no more":
        experts.set_active_expert(1)
        train()
    if change == "merge":
        experts.freeze(2)  # so that the last router is not paused by what follows
    model(ids, labels=ids).loss.backward()  # gradients are there
    logits = model(ids).logits
    if harm is spoil:
        spoil(model, optimizer)
    else:
        calls = []

        def fail(*args):
            calls.append(args)
            raise MemoryError("no memory is left")

        monkeypatch.setattr(experts, "check_optimizer", fail)  # the last thing a change does
    before = everything(model, optimizer)
    with pytest.raises((ValueError, MemoryError), match=r"'odd'|no memory"):
        CHANGES[change](experts)
    assert everything(model, optimizer) == before
    assert torch.equal(model(ids).logits, logits)
    monkeypatch.undo()
    for state in optimizer.state.values():
        state.pop("odd", None)
    optimizer.zero_grad()
    train()
    CHANGES[change](experts)
    train()


def test_an_expert_that_the_optimizer_does_not_hold_cannot_be_unfrozen(mixture, ids):
    model = mixture()
    model.experts.freeze(1)
    optimizer = optim.AdamW([p for p in ours(model) if p.requires_grad])
    model.experts.attach_optimizer(optimizer)
    model(ids, labels=ids).loss.backward()
    optimizer.step()  # before it they would be joined: there is nothing yet by which they differ
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"experts_1-1.lora_A 0 times"):
        model.experts.unfreeze(1)
    assert everything(model, optimizer) == before
