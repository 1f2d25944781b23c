"""Frozen products taken over: the same outputs and gradients as when autograd has them."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from dylora.kernels.dense import Block, add_dense, down_products
from dylora.kernels.frozen_linear import FrozenLinearGrads
from dylora.kernels.grouped import add_grouped, grouped_products, plan_pairs

T, D, E, R = 5, 4, 3, 2
WIDTHS = (3, 6)


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def frozen_weights():
    return [double(width, D, grad=False) for width in WIDTHS]


def test_two_dense_projections_of_one_input_have_the_numeric_gradient():
    weights, gates = frozen_weights(), torch.rand(T, E).double()
    matrices = [*(double(E, R, D) for _ in WIDTHS), *(double(E, R, width) for width in WIDTHS)]
    block, scaling_E = [Block(0, E, R, False)], torch.ones(E).double()

    def both(x, *matrices):
        grads = FrozenLinearGrads(list(WIDTHS))
        As, Bs = [[A] for A in matrices[:2]], matrices[2:]
        hs, carriers = down_products(x, As, x.dtype, grads)
        found = []
        for place, weight in enumerate(weights):
            grads.record(place, weight)
            y = x.detach() @ weight.T
            parts = (hs[place], gates, scaling_E, block, [Bs[place]], carriers[place])
            found.append(add_dense(y, *parts))
        return tuple(found)

    assert gradcheck(both, (double(T, D), *matrices))


def test_two_grouped_projections_of_one_input_have_the_numeric_gradient():
    weights, weights_TK = frozen_weights(), torch.rand(T, 2).double()
    plan = plan_pairs(torch.randn(T, E).topk(2).indices, E)
    matrices = [*(double(E, R, D) for _ in WIDTHS), *(double(E, R, width) for width in WIDTHS)]

    def both(x, *matrices):
        grads = FrozenLinearGrads(list(WIDTHS))
        hs, carriers = grouped_products(x, list(matrices[:2]), x.dtype, plan, grads)
        found = []
        for place, (weight, B) in enumerate(zip(weights, matrices[2:], strict=True)):
            grads.record(place, weight)
            y = x.detach() @ weight.T
            found.append(add_grouped(y, hs[place], weights_TK, B, plan, carriers[place]))
        return tuple(found)

    assert gradcheck(both, (double(T, D), *matrices))


def test_a_gradient_carrier_takes_no_memory():
    [carrier] = FrozenLinearGrads([1000]).carriers(double(1, 500, 4))
    assert carrier.shape == (1, 500, 1000)
    assert carrier.untyped_storage().nbytes() == 8


def test_a_weight_changed_before_backward_is_found():
    grads, weight = FrozenLinearGrads([3]), double(3, D, grad=False)
    grads.record(0, weight)
    assert grads.gradient((double(T, 3),)) is not None
    weight.zero_()
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        grads.gradient((double(T, 3),))


# Whole models


@pytest.fixture
def watched(monkeypatch):
    """How many projections ran outside autograd, by backward pass."""
    counts = []
    real = FrozenLinearGrads.gradient

    def gradient(self, dys):
        taken = [dy is not None and own is not None for dy, own in zip(dys, self._weights)]  # noqa: B905
        counts.append(sum(taken))
        return real(self, dys)

    monkeypatch.setattr(FrozenLinearGrads, "gradient", gradient)
    return counts


def loss_of(model, ids):
    """With embeddings that learn, so that the gradient goes all the way down."""
    model.base.get_input_embeddings().weight.requires_grad_()
    return model(ids, labels=ids).loss


def learn(model, ids):
    """The loss, and the gradients of the embeddings and of all that is trained."""
    model.zero_grad()
    loss = loss_of(model, ids)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def left_to_autograd(model, ids, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dylora.adapters.projection.is_frozen_product", lambda module, x: False)
        return learn(model, ids)


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11, msg=name)


CASES = {
    "dense": {"maturity": [0.0] * 8},
    "grouped": {"maturity": [1.0] * 8},
    "both": {"maturity": [1.0] * 6 + [0.0] * 2},
    "one A": {"maturity": [0.0] * 8, "share_A": True},
    "biases": {"maturity": [0.0] * 8, "bias": "lora_only"},
    "A frozen": {"maturity": [0.0] * 8, "freeze_A": True},
    "MLP too": {
        "maturity": [0.0] * 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    },
}


@pytest.mark.parametrize(
    ("case", "family"),
    [(case, "llama") for case in CASES if case != "biases"]  # Llama has none
    + [(case, "gpt2") for case in CASES if case != "MLP too"],
)
def test_a_model_learns_the_same_whoever_has_the_frozen_products(
    case, family, mixture, gpt2, ids, monkeypatch, watched
):
    settings = {"num_experts": 8} | CASES[case]
    if family == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = mixture(gpt2(**still), **settings).double()
    else:
        model = mixture(**settings).double()
    if case in ("grouped", "both"):
        monkeypatch.setattr("dylora.adapters.plan.select_kernel", lambda **known: "grouped")
    for adapter in model.mixture.adapters.values():
        for stack in adapter.stacks:
            nn.init.normal_(stack.lora_B, std=0.1)
    theirs = left_to_autograd(model, ids, monkeypatch)
    assert sum(watched) == 0
    ours = learn(model, ids)
    assert sum(watched) == len(model.mixture.adapters)
    agree(ours, theirs)


def with_hook(model, projection):
    projection.register_forward_hook(lambda module, args, output: output * 2)


def with_pre_hook(model, projection):
    projection.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def with_trained_weight(model, projection):
    projection.weight.requires_grad_()


def with_wrapped_forward(model, projection):
    forward = projection.forward
    projection.forward = lambda x: forward(x * 2)


@pytest.mark.parametrize(
    "change", [with_hook, with_pre_hook, with_trained_weight, with_wrapped_forward]
)
def test_a_projection_that_is_more_than_a_frozen_product_is_left_to_autograd(
    change, mixture, ids, monkeypatch, watched
):
    model = mixture().double()
    path = next(reversed(model.mixture.adapters))
    change(model, model.base.get_submodule(path))
    theirs = left_to_autograd(model, ids, monkeypatch)
    ours = learn(model, ids)
    assert sum(watched) == len(model.mixture.adapters) - 1
    agree(ours, theirs)


@pytest.mark.parametrize("maturity", [0.0, 1.0])
def test_a_base_may_clip_its_projections_in_place(maturity, mixture, random_base, ids, monkeypatch):
    """As OLMo does with clip_qkv."""
    monkeypatch.setattr("dylora.adapters.plan.select_kernel", lambda **known: "grouped")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "clip_qkv": 0.5}
    base = random_base("OlmoConfig", **sizes, num_hidden_layers=2, num_attention_heads=2)
    model = mixture(base, num_experts=8, maturity=[maturity] * 8).double()
    ours = learn(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the plain form
        theirs = learn(model, ids)
    agree(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*backward hook")
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_on_all_modules_leave_everything_to_autograd(
    kind, mixture, ids, monkeypatch, watched
):
    model = mixture().double()
    if kind == "forward":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output * 2 if hasattr(module, "dylora_adapter") else None
        )
    else:
        handle = nn.modules.module.register_module_full_backward_hook(lambda *args: None)
    try:
        theirs = left_to_autograd(model, ids, monkeypatch)
        ours = learn(model, ids)
    finally:
        handle.remove()
    assert sum(watched) == 0
    agree(ours, theirs)


def test_projections_of_one_input_agree_on_what_is_dropped(mixture, ids, watched):
    """Whoever comes first draws for all; one that is not training alone changes nothing."""
    model = mixture(lora_dropout=0.3)
    model.train()
    for layer in model.base.model.layers:
        layer.self_attn.k_proj.eval()
        layer.self_attn.o_proj.eval()
    learn(model, ids)
    assert sum(watched) == len(model.base.model.layers)  # o alone


def test_disabled_adapters_take_any_call_of_a_projection(mixture):
    model = mixture()
    projection = model.base.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, projection.in_features, requires_grad=True)
    with model.disable_adapters():
        torch.testing.assert_close(projection(input=x), x @ projection.weight.T)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_nothing_runs_outside_autograd_where_the_experts_read_another_input(
    settings, mixture, ids, watched
):
    model = mixture(**settings)
    model.train()
    learn(model, ids)
    assert sum(watched) == 0


def test_nothing_runs_outside_autograd_under_autocast(mixture, ids, watched):
    model = mixture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learn(model, ids)
    assert sum(watched) == 0


def test_a_second_backward_through_one_graph_gives_the_same(mixture, ids):
    model = mixture().double()
    loss, embeddings = loss_of(model, ids), model.base.get_input_embeddings().weight
    first = torch.autograd.grad(loss, embeddings, retain_graph=True)
    second = torch.autograd.grad(loss, embeddings)
    assert torch.equal(*first, *second)


def test_a_pass_that_broke_off_leaves_nothing_behind(mixture, ids, monkeypatch):
    model = mixture().double()
    expected = learn(model, ids)

    def broken(*args, **kwargs):
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", broken)
        with pytest.raises(KeyError):
            learn(model, ids)
    again = learn(copy.deepcopy(model), ids)
    for name, value in again.items():
        assert torch.equal(value, expected[name])


def test_disabled_adapters_leave_the_base_to_autograd(mixture, ids, watched):
    model = mixture().double()
    with model.disable_adapters():
        loss_of(model, ids).backward()
    assert model.base.get_input_embeddings().weight.grad is not None
    assert sum(watched) == 0
