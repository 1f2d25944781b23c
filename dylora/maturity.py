"""When is an expert mature? Pure functions of a small state, called once an optimizer step.

Per expert: evidence n (gate mass received, in tokens) and the gate-weighted token loss l with a
fast and a slow average, both of which move in proportion to the mass. With
    settled = sigmoid((ρ - (slow - fast) / slow) / s),  seen = 1 - exp(-n / τ)
the modes are: manual (only `set` changes it), schedule (a ramp over the run), usage (seen),
plateau (settled, once there is any evidence), hybrid (seen · settled).
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
    evidence: Tensor  # n, gate mass so far, in tokens
    fast: Tensor  # fast average of the expert's loss in nats; NaN before its first token
    slow: Tensor  # slow average

    @classmethod
    def create(cls, num_experts: int) -> "ExpertMaturity":
        """All newborn."""
        zeros = torch.zeros(num_experts, dtype=torch.float64)
        unseen = torch.full_like(zeros, math.nan)
        return cls(zeros, zeros.clone(), unseen, unseen.clone())


def observe(
    state: ExpertMaturity,
    mass_E: Tensor,
    loss_mass_E: Tensor,
    *,
    progress: float,
    tokens_per_expert: float,
    config: MoELoraConfig,
) -> ExpertMaturity:
    """The state after one optimizer step.

    Args:
        mass_E: gate mass over the step's target tokens, averaged over sites.
        loss_mass_E: Σ_t g_te · loss_t over the same tokens.
        progress: share of the run that is done, in [0, 1].
        tokens_per_expert: target tokens that the run gives an expert on average.
    """
    mass_E, loss_mass_E = mass_E.double().cpu(), loss_mass_E.double().cpu()
    seen_now = mass_E > 0
    loss = torch.where(seen_now, loss_mass_E / mass_E, state.fast)
    evidence = state.evidence + mass_E

    def move(average: Tensor, memory: float) -> Tensor:
        weight = 1 - torch.exp(-mass_E / (memory * tokens_per_expert))
        moved = average + weight * (loss - average)
        return torch.where(average.isnan(), loss, moved)

    fast, slow = move(state.fast, config.maturity_fast), move(state.slow, config.maturity_slow)
    target = _MODES[config.maturity_mode](
        state.maturity, evidence / tokens_per_expert, fast, slow, progress, config
    )
    maturity = torch.maximum(state.maturity, target.nan_to_num(0.0).clamp(0, 1))
    maturity = torch.where(
        maturity >= config.maturity_threshold, torch.ones_like(maturity), maturity
    )
    if config.maturity_mode == "manual":
        maturity = state.maturity
    return ExpertMaturity(maturity, evidence, fast, slow)


def reset(state: ExpertMaturity, expert: int) -> ExpertMaturity:
    """The state with one expert newborn again."""
    newborn = ExpertMaturity.create(len(state.maturity))
    chosen = torch.arange(len(state.maturity)) == expert
    return ExpertMaturity(
        *(torch.where(chosen, new, old) for new, old in zip(newborn, state, strict=True))
    )


def seen(evidence: Tensor, config: MoELoraConfig) -> Tensor:
    """1 - exp(-n/τ), with n and τ as shares of the tokens the run gives an expert."""
    return 1 - torch.exp(-evidence / config.maturity_tau)


def settled(fast: Tensor, slow: Tensor, config: MoELoraConfig) -> Tensor:
    """Near 1 when the loss improves by less than ρ of itself between the two averages."""
    improvement = (slow - fast) / slow.clamp_min(1e-12)
    return torch.sigmoid((config.maturity_rho - improvement) / config.maturity_s)


def _manual(maturity, evidence, fast, slow, progress, config):
    return maturity


def _schedule(maturity, evidence, fast, slow, progress, config):
    begin, end = config.maturity_schedule
    return torch.full_like(maturity, min(1.0, max(0.0, (progress - begin) / (end - begin))))


def _usage(maturity, evidence, fast, slow, progress, config):
    return seen(evidence, config)


def _plateau(maturity, evidence, fast, slow, progress, config):
    # Both averages start at the same loss: wait until the slow one has had time to differ.
    return settled(fast, slow, config) * (evidence > config.maturity_slow)


def _hybrid(maturity, evidence, fast, slow, progress, config):
    return seen(evidence, config) * settled(fast, slow, config)


_MODES = {
    "manual": _manual,
    "schedule": _schedule,
    "usage": _usage,
    "plateau": _plateau,
    "hybrid": _hybrid,
}
