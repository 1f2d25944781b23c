"""A copy of a mixture that shares its base: the reference of DPO, KTO, GRPO and RLOO."""

import copy
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from dylora.experts import ExpertManager

EXPERTS = "dylora_experts"  # attribute of a base: its ExpertManager


def experts_of(model: Any) -> ExpertManager | None:
    """Those of a base, wrapped or compiled maybe; None where it carries none."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return getattr(model, EXPERTS, None)


def reference_model(experts: ExpertManager) -> PreTrainedModel:
    """The mixture as it is now, frozen, as a model for `ref_model=`.

    It shares the frozen weights of the base; experts, routers, buffers and what of the base is
    trained are copied. So it must stay on the device of the mixture.
    """
    base: Any = experts.mixture.base
    own = {id(parameter) for _, parameter in experts.mixture.own_parameters()}
    shared = [p for p in base.parameters() if id(p) not in own and not p.requires_grad]
    memo: dict[int, Any] = {id(p): p for p in shared}
    memo |= {id(experts.optimizer): None, id(base.dylora_pass.observer): None}
    copied = copy.deepcopy(base, memo)
    # A forward that a trainer has put on the base would run the base, not the copy.
    if isinstance(vars(copied).get("forward"), MethodType):
        del copied.forward
    return copied.requires_grad_(False).eval()


def make_reference(bare: PreTrainedModel, experts: ExpertManager) -> None:
    """Make a base that a trainer has loaded by its name the mixture as it is now, in place.

    The forward that the trainer has put on it stays. Raises ValueError for another base.
    """
    base = experts.mixture.base
    if type(bare) is not type(base) or not isinstance(bare, PreTrainedModel):
        raise ValueError(
            f"the reference is a {type(bare).__name__} without experts, so not the mixture that "
            "is trained: give ref_model=model.reference_model()"
        )
    copied = reference_model(experts)
    names = vars(bare).keys() & {"forward", "_original_forward"}
    kept = {name: vars(bare)[name] for name in names}
    copied_experts: ExpertManager = getattr(copied, EXPERTS)
    vars(bare).clear()
    vars(bare).update(vars(copied) | kept)
    copied_experts.mixture.base = bare
