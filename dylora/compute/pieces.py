"""What the ways share."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of an update's products beside a base of this one: its own where the device
    multiplies it, or else float32, which a CPU without such instructions does tens of times faster.
    """
    return torch.float32 if device.type == "cpu" and _is_emulated(dtype) else dtype


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    return dtype in names and not getattr(torch.ops.mkldnn, names[dtype])()


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [T, D]."""
    return x.reshape(-1, x.shape[-1])


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operands are cast by hand here: an addition in place is not autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
