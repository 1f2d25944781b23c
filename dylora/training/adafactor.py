"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235; that of transformers) for stacks of experts.

Shape letters: D input width, E experts, R rank.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.optimization import Adafactor as OneTensor


class Adafactor(OneTensor):
    """Theirs with a learning rate from outside, in which each expert of a tensor moves by itself.

    A stack of matrices [E, R, D] keeps the mean squares of each one's rows, [E, R], and columns,
    [E, D]; anything else one for every element. An update is clipped to a root mean square of 1
    by row of the first dimension: by expert in a stack, and in a router.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        outside = {"scale_parameter": False, "relative_step": False}
        super().__init__(params, lr=lr, weight_decay=weight_decay, **outside)

    @staticmethod
    def _get_options(param_group: dict[str, Any], param_shape: tuple[int, ...]) -> Any:
        return len(param_shape) > 2, False  # whether it is factored, and has a first moment

    @staticmethod
    def _rms(tensor: Tensor) -> Tensor:
        rows = tensor.reshape(*(tensor.shape[:1] or (1,)), -1)
        return rows.square().mean(1).sqrt().view(*tensor.shape[:1], *(1,) * (tensor.ndim - 1))

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of every parameter with a gradient."""
        loss = super().step(closure)
        for state in self.state.values():
            state.pop("RMS", None)  # of the parameter, which scale_parameter would ask for
        return loss
