"""LoHa: an expert's update is the elementwise product of two low-rank matrices, so that rank r can
give rank r² (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098).

    ΔW_e = s_e · (W1a_e W1b_e) ∘ (W2a_e W2b_e),    y = base(x) + Σ_e g_e · ΔW_e drop(x)

Multiplied out, ΔW_e is a LoRA of rank r²: B has the columns W1a[:, p] ∘ W2a[:, q] and A the rows
W1b[p] ∘ W2b[q], their Khatri-Rao products over the rank axes. So a mixture is `mixture_update` on
those, and no weight of [O, D] is formed, unless r² is so large that this is more work.

Shape letters: T tokens, D input width, O output width, E experts, R rank.
"""

import math

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora.adapters.adapter import Adapter
from dylora.adapters.lora import mixture_update
from dylora.adapters.stack import ExpertStack
from dylora.config import MoELoraConfig


class LoHaStack(ExpertStack):
    """W1a and W2a [E, R, O], W1b and W2b [E, R, D], by PEFT's names."""

    NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter


class StackedLoHa(Adapter):
    """The LoHa experts of one projection."""

    PEFT_TYPE = "LOHA"
    STACK = LoHaStack

    @staticmethod
    def check_projection(path: str, projection: nn.Module, config: MoELoraConfig) -> None:
        if isinstance(projection, Conv1D):
            raise ValueError(
                f"{path} is a Conv1D, which PEFT's LoHa does not adapt: use adapter_type 'lora'"
            )

    def initial_values(
        self, count: int, rank: int, projection: nn.Module, *, drawn: bool
    ) -> dict[str, Tensor | None]:
        """W2b is 0; the others are uniform as in PEFT's kaiming_uniform_(a=sqrt(5)), different for
        each expert: within 1/sqrt(r) for W1a and W2a [O, r], within 1/sqrt(D) for W1b [r, D]."""
        values, widths = {}, (self.out_features, self.in_features) * 2
        for name, width in zip(LoHaStack.NAMES, widths, strict=True):
            values[name] = torch.zeros(count, rank, width, device=self.device)
        for expert in range(count if drawn else 0):
            for name in LoHaStack.NAMES[:3]:
                bound = 1 / math.sqrt(self.in_features if name == "hada_w1_b" else rank)
                nn.init.uniform_(values[name][expert], -bound, bound)
        return values

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x [..., D], gates [..., E] -> Σ_e g_e ΔW_e drop(x), [..., O], in x's precision."""
        x = self.dropout(x)
        update = x.new_zeros(*x.shape[:-1], self.out_features)
        for stack in self.stacks:
            tokens, mix = x.shape[:-1].numel(), mix_low_rank
            if multiplies_delta(tokens, stack.rank, self.in_features, self.out_features):
                mix = mix_deltas
            update = update + mix(x, stack.own(gates), stack)
        return update


def multiplies_delta(tokens: int, rank: int, D: int, O: int) -> bool:  # noqa: E741
    """Whether `mix_deltas` needs fewer multiplications than `mix_low_rank`, for each expert."""
    low_rank = rank**2 * (D + O) * (tokens + 1)  # two products a token, and making A and B
    return D * O * (tokens + 2 * rank + 1) < low_rank  # one a token, and making ΔW


def mix_low_rank(x: Tensor, gates: Tensor, stack: LoHaStack) -> Tensor:
    """x [..., D], gates [..., E] -> [..., O] by A [E, R², D] and B [E, R², O]."""
    A = khatri_rao(stack.hada_w1_b, stack.hada_w2_b)
    B = khatri_rao(stack.hada_w1_a, stack.hada_w2_a)
    return mixture_update(x, gates, A, B, stack.scaling_E)


def khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    """[E, R, N] twice -> each row of one times each row of the other, [E, R², N]."""
    return rearrange(first[:, :, None] * second[:, None], "e p q n -> e (p q) n")


def mix_deltas(x: Tensor, gates: Tensor, stack: LoHaStack) -> Tensor:
    """The same by ΔW [E, O, D]; the gates multiply x, so there is no tensor of [T, E, O]."""
    one = einsum(stack.hada_w1_a, stack.hada_w1_b, "e r o, e r d -> e o d")
    two = einsum(stack.hada_w2_a, stack.hada_w2_b, "e r o, e r d -> e o d")
    weighted = (gates * stack.scaling_E).to(x.dtype)[..., None] * x[..., None, :]
    return einsum(weighted, (one * two).to(x.dtype), "... e d, e o d -> ... o")


ADAPTER = StackedLoHa
