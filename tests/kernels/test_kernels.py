"""The compute paths: one meaning, held against the loop over experts, gradients included."""

import copy

import pytest
import torch
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

import oracles
from dylora.kernels import select
from dylora.kernels.common import product_dtype
from dylora.kernels.decode import DecodePass
from dylora.kernels.dense import Block, add_dense, down_products
from dylora.kernels.grouped import add_grouped, grouped_products, plan_pairs
from dylora.kernels.select import select_kernel

T, D, O, E, R = 5, 4, 3, 6, 2  # noqa: E741 - the letters of the design


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


# The dense kernel

# Stacks as (experts, rank, trained); a shared A has the rank of all.
LAYOUTS = {
    "one stack": ([(E, R, True)], False),
    "frozen beside trained": ([(2, R, False), (3, R, True), (1, R, False)], False),
    "trained around frozen, other ranks": ([(2, 3, True), (3, 1, False), (1, 2, True)], False),
    "nothing trained": ([(E, R, False)], False),
    "one A for all": ([(4, R, True), (2, R, True)], True),
}


def wide_parts(layout):
    stacks, shared = LAYOUTS[layout]
    blocks, As, Bs, first = [], [], [], 0
    for experts, rank, trained in stacks:
        blocks.append(Block(first, experts, rank, shared))
        if not (shared and As):
            As.append(double(rank if shared else experts * rank, D, grad=trained))
        Bs.append(double(experts * rank, O, grad=trained))
        first += experts
    return blocks, As, Bs


