"""StackedLoRA: the folded mixture is the sum over experts, with its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from dylora import MoELoraConfig
from dylora.adapters.block import RoutedBlock
from dylora.adapters.projection import StackedLoRA
from dylora.routing.state import RoutingState

D, O, E, R = 6, 5, 3, 2  # noqa: E741 - the letters of the design


def fresh(num_experts=E, width=D, rank=R, **settings):
    """The adapter of a projection [5, width], as injection builds it, and its only stack."""
    config = MoELoraConfig(
        num_experts=max(num_experts, 2), top_k_experts=1, r=rank, lora_alpha=2 * rank, **settings
    )
    lora = StackedLoRA(
        RoutedBlock("block", 0, RoutingState(num_experts), width), "block.q", width, O, config
    )
    projection = torch.nn.Linear(width, O)
    stack = lora.create_stack(0, rank, [2.0 * rank] * num_experts, projection)
    lora.stacks.append(stack)
    return lora, stack


@pytest.fixture
def adapter():
    """Builds a float64 adapter, random in A and B, each expert with a scale of its own."""

    def build(num_experts=E, rank=R, **settings):
        lora, stack = fresh(num_experts, rank=rank, **settings)
        lora.double()
        torch.nn.init.normal_(stack.lora_B)
        stack.scaling_E.copy_(torch.linspace(0.5, 2, num_experts))
        return lora

    return build


def inputs(tokens=4, experts=E, dtype=torch.float64):
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    gates = torch.rand(tokens, experts, dtype=dtype, requires_grad=True)
    return x, gates


def oracle_of(lora, x, gates):
    [stack] = lora.stacks
    return oracles.mixture_update(x, stack.lora_A, stack.lora_B, gates, stack.scaling_E)


@pytest.mark.parametrize(("experts", "rank"), [(1, 2), (3, 1), (3, 4)])
def test_fold_equals_the_loop_over_experts(adapter, experts, rank):
    lora = adapter(experts, rank)
    x, gates = inputs(experts=experts)
    torch.testing.assert_close(lora(x, gates), oracle_of(lora, x, gates))


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "gates", "x"])
def test_fold_has_the_gradient_of_the_loop(adapter, which):
    lora = adapter()
    x, gates = inputs()
    leaf = {
        "lora_A": lora.stacks[0].lora_A,
        "lora_B": lora.stacks[0].lora_B,
        "gates": gates,
        "x": x,
    }[which]
    weight = torch.randn(len(x), O, dtype=torch.float64)
    [ours] = torch.autograd.grad((lora(x, gates) * weight).sum(), leaf)
    [expected] = torch.autograd.grad((oracle_of(lora, x, gates) * weight).sum(), leaf)
    assert expected.abs().min() > 0
    torch.testing.assert_close(ours, expected)


def test_tokens_may_have_any_leading_dimensions(adapter):
    lora = adapter()
    x, gates = inputs(tokens=6)
    folded = lora(x.view(2, 3, D), gates.view(2, 3, E))
    torch.testing.assert_close(folded, lora(x, gates).view(2, 3, O))


def test_a_new_adapter_adds_exactly_zero():
    lora, _ = fresh()
    x, gates = inputs(dtype=torch.float32)
    assert torch.equal(lora(x, gates), torch.zeros(4, O))


def test_expert_order_does_not_matter(adapter):
    lora, other = adapter(), adapter()
    x, gates = inputs()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        other.stacks[0].lora_A.copy_(lora.stacks[0].lora_A[order])
        other.stacks[0].lora_B.copy_(lora.stacks[0].lora_B[order])
        other.stacks[0].scaling_E.copy_(lora.stacks[0].scaling_E[order])
    torch.testing.assert_close(other(x, gates[:, order]), lora(x, gates))


@pytest.mark.parametrize("expert", range(E))
def test_a_one_hot_gate_gives_that_expert_alone(adapter, expert):
    lora, alone = adapter(), adapter(num_experts=1)
    x, _ = inputs()
    one_hot = F.one_hot(torch.tensor([expert] * len(x)), E).double()
    with torch.no_grad():
        alone.stacks[0].lora_A.copy_(lora.stacks[0].lora_A[[expert]])
        alone.stacks[0].lora_B.copy_(lora.stacks[0].lora_B[[expert]])
        alone.stacks[0].scaling_E.copy_(lora.stacks[0].scaling_E[[expert]])
    ours = lora(x, one_hot)
    assert ours.abs().min() > 0
    torch.testing.assert_close(ours, alone(x, torch.ones(len(x), 1, dtype=torch.float64)))


def test_an_expert_without_gate_gets_no_gradient(adapter):
    lora = adapter()
    x, gates = inputs()
    lora(x, gates * torch.tensor([1.0, 0.0, 1.0])).square().sum().backward()
    assert lora.stacks[0].lora_A.grad[0].abs().min() > 0
    assert not lora.stacks[0].lora_A.grad[1].any()
    assert not lora.stacks[0].lora_B.grad[1].any()


def test_no_tensor_has_tokens_times_experts_times_outputs_elements(adapter):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    lora, tokens = adapter(), 50
    x, gates = inputs(tokens)
    with Sizes() as sizes:
        lora(x, gates).sum().backward()
    assert tokens * E * R <= sizes.largest < tokens * E * O


def test_experts_start_with_different_A(adapter):
    lora = adapter()
    assert all(
        (lora.stacks[0].lora_A[a] != lora.stacks[0].lora_A[b]).all()
        for a, b in [(0, 1), (0, 2), (1, 2)]
    )


def test_A_starts_uniform_within_one_over_the_root_of_the_input_width():
    A = fresh(width=100, rank=20)[1].lora_A
    assert A.abs().max() <= 0.1
    torch.testing.assert_close(A.std(), torch.tensor(0.1 / 3**0.5), rtol=0.05, atol=0)
    assert A.mean().abs() < 0.005


def test_gaussian_A_has_deviation_one_over_the_rank():
    A = fresh(width=100, rank=20, init_lora_weights="gaussian")[1].lora_A
    torch.testing.assert_close(A.std(), torch.tensor(1 / 20), rtol=0.05, atol=0)
    assert A.abs().max() > 3 / 20


def test_parameters_are_float32_and_the_update_has_the_precision_of_x():
    lora, stack = fresh()
    update = lora(torch.randn(4, D, dtype=torch.bfloat16), torch.rand(4, E))
    assert (stack.lora_A.dtype, stack.lora_B.dtype) == (torch.float32, torch.float32)
    assert update.dtype == torch.bfloat16


def test_dropout_acts_on_the_input_of_A(adapter):
    lora = adapter(lora_dropout=0.4).train()
    x, gates = inputs()
    torch.manual_seed(5)
    dropped = lora(x, gates)
    torch.manual_seed(5)
    expected = oracle_of(lora, F.dropout(x, 0.4), gates)
    torch.testing.assert_close(dropped, expected)


def test_dropout_leaves_the_expected_update(adapter):
    lora = adapter(lora_dropout=0.4)
    x, gates = inputs()
    with torch.no_grad():
        exact = lora.eval()(x, gates)
        lora.train()
        draws = torch.stack([lora(x, gates) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5  # of the mean
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()
    assert error.min() > 0


def test_dropout_is_off_in_evaluation(adapter):
    lora = adapter(lora_dropout=0.4).eval()
    x, gates = inputs()
    torch.testing.assert_close(lora(x, gates), oracle_of(lora, x, gates))
