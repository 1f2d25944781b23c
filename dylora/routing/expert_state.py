"""The state of a model's experts that every pass reads: maturity, which are enabled, fixed weights.

Shape letters: E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ExpertState(nn.Module):
    """Buffers on the device, and host copies for decisions that must not wait for it."""

    maturity_E: Tensor
    active_E: Tensor
    fixed_weights_E: Tensor

    def __init__(
        self,
        num_experts: int,
        fixed_weights: list[float] | None = None,
        device: torch.device | None = None,
        shared: int = 0,
    ):
        """shared: so many experts, the first ones, are mixed into every token beside the others."""
        super().__init__()
        fixed = fixed_weights or [1 / num_experts] * num_experts
        self.shared = shared
        self.register_buffer("maturity_E", torch.zeros(num_experts, device=device))
        self.register_buffer("active_E", torch.ones(num_experts, dtype=torch.bool, device=device))
        self.register_buffer("fixed_weights_E", torch.tensor(fixed, device=device))
        self.mature = [False] * num_experts
        self.all_immature = True
        self.set_active([True] * num_experts)

    @property
    def num_experts(self) -> int:
        """All experts that ever were: the width of every gate."""
        return len(self.active)

    @property
    def all_active(self) -> bool:
        """Whether every expert is enabled."""
        return self.active_count == len(self.active)

    @property
    def routed_E(self) -> Tensor:
        """Which experts a router chooses among: those that are enabled and not shared."""
        if not self.shared:
            return self.active_E
        routed_E = self.active_E.clone()
        routed_E[: self.shared] = False
        return routed_E

    @property
    def routed_count(self) -> int:
        """How many those are."""
        return self.active_count - sum(self.active[: self.shared])

    @property
    def all_routed(self) -> bool:
        """Whether a router chooses among all experts."""
        return not self.shared and self.all_active

    def set_active(self, active: list[bool]) -> None:
        """Which experts are enabled; the others have probability 0."""
        self.active_E = torch.tensor(active, device=self.active_E.device)
        self._mirror_active(active)

    def _mirror_active(self, active: list[bool]) -> None:
        self.active = list(active)
        self.active_count = sum(active)

    def set_maturity(self, maturity_E: Tensor) -> None:
        """What each expert's maturity is from here on; [E] on the CPU."""
        self.maturity_E.copy_(maturity_E, non_blocking=True)
        self._mirror_maturity(maturity_E.tolist())

    def _mirror_maturity(self, values: list[float]) -> None:
        self.mature = [value == 1 for value in values]
        self.all_immature = not any(values)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Values loaded past `set_maturity` and `set_active` are mirrored as well."""
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror_maturity(self.maturity_E.tolist())
        self._mirror_active(self.active_E.tolist())

    def resize(self, maturity: list[float], fixed_weights: list[float]) -> None:
        """Room for another number of experts, all of them enabled."""
        device = self.maturity_E.device
        self.maturity_E = torch.tensor(maturity, dtype=self.maturity_E.dtype, device=device)
        self.fixed_weights_E = torch.tensor(fixed_weights, device=device).to(self.maturity_E)
        self._mirror_maturity(maturity)
        self.set_active([True] * len(maturity))

    def fixed_gates(self) -> Tensor:
        """The weights [E] of router_type fixed; what inactive experts had goes to the others."""
        weights_E = self.fixed_weights_E
        if self.all_active:
            return weights_E
        kept_E = weights_E * self.active_E
        even_E = self.active_E.to(weights_E) / self.active_count
        kept_E = torch.where(kept_E.sum() > 0, kept_E, even_E)
        return kept_E * (weights_E.sum() / kept_E.sum())
