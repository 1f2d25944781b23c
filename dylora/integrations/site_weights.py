"""Constant weights of experts by block and by projection.

Shape letters: N blocks, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Weights = Tensor | Sequence[float]


def site_weights(weights: Weights, sites: int, live: list[bool]) -> Tensor:
    """Weights [E] or [N, E] as [N, E] in float64.

    Raises ValueError for another shape, for values that are negative or not finite, for a weight
    of a retired expert, and where no expert has any.
    """
    weights_NE = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    experts = len(live)
    if list(weights_NE.shape) not in ([experts], [sites, experts]):
        raise ValueError(
            f"weights have shape {list(weights_NE.shape)}, but must hold one value for each of "
            f"the {experts} experts (0 for a retired one), [{experts}], or for each site and "
            f"expert, [{sites}, {experts}]"
        )
    if not bool((weights_NE.isfinite() & (weights_NE >= 0)).all()):
        raise ValueError(f"weights are {weights_NE.tolist()}, but must be finite and at least 0")
    weights_NE = weights_NE.expand(sites, experts).clone()
    for expert in range(experts):
        if not live[expert] and bool((weights_NE[:, expert] > 0).any()):
            raise ValueError(f"expert_{expert} is retired: its weight must be 0")
    if not bool((weights_NE > 0).any()):
        raise ValueError("all weights are 0: that is the base without any expert")
    return weights_NE


def by_projection(
    weights_NE: Tensor, live: list[bool], sites: list[str], projections: list[str]
) -> dict[str, list[float]]:
    """Path of a projection -> the weights of the live experts, in order."""
    rows = dict(zip(sites, weights_NE[:, live].tolist(), strict=True))
    return {path: rows[path.rpartition(".")[0]] for path in projections}
