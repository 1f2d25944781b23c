"""When is an expert mature? Pure functions of a small state, called once an optimizer step.

Per expert: evidence n (sum of its gates, in tokens) and the gate-weighted token loss with a fast
and a slow average, both of which move in proportion to that sum. How much the loss still changes is

    change = average of |slow - fast| / max(slow, first / 10)

which starts at 1/2 and has the slow average's memory, so that neither one lucky step nor the moment
when a loss turns from rising to falling counts as rest. With
    settled = sigmoid((ρ - change) / s),  seen = 1 - exp(-n / τ)
the modes are: manual (only `set_maturity` changes it), schedule (a ramp over the expert's part of
the run), usage (seen), plateau (settled), hybrid (seen · settled).

An expert's clock is its own: τ and all memories are shares of the tokens that were expected of it
when it began, an even share of what was left of the run. Experts that come or go later change
nothing of it. While the learning rate is below a third of its peak no loss counts as settled, since
a rate that decays lets every loss rest. Maturity snaps to 1 at a threshold, but for schedule, which
ends there. It falls only in the
modes that ask for the loss, when that of a mature expert jumps to twice its value: its data have
changed, and it begins anew.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.config import MoELoraConfig

FIRST_CHANGE = 0.5  # `change` of an expert that has just begun
FLOOR = 0.1  # of the first loss: relative changes of a loss near 0 mean nothing
LEAST_RATE = 1 / 3  # share of the peak rate below which no loss counts as settled
LEAST_MATURITY = 1e-3  # less counts as 0, which mixes densely without the gate's operations
JUMP = 0.15  # the fast average over the slow one: what a loss that doubles at once comes to
LATE = 0.8  # share of a run after which maturing leaves too little to adapt in
UNKNOWN_AT_FIRST = ("fast", "slow", "first", "expected")  # NaN before an expert's first token
EARLIER = ("maturity", "evidence", "fast", "slow", "born")  # fields in files of earlier versions


class ExpertMaturity(NamedTuple):
    """State of all experts, [E] each, float64 on the CPU; saved with the router."""

    maturity: Tensor  # m, in [0, 1]
    evidence: Tensor  # n, sum of its gates since it began, in tokens
    fast: Tensor  # fast average of the expert's loss in nats; NaN before its first token
    slow: Tensor  # slow average
    first: Tensor  # the loss of its first step; NaN before
    change: Tensor  # average relative difference of the two averages
    start_progress: Tensor  # share of the run that was done when the expert began
    expected: Tensor  # tokens expected of it when it began; NaN before its first token

    @classmethod
    def create(cls, num_experts: int, start_progress: float = 0.0) -> "ExpertMaturity":
        """All immature."""
        nan = math.nan
        values = (0.0, 0.0, nan, nan, nan, FIRST_CHANGE, min(start_progress, 1.0), nan)
        return cls(*(torch.full((num_experts,), value, dtype=torch.float64) for value in values))


def observe(
    state: ExpertMaturity,
    gate_sum_E: Tensor,
    loss_sum_E: Tensor,
    *,
    progress: float,
    run_tokens: float,
    active: int | Tensor,
    config: MoELoraConfig,
    rate: float = 1.0,
) -> ExpertMaturity:
    """The state after one optimizer step.

    Args:
        gate_sum_E: of the step's target tokens, averaged over blocks.
        loss_sum_E: Σ_t g_te · loss_t over the same tokens.
        progress: share of the run that is done, in [0, 1].
        run_tokens: target tokens of the whole run.
        active: how many experts a router chooses among; [E] where that differs by expert.
        rate: the step's learning rate as a share of its peak.
    """
    gate_sum_E, loss_sum_E = gate_sum_E.cpu().double(), loss_sum_E.cpu().double()
    state = begun(state, gate_sum_E, progress, run_tokens, active)
    loss = torch.where(gate_sum_E > 0, loss_sum_E / gate_sum_E, state.fast)
    share = gate_sum_E / state.expected.nan_to_num(1.0)

    def move(average: Tensor, value: Tensor, memory: float) -> Tensor:
        moved = average + (1 - torch.exp(-share / memory)) * (value - average)
        return torch.where(average.isnan(), value, moved)

    state = state._replace(
        evidence=state.evidence + gate_sum_E,
        fast=move(state.fast, loss, config.maturity_fast),
        slow=move(state.slow, loss, config.maturity_slow),
        first=torch.where(state.first.isnan(), loss, state.first),
    )
    rise = (state.fast - state.slow) / torch.maximum(state.slow, FLOOR * state.first)
    counts = rate >= LEAST_RATE
    if counts:
        change = move(state.change, rise.abs().nan_to_num(0.0), config.maturity_slow)
        state = state._replace(change=change)
    if config.maturity_mode == "manual":
        return state
    wanted = target(state, progress, counts, config).clamp(0, 1)
    wanted = torch.where(wanted < LEAST_MATURITY, 0.0, wanted)
    maturity = torch.maximum(state.maturity, wanted)
    # A schedule gets there by itself, without a jump.
    least = 1.0 if config.maturity_mode == "schedule" else config.maturity_threshold
    whole = maturity >= least
    state = state._replace(maturity=torch.where(whole, 1.0, maturity))
    if config.maturity_mode in ("plateau", "hybrid"):
        return fallen_back(state, rise > JUMP, progress, run_tokens / active)
    return state


def begun(
    state: ExpertMaturity,
    gate_sum_E: Tensor,
    progress: float,
    run_tokens: float,
    active: int | Tensor,
) -> ExpertMaturity:
    """The state in which experts that get their first tokens have a clock."""
    # One that was made at the end of an earlier clock begins with this one.
    start = torch.where(state.start_progress < progress, state.start_progress, 0.0)
    expected = ((1 - start) * run_tokens / active).clamp_min(1.0)
    first = state.expected.isnan() & (gate_sum_E > 0)
    return state._replace(
        start_progress=torch.where(first, start, state.start_progress),
        expected=torch.where(first, expected, state.expected),
    )


def target(state: ExpertMaturity, progress: float, counts: bool, config: MoELoraConfig) -> Tensor:
    """What the mode asks maturity [E] to be at least; counts: whether losses count at this rate."""
    mode = config.maturity_mode
    if mode == "schedule":
        begin, end = config.maturity_schedule
        own = (progress - state.start_progress) / (1 - state.start_progress).clamp_min(1e-12)
        return (own - begin) / (end - begin)
    usage = seen(state.evidence / state.expected.nan_to_num(1.0), config)
    plateau = settled(state.change, config) * float(counts)
    return {"usage": usage, "plateau": plateau, "hybrid": usage * plateau}[mode]


def seen(evidence: Tensor, config: MoELoraConfig) -> Tensor:
    """1 - exp(-n/τ), with n and τ as shares of the tokens expected of the expert."""
    return 1 - torch.exp(-evidence / config.maturity_tau)


def settled(change: Tensor, config: MoELoraConfig) -> Tensor:
    """Near 1 when the loss changes by less than ρ of itself between its two averages."""
    return torch.sigmoid((config.maturity_rho - change) / config.maturity_s)


def fallen_back(
    state: ExpertMaturity, jumped: Tensor, progress: float, run_tokens_each: float | Tensor
) -> ExpertMaturity:
    """The state in which mature experts whose loss has `jumped` [E] begin anew at this step."""
    falls = jumped & (state.maturity == 1)
    fresh = ExpertMaturity.create(len(falls), progress)
    expected = torch.as_tensor((1 - progress) * run_tokens_each).to(state.expected).clamp_min(1.0)
    fresh = fresh._replace(
        fast=state.fast,
        slow=state.fast,
        first=state.first,
        expected=expected.expand_as(state.expected),
    )
    pairs = zip(fresh, state, strict=True)
    return ExpertMaturity(*(torch.where(falls, new, old) for new, old in pairs))


def extended(state: ExpertMaturity, progress: float = 0.0) -> ExpertMaturity:
    """The state with one more expert, which begins when `progress` of the run is done."""
    fresh = ExpertMaturity.create(1, progress)
    return ExpertMaturity(*(torch.cat([old, new]) for old, new in zip(state, fresh, strict=True)))


def fields_in(names: Collection[str]) -> tuple[str, ...]:
    """Which fields a file has that has tensors of these names."""
    return EARLIER if "maturity.born" in names else ExpertMaturity._fields


def from_fields(fields: Mapping[str, Tensor]) -> ExpertMaturity:
    """The state of the fields of a file; what an earlier version did not keep begins afresh."""
    values = dict(fields)
    if "born" in values:
        values["start_progress"] = values.pop("born")
    return ExpertMaturity.create(len(values["maturity"]))._replace(**values)


def merged(state: ExpertMaturity, i: int, j: int, shares: tuple[float, float]) -> ExpertMaturity:
    """The state where expert i stands for both, which counted by these shares."""

    def mean(value: Tensor) -> Tensor:
        # An expert that has seen nothing has no averages yet, and no share in these.
        a, b = value[i], value[j]
        return shares[0] * a.nan_to_num(float(b)) + shares[1] * b.nan_to_num(float(a))

    values = {name: mean(getattr(state, name)) for name in ("fast", "slow", "first", "expected")}
    values |= {
        "maturity": torch.minimum(state.maturity[i], state.maturity[j]),
        "evidence": state.evidence[i] + state.evidence[j],
        "change": torch.maximum(state.change[i], state.change[j]),
        "start_progress": torch.minimum(state.start_progress[i], state.start_progress[j]),
    }
    changed = {name: value.clone() for name, value in state._asdict().items()}
    for name, value in values.items():
        changed[name][i] = value
    return ExpertMaturity(**changed)
