"""The update alone, no model around it: sections `projections` and `sparse` of the benchmark."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dylora.adapters.plan
from dylora import MoELoraConfig
from dylora.adapters.block import RoutedBlock
from dylora.adapters.projection import StackedLoRA
from dylora.kernels.common import product_dtype
from dylora.kernels.select import select_kernel
from dylora.routing.gating import RouterOutput
from dylora.routing.state import RoutingState
from experiments.speed import models
from experiments.speed.timing import timed


class Four(nn.Module):
    """q, k and v of one input, and o of another."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.self_attn = Four(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.self_attn(x)


def adapted(
    block: Block,
    experts: int,
    tokens: int,
    *,
    top_k: int | None = None,
    names: tuple[str, ...] = (),
) -> Block:
    """A copy whose projections carry a mixture; with top_k all experts are mature."""
    block = copy.deepcopy(block)
    weight = block.self_attn.q_proj.weight
    config = MoELoraConfig(num_experts=experts, r=16, lora_alpha=32, top_k_experts=top_k or 2)
    site = RoutedBlock("self_attn", 0, RoutingState(experts), weight.shape[1])
    gates = torch.rand(1, tokens, experts, device=weight.device)
    mature = None
    if top_k is not None:
        gates = gates * gates.scatter(-1, gates.topk(top_k).indices, 2.0).gt(1)
        mature = [True] * experts
    gates = (gates / gates.sum(-1, keepdim=True)).requires_grad_()
    for name in names or ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(block.self_attn, name)
        sizes = (projection.in_features, projection.out_features)
        lora = StackedLoRA(site, f"self_attn.{name}", *sizes, config, weight.device)
        stack = lora.create_stack(0, 16, [32.0] * experts, projection)
        nn.init.normal_(stack.lora_B, std=0.02)
        lora.set_stacks([stack])
        projection.add_module("dylora_adapter", lora)
        projection.register_forward_pre_hook(lora.run_outside_autograd)
        projection.register_forward_hook(lora.add_update)
        site.add(lora)

    def begin(module: nn.Module, args: Any) -> None:
        pass_ = site.state.begin_block(0)
        pass_.kept = None if torch.is_grad_enabled() else kept
        site.begin(pass_, RouterOutput(gates, gates, None, mature), args[0].dtype)

    kept: dict[str, Any] = {}  # as in one decoding
    block.self_attn.register_forward_pre_hook(begin)
    return block


def projections(options: argparse.Namespace) -> dict[str, Any]:
    """Added time over four frozen projections, against one peft-style LoRA of the same rank."""
    results = {}
    for width, tokens in ((512, 512), (512, 1024), (2048, 512)):
        torch.manual_seed(0)
        block = Block(width).requires_grad_(False).to(options.device, options.dtype)
        x = torch.randn(1, tokens, width, device=options.device, dtype=options.dtype)

        def step(module: nn.Module, x: torch.Tensor = x) -> Callable[[], None]:
            parameters = [p for p in module.parameters() if p.requires_grad]
            dy = torch.randn_like(x)

            def run() -> None:
                module(x.detach().requires_grad_()).backward(dy)
                for parameter in parameters:
                    parameter.grad = None

            return run

        ways = {"frozen": step(block), "ours, E=8 r=16": step(adapted(block, 8, tokens))}
        theirs = models.with_peft(
            {"peft LoRA r=128": lambda block=block: models.peft_lora(block, 128)}
        )
        ways |= {name: step(model) for name, model in theirs.items()}
        key = f"width {width}, T={tokens}"
        results[key] = timed(f"four projections, {key}", ways, "frozen", options)
        added = {n: t["ratio"] - 1 for n, t in results[key].items() if n != "frozen"}
        if "peft LoRA r=128" in added:
            results[key]["added, ours / peft"] = added["ours, E=8 r=16"] / added["peft LoRA r=128"]
            print(f"added time, ours / peft: {results[key]['added, ours / peft']:.3f}")
    return results


# Passes of a few tokens are those of decoding, one prompt or many, and have no gradient.
SPARSE_TOKENS = [(1, False), (4, False), (16, False), (32, False), (64, False)]
SPARSE_TOKENS += [(16, True), (64, True), (512, True), (4096, True)]


def sparse(options: argparse.Namespace) -> dict[str, Any]:
    """One square projection: every way, and the automatic choice, over E and T."""
    results = {}
    torch.manual_seed(0)
    width = options.width
    block = Block(width).requires_grad_(False).to(options.device, options.dtype)
    cases = [(tokens, True) for tokens in options.sparse_tokens or ()] or SPARSE_TOKENS
    for tokens, grad in cases:
        for experts in options.sparse_experts:
            key = f"E={experts}, T={tokens}{'' if grad else ', no gradient'}"
            if options.case not in key:
                continue
            x = torch.randn(1, tokens, width, device=options.device, dtype=options.dtype)
            lora = adapted(block, experts, tokens, top_k=2, names=("q_proj",)).self_attn
            names = ["dense", "grouped"] if grad else ["dense", "grouped", "gather"]
            frozen = copy.deepcopy(block).self_attn
            ways = {"frozen": one_product(frozen, x, grad, "dense")}
            ways |= {name: one_product(lora, x, grad, name) for name in names}
            ways["automatic"] = one_product(lora, x, grad, None)
            results[key] = timed(f"one projection, K=2 r=16, {key}", ways, "dense", options)
            found = {name: timing["median_ms"] for name, timing in results[key].items()}
            choice = select_kernel(
                tokens=tokens,
                mature=experts,
                top_k=2,
                needs_grad=grad,
                device=options.device.type,
                half=product_dtype(options.dtype, options.device).itemsize == 2,
            )
            # Of the way it takes, timed by itself: "automatic" runs the same code at other moments.
            results[key]["choice"] = choice
            results[key]["choice / better"] = found[choice] / min(map(found.get, names))
            added = {name: value - found["frozen"] for name, value in found.items()}
            results[key]["wide / automatic, added"] = added["dense"] / added["automatic"]
            print(
                f"added to the frozen projection, wide / automatic: "
                f"{results[key]['wide / automatic, added']:.2f}"
            )
    dylora.adapters.plan.select_kernel = select_kernel
    worst = max(results, key=lambda key: results[key]["choice / better"])
    print(f"\nchosen way / better way, at worst: {results[worst]['choice / better']:.3f}, {worst}")
    return results


def one_product(four: Any, x: torch.Tensor, grad: bool, way: str | None) -> Callable[[], None]:
    """A pass through q_proj by a kernel, backward where there is a gradient; None: as selected."""
    parameters = [p for p in four.parameters() if p.requires_grad]

    def step() -> None:
        choose = select_kernel if way is None else lambda **known: way
        dylora.adapters.plan.select_kernel = choose
        with torch.set_grad_enabled(grad):
            y = four.q_proj(lora_input(four, x, grad))
            if grad:
                y.backward(torch.ones_like(y))
        for parameter in parameters:
            parameter.grad = None

    return step


def lora_input(four: Any, x: torch.Tensor, grad: bool) -> torch.Tensor:
    """x as it enters the block: routed, and with a gradient where one is wanted."""
    x = x.detach().requires_grad_(grad)
    for hook in four._forward_pre_hooks.values():
        hook(four, (x,))
    return x
