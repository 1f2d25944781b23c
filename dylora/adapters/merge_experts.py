"""Two low-rank updates into one of bounded rank.

Shape letters: D input width, O output width, R rank, C columns (the ranks summed).
"""

import torch
from torch import Tensor


def truncated_sum(A_CD: Tensor, B_CO: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [R, D] and B [R, O] whose product is nearest to that of A and B, and its relative error.

    The best of that rank (Eckart and Young 1936). With QR of the two factors the decomposition is
    that of a [C, C] matrix, never of [O, D].
    """
    Q_A, R_A = torch.linalg.qr(A_CD.T)  # [D, c], [c, C]
    Q_B, R_B = torch.linalg.qr(B_CO.T)  # [O, b], [b, C]
    U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    A = A_CD.new_zeros(rank, A_CD.shape[1])
    B = B_CO.new_zeros(rank, B_CO.shape[1])
    A[:kept] = (Q_A @ (V[:kept].T * root)).T
    B[:kept] = (Q_B @ (U[:, :kept] * root)).T
    total = S.norm()
    return A, B, float(S[kept:].norm() / total) if total > 0 else 0.0
