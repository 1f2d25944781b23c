"""The constant weights that stand for an expert, a mixture or fixed routing.

Shape letters: N blocks, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dylora.mixture import Mixture

Weights = Tensor | Sequence[float]
TOKEN_DEPENDENT = (
    "the routers choose by the token, so there is nothing constant to take: name one expert, give "
    "weights, or measure them on a text (run.py export --weights measured --text FILE)"
)


def static_weights(
    mixture: Mixture, expert: int | None = None, weights: Weights | None = None
) -> Tensor:
    """What a caller means by an expert, by weights, or by neither: weights [N, E], float64.

    Neither is allowed where the routers do not look at the token: router_type fixed, plain LoRA.
    Raises ValueError, with what to do, where the weights would depend on the token, for both at
    once, an expert that is not there, and weights that do not fit.
    """
    experts, sites = len(mixture.table), len(mixture.blocks)
    if expert is not None and weights is not None:
        raise ValueError("give an expert or weights, not both")
    if expert is not None:
        if expert not in mixture.live:
            raise ValueError(f"there is no expert {expert}, only {mixture.live} (without retired)")
        weights = [float(index == expert) for index in range(experts)]
    if weights is None:
        if mixture.config.is_learned:
            raise ValueError(TOKEN_DEPENDENT)
        weights = mixture.state.fixed_gates()
    return site_weights(weights, sites, [row.state != "retired" for row in mixture.table])


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
