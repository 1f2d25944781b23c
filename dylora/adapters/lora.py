"""The mixture of LoRA experts, as it is defined:

    y = Σ_e g_e · s_e · B_e A_e x

The gate sits on the rank axis, so a mixture of E experts of rank r is one LoRA of rank E·r with a
diagonal in the middle: two products, and no tensor of [T, E, O]. This is the plain form, used by
`torch.compile` and DoRA and compared with a loop over experts by the tests; `dylora.kernels` has
its fast equals.

Shape letters: T tokens, D input width, O output width, E experts, R rank.
"""

from einops import einsum
from torch import Tensor


def mixture_update(x: Tensor, gates: Tensor, A: Tensor, B: Tensor, scaling_E: Tensor) -> Tensor:
    """x [..., D], gates [..., E], A [E, R, D] (or [1, R, D], shared), B [E, R, O] -> [..., O].

    In x's precision; casting A and B down is cheaper than raising x and y.
    """
    weights = (gates * scaling_E).to(x.dtype)
    h = einsum(x, A.to(x.dtype), "... d, e r d -> ... e r")
    h = h * weights[..., None].to(h.dtype)
    return einsum(h, B.to(h.dtype), "... e r, e r o -> ... o")
