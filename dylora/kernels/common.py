"""What the kernels share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for the sake of exact tests."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of an update's products beside a base of this one: its own where the device
    multiplies it, or else float32, which a CPU without such instructions does tens of times faster.
    """
    return torch.float32 if device.type == "cpu" and is_emulated(dtype) else dtype


@contextmanager
def float32_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU unless they say otherwise, whatever the caller's defaults
    are: experts and routers are float32 on a base in any precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions to multiply a half precision."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or not torch.backends.mkldnn.is_available():
        return name is not None
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def flatten_tokens(x: Tensor) -> Tensor:
    """[..., D] -> [T, D]."""
    return x.reshape(-1, x.shape[-1])


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operands are cast by hand here: an addition in place is not autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
