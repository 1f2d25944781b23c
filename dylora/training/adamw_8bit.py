"""AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861; `bitsandbytes`) for stacks
of experts.

Shape letters: D width, E experts, R rank, N blocks of an expert's matrix.
"""

from functools import lru_cache
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from dylora.training.by_matrix import ByMatrix

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # values that share a scale; of their kernels


class AdamW8bit(ByMatrix):
    """Theirs for matrices, in which no block of values with one scale reaches into the next expert.

    A moment is a byte for each value, [E, R, D], and a float32 scale for each block, [E, N].
    """

    def new_state(self, p_ERD: Tensor) -> dict[str, Any]:
        """Two moments, and how many steps they have seen."""
        blocks = -(-p_ERD[0].numel() // BLOCK)
        state: dict[str, Any] = {"step": 0}
        for name in MOMENTS:
            state[name] = torch.zeros_like(p_ERD, dtype=torch.uint8)
            state[f"{name}_scale"] = p_ERD.new_zeros(len(p_ERD), blocks)
        return state

    def move(
        self, p_ERD: Tensor, gradient_ERD: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step, by a kernel for the stack where blocks end with experts, else by one each."""
        state["step"] += 1
        beta1, beta2 = group["betas"]
        signed, unsigned = code_maps(p_ERD.device)
        size = 1 if p_ERD[0].numel() % BLOCK else len(p_ERD)
        scales = [state[f"{name}_scale"] for name in MOMENTS]
        tensors = [gradient_ERD.contiguous(), p_ERD, *(state[name] for name in MOMENTS), *scales]
        for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            gradient, p, first, second, first_scale, second_scale = parts
            functional.optimizer_update_8bit_blockwise(
                "adam",
                gradient,
                p,
                state1=first,
                state2=second,
                beta1=beta1,
                beta2=beta2,
                beta3=0.0,  # not of Adam
                alpha=0.0,  # nor this
                eps=group["eps"],
                step=int(state["step"]),
                lr=group["lr"],
                qmap1=signed,
                qmap2=unsigned,
                absmax1=first_scale.view(-1),
                absmax2=second_scale.view(-1),
                weight_decay=group["weight_decay"],
            )


@lru_cache
def code_maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values [256] that bytes stand for, in the first and in the second moment."""
    signed, unsigned = (functional.create_dynamic_map(signed=s) for s in (True, False))
    return signed.to(device), unsigned.to(device)
