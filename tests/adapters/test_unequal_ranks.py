"""Experts of unequal rank: the update on every path is the loop over experts, and their moments
come back, those of files that padded them among them."""

import copy

import pytest
import torch

import oracles
from dylora import DyLoRA_MoE
from dylora.adapters.dora import weight_OD
from dylora.routing.gating import RouterOutput
from dylora.run_config import TrainConfig
from dylora.training.optim import build_optimizer, load_state_by_name, state_by_name

RANKS = [3, 1, 1, 1, 1, 2, 2, 4]
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "A frozen": {"freeze_A": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.5}},
}
BLOCK = "model.layers.0.self_attn"
NAMES = ("q_proj", "k_proj", "v_proj")  # which share an input


@pytest.fixture(params=OPTIONS)
def model(request, mixture):
    """Eight experts in float64, all of whose matrices are random; one of them came later."""
    settings = {"expert_alphas": [4.0, 2, 3, 1, 5, 6, 2, 3]} | OPTIONS[request.param]
    model = mixture(num_experts=8, expert_ranks=RANKS, **settings).double()
    model.experts.create_expert(rank=5, alpha=7.0)
    model.experts.freeze(3)
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            noise = 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype)
            parameter.add_(noise * (0.1 if "magnitude" in name else 1))
    return model


def block_oracle(model, x, gates):
    """Outputs of q, k and v side by side, one expert after the other by its own formula."""
    config, outputs = model.config, []
    for name in NAMES:
        path = f"{BLOCK}.{name}"
        adapter, projection = model.mixture.adapters[path], model.base.get_submodule(path)
        W_OD = weight_OD(projection)
        output = x @ W_OD.T
        for row, gate_T in zip(model.experts.table, gates.T, strict=True):
            rank = config.rank_pattern.get(name, row.rank)
            alpha = config.alpha_pattern.get(name, row.alpha)
            scale = torch.tensor([alpha / (rank**0.5 if config.use_rslora else rank)]).to(x)
            stack, place = adapter.stack_of(int(row.name.removeprefix("expert_")))
            own = {n: p[place : place + 1] for n, p in stack.named_parameters()}
            matrices = [own[n] for n in own if n != "lora_magnitude"]
            assert {matrix.shape[1] for matrix in matrices} == {rank}
            if not config.use_dora:
                output = output + oracles.mixture_update(x, *matrices, gate_T[:, None], scale)
                continue
            merged = W_OD + scale * matrices[1][0].T @ matrices[0][0]
            length_O1 = merged.norm(dim=1, keepdim=True).detach()
            merged = own["lora_magnitude"].T * merged / length_O1
            output = output + gate_T[:, None] * (x @ (merged - W_OD).T)
        outputs.append(output)
    return torch.cat(outputs, 1)


def outputs_of(model, x, gates, mature=None, kept=None):
    """The same by the projections as they are, hooks included."""
    state = model.mixture.state
    pass_ = state.begin_block(0)
    pass_.kept = kept
    block = model.mixture.blocks[0]
    block.begin(pass_, RouterOutput(gates[None], gates[None], None, mature), x.dtype)
    x = x[None]
    parts = [model.base.get_submodule(f"{BLOCK}.{name}")(x)[0] for name in NAMES]
    state.end_block(block.index)
    return torch.cat(parts, 1)


def plain(model, x, gates):
    """The same by the definition that torch.compile takes."""
    if model.config.use_dora:  # has no other
        return outputs_of(model, x, gates)
    adapters = [(n, model.mixture.adapters[f"{BLOCK}.{n}"]) for n in NAMES]
    parts = [
        x @ model.base.get_submodule(f"{BLOCK}.{n}").weight.T + a(x, gates) for n, a in adapters
    ]
    return torch.cat(parts, 1)


MATURE = [True, True, True, True, False, True, True, True, True]
PATHS = {  # kernel, what computes, whether with gradients
    "dense": ("dense", outputs_of, True),
    "grouped": ("grouped", lambda *args: outputs_of(*args, MATURE), True),
    "plain": ("dense", plain, True),
    "gather": ("gather", lambda *args: outputs_of(*args, MATURE), False),
    "decode": ("dense", lambda *args: outputs_of(*args, None, {}), False),
}


