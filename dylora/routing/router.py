"""The learned router of one block: p = softmax(W x / temperature), then the gate.

Shape letters: B batch, S sequence, E experts, D hidden width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.config import MoELoraConfig
from dylora.kernels.common import at_least_float32
from dylora.routing.gating import RouterOutput, cap_tokens, drop_experts, maturity_gates
from dylora.routing.state import Pass, RoutingState


class DynamicHybridRouter(nn.Module):
    """A linear or two-layer router with the maturity-aware gate; float32 whatever the base is.

    Routers start near uniform: each row of the last layer is normal with deviation 0.5/sqrt(width)
    (rows of exact zeros would tie, and ties go to the lowest index), biases are 0.
    """

    def __init__(
        self, width: int, config: MoELoraConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.router_hidden_size
        self.inner = nn.Linear(width, hidden, device=device) if hidden else None
        self.outer = nn.Linear(hidden or width, config.num_experts, device=device)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(hidden or width))
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """x [B, S, D] -> gates, probabilities and logits [B, S, E]."""
        state = pass_.state
        logits = self.score(x)
        if self.training and self.config.router_noise:
            logits = logits + self.config.router_noise * torch.randn_like(logits)
        if not state.all_active:
            logits = logits.masked_fill(~state.active_E.to(logits.device), -math.inf)
        temperature = self.config.router_temperature
        scaled = logits if temperature == 1 else logits / temperature
        probabilities = scaled.softmax(-1)
        gates = self.gate(probabilities, pass_)
        return RouterOutput(gates, probabilities, logits, self.mature_experts(state))

    def resize(self, experts: int) -> None:
        """Rows for another number of experts, with fresh values where there were none."""
        old, kept = self.outer, min(experts, self.outer.out_features)
        self.outer = nn.Linear(old.in_features, experts, device=old.weight.device).to(old.weight)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(old.in_features))
        nn.init.zeros_(self.outer.bias)
        with torch.no_grad():
            self.outer.weight[:kept] = old.weight[:kept]
            self.outer.bias[:kept] = old.bias[:kept]

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
        gates = maturity_gates(probabilities, maturity.to(probabilities), config.top_k_experts)
        if mode == "sparse" and self.training and config.expert_capacity_factor is not None:
            # Experts that take no part hold no tokens, so they count neither in K nor in E.
            top_k = min(config.top_k_experts, state.active_count)
            gates = cap_tokens(
                gates, top_k, config.expert_capacity_factor, pass_.token_mask, state.active_count
            )
        return gates
