"""The maturity signal: what makes an expert mature, what does not, and what undoes it."""

import math
from itertools import pairwise

import pytest
import torch

from dylora import ExpertMaturity, MoELoraConfig
from dylora.routing.maturity import extended, observe, seen, settled
from experiments.maturity import simulate

TOKENS = 1000.0  # that the run gives an expert
MODES = ["manual", "schedule", "usage", "plateau", "hybrid"]


def run(mode, losses, mass=(100.0, 100.0, 0.0), state=None, rates=None, begin=0.0, **settings):
    """States after each step, in which expert e sees mass[e] tokens at that step's loss.

    begin: share of the run that is done before the first step; the steps are all that is left.
    """
    config = MoELoraConfig(maturity_mode=mode, num_experts=3, **settings)
    state = state or ExpertMaturity.create(3)
    states = []
    for step, loss in enumerate(losses, start=1):
        gate_sum_E = torch.tensor(mass)
        state = observe(
            state,
            gate_sum_E,
            gate_sum_E * loss,
            progress=begin + (1 - begin) * step / len(losses),
            run_tokens=3 * TOKENS,
            active=3,
            config=config,
            rate=rates[step - 1] if rates else 1.0,
        )
        states.append(state)
    return states


def test_experts_are_born_immature_and_unseen():
    state = ExpertMaturity.create(3)
    assert state.maturity.tolist() == state.evidence.tolist() == [0, 0, 0]
    assert state.fast.isnan().all()
    assert state.slow.isnan().all()


def test_evidence_is_the_accumulated_gate_mass():
    assert run("hybrid", [2.0] * 5)[-1].evidence.tolist() == [500, 500, 0]


def test_averages_move_in_proportion_to_the_mass():
    config = MoELoraConfig(num_experts=2, maturity_fast=0.02)
    before = ExpertMaturity.create(2)
    four = torch.full((2,), 4.0, dtype=torch.float64)
    before = before._replace(fast=four, slow=four, first=four, expected=four * TOKENS / 4)
    mass = torch.tensor([5.0, 50.0], dtype=torch.float64)
    clock = {"progress": 0.1, "run_tokens": 2 * TOKENS, "active": 2}
    after = observe(before, mass, mass * 2, **clock, config=config)
    for memory, average in ((0.02, after.fast), (0.1, after.slow)):
        expected = [4 - 2 * (1 - math.exp(-n / (memory * TOKENS))) for n in (5, 50)]
        assert average.tolist() == pytest.approx(expected)


def test_one_step_of_mass_2n_moves_averages_like_two_of_n():
    once = run("hybrid", [2.0, 1.0], mass=(40.0, 40.0, 0.0))
    twice = run("hybrid", [1.0, 1.0], mass=(20.0, 20.0, 0.0), state=once[0])
    assert twice[-1].slow[0].item() == pytest.approx(once[-1].slow[0].item())


def test_the_first_tokens_set_both_averages():
    state = run("hybrid", [3.0])[-1]
    assert state.fast[0].item() == state.slow[0].item() == pytest.approx(3)


def test_a_tiny_first_mass_sets_the_averages_to_its_loss():
    state = run("hybrid", [3.0], mass=(1e-20, 1e-14, 1.0))[-1]
    assert state.slow.tolist() == pytest.approx([3, 3, 3])


def test_usage_is_one_minus_exp_of_the_evidence_over_tau():
    state = run("usage", [2.0] * 2, maturity_tau=0.3, maturity_threshold=1.0)[-1]
    assert state.maturity[0].item() == pytest.approx(1 - math.exp(-0.2 / 0.3))


def test_usage_does_not_ask_for_the_loss():
    falling, flat = run("usage", [5.0, 2.0, 1.0]), run("usage", [2.0] * 3)
    assert torch.equal(falling[-1].maturity, flat[-1].maturity)


