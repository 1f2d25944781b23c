"""Threshold routing: each token keeps the experts whose probability exceeds a threshold of its own.

AdaMoLE (Liu & Luo 2024, arXiv 2405.00361), equations 4 to 6:

    p = softmax((W x + b) / temperature),  τ = sigmoid(v·x + c) / E
    g_e = max(p_e - τ, 0) / Σ_j max(p_j - τ, 0)

As τ < 1/E, at least one expert is kept. K and the experts' maturity play no part. Where a sequence
loses experts in training, p is that of those it keeps. A new expert lies
below every threshold at first; it lowers that of the others, which is a share of 1/E.

Shape letters: B batch, S sequence, E experts, D hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.config import MoELoraConfig
from dylora.kernels.common import at_least_float32
from dylora.routing.gating import RouterOutput, drop_experts
from dylora.routing.router import DynamicHybridRouter, Shape
from dylora.routing.state import Pass


class ThresholdRouter(DynamicHybridRouter):
    """The learned router with a threshold of each token's own, which begins at 1 / 2E."""

    def __init__(self, width: int, config: MoELoraConfig, device: torch.device | None = None):
        super().__init__(width, config, device)
        self.threshold = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.threshold.weight)
        nn.init.zeros_(self.threshold.bias)

    def forward(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """x [B, S, D] -> gates, probabilities and logits [B, S, E]."""
        logits, probabilities = self.probabilities(x, pass_)
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            v, c = self.threshold.weight.to(x.dtype), self.threshold.bias.to(x.dtype)
            threshold = F.linear(x, v, c).sigmoid() / pass_.state.routed_count
        kept = probabilities
        if self.training and self.config.expert_dropout:
            kept = drop_experts(kept, self.config.expert_dropout)  # sums to 1: one is above 1/E
        gates = (kept - threshold).relu()
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        return RouterOutput(gates, probabilities, logits)

    @staticmethod
    def state_spec(config: MoELoraConfig, experts: int) -> dict[str, Shape]:
        spec = DynamicHybridRouter.state_spec(config, experts)
        return spec | {"threshold.weight": [1, None], "threshold.bias": [1]}


ROUTER = ThresholdRouter
