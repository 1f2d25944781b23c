"""Training passes by torch.compile, one layer of the base at a time."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dylora.model import DyLoRA_MoE
from dylora.routing.state import RoutingState
from dylora.training.distributed import layers_of


@contextmanager
def compiled_passes(model: DyLoRA_MoE, wanted: bool) -> Iterator[None]:
    """While entered, layers of the base in training mode and with gradient run compiled, for any
    number of rows and tokens; evaluation and decoding run as they are.

    Layers of one shape are traced one by one and share what is compiled. The compiler traces the
    plain, dense form of the mixture (`dylora.adapters.lora`), of mature experts too, whose gates
    are then 0 for most tokens; and traces anew where experts come, go or first mature. Raises
    ValueError where activations are recomputed, which it cannot trace.
    """
    if not wanted:
        yield
        return
    layers = [model.base.get_submodule(name) for name in layers_of(model)]
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(
            "train.compile is true, and the compiler has no train.gradient_checkpointing: set one "
            "of them to false"
        )
    forms = 8 * len(layers)  # torch's limit of traces is for one function, which the layers share
    limits = {"recompile_limit": forms, "accumulated_recompile_limit": 4 * forms}
    with (
        torch._dynamo.config.patch(**limits),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
        ExitStack() as held,
    ):
        # torch looks for a gradient of what enters a layer.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for layer in layers:
            plain: Any = layer.forward
            layer.forward = _compiled(layer, plain, model.mixture.state)
            held.callback(setattr, layer, "forward", plain)
        yield


def _compiled(layer: nn.Module, plain: Callable[..., Any], state: RoutingState) -> Any:
    # Dropout draws the numbers that it draws uncompiled.
    compiled = torch.compile(plain, dynamic=True, options={"fallback_random": True})

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        with state.compiled():
            return compiled(*args, **kwargs)

    return forward