def test_schedule_rises_linearly_between_its_two_shares():
    states = run("schedule", [2.0] * 10, maturity_schedule=(0.2, 0.7))  # no threshold cuts it
    expected = [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    assert [state.maturity[0].item() for state in states] == pytest.approx(expected)


def test_manual_moves_only_when_it_is_set():
    start = ExpertMaturity.create(3)._replace(maturity=torch.tensor([0.3, 0.95, 1.0]).double())
    assert torch.equal(run("manual", [2.0] * 20, state=start)[-1].maturity, start.maturity)


def test_maturity_by_hand():
    """Every number of three steps of one expert of two, recomputed without tensors."""
    state = ExpertMaturity.create(2)
    config = MoELoraConfig(num_experts=2, maturity_mode="hybrid")
    n, fast, slow, change, m = 0.0, None, None, 0.5, 0.0
    for step, (tokens, loss) in enumerate([(90.0, 2.0), (60.0, 1.5), (150.0, 1.6)], start=1):
        mass = torch.tensor([tokens, 0.0])
        clock = {"progress": step / 3, "run_tokens": 600.0, "active": 2, "config": config}
        state = observe(state, mass, mass * loss, **clock)
        n += tokens
        fast, slow = (
            loss if old is None else old + (1 - math.exp(-tokens / 300 / memory)) * (loss - old)
            for old, memory in ((fast, 0.05), (slow, 0.1))
        )
        weight = 1 - math.exp(-tokens / 300 / 0.1)
        change += weight * (abs(slow - fast) / max(slow, 0.2) - change)
        hybrid = (1 - math.exp(-n / 300 / 0.1)) / (1 + math.exp((change - 0.022) / 0.002))
        m = max(m, hybrid if hybrid >= 1e-3 else 0.0)
        m = 1.0 if m >= 0.7 else m
        row = [float(value[0]) for value in state]
        assert row == pytest.approx([m, n, fast, slow, 2.0, change, 0.0, 300.0])


# What counts as settled


@pytest.mark.parametrize("noise", simulate.NOISE)
def test_a_flat_loss_matures_in_the_middle_of_a_run_whatever_the_noise(noise):
    found = simulate.simulate(simulate.CURVES["flat after 10 %"], noise, experts=8)
    share, at = simulate.matured(found)
    assert share == 1
    assert 0.4 < at < 0.7


def test_the_time_of_maturing_hangs_not_on_noise():
    times = [
        simulate.matured(simulate.simulate(simulate.CURVES["flat after 10 %"], noise))[1]
        for noise in simulate.NOISE
    ]
    assert max(times) - min(times) < 0.06


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("rate", simulate.RATES)
def test_a_loss_that_halves_matures_nobody(noise, rate):
    found = simulate.simulate(simulate.CURVES["halves"], noise, simulate.RATES[rate], experts=8)
    assert not (found == 1).any()


@pytest.mark.parametrize("noise", simulate.NOISE)
def test_a_rising_loss_is_no_sign_of_having_settled(noise):
    found = simulate.simulate(simulate.CURVES["new task at 40 %"], noise, experts=8)
    assert not (found == 1).any()
    rising = simulate.simulate(lambda t: 4**t, noise, experts=8)
    assert not (rising == 1).any()


@pytest.mark.parametrize("noise", simulate.NOISE)
def test_nobody_matures_where_a_schedule_restarts(noise):
    whole = simulate.simulate(simulate.CURVES["restarts"], noise, experts=8) == 1
    begun = (whole[1:] & ~whole[:-1]).any(1).nonzero().flatten() / simulate.STEPS
    for restart in (1 / 3, 2 / 3):
        assert not ((begun > restart - 0.01) & (begun < restart + 0.07)).any()


@pytest.mark.parametrize("curve", ["flat after 10 %", "power law t^-0.1", "restarts"])
def test_nobody_matures_while_the_rate_is_nearly_0(curve):
    """The cosine is below a third from 0.61 on, and losses settle because of it."""
    found = simulate.simulate(simulate.CURVES[curve], 0.05, simulate.RATES["cosine"], experts=8)
    late = int(0.62 * simulate.STEPS)
    assert torch.equal(found[-1], found[late])


def test_a_loss_that_goes_to_0_settles_against_a_tenth_of_its_first_value():
    losses = [2 * math.exp(-0.2 * step) for step in range(100)]  # 2 % less a step, to the end
    assert run("plateau", losses, mass=(10.0, 10.0, 0.0))[-1].maturity[0] == 1


def test_a_rate_below_a_third_of_its_peak_lets_no_loss_count_as_settled():
    steps, flat = 40, [2.0] * 40
    assert run("plateau", flat, mass=(25.0,) * 3)[-1].maturity.tolist() == [1, 1, 1]
    slow = run("plateau", flat, mass=(25.0,) * 3, rates=[0.33] * steps)[-1]
    assert not slow.maturity.any()


# Each expert's own clock


def test_an_added_expert_does_not_age_the_others():
    half = run("hybrid", [2.0] * 10, mass=(50.0, 30.0, 40.0), maturity_threshold=1.0)[-1]
    mass = torch.tensor([1.0, 1.0, 1.0, 0.0])
    clock = {
        "progress": 0.5,
        "run_tokens": 3 * TOKENS,
        "config": MoELoraConfig(maturity_mode="hybrid"),
    }
    alone = observe(half, mass[:3], mass[:3] * 2, active=3, **clock)
    grown = observe(extended(half, 0.5), mass, mass * 2, active=4, **clock)
    for one, other in zip(alone, grown, strict=True):
        assert torch.equal(one, other[:3])


def test_a_late_new_expert_can_mature():
    """Born at 80 %: it is expected to see a fifth of what the others are."""
    before = ExpertMaturity.create(2)
    state = extended(before, 0.8)
    states = run("hybrid", [2.0] * 20, mass=(0.0, 0.0, 0.2 * TOKENS / 20), state=state, begin=0.8)
    assert states[-1].expected[2].item() == pytest.approx(0.2 * TOKENS)
    assert states[-1].maturity.tolist() == [0, 0, 1]


def test_an_expert_of_an_earlier_stage_s_end_begins_with_the_next_stage():
    state = run("schedule", [2.0] * 10, state=extended(ExpertMaturity.create(2), 1.0))[0]
    assert state.start_progress.tolist() == [0, 0, 1]  # it has no tokens yet
    state = run(
        "schedule", [2.0] * 10, mass=(9.0,) * 3, state=extended(ExpertMaturity.create(2), 1)
    )
    assert state[0].start_progress.tolist() == [0, 0, 0]
    assert state[4].maturity.tolist() == pytest.approx([0.75] * 3)


# Data that change


def test_a_mature_expert_falls_back_when_its_loss_jumps():
    config = MoELoraConfig(num_experts=3, maturity_mode="hybrid")
    clock = {"run_tokens": 3 * TOKENS, "active": 3}
    state = run("hybrid", [2.0] * 40, mass=(25.0,) * 3)[-1]
    assert state.maturity.tolist() == [1, 1, 1]
    mass, loss = torch.full((3,), 25.0), torch.tensor([2.0, 2.6, 4.4])
    for _ in range(3):  # its averages need a few steps to part
        state = observe(state, mass, mass * loss, progress=0.5, config=config, **clock)
    assert state.maturity.tolist() == [1, 1, 0]
    assert state.change[2] > 0.2  # afresh from 1/2
    assert state.expected.tolist() == [TOKENS, TOKENS, TOKENS / 2]  # a share of what is left
    for step in range(20):
        progress = 0.5 + (step + 1) / 40
        state = observe(state, mass, mass * loss, progress=progress, config=config, **clock)
    assert state.maturity[2] == 1  # its new loss has settled


@pytest.mark.parametrize("mode", ["manual", "schedule", "usage"])
def test_modes_that_ask_for_no_loss_do_not_fall_back(mode):
    mature = ExpertMaturity.create(3)._replace(maturity=torch.ones(3).double())
    states = run(mode, [2.0] * 5 + [20.0], mass=(100.0,) * 3, state=mature)
    assert states[-1].maturity.tolist() == [1, 1, 1]


# The modes


def test_plateau_is_low_while_the_loss_falls_and_high_when_it_has_settled():
    falling = run("plateau", [4.0, 3.0, 2.0, 1.0])[-1]
    flat = run("plateau", [4.0, 3.0, 2.0, 1.0] + [1.0] * 20)[-1]
    assert falling.maturity[0] < 0.01
    assert flat.maturity[0] > 0.8


def test_settled_is_half_where_the_change_is_rho():
    config = MoELoraConfig(maturity_rho=0.05, maturity_s=0.01)
    assert settled(torch.tensor(0.05).double(), config).item() == pytest.approx(0.5)


def test_hybrid_is_the_product_of_usage_and_settling():
    config, losses = MoELoraConfig(maturity_rho=0.1, maturity_s=0.05), [4.0, 3.9, 3.9, 3.9, 3.9]
    steps = run("hybrid", losses, maturity_threshold=1.0, maturity_rho=0.1, maturity_s=0.05)
    products = [
        (seen(s.evidence / TOKENS, config) * settled(s.change, config))[0].item() for s in steps
    ]
    assert 0.01 < max(products) < 0.9
    assert steps[-1].maturity[0].item() == pytest.approx(max(products))


@pytest.mark.parametrize("mode", MODES)
def test_maturity_never_falls_without_a_jump(mode):
    losses = [4.0, 3.0, 3.0, 3.0, 3.0, 3.4, 2.0, 1.0, 1.2, 0.5]  # settles, then moves again
    states = run(mode, losses, mass=(30.0, 10.0, 0.0))
    for before, after in pairwise(states):
        assert (after.maturity >= before.maturity).all()


def test_maturity_keeps_its_height_when_the_loss_moves_again():
    settled_at = run("plateau", [2.0] * 3, maturity_threshold=1.0)[-1]
    moving = run("plateau", [1.0], state=settled_at, maturity_threshold=1.0)[-1]
    assert 0 < settled_at.maturity[0] < 1
    assert moving.maturity[0] == settled_at.maturity[0]


def test_maturity_snaps_to_one_at_the_threshold():
    states = run("usage", [2.0] * 4, maturity_tau=0.1, maturity_threshold=0.8)
    assert states[0].maturity[0].item() == pytest.approx(1 - math.exp(-1))
    assert states[1].maturity[0].item() == 1  # 0.86 without the threshold


@pytest.mark.parametrize("mode", MODES)
def test_maturity_stays_within_zero_and_one(mode):
    for state in run(mode, [9.0, 1.0, 5.0, 0.1, 0.0, 0.0], mass=(1e6, 1e-6, 0.0)):
        assert ((state.maturity >= 0) & (state.maturity <= 1)).all()


@pytest.mark.parametrize("mode", ["manual", "usage", "plateau", "hybrid"])
def test_an_expert_that_gets_no_mass_stays_newborn(mode):
    assert run(mode, [2.0] * 30)[-1].maturity[2].item() == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_that_gets_no_mass_brings_no_nan(mode):
    for state in run(mode, [2.0] * 30):
        assert state.maturity.isfinite().all()


def test_a_late_expert_starts_its_averages_at_its_own_loss():
    early = run("hybrid", [4.0, 3.0])[-1]
    late = run("hybrid", [1.5], mass=(100.0, 100.0, 100.0), state=early)[-1]
    assert late.fast[2].item() == late.slow[2].item() == pytest.approx(1.5)


def test_an_expert_whose_loss_has_settled_matures_within_the_default_run():
    assert run("hybrid", [2.0] * 10)[-1].maturity.tolist() == [1, 1, 0]


def test_float32_sums_from_a_device_are_kept_in_float64():
    assert {value.dtype for value in run("hybrid", [2.0])[-1]} == {torch.float64}
