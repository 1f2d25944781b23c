"""What the ways share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [T, D]."""
    return x.reshape(-1, x.shape[-1])


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operands are cast by hand here: an addition in place is not autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
