"""What the blocks of one model share in a pass.

Shape letters: B batch, S sequence, E experts.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dylora.routing.gating import RouterOutput


class RoutingState(nn.Module):
    """What the sites of one model share: the experts' maturity, which of them take part, and the
    wishes for one pass.

    Hooks on the base (`begin_pass`, `end_pass`) fix the wishes when a pass begins and let go of
    what it leaves at its sites when it ends. The wishes of a pass with gradient stand until the
    next one begins: gradient checkpointing runs the sites again in backward, and where that may
    come after another pass, `checkpoint_contexts` gives them the wishes of their own.
    """

    maturity_E: Tensor
    active_E: Tensor
    fixed_weights_E: Tensor

    def __init__(
        self,
        num_experts: int,
        fixed_weights: list[float] | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        fixed = fixed_weights or [1 / num_experts] * num_experts
        self.register_buffer("maturity_E", torch.zeros(num_experts, device=device))
        self.register_buffer("active_E", torch.ones(num_experts, dtype=torch.bool, device=device))
        self.register_buffer("fixed_weights_E", torch.tensor(fixed, device=device))
        # What the device knows, too, for decisions that must not wait for it.
        self.active = [True] * num_experts
        self.active_count = num_experts
        self.mature = [False] * num_experts
        self.all_immature = True
        self.enabled = True  # False: the frozen base alone
        self.requested: Tensor | None = None  # routing weights for the next pass only
        self.held: Tensor | None = None  # routing weights for every pass until taken back
        self.override: Tensor | None = None  # the ones of the pass under way
        self.token_mask: Tensor | None = None  # [B, S], 0 on padding, of the pass under way
        self.first_site: RouterOutput | None = None  # what router_scope shared hands on
        self.sites: list[Any] = []  # which follow this state

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        return self.__dict__ | dict.fromkeys(("requested", "override", "token_mask", "first_site"))

    def begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        self.override = self.held if self.requested is None else self.requested
        self.requested = None
        mask = kwargs.get("attention_mask")
        self.token_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        for site in self.sites:
            site.output = None  # a block that this pass skips has decided nothing

    def end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base model."""
        for site in self.sites:
            site.end()
        if not torch.is_grad_enabled():
            self.override = self.token_mask = self.first_site = None

    @property
    def num_experts(self) -> int:
        """All experts that ever were: the width of every gate."""
        return len(self.active)

    @property
    def all_active(self) -> bool:
        """Whether every expert takes part."""
        return self.active_count == len(self.active)

    def set_active(self, active: list[bool]) -> None:
        """Which experts take part; the others have probability 0."""
        self.active_E = torch.tensor(active, device=self.active_E.device)
        self._know_active(active)

    def _know_active(self, active: list[bool]) -> None:
        self.active = list(active)
        self.active_count = sum(active)

    def set_maturity(self, maturity_E: Tensor) -> None:
        """What each expert's maturity is from here on; [E] on the CPU."""
        self.maturity_E.copy_(maturity_E, non_blocking=True)
        self._know_maturity(maturity_E.tolist())

    def _know_maturity(self, values: list[float]) -> None:
        self.mature = [value == 1 for value in values]
        self.all_immature = not any(values)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Values loaded past `set_maturity` and `set_active` are known here as well."""
        super()._load_from_state_dict(*args, **kwargs)
        self._know_maturity(self.maturity_E.tolist())
        self._know_active(self.active_E.tolist())

    def resize(self, maturity: list[float], fixed_weights: list[float]) -> None:
        """Room for another number of experts, all of them taking part."""
        device = self.maturity_E.device
        self.maturity_E = torch.tensor(maturity, dtype=self.maturity_E.dtype, device=device)
        self.fixed_weights_E = torch.tensor(fixed_weights, device=device).to(self.maturity_E)
        self._know_maturity(maturity)
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

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], ...]:
        """`context_fn` of torch.utils.checkpoint: a recomputed layer sees what it saw at first."""
        return nullcontext(), _Recomputation(self)


class _Recomputation:
    """While a layer runs again its sites see the wishes of their own pass; after it they hold
    nothing of it. Entered once a backward pass, so maybe more than once.
    """

    def __init__(self, state: RoutingState):
        self.state = state
        self.wishes = self._read()

    def _read(self) -> tuple[Any, ...]:
        return self.state.override, self.state.token_mask, self.state.first_site

    def _write(self, wishes: tuple[Any, ...]) -> None:
        self.state.override, self.state.token_mask, self.state.first_site = wishes

    def __enter__(self) -> None:
        self.latest, self.outputs = self._read(), [site.output for site in self.state.sites]
        self._write(self.wishes)

    def __exit__(self, *error: object) -> None:
        self._write(self.latest)
        for site, output in zip(self.state.sites, self.outputs, strict=True):
            if site.output is not output:
                site.output = output
                site.end()
        del self.latest, self.outputs