def wide_oracle(y, x, gates, scaling_E, blocks, As, Bs):
    for index, block in enumerate(blocks):
        B = Bs[index].view(block.experts, block.rank, O)
        A = As[0 if block.shared else index]
        A = A.expand(block.experts, -1, -1) if block.shared else A.view(block.experts, -1, D)
        own = slice(block.first, block.first + block.experts)
        y = y + oracles.mixture_update(x, A, B, gates[:, own], scaling_E[own])
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_kernel_is_the_loop_over_experts(layout):
    blocks, As, Bs = wide_parts(layout)
    x, gates, y = double(T, D), torch.rand(T, E).double(), double(T, O)
    scaling_E = torch.linspace(0.5, 2, E).double()
    expected = wide_oracle(y, x, gates, scaling_E, blocks, As, Bs)
    [h], _ = down_products(x, [As], x.dtype)
    ours = add_dense(y.clone(), h, gates, scaling_E, blocks, Bs)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        [h], _ = down_products(x, [As], x.dtype)
        torch.testing.assert_close(add_dense(y.clone(), h, gates, scaling_E, blocks, Bs), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_kernel_has_the_numeric_gradient_and_none_for_frozen_experts(layout):
    blocks, As, Bs = wide_parts(layout)
    gates = torch.rand(T, E).double().requires_grad_()
    scaling_E = torch.linspace(0.5, 2, E).double()

    def mixture(y, x, gates, *matrices):
        own = list(matrices[: len(As)])
        [h], _ = down_products(x, [own], x.dtype)
        return add_dense(y * 1, h, gates, scaling_E, blocks, list(matrices[len(As) :]))

    x, y = double(T, D), double(T, O)
    assert gradcheck(mixture, (y, x, gates, *As, *Bs))
    mixture(y, x, gates, *As, *Bs).sum().backward()
    for matrix in (*As, *Bs):
        assert (matrix.grad is not None) == matrix.requires_grad


def test_projections_with_one_input_share_the_product_and_its_gradient():
    x, As = double(T, D), [[double(4, D)], [double(2, D, grad=False), double(3, D)], [double(1, D)]]

    def products(x, *flat):
        q, k1, k2, v = flat
        return down_products(x, [[q], [k1, k2], [v]], x.dtype)[0]

    flat = [A for own in As for A in own]
    for h, own in zip(products(x, *flat), As, strict=True):
        torch.testing.assert_close(h, x @ torch.cat(own).T)
    assert gradcheck(lambda *args: tuple(products(*args)), (x, *flat))


def test_a_product_that_nobody_uses_takes_nothing_from_the_others():
    x, A, unused = double(T, D), double(4, D), double(2, D)
    (h, _), _ = down_products(x, [[A], [unused]], x.dtype)
    h.square().sum().backward()
    expected = 2 * (x @ A.T).detach() @ A.detach()
    torch.testing.assert_close(x.grad, expected)
    assert not unused.grad.any()


def test_the_update_is_added_in_place_and_the_input_is_kept_once():
    x, As, B = double(T, D), [[double(4, D)] for _ in range(3)], double(4, O)
    y = torch.zeros(T, O, dtype=torch.float64)
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hs, _ = down_products(x, As, x.dtype)
        gates = torch.ones(T, 2).double()
        out = add_dense(y, hs[0], gates, torch.ones(2), [Block(0, 2, 2, False)], [B])
    assert out.data_ptr() == y.data_ptr()
    assert kept.count(x.untyped_storage().data_ptr()) == 1
    assert y.untyped_storage().data_ptr() not in kept


def test_no_tokens_at_all_are_none_of_an_updates_business():
    x, A, B, gates = double(0, D), double(E * R, D), double(E * R, O), double(0, E)
    [h], _ = down_products(x, [[A]], x.dtype)
    out = add_dense(
        torch.zeros(0, O).double(), h, gates, torch.ones(E), [Block(0, E, R, False)], [B]
    )
    out.sum().backward()
    assert out.shape == (0, O)
    assert not A.grad.any()
    assert x.grad.shape == x.shape


def test_an_output_that_cannot_be_viewed_as_rows_is_not_changed():
    base = torch.zeros(O, T, dtype=torch.float64)
    h, B = double(T, 4), double(4, O)
    out = add_dense(
        base.T, h, torch.ones(T, 2).double(), torch.ones(2), [Block(0, 2, 2, False)], [B]
    )
    assert not base.any()
    torch.testing.assert_close(out, h @ B)


# The grouped kernel, and gathering


def sparse_parts(top_k, experts=E, used=None):
    """Weights [T, K] and experts [T, K], different ones in a row; some places have weight 0."""
    choices = torch.randn(T, experts)
    if used is not None:
        choices[:, used:] = -9
    experts_TK = choices.topk(top_k).indices
    weights_TK = torch.rand(T, top_k).double()
    weights_TK[1, -1] = 0
    return weights_TK, experts_TK


def add_sparse(y, x, weights_TK, plan, A, B):
    [h], _ = grouped_products(x, [A], y.dtype, plan)
    return add_grouped(y, h, weights_TK, B, plan)


def as_gates(weights_TK, experts_TK, experts=E):
    zeros = torch.zeros(T, experts, dtype=weights_TK.dtype)
    return zeros.scatter(1, experts_TK, weights_TK)


@pytest.mark.parametrize("used", [None, 3])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_grouped_kernel_is_the_loop_over_experts(top_k, used):
    """With `used`, half of the experts have no token at all."""
    weights_TK, experts_TK = sparse_parts(top_k, used=used)
    x, A, B, y = double(T, D), double(E, R, D), double(E, R, O), double(T, O)
    gates = as_gates(weights_TK, experts_TK)
    expected = y + oracles.mixture_update(x, A, B, gates, torch.ones(E, dtype=torch.float64))
    plan = plan_pairs(experts_TK, E)
    torch.testing.assert_close(add_sparse(y.clone(), x, weights_TK, plan, A, B), expected)


@pytest.mark.parametrize("frozen", [(), ("A",), ("A", "B")])
def test_the_grouped_kernel_has_the_numeric_gradient(frozen):
    weights_TK, experts_TK = sparse_parts(2)
    plan = plan_pairs(experts_TK, E)
    A, B = double(E, R, D, grad="A" not in frozen), double(E, R, O, grad="B" not in frozen)
    assert gradcheck(
        lambda y, x, w, A, B: add_sparse(y * 1, x, w, plan, A, B),
        (double(T, O), double(T, D), weights_TK.requires_grad_(), A, B),
    )


def test_the_grouped_kernel_is_the_same_in_float32_by_torchs_grouped_products():
    weights_TK, experts_TK = sparse_parts(2)
    plan = plan_pairs(experts_TK, E)
    results = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(1)
        parts = [double(T, O), double(T, D), weights_TK, double(E, R, D), double(E, R, O)]
        y, x, w, A, B = (part.detach().to(dtype).requires_grad_() for part in parts)
        out = add_sparse(y * 1, x, w, plan, A, B)
        out.square().sum().backward()
        results[dtype] = [t.double() for t in (out, x.grad, w.grad, A.grad, B.grad)]
    for exact, ours in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_pairs_are_sorted_by_expert_and_go_back():
    experts_TK = torch.tensor([[3, 0], [0, 5], [3, 1]])
    plan = plan_pairs(experts_TK, 6)
    assert plan.ends_E.tolist() == [2, 3, 3, 5, 5, 6]
    assert experts_TK.flatten()[plan.pair_P].tolist() == [0, 0, 1, 3, 3, 5]
    assert plan.token_P.tolist() == [0, 1, 2, 0, 2, 1]
    assert torch.equal(plan.pair_P[plan.sorted_P], torch.arange(6))


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("maturity", [0.0, 1.0])
def test_a_bfloat16_base_learns_near_what_a_float32_one_does(
    emulated, maturity, mixture, ids, monkeypatch
):
    """Whether the device multiplies bfloat16 itself, or the products are made in float32."""
    monkeypatch.setattr("dylora.kernels.common.is_emulated", lambda dtype: emulated)
    monkeypatch.setattr("dylora.adapters.plan.select_kernel", lambda **known: "grouped")
    model = mixture(num_experts=8, maturity=[maturity] * 8)
    for adapter in model.mixture.adapters.values():
        torch.nn.init.normal_(adapter.stacks[0].lora_B, std=0.1)
    output = model(ids, labels=ids)
    output.loss.backward()
    exact = {name: p.grad.clone() for name, p in model.own_parameters()}
    model.zero_grad()
    model.base.to(torch.bfloat16)
    for _, parameter in model.own_parameters():
        parameter.data = parameter.data.float()
    rough = model(ids, labels=ids)
    rough.loss.backward()
    torch.testing.assert_close(rough.loss, output.loss, rtol=0.02, atol=0.02)
    for name, parameter in model.named_expert_parameters():
        expected = exact[name]
        distance = (parameter.grad - expected).norm() / expected.norm().clamp_min(1e-6)
        assert distance < 0.2, name


def test_products_keep_the_precision_that_the_device_has(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("dylora.kernels.common.is_emulated", lambda dtype: dtype.itemsize == 2)
    assert product_dtype(torch.bfloat16, cpu) == torch.float32
    assert product_dtype(torch.float64, cpu) == torch.float64
    assert product_dtype(torch.bfloat16, gpu) == torch.bfloat16


# The rule, and whole models


def test_the_rule_looks_at_experts_tokens_and_gradients():
    train = {"needs_grad": True, "device": "cpu"}
    assert select_kernel(tokens=1024, mature=64, top_k=2, **train) == "grouped"
    assert select_kernel(tokens=1024, mature=0, top_k=2, **train) == "dense"
    assert select_kernel(tokens=1024, mature=2, top_k=2, **train) == "dense"
    assert select_kernel(tokens=4, mature=64, top_k=2, **train) == "dense"
    assert select_kernel(tokens=16, mature=64, top_k=2, **train) == "grouped"
    assert select_kernel(tokens=64, mature=8, top_k=2, **train) == "dense"
    step = {"needs_grad": False, "device": "cpu"}
    assert select_kernel(tokens=1, mature=64, top_k=2, **step) == "gather"
    assert select_kernel(tokens=1, mature=16, top_k=2, **step) == "dense"
    assert select_kernel(tokens=16, mature=64, top_k=2, **step) == "gather"
    assert select_kernel(tokens=20, mature=64, top_k=2, **step) == "dense"
    assert select_kernel(tokens=40, mature=64, top_k=2, **step) == "grouped"
    assert select_kernel(tokens=40, mature=256, top_k=2, **step) == "gather"
    assert select_kernel(tokens=80, mature=512, top_k=2, **step) == "grouped"
    assert select_kernel(tokens=512, mature=8, top_k=2, **train) == "grouped"
    assert select_kernel(tokens=512, mature=8, top_k=2, half=True, **train) == "dense"
    assert select_kernel(tokens=16, mature=64, top_k=2, half=True, **step) == "dense"


def test_on_cuda_only_large_passes_are_sorted():
    train, step = {"needs_grad": True, "device": "cuda"}, {"needs_grad": False, "device": "cuda"}
    assert select_kernel(tokens=2048, mature=64, top_k=2, **train) == "dense"
    assert select_kernel(tokens=8192, mature=256, top_k=2, **train) == "dense"
    assert select_kernel(tokens=32768, mature=256, top_k=2, **train) == "grouped"
    assert select_kernel(tokens=8192, mature=512, top_k=2, **train) == "grouped"
    assert select_kernel(tokens=1, mature=256, top_k=2, **step) == "dense"
    assert select_kernel(tokens=64, mature=256, top_k=2, **step) == "dense"


SPARSE = {
    "all mature": {"maturity": [1.0] * 8},
    "one newborn": {"maturity": [1.0] * 3 + [0.0] + [1.0] * 4},
    "some halfway": {"maturity": [1.0, 0.5, 1.0, 1.0, 0.2, 1.0, 1.0, 1.0]},
    "learned": {"router_type": "learned", "expert_capacity_factor": None},
    "sparse": {"routing_mode": "sparse"},
    "top-1": {"maturity": [1.0] * 8, "top_k_experts": 1},
    "top-3, ragged": {
        "maturity": [1.0] * 8,
        "top_k_experts": 3,
        "expert_ranks": [3, 1, 1, 1, 1, 2, 2, 4],
    },
    "shared router": {"maturity": [1.0] * 8, "router_scope": "shared"},
    "capacity": {"routing_mode": "sparse", "expert_capacity_factor": 0.7},
}


def by(way, monkeypatch, model, ids, *, learns=True):
    """Logits and gradients of a model all of whose stacks take one kernel where they can."""
    monkeypatch.setattr("dylora.adapters.plan.select_kernel", lambda **known: way)
    if not learns:
        with torch.no_grad():
            return model(ids).logits, {}
    output = model(ids, labels=ids)
    model.zero_grad()
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.own_parameters() if p.grad is not None}
    return output.logits.detach(), {name: grad.clone() for name, grad in gradients.items()}


@pytest.mark.parametrize("pool", ["as it began", "with a history"])
@pytest.mark.parametrize("settings", SPARSE)
def test_every_kernel_has_the_same_logits_and_gradients(
    settings, pool, mixture, gpt2, ids, monkeypatch
):
    settings = {"maturity": [1.0] * 8} | SPARSE[settings]
    base = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = mixture(base, num_experts=8, **settings).double()
    if pool == "with a history":
        model.experts.create_expert(share=0.2)
        model.experts.freeze(2, 3)
        model.experts.retire(5)
        torch.nn.init.normal_(
            model.mixture.adapters["transformer.h.0.attn.c_attn"].stacks[-1].lora_B
        )
    model.train()
    logits, gradients = by("dense", monkeypatch, model, ids)
    ours, theirs = by("grouped", monkeypatch, model, ids)
    torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
    assert theirs.keys() == gradients.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-7, atol=1e-9, msg=name)
    model.eval()
    logits, _ = by("dense", monkeypatch, model, ids)
    for way in ("dense", "grouped", "gather"):
        ours, _ = by(way, monkeypatch, model, ids, learns=False)
        torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9, msg=way)


