"""Routers: from the hidden state that enters a block to the weight of every expert.

`Router` is the contract, `DynamicHybridRouter` the usual one; others have files of their own here,
named by `router_type`.

Shape letters: B batch, S sequence, E experts, D hidden width, H router width.
"""

import math
from abc import abstractmethod
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.config import MoELoraConfig
from dylora.kernels.common import at_least_float32
from dylora.routing.gating import RouterOutput, cap_tokens, drop_experts, maturity_gates
from dylora.routing.state import Pass, RoutingState

Shape = list[int | None]  # None: any size


class Router(nn.Module):
    """What a router does, whatever it computes.

    Its parameters are float32 whatever the base is. A new one is a subclass in a file of its own,
    named by the configuration.
    """

    config: MoELoraConfig
    count: int | None = None  # of experts that its block has, the first ones; None: all

    def __init__(self, width: int, config: MoELoraConfig, device: torch.device | None = None):
        """width: D of the hidden states."""
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """Hidden states [B, S, D] -> gates, probabilities and logits [B, S, E].

        Experts that are not to be chosen (`pass_.state.routed_E`) get the gate 0.
        """

    @abstractmethod
    def add_expert(self, share: float, active_E: Tensor) -> dict[str, nn.Parameter]:
        """Room for one more expert whose probability stays below `share` for every hidden state.

        active_E [E]: among which of the others it chooses. Returns the parameters that were
        replaced, by name; the optimizer's moments go over to those in their place.
        """

    @abstractmethod
    def resize(self, experts: int) -> None:
        """Another number of experts, with values that a loader overwrites."""

    @abstractmethod
    def merge_experts(self, i: int, j: int, shares: tuple[float, float]) -> None:
        """Let expert i stand for both, which counted by these shares."""

    @staticmethod
    @abstractmethod
    def state_spec(config: MoELoraConfig, experts: int) -> dict[str, Shape]:
        """Name and shape of every parameter, for so many experts."""

    def check_experts(self, block: str, experts: int) -> None:
        """Raises ValueError for parameters that are not those of so many experts; the block is
        named."""
        own = dict(self.named_parameters())
        for name, shape in self.state_spec(self.config, experts).items():
            found = list(own[name].shape) if name in own else shape
            if any(size not in (None, had) for size, had in zip(shape, found, strict=True)):
                raise ValueError(
                    f"the router of {block} has {name} {found}, but there are {experts} experts "
                    "now: resize it, or attach fresh ones"
                )


def router_class(config: MoELoraConfig) -> type[Router]:
    """The router that a configuration names: that of this file, or of the file of that name."""
    file = config.router_file
    if file is None:
        return DynamicHybridRouter
    module: Any = import_module(f"{__package__}.{file}")
    return module.ROUTER


