"""The rule that chooses the way."""

import math
from typing import NamedTuple

GATHERED_TOKENS = 48  # at most, to look rows up
GATHERED_FROM = 32.0  # mature experts per place of the top-k, from which on rows are looked up


class Limits(NamedTuple):
    """From where on a way pays, in mature experts per place of the top-k."""

    grouped: float  # it pays to sort from so many
    trained: float  # and so many times the tokens, with a backward pass
    applied: float  # without one
    gathered: float  # so many a token, to look rows up


# Measured by experiments/speed/benchmark.py --section sparse (numbers in docs/performance.md). The
# wide way's work grows with tokens times experts and that of the grouped way far less; but it has
# to sort, and its products are thin. Looking rows up copies those of every token. Products in half
# precision favour the wide way, where a device has them. On CUDA (one H100, bfloat16, E up to 512)
# every way of few tokens waits for its launches, of which the wide way has the fewest; the grouped
# way pays once the wide products themselves take milliseconds.
LIMITS = {
    "cpu": Limits(grouped=4, trained=320, applied=800, gathered=2),
    "cpu, half": Limits(grouped=8, trained=2000, applied=6000, gathered=4),
    "cuda": Limits(grouped=16, trained=2e6, applied=2e6, gathered=math.inf),
}


def select_kernel(
    *, tokens: int, mature: int, top_k: int, needs_grad: bool, device: str, half: bool = False
) -> str:
    """wide, grouped or gathered, from what is known without looking at the gates.

    Args:
        tokens: T of this pass.
        mature: how many experts only their chosen tokens use.
        top_k: how many of those a token may use.
        needs_grad: whether a backward pass follows.
        half: whether products are of half precision.
    """
    if mature <= top_k:
        return "wide"
    per_place = mature / top_k
    limits = LIMITS["cuda" if device != "cpu" else "cpu, half" if half else "cpu"]
    few = not needs_grad and tokens <= GATHERED_TOKENS
    if few and per_place >= max(GATHERED_FROM, limits.gathered * tokens):
        return "gathered"
    enough = limits.trained if needs_grad else limits.applied
    pays = per_place >= limits.grouped and tokens * per_place >= enough
    return "grouped" if pays else "wide"
