"""The constant weights that stand for an expert, a mixture or fixed routing.

Shape letters: N blocks, E experts.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from dylora.integrations.site_weights import Weights, site_weights

if TYPE_CHECKING:
    from dylora.model import DyLoRA_MoE

TOKEN_DEPENDENT = (
    "the routers choose by the token, so there is nothing constant to take: name one expert, give "
    "weights, or measure them on a text (run.py export --weights measured --text FILE)"
)


def static_weights(
    model: "DyLoRA_MoE", expert: int | None = None, weights: Weights | None = None
) -> Tensor:
    """What a caller means by an expert, by weights, or by neither: weights [N, E], float64.

    Neither is allowed where the routers do not look at the token: router_type fixed, plain LoRA.
    Raises ValueError, with what to do, where the weights would depend on the token, for both at
    once, an expert that is not there, and weights that do not fit.
    """
    experts, sites = model.experts, len(model.mixture.blocks)
    if expert is not None and weights is not None:
        raise ValueError("give an expert or weights, not both")
    if expert is not None:
        if expert not in experts.live:
            raise ValueError(f"there is no expert {expert}, only {experts.live} (without retired)")
        weights = [float(index == expert) for index in range(len(experts))]
    if weights is None:
        if model.config.is_learned:
            raise ValueError(TOKEN_DEPENDENT)
        weights = model.mixture.state.fixed_gates()
    return site_weights(weights, sites, [row.state != "retired" for row in experts.table])