@pytest.mark.parametrize("path", PATHS)
def test_experts_of_unequal_rank_are_the_loop_over_experts_on_every_path(path, model, monkeypatch):
    kernel, compute, learns = PATHS[path]
    monkeypatch.setattr("dylora.adapters.plan.select_kernel", lambda **known: kernel)
    x = torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(16, 9, dtype=torch.float64)
    chosen = torch.stack([torch.arange(16) % 8, torch.arange(16) // 2], 1)
    gates[:, MATURE] *= torch.zeros(16, 8).scatter(
        1, chosen, 1.0
    )  # as of mature experts; the immature one serves every token
    gates.requires_grad_()
    expected = block_oracle(model, x, gates)
    with torch.set_grad_enabled(learns):
        ours = compute(model, x, gates)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    if not learns:
        return
    weights = torch.randn_like(expected)
    leaves = {"x": x, "gates": gates} | {
        name: p
        for name, p in model.named_expert_parameters()
        if p.requires_grad and name.startswith(tuple(f"{BLOCK}.{n}" for n in NAMES))
    }
    one, other = (
        torch.autograd.grad((output * weights).sum(), leaves.values())
        for output in (expected, ours)
    )
    for name, theirs, mine in zip(leaves, one, other, strict=True):
        assert theirs.any(), name
        if name == "gates" and path == "grouped":  # of what is chosen; the rest is masked before
            theirs, mine = theirs * (gates > 0), mine * (gates > 0)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)


def train(model, optimizer, ids, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return losses


LIVES = {
    "as it began": lambda experts: None,
    "frozen": lambda experts: experts.freeze(0),
    "merged": lambda experts: experts.merge(0, 3, rank=3),
    "created and retired": lambda experts: (experts.create_expert(rank=7), experts.retire(2)),
}


def lived(model, ids, life):
    """An optimizer with moments, from before the life and after it."""
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.01))
    train(model, optimizer, ids)
    LIVES[life](model.experts)
    train(model, optimizer, ids)
    return optimizer


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("padded", [False, True])
def test_moments_of_unequal_ranks_come_back_whatever_the_experts_lived(
    life, padded, mixture, ids, tmp_path
):
    model = mixture(num_experts=5, expert_ranks=[6, 2, 2, 4, 2])
    optimizer = lived(model, ids, life)
    base = copy.deepcopy(mixture().unload())
    model.save_pretrained(tmp_path / "saved")
    moments = copy.deepcopy(state_by_name(optimizer, model))
    if padded:
        moments = padded_to(moments, 6)
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base).eval()
    fresh = build_optimizer(again, TrainConfig(learning_rate=0.01))
    load_state_by_name(fresh, again, moments)
    ours, theirs = train(model, optimizer, ids), train(again, fresh, ids)
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def padded_to(moments, rank):
    """As files of earlier versions have them: stacks as wide as their widest expert."""
    return {
        name: {
            key: torch.nn.functional.pad(value, (0, 0, 0, max(0, rank - value.shape[1])))
            if value.ndim == 3
            else value
            for key, value in state.items()
        }
        for name, state in moments.items()
    }


def test_moments_of_one_padded_stack_are_those_of_its_parts(mixture, ids):
    model = mixture(num_experts=3, expert_ranks=[4, 2, 2])
    optimizer = lived(model, ids, "as it began")
    apart = copy.deepcopy(state_by_name(optimizer, model))
    padded, joined = padded_to(apart, 4), {}
    for name, state in padded.items():
        if ".experts_0-0." not in name:
            joined |= {} if ".experts_1-2." in name else {name: state}
            continue
        rest = padded[name.replace("experts_0-0", "experts_1-2")]
        joined[name.replace("experts_0-0", "experts_0-2")] = {
            key: torch.cat([value, rest[key]]) if value.ndim else value
            for key, value in state.items()
        }
    optimizer.state.clear()
    load_state_by_name(optimizer, model, joined)
    for name, state in state_by_name(optimizer, model).items():
        assert all(torch.equal(value, apart[name][key]) for key, value in state.items())
    first = next(name for name in joined if name.endswith("lora_A"))
    joined[first]["exp_avg"][1, 3] = 1.0  # beyond the rank of expert 1, where no padding is
    with pytest.raises(ValueError, match=r"experts_1-2.lora_A has exp_avg of the shape \[2, 4, 32"):
        load_state_by_name(optimizer, model, joined)
