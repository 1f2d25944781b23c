"""Two experts into one of bounded rank.

Shape letters: D input width, O output width, R rank.
"""

import torch

from dylora.adapters.projection import StackedLoRA
from dylora.adapters.stack import ExpertStack


def merged_stack(
    adapter: StackedLoRA,
    i: int,
    j: int,
    rank: int,
    alpha: float,
    shares: tuple[float, float],
) -> tuple[ExpertStack, float]:
    """A stack of one expert whose update is the mean of two, and its relative error.

    W = Σ_k a_k s_k B_kᵀ A_k is of rank 2R at most: with QR of its two factors the decomposition
    is that of a [2R, 2R] matrix, never of [O, D].
    """
    pieces = [adapter.stack_of(expert) for expert in (i, j)]
    own, scale = adapter.rank(rank), adapter.scaling(rank, alpha)
    factors = [
        share * float(stack.scaling_E[place])
        for share, (stack, place) in zip(shares, pieces, strict=True)
    ]
    Bs = [f * s.lora_B[p].double() for f, (s, p) in zip(factors, pieces, strict=True)]  # [R, O]
    first = pieces[0][0]
    bias = None
    if first.lora_bias is not None:
        other, at = pieces[1]
        assert other.lora_bias is not None
        mean = shares[0] * first.lora_bias[pieces[0][1]] + shares[1] * other.lora_bias[at]
        bias = mean[None]
    like = first.lora_B
    if adapter.shared_A is not None:
        merged = ((Bs[0] + Bs[1]) / scale).to(like)[None]
        return ExpertStack(i, [own], [scale], None, merged, None, bias), 0.0
    A_CD = torch.cat([adapter.A_of(stack)[place].double() for stack, place in pieces])
    B_CO = torch.cat(Bs)
    Q_A, R_A = torch.linalg.qr(A_CD.T)  # [D, c], [c, C]
    Q_B, R_B = torch.linalg.qr(B_CO.T)  # [O, b], [b, C]
    U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    kept = min(own, len(S))
    root = S[:kept].sqrt()
    A = A_CD.new_zeros(1, own, adapter.in_features)
    B = A_CD.new_zeros(1, own, adapter.out_features)
    A[0, :kept] = (Q_A @ (V[:kept].T * root)).T
    B[0, :kept] = (Q_B @ (U[:, :kept] * root)).T / scale
    total = S.norm()
    error = float(S[kept:].norm() / total) if total > 0 else 0.0
    return ExpertStack(i, [own], [scale], A.to(like), B.to(like), None, bias), error
