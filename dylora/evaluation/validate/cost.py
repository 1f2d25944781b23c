"""The cost of one routed pass, against one pass per expert with mixed logits.

Shape letters: B batch, S sequence, E experts, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.model import DyLoRA_MoE
from dylora.training.memory import LiveBytes

ROUNDS = 5


class Cost(NamedTuple):
    """One pass against N passes: seconds of each round, and bytes allocated in addition."""

    one_pass_s: list[float]
    n_passes_s: list[float]
    one_pass_bytes: int
    n_passes_bytes: int
    passes: int

    @property
    def ratios(self) -> list[float]:
        """How many times as long the N passes took, by round."""
        return [n / one for n, one in zip(self.n_passes_s, self.one_pass_s, strict=True)]


def measure_cost(model: DyLoRA_MoE, ids: Tensor) -> Cost:
    """One routed pass against a pass per expert whose logits are mixed, in alternating rounds.

    The N passes get their routing weights. Each multiplies all experts, with a one-hot weight; one
    expert's matrices alone would take 7 % less on the embedded base with six experts of rank 16.
    """
    weights_BSE = model.get_routing_weights(ids).mean(2)
    methods: list[Callable[[], Tensor]] = [
        lambda: model(ids).logits,
        lambda: n_passes(model, ids, weights_BSE),
    ]
    peaks = [peak_bytes(method, ids.device) for method in methods]  # these passes warm up as well
    times: list[list[float]] = [[], []]
    for round_ in range(ROUNDS):
        for index in (0, 1) if round_ % 2 == 0 else (1, 0):
            times[index].append(seconds(methods[index], ids.device))
    return Cost(times[0], times[1], peaks[0], peaks[1], len(model.experts.live))


def one_hot(model: DyLoRA_MoE, expert: int, rows: int, device: torch.device) -> Tensor:
    """Routing weights [rows, E] that use one expert alone."""
    return torch.eye(len(model.experts), device=device)[[expert] * rows]


def n_passes(model: DyLoRA_MoE, ids: Tensor, weights: Tensor) -> Tensor:
    """Logits [B, S, V] of every expert alone, a pass each, mixed by weights [B, S or 1, E]."""
    mixed: Tensor | None = None
    for expert in model.experts.live:
        alone = one_hot(model, expert, len(ids), ids.device)
        logits = model(ids, routing_weights=alone).logits.float()
        if mixed is None:
            mixed = torch.zeros_like(logits)
        mixed.addcmul_(weights[..., expert, None], logits)  # in place: holds two, not one each
    assert mixed is not None
    return mixed


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` allocates in addition at one time; a CPU's allocator records none,
    so there operations are watched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with LiveBytes() as memory:
        run()
    return memory.peak


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def describe_cost(cost: Cost) -> list[str]:
    """The lines of a report."""

    def row(name: str, times: list[float], peak: int) -> str:
        median = 1e3 * statistics.median(times)
        return f"{name:10} {median:9.2f} ms   peak {peak / 1e6:.2f} MB"

    ratios = cost.ratios
    return [
        "",
        row("one pass", cost.one_pass_s, cost.one_pass_bytes),
        row(f"{cost.passes} passes", cost.n_passes_s, cost.n_passes_bytes),
        f"ratio      {statistics.median(ratios):9.2f}      "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)",
        "",
    ]
