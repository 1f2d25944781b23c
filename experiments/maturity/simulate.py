"""Question: on which loss curves does an expert mature, when, and how much does noise matter?

Method: `dylora.routing.maturity.observe` alone, in mode hybrid, on made-up loss curves
of 300 steps: each of 64 experts gets an even share of every step's tokens, and the curve's loss
times 1 + noise of its own. No model is trained.
Rule, fixed before the runs: a flat loss matures between 0.4 and 0.7 of the run whatever the noise;
a loss that halves matures nobody, a jump (a new task, a restarted schedule) nobody at the jump, and
nobody matures while the rate is below a third of its peak.
Result: experiments/LOG.md and experiments/results/maturity_simulated.json.

    python experiments/maturity/simulate.py            # seconds; prints the table, writes the JSON
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dylora.config import MoELoraConfig
from dylora.routing.maturity import ExpertMaturity, observe

RESULTS = Path(__file__).parents[1] / "results" / "maturity_simulated.json"
STEPS, EXPERTS, TOKENS = 300, 64, 1000.0  # TOKENS: of a step
NOISE = (0.0, 0.05, 0.2)  # standard deviation of a step's loss, relative
NEW_TASK = 0.4  # progress at which the loss jumps
# Training loss of compare.py's dense run, seed 0, under a cosine: means of ten steps of 100.
RECORDED = (2.704, 1.515, 0.965, 0.713, 0.543, 0.506, 0.456, 0.394, 0.352, 0.358)


def restarting(t: float) -> float:
    """Three cycles: the loss falls by 40 % and jumps most of the way back at 1/3 and 2/3."""
    cycle = min(int(3 * t), 2)
    return (1 - 0.15 * cycle) * (1 - 0.4 * (3 * t - cycle) ** 0.7)


def new_task(t: float) -> float:
    """Falls, jumps to three times its value, and falls again."""
    if t < NEW_TASK:
        return 1 + math.exp(-t / 0.1)
    return 1 + 2 * math.exp(-(t - NEW_TASK) / 0.1)


def recorded(t: float) -> float:
    """The recorded loss, straight between the middles of its means."""
    place = min(max(10 * t - 0.5, 0.0), len(RECORDED) - 1.0)
    left = min(int(place), len(RECORDED) - 2)
    return RECORDED[left] + (place - left) * (RECORDED[left + 1] - RECORDED[left])


CURVES: dict[str, Callable[[float], float]] = {
    "flat after 10 %": lambda t: max(2 - 10 * t, 1.0),
    "power law t^-0.1": lambda t: t**-0.1,
    "falls linearly by 30 %": lambda t: 1 - 0.3 * t,
    "halves": lambda t: 2 ** (1 - t),
    "power law t^-0.5": lambda t: t**-0.5,
    "new task at 40 %": new_task,
    "restarts": restarting,
    "recorded, six skills": recorded,
}
RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


def simulate(
    curve: Callable[[float], float],
    noise: float,
    rate: Callable[[float], float] = RATES["constant"],
    config: MoELoraConfig | None = None,
    steps: int = STEPS,
    experts: int = EXPERTS,
) -> Tensor:
    """Maturity after each step, [steps, experts]."""
    config = config or MoELoraConfig(maturity_mode="hybrid")
    draw, state = torch.Generator().manual_seed(0), ExpertMaturity.create(experts)
    gate_sum_E = torch.full((experts,), TOKENS / experts)
    maturity = []
    for step in range(1, steps + 1):
        loss_E = curve(step / steps) * (1 + noise * torch.randn(experts, generator=draw))
        state = observe(
            state,
            gate_sum_E,
            gate_sum_E * loss_E,
            progress=step / steps,
            run_tokens=steps * TOKENS,
            active=experts,
            config=config,
            rate=rate(step / steps),
        )
        maturity.append(state.maturity)
    return torch.stack(maturity)


def matured(maturity: Tensor) -> tuple[float, float | None]:
    """The share of experts that ever matured, and the median share of the run at which."""
    whole = maturity == 1
    ever = whole.any(0)
    first = (whole.int().argmax(0)[ever] + 1) / len(maturity)
    return float(ever.double().mean()), float(first.median()) if ever.any() else None


def main() -> None:
    rows = []
    print("| loss curve | rate | noise 0 | 5 % | 20 % |\n|---|---|---|---|---|")
    for name, curve in CURVES.items():
        for schedule, rate in RATES.items():
            found = [matured(simulate(curve, noise, rate)) for noise in NOISE]
            rows.append({"curve": name, "rate": schedule, "noise": NOISE, "matured": found})
            cells = [f"{at:.2f} ({share:.0%})" if at else "never" for share, at in found]
            print(f"| {name} | {schedule} | {' | '.join(cells)} |")
    RESULTS.write_text(json.dumps({"steps": STEPS, "experts": EXPERTS, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
