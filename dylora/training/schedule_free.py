"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682; `schedulefree` of its authors) for
experts that come and go.

In training a parameter is y, at which gradients are taken. It is evaluated and saved as the average
x, of which y and z, the point that gradients move, are made: y = beta1·x + (1 - beta1)·z.
"""

from collections.abc import Callable
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

COUNTERS = {"k": 0.0, "weight_sum": 0.0, "lr_max": -1.0}  # and what they begin with


class ScheduleFree(AdamWScheduleFree):
    """Theirs, with the counters of a group kept by parameter: what begins later averages from its
    own first step. Begins in training.

    Between `eval` and `train` a parameter's state has y, so that to look at the averages changes
    no bit of what is trained.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter with a gradient, which stays as it is."""
        groups = self.param_groups
        parts = [part for group in groups for part in self._by_counters(group)]
        held = [p for part in parts for p in part["params"]]
        gradients = [p.grad for p in held]
        try:
            if not parts:
                return None
            for p, gradient in zip(held, gradients, strict=True):  # theirs are divided in place
                p.grad = gradient.clone()
            self.param_groups = parts
            loss = super().step(closure)
        finally:
            self.param_groups = groups
            for p, gradient in zip(held, gradients, strict=True):
                p.grad = gradient
        for part in parts:
            for p in part["params"]:
                self.state[p] |= {name: float(part[name]) for name in COUNTERS}
        return loss

    def _by_counters(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group of its own for the parameters that have the same counters."""
        parts: dict[tuple[float, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                state = self.state.get(p, {})
                counters = tuple(float(state.get(name, first)) for name, first in COUNTERS.items())
                parts.setdefault(counters, []).append(p)
        return [
            group | dict(zip(COUNTERS, counters, strict=True)) | {"params": p, "train_mode": True}
            for counters, p in parts.items()
        ]

    @torch.no_grad()
    def eval(self) -> None:
        """Every parameter becomes its average x."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "z" in state and "y" not in state:
                    state["y"] = p.clone()
                    p.lerp_(state["z"], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def train(self) -> None:
        """Every parameter is y again, bit for bit."""
        for p, state in self.state.items():
            if "y" in state:
                p.copy_(state.pop("y"))
