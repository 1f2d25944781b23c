"""One shift of a bias of the base, common to all experts (bias all)."""

from typing import Any

import torch
from torch import Tensor, nn

from dylora.routing.state import RoutingState


class BiasShift(nn.Module):
    """With bias all: what all experts add to a bias of the base outside their projections."""

    def __init__(self, state: RoutingState, bias: Tensor):
        super().__init__()
        self.state = [state]  # in a list: the state is no submodule of this
        self.shift = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    def add_shift(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the module whose bias this moves."""
        state = self.state[0]
        pass_ = state.current()
        if state.mine.disabled if pass_ is None else not pass_.enabled:
            return output
        return output + self.shift.to(output.dtype)
