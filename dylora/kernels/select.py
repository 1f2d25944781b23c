"""The rule that selects the kernel of a pass."""

import math
from typing import NamedTuple

GATHER_TOKENS = 48  # at most, to gather experts
GATHER_FROM = 32.0  # mature experts per K from which on they are gathered


class Limits(NamedTuple):
    """From where on a kernel pays, in mature experts per K."""

    grouped: float  # it pays to sort from so many
    trained: float  # and so many times the tokens, with a backward pass
    applied: float  # without one
    gather: float  # so many a token, to gather experts


# Measured by experiments/speed/benchmark.py --section sparse (numbers in docs/performance.md). The
# dense kernel's work grows with tokens times experts and that of the grouped one far less; but it
# has to sort, and its products are thin. Gathering copies the experts of every token. Products in
# half precision favour the dense kernel, where a device has them. On CUDA (one H100, bfloat16, E up
# to 512) every kernel of few tokens waits for its launches, of which the dense one has the fewest;
# the grouped one pays once the dense products themselves take milliseconds.
LIMITS = {
    "cpu": Limits(grouped=4, trained=320, applied=800, gather=2),
    "cpu, half": Limits(grouped=8, trained=2000, applied=6000, gather=4),
    "cuda": Limits(grouped=16, trained=2e6, applied=2e6, gather=math.inf),
}


def select_kernel(
    *, tokens: int, mature: int, top_k: int, needs_grad: bool, device: str, half: bool = False
) -> str:
    """dense, grouped or gather, from what is known without looking at the gates.

    Args:
        tokens: T of this pass.
        mature: how many experts only their chosen tokens use.
        top_k: how many of those a token may use.
        needs_grad: whether a backward pass follows.
        half: whether products are of half precision.
    """
    if mature <= top_k:
        return "dense"
    per_k = mature / top_k
    limits = LIMITS["cuda" if device != "cpu" else "cpu, half" if half else "cpu"]
    few = not needs_grad and tokens <= GATHER_TOKENS
    if few and per_k >= max(GATHER_FROM, limits.gather * tokens):
        return "gather"
    enough = limits.trained if needs_grad else limits.applied
    pays = per_k >= limits.grouped and tokens * per_k >= enough
    return "grouped" if pays else "dense"