def test_experts_that_take_no_part_are_not_computed(mixture, ids):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids)
        return counter.get_total_flops()

    model = mixture(num_experts=4, maturity=[0.0] * 4)
    with model.disable_adapters():
        base = flops(model)
    all_four = flops(model) - base
    model.experts.set_active_expert(2)
    assert flops(model) - base < 0.4 * all_four  # a quarter, and the router


def test_weights_that_a_caller_gives_reach_experts_that_are_not_chosen(mixture, ids):
    model = mixture(num_experts=8, maturity=[1.0] * 8)
    weights = torch.rand(2, 8)
    expected = copy.deepcopy(model)(ids, routing_weights=weights).logits
    compute_all = mixture(num_experts=8, maturity=[0.0] * 8)
    torch.testing.assert_close(compute_all(ids, routing_weights=weights).logits, expected)


def test_a_block_that_matures_changes_its_kernel_without_a_restart(mixture, monkeypatch):
    seen = []
    real = select.select_kernel

    def watch(**known):
        seen.append(real(**known))
        return seen[-1]

    monkeypatch.setattr("dylora.adapters.plan.select_kernel", watch)
    model = mixture(num_experts=16, maturity=[0.0] * 16)
    ids = torch.randint(3, 40, (4, 32))
    model(ids, labels=ids).loss.backward()
    assert "grouped" not in seen
    mature = model.maturity._replace(maturity=torch.ones(16, dtype=torch.float64))
    model.set_maturity(mature)
    model(ids, labels=ids).loss.backward()
    assert seen[-2:] == ["grouped", "grouped"]


