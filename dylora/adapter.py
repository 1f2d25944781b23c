"""The routed low-rank update of one projection.

    y = base(x) + Σ_e g_e · s_e · B_e A_e drop(x)

The gate is folded into the rank axis: h = x Aᵀ as [T, E, R], h *= (g·s)[..., None], y = h B. A
mixture is then one LoRA of rank E·R with a diagonal in the middle: two matrix products, and no
tensor of [T, E, O].

Shape letters: T tokens, D input width, O output width, E experts, R rank.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.router import DynamicHybridRouter, RouterOutput, RoutingState, expand_override


class Site:
    """The channel between one block's router and the adapters of its projections.

    Handed to both at construction. `route` is a forward pre-hook of the block: it routes the
    hidden state that enters and leaves the decision in `output`, where the projections inside the
    block read it.
    """

    def __init__(
        self,
        name: str,
        index: int,
        state: RoutingState,
        num_experts: int,
        fixed_weights: list[float] | None,
    ):
        self.name = name
        self.index = index
        self.state = state
        self.num_experts = num_experts
        self.fixed_weights = fixed_weights or [1 / num_experts] * num_experts
        self.router: DynamicHybridRouter | None = None  # None: fixed weights, or the first site's
        self.shares_first = False
        self.output: RouterOutput | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the decision: it may be part of a graph."""
        return self.__dict__ | {"output": None}

    def route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block; reads its first argument, the hidden states [B, S, D]."""
        state = self.state
        if not state.enabled:
            return
        x = args[0] if args else kwargs["hidden_states"]
        if state.override is not None:
            gates = expand_override(state.override, self.index, x.shape[0], x.shape[1])
            gates = gates.to(x.device, torch.promote_types(x.dtype, torch.float32))
            self.output = RouterOutput(gates, gates, None)
        elif self.router is not None:
            self.output = self.router(x, state)
        elif self.shares_first and state.first_site is not None:
            self.output = state.first_site
        else:
            weights_E = torch.tensor(self.fixed_weights, device=x.device)
            gates = weights_E.expand(*x.shape[:-1], -1)
            self.output = RouterOutput(gates, gates, None)
        if self.index == 0:
            state.first_site = self.output if self.router is not None else None


class StackedLoRA(nn.Module):
    """E LoRA experts of one projection as stacked tensors.

    lora_A [E, R, D] starts random and different for each expert (equal ones would stay twins for
    ever), lora_B [E, R, O] starts at 0, so a new adapter is exactly the identity. Both are float32
    whatever the base is; they are cast to the activations' precision for the products.
    """

    scaling_E: Tensor

    def __init__(
        self,
        site: Site,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: Literal[True, "gaussian"] = True,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.site = site
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, out_features, device=device))
        self.register_buffer("scaling_E", torch.full((num_experts,), scaling, device=device))
        self.dropout = nn.Dropout(dropout)
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        else:  # PEFT's kaiming_uniform_(a=sqrt(5)): bound 1/sqrt(fan in)
            bound = 1 / math.sqrt(in_features)
            nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x [..., D], gates [..., E] -> the update [..., O], in x's precision."""
        weights = (gates * self.scaling_E).to(x.dtype)  # [..., E]
        A_CD = self.lora_A.flatten(0, 1).to(x.dtype)  # C = E·R; casting these two is
        B_CO = self.lora_B.flatten(0, 1).to(x.dtype)  # cheaper than raising x and y
        h = F.linear(self.dropout(x), A_CD).unflatten(-1, self.lora_A.shape[:2])  # [..., E, R]
        h = h * weights.unsqueeze(-1).to(h.dtype)
        return h.flatten(-2) @ B_CO.to(h.dtype)

    def add_update(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the projection."""
        if not self.site.state.enabled:
            return output
        routing = self.site.output
        assert routing is not None, f"{self.site.name} has not routed"
        return output + self(args[0], routing.gates).to(output.dtype)
