"""What experts of a live mixture add to the weights of its base."""

from torch import Tensor

from dylora.adapters.adapter import Adapter
from dylora.storage.peft_types import PEFT_TYPES


def delta_weight(adapter: Adapter, expert: int) -> Tensor:
    """What one expert adds to the projection's weight, [O, D], without DoRA's magnitude."""
    kind, own = PEFT_TYPES[adapter.PEFT_TYPE], adapter.expert_tensors(expert)
    stack, place = adapter.stack_of(expert)
    return stack.scaling_E[place] * kind.product(*(own[name] for name in kind.matrices))