class CopiedLists(TorchFunctionMode):
    """Counts lists made into tensors: on a device each is a copy that waits for it."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("learns", "groups"), [(True, 4), (False, 5)])
def test_a_pass_copies_no_list_to_the_device_again(learns, groups, mixture):
    maturity = [1.0, 1.0, 1.0, 0.5] * groups
    model = mixture(num_experts=len(maturity), maturity=maturity).train(learns)
    model.experts.retire(2)
    ids = torch.randint(3, 40, (4, 32))
    counts = []
    for enabled in (True, True, False):
        model.mixture.state.mine.disabled = not enabled
        with torch.set_grad_enabled(learns), CopiedLists() as mode:
            model(ids)
        counts.append(mode.count)
    first, second, base = counts
    assert first > second == base


def test_what_inference_has_made_serves_training(mixture):
    model = mixture(num_experts=24, maturity=[1.0, 1.0, 0.0, 1.0, 1.0, 1.0] * 4)
    ids = torch.randint(3, 40, (4, 32))
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for _, p in model.named_expert_parameters())


# Decoding


def decoded(model, ids, cache=None):
    """Logits [B, S, V] of one token at a time with a cache."""
    cache = DynamicCache(config=model.base.config) if cache is None else cache
    with torch.no_grad():
        steps = [
            model.base(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("settings", [*SPARSE, "newborn", "one A"])
def test_decoding_is_computed_as_any_pass(settings, mixture, gpt2, ids, monkeypatch):
    extra = {"newborn": {"maturity": [0.0] * 8}, "one A": {"share_A": True}}
    settings = {"maturity": [1.0] * 8} | (SPARSE | extra)[settings]
    model = mixture(gpt2(), num_experts=8, **settings).double()
    used = []
    real = DecodePass.add
    monkeypatch.setattr(DecodePass, "add", lambda *args: used.append(1) or real(*args))
    for kernel in (None, "dense", "gather"):
        with monkeypatch.context() as patch:
            if kernel:
                patch.setattr(
                    "dylora.adapters.plan.select_kernel", lambda kernel=kernel, **k: kernel
                )
            ours = decoded(model, ids)
        with torch.no_grad():
            torch.testing.assert_close(ours, model(ids).logits, rtol=1e-10, atol=1e-10)
    assert used


KEPT = pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["layouts", "ratios"])


@KEPT
@pytest.mark.parametrize("write", ["data", "fused", "in place", "eval", "cast", "loaded"])
def test_a_decoding_sees_every_write_that_came_before_it(settings, write, mixture, ids):
    """`.data` and fused optimizers leave version counters as they are."""
    model = mixture(num_experts=4, maturity=[0.0] * 4, **settings)
    before = decoded(model, ids)
    with torch.no_grad():
        for _, parameter in model.own_parameters():
            if write in ("data", "eval"):
                parameter.data.mul_(-1.5)
            elif write == "fused":
                parameter.grad = torch.ones_like(parameter)
            else:
                parameter.mul_(-1.5)
    if write == "fused":
        parameters = [p for _, p in model.own_parameters()]
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    if write == "eval":
        model.train().eval()
    if write == "cast":
        model.double()
        model.float()
    if write == "loaded":
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    after = decoded(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(after, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert (after - before).abs().max() > 0.1


@KEPT
def test_a_static_cache_used_again_is_another_decoding(settings, mixture, ids):
    model = mixture(**settings)
    cache = StaticCache(config=model.base.config, max_cache_len=ids.shape[1] + 1)

    def continued():
        cache.reset()
        with torch.no_grad():
            model.base(input_ids=ids, past_key_values=cache, use_cache=True)
            last = model.base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        return last.logits

    continued()
    for _, parameter in model.own_parameters():
        parameter.data.mul_(-1.5)
    with torch.no_grad():
        expected = model(torch.cat([ids, ids[:, -1:]], 1)).logits[:, -1:]
    torch.testing.assert_close(continued(), expected, rtol=1e-4, atol=1e-4)


@KEPT
def test_experts_that_come_and_go_within_a_decoding_are_seen(settings, mixture, ids):
    model, cache = mixture(**settings), None
    cache = DynamicCache(config=model.base.config)
    decoded(model, ids[:, :3], cache)
    assert model.mixture.state._decodings
    model.experts.retire(1)
    ours = decoded(model, ids[:, 3:4], cache)
    cache.crop(-1)
    with torch.no_grad():
        theirs = model.base(input_ids=ids[:, 3:5], past_key_values=cache, use_cache=True).logits[
            :, :1
        ]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@KEPT
def test_parameters_that_are_replaced_are_followed(settings, mixture, ids):
    model, other = mixture(**settings), mixture(**settings)
    with torch.no_grad():
        for parameter in (p for _, p in other.own_parameters()):
            parameter.mul_(-1.5)
        before, expected = model(ids).logits, other(ids).logits
        values = {name: value.clone() for name, value in other.base.state_dict().items()}
        ours = torch.func.functional_call(model.base, values, (ids,)).logits
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(model(ids).logits, before)
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(decoded(model, ids), expected, rtol=1e-4, atol=1e-4)


@KEPT
def test_experts_that_change_in_inference_mode_decode_and_train_after_it(settings, mixture, ids):
    model = mixture(**settings)
    with torch.inference_mode():
        model.experts.set_active_expert(1)
        decoded(model, ids)
        model.experts.activate_all_experts()
        model.experts.freeze(0)
        model.experts.unfreeze(0)
        model.experts.create_expert()
        model.experts.retire(2)
        if not settings:
            model.experts.merge(0, 1)  # DoRA's cannot be
        model.experts.load_state_dict(model.experts.state_dict())
        decoded(model, ids)
    decoded(model, ids)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for _, p in model.own_parameters() if p.requires_grad)


def test_what_a_decoding_keeps_ends_with_its_cache_and_with_training(mixture, ids):
    model = mixture()
    decodings = model.mixture.state._decodings
    decoded(model, ids)
    assert not decodings
    cache = DynamicCache(config=model.base.config)
    decoded(model, ids, cache)
    assert len(decodings) == 1
    model(ids, labels=ids)
    assert not decodings
