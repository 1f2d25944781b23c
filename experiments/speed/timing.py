"""Interleaved timing: every contender once a round, in an order that turns; medians and ratios."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Of one contender."""

    median_ms: float
    ratio: float  # median over rounds of (this / baseline in the same round)
    low: float  # the quartiles of those ratios
    high: float


def interleave(
    contenders: dict[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all contenders; ratios are taken within a round, so a noisy minute hits both alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for name in names * 2:  # warm up
        contenders[name]()
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            started = clock()
            contenders[name]()
            synchronize(device)
            seconds[name].append(clock() - started)
    timings = {}
    for name, values in seconds.items():
        ratios = [mine / base for mine, base in zip(values, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        timings[name] = Timing(statistics.median(values) * 1e3, middle, low, high)
    return timings


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    title: str, ways: dict[str, Callable[[], object]], baseline: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Time, print, and return as JSON types; `options` has the rounds and the device, and may have
    the clock."""
    clock = getattr(options, "clock", time.perf_counter)
    timings = interleave(ways, baseline, options.rounds, options.device, clock)
    show(title, timings, baseline)
    return {name: timing._asdict() for name, timing in timings.items()}


def show(title: str, timings: dict[str, Timing], baseline: str) -> None:
    """A table on the terminal."""
    print(f"\n{title}\n{'contender':34} {'ms':>10} {'x ' + baseline:>14}   quartiles")
    for name, timing in timings.items():
        quartiles = f"{timing.low:.3f}-{timing.high:.3f}"
        print(f"{name:34} {timing.median_ms:10.2f} {timing.ratio:14.3f}   {quartiles}", flush=True)
