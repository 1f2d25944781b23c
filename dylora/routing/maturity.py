"""When is an expert mature? Pure functions of a small state, called once an optimizer step.

Per expert: evidence n (sum of its gates, in tokens) and the gate-weighted token loss l with a fast
and a slow average, both of which move in proportion to that sum. With
    settled = sigmoid((ρ - (slow - fast) / slow) / s),  seen = 1 - exp(-n / τ)
the modes are: manual (only `set` changes it), schedule (a ramp over the run), usage (seen),
plateau (settled, once the slow average has had time to differ), hybrid (seen · plateau).
τ and the averages' memories are shares of the tokens that the run will give each expert, so that a
short run matures too. Maturity never falls, and snaps to 1 at a threshold.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.config import MoELoraConfig


class ExpertMaturity(NamedTuple):
    """State of all experts, [E] each, float64 on the CPU; saved with the router."""

    maturity: Tensor  # m, in [0, 1]
    evidence: Tensor  # n, sum of its gates so far, in tokens
    fast: Tensor  # fast average of the expert's loss in nats; NaN before its first token
    slow: Tensor  # slow average
    born: Tensor  # share of the run that was done when the expert began, or was reset

    @classmethod
    def create(cls, num_experts: int, born: float = 0.0) -> "ExpertMaturity":
        """All immature."""
        values = (0.0, 0.0, math.nan, math.nan, min(born, 1.0))
        return cls(*(torch.full((num_experts,), value, dtype=torch.float64) for value in values))


def observe(
    state: ExpertMaturity,
    gate_sum_E: Tensor,
    loss_sum_E: Tensor,
    *,
    progress: float,
    tokens_per_expert: float,
    config: MoELoraConfig,
) -> ExpertMaturity:
    """The state after one optimizer step.

    Args:
        gate_sum_E: of the step's target tokens, averaged over blocks.
        loss_sum_E: Σ_t g_te · loss_t over the same tokens.
        progress: share of the run that is done, in [0, 1].
        tokens_per_expert: target tokens that the run gives an expert on average.
    """
    gate_sum_E, loss_sum_E = gate_sum_E.cpu().double(), loss_sum_E.cpu().double()
    loss = torch.where(gate_sum_E > 0, loss_sum_E / gate_sum_E, state.fast)
    evidence = state.evidence + gate_sum_E

    def move(average: Tensor, memory: float) -> Tensor:
        weight = 1 - torch.exp(-gate_sum_E / (memory * tokens_per_expert))
        moved = average + weight * (loss - average)
        return torch.where(average.isnan(), loss, moved)

    fast, slow = move(state.fast, config.maturity_fast), move(state.slow, config.maturity_slow)
    if config.maturity_mode == "manual":
        return ExpertMaturity(state.maturity, evidence, fast, slow, state.born)
    usage = seen(evidence / tokens_per_expert, config)
    # Both averages start at the same loss: their difference means nothing at first.
    could_differ = state.evidence / tokens_per_expert > config.maturity_slow
    plateau = settled(fast, slow, config) * could_differ
    begin, end = config.maturity_schedule
    own_progress = (progress - state.born) / (1 - state.born).clamp_min(1e-12)
    target = {
        "schedule": ((own_progress - begin) / (end - begin)).clamp(0, 1),
        "usage": usage,
        "plateau": plateau,
        "hybrid": usage * plateau,
    }[config.maturity_mode]
    maturity = torch.maximum(state.maturity, target.nan_to_num(0.0).clamp(0, 1))
    maturity = torch.where(
        maturity >= config.maturity_threshold, torch.ones_like(maturity), maturity
    )
    return ExpertMaturity(maturity, evidence, fast, slow, state.born)


def seen(evidence: Tensor, config: MoELoraConfig) -> Tensor:
    """1 - exp(-n/τ), with n and τ as shares of the tokens the run gives an expert."""
    return 1 - torch.exp(-evidence / config.maturity_tau)


def settled(fast: Tensor, slow: Tensor, config: MoELoraConfig) -> Tensor:
    """Near 1 when the loss improves by less than ρ of itself between the two averages."""
    improvement = (slow - fast) / slow.clamp_min(1e-12)
    return torch.sigmoid((config.maturity_rho - improvement) / config.maturity_s)


def extended(state: ExpertMaturity, progress: float = 0.0) -> ExpertMaturity:
    """The state with one more expert, which begins when `progress` of the run is done."""
    fresh = ExpertMaturity.create(1, progress)
    return ExpertMaturity(*(torch.cat([old, new]) for old, new in zip(state, fresh, strict=True)))


def reset(state: ExpertMaturity, expert: int, progress: float = 0.0) -> ExpertMaturity:
    """The state with one expert immature again, as one that begins at `progress` of the run."""
    fresh = ExpertMaturity.create(len(state.maturity), progress)
    chosen = torch.arange(len(state.maturity)) == expert
    return ExpertMaturity(
        *(torch.where(chosen, new, old) for new, old in zip(fresh, state, strict=True))
    )


def merged(state: ExpertMaturity, i: int, j: int, shares: tuple[float, float]) -> ExpertMaturity:
    """The state where expert i stands for both, which counted by these shares."""
    # An expert that has seen nothing has no averages yet, and no share in these.
    fast, slow = (
        shares[0] * value[i].nan_to_num(float(value[j]))
        + shares[1] * value[j].nan_to_num(float(value[i]))
        for value in (state.fast, state.slow)
    )
    values = {
        "maturity": torch.minimum(state.maturity[i], state.maturity[j]),
        "evidence": state.evidence[i] + state.evidence[j],
        "fast": fast,
        "slow": slow,
        "born": torch.minimum(state.born[i], state.born[j]),
    }
    changed = {name: value.clone() for name, value in state._asdict().items()}
    for name, value in values.items():
        changed[name][i] = value
    return ExpertMaturity(**changed)
