"""Optimizers that move the matrices of experts by a rule of their own, and all else by AdamW.

Shape letters: D width, E experts, R rank.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ByMatrix(torch.optim.AdamW):
    """AdamW for routers, biases and magnitudes; `move` is for stacks of matrices [E, R, D]."""

    @abstractmethod
    def new_state(self, p_ERD: Tensor) -> dict[str, Any]:
        """What is kept of a stack before its first step."""

    @abstractmethod
    def move(
        self, p_ERD: Tensor, gradient_ERD: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step of a stack and its state in place, each expert by itself."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of every parameter with a gradient."""
        held = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [p for p in group["params"] if p.ndim < 3]
            loss = super().step(closure)
        finally:
            for group, parameters in zip(self.param_groups, held, strict=True):
                group["params"] = parameters
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 2 and p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(self.new_state(p))
                    self.move(p, p.grad, state, group)
        return loss