class DynamicHybridRouter(Router):
    """A linear or two-layer router with the maturity-aware gate.

        p = softmax((W x + b) / temperature),  g = maturity_gates(p, m)

    Routers start near uniform: each row of the last layer is normal with deviation 0.5/sqrt(width)
    (rows of exact zeros would tie, and ties go to the lowest index), biases are 0.
    """

    def __init__(self, width: int, config: MoELoraConfig, device: torch.device | None = None):
        super().__init__(width, config, device)
        hidden = config.router_hidden_size
        self.inner = nn.Linear(width, hidden, device=device) if hidden else None
        self.outer = nn.Linear(hidden or width, config.num_experts, device=device)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(hidden or width))
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """x [B, S, D] -> gates, probabilities and logits [B, S, E]."""
        logits, probabilities = self.probabilities(x, pass_)
        gates = self.gate(probabilities, pass_)
        return RouterOutput(gates, probabilities, logits, self.mature_experts(pass_.state))

    def probabilities(self, x: Tensor, pass_: Pass) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> logits, and their softmax over the enabled experts, [B, S, E]."""
        logits = self.score(x)
        if self.training and self.config.router_noise:
            logits = logits + self.config.router_noise * torch.randn_like(logits)
        if not pass_.state.all_routed:
            logits = logits.masked_fill(~pass_.state.routed_E.to(logits.device), -math.inf)
        if self.count is not None:
            absent_E = torch.arange(logits.shape[-1], device=logits.device) >= self.count
            logits = logits.masked_fill(absent_E, -math.inf)
        temperature = self.config.router_temperature
        scaled = logits if temperature == 1 else logits / temperature
        return logits, scaled.softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """Logits [..., E] of hidden states [..., D]."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._score(x)
        return self._score(x)

    def _score(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)  # bf16 logits change the chosen experts for up to 1 % of tokens
        inner, outer = self.inner, self.outer
        if inner is not None:
            x = F.silu(F.linear(x, inner.weight.to(x.dtype), inner.bias.to(x.dtype)))
        weight, bias = outer.weight.to(x.dtype), outer.bias.to(x.dtype)
        if self.config.router_logits == "absolute":
            return F.linear(x, weight).abs() + bias
        return F.linear(x, weight, bias)

    def mature_experts(self, state: RoutingState) -> list[bool] | None:
        """Which experts only their chosen tokens use; None where every token uses all."""
        mode = self._mode()
        if mode == "dense":
            return None
        return [True] * state.num_experts if mode == "sparse" else state.mature

    def _mode(self) -> str:
        """How this pass mixes: dense, sparse or maturity."""
        mode = self.config.routing_mode
        if mode == "dense_train_sparse_eval":
            return "dense" if self.training else "sparse"
        if mode == "maturity" and self.config.router_type == "learned":
            return "sparse"
        return mode

    def gate(self, probabilities: Tensor, pass_: Pass) -> Tensor:
        """Probabilities [..., E] -> gates [..., E] by routing mode, dropout and capacity."""
        config, state, mode = self.config, pass_.state, self._mode()
        if self.training and config.expert_dropout:
            probabilities = drop_experts(probabilities, config.expert_dropout)
        if mode == "dense":
            return probabilities
        if mode == "maturity" and state.all_immature:
            return probabilities  # what the gate below amounts to, without its operations
        if mode == "sparse":
            maturity = torch.ones_like(state.maturity_E)
        else:
            maturity = state.maturity_E
        maturity, k = maturity.to(probabilities), config.top_k_experts
        gates = maturity_gates(probabilities, maturity, k, config.gate_scale)
        if mode == "sparse" and self.training and config.expert_capacity_factor is not None:
            # Experts that are not enabled hold no tokens, so they count neither in K nor in E.
            count = sum(state.active[state.shared : self.count])
            top_k, factor = min(config.top_k_experts, count), config.expert_capacity_factor
            gates = cap_tokens(gates, top_k, factor, pass_.token_mask, count)
        return gates

    # The experts' life

    def resize(self, experts: int) -> None:
        """Rows for another number of experts, with fresh values where there were none."""
        old, kept = self.outer, min(experts, self.outer.out_features)
        self.outer = nn.Linear(old.in_features, experts, device=old.weight.device).to(old.weight)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(old.in_features))
        nn.init.zeros_(self.outer.bias)
        with torch.no_grad():
            self.outer.weight[:kept] = old.weight[:kept]
            self.outer.bias[:kept] = old.bias[:kept]

    @torch.no_grad()
    def add_expert(self, share: float, active_E: Tensor) -> dict[str, nn.Parameter]:
        """The new row is the mean of the others' rows with its bias lowered by
        T·log((1 - share) / (share·E)), so that by Jensen's inequality its probability stays below
        `share` for every hidden state."""
        count = int(active_E.sum())
        offset = self.config.router_temperature * math.log(share / (1 - share) * count)
        old = {"weight": self.outer.weight, "bias": self.outer.bias}
        self.resize(len(active_E) + 1)
        for name, before in old.items():
            row = before[active_E.to(before.device)].mean(0, keepdim=True)
            new = getattr(self.outer, name)
            new.copy_(torch.cat([before, row + (offset if name == "bias" else 0)]))
            new.requires_grad_(before.requires_grad)
        return {f"outer.{name}": before for name, before in old.items()}

    @torch.no_grad()
    def merge_experts(self, i: int, j: int, shares: tuple[float, float]) -> None:
        """The row becomes a_i w_i + a_j w_j with T·H(a) added to its bias: the best lower bound on
        the two experts' common probability."""
        weight, bias = self.outer.weight, self.outer.bias
        entropy = -sum(a * math.log(a) for a in shares if a > 0)
        weight[i] = shares[0] * weight[i] + shares[1] * weight[j]
        raised = self.config.router_temperature * entropy
        bias[i] = shares[0] * bias[i] + shares[1] * bias[j] + raised

    @staticmethod
    def state_spec(config: MoELoraConfig, experts: int) -> dict[str, Shape]:
        hidden = config.router_hidden_size
        spec: dict[str, Shape] = {"outer.weight": [experts, hidden], "outer.bias": [experts]}
        if hidden is not None:
            spec |= {"inner.weight": [hidden, None], "inner.bias": [hidden]}
        return spec
