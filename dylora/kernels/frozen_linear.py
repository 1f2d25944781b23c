"""Gradients of frozen projections, computed along with those of the experts.

A frozen projection y = x Wᵀ has one gradient, dx = dy W. Left to autograd, each of q, k and v makes
a [T, D] of its own, and three additions join them with that of the experts. So a projection that
is sure to be no more than that (`StackedLoRA.run_outside_autograd`) runs outside autograd, and the
node that makes h adds dy W into the one gradient of x it computes anyway.

In the graph a gradient carrier stands for y: an input of the node that adds the update, an output
of the one that makes h. It has y's shape and no memory, and carries dy from the one to the other.

Shape letters: T tokens, D input width, O output width.
"""

from typing import Any

from torch import Tensor

from dylora.kernels.common import flatten_tokens, product_dtype


class FrozenLinearGrads:
    """The products of one input: of each projection the width of its output and, from when it has
    run outside autograd, its weight."""

    def __init__(self, widths: list[int]):
        self.widths = widths
        self._weights: list[tuple[Tensor, int] | None] = [None] * len(widths)

    def record(self, index: int, weight: Tensor) -> None:
        """This projection has run outside autograd with weight [O, D]."""
        self._weights[index] = weight, weight._version

    def carriers(self, x: Tensor) -> list[Tensor]:
        """One [..., O] of each projection for x [..., D]; never read."""
        return [x.new_empty(()).expand(*x.shape[:-1], width) for width in self.widths]

    def gradient(self, dys: tuple[Tensor | None, ...]) -> Tensor | None:
        """Σ dy W [T, D] over the projections that ran outside autograd, in the precision of
        products; None where none did.

        Raises RuntimeError for a weight that was written to since, as autograd would.
        """
        dx = None
        for dy, recorded in zip(dys, self._weights, strict=True):
            if dy is None or recorded is None:
                continue
            weight, version = recorded
            if weight._version != version:
                raise RuntimeError("a frozen weight was changed between forward and backward")
            dtype = product_dtype(dy.dtype, dy.device)
            dy_TO, W = flatten_tokens(dy).to(dtype), weight.to(dtype)
            dx = dy_TO @ W if dx is None else dx.addmm_(dy_TO, W)
        return dx


def gradients_of_y(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For y, and for the carrier that stands for it."""
    of_y, of_carrier = (dy if wanted else None for wanted in ctx.needs_input_grad[:2])
    return of_y, of_carrier
