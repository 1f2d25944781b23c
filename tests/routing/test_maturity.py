"""The maturity signal: what makes an expert mature, and what never undoes it."""

import math
from itertools import pairwise

import pytest
import torch

from dylora import ExpertMaturity, MoELoraConfig
from dylora.routing.maturity import observe, reset, seen, settled

TOKENS = 1000.0  # that the run gives an expert
MODES = ["manual", "schedule", "usage", "plateau", "hybrid"]


def run(mode, losses, mass=(100.0, 100.0, 0.0), state=None, **settings):
    """States after each step, in which expert e sees mass[e] tokens at that step's loss."""
    config = MoELoraConfig(maturity_mode=mode, num_experts=3, **settings)
    state = state or ExpertMaturity.create(3)
    states = []
    for step, loss in enumerate(losses, start=1):
        gate_sum_E = torch.tensor(mass)
        state = observe(
            state,
            gate_sum_E,
            gate_sum_E * loss,
            progress=step / len(losses),
            tokens_per_expert=TOKENS,
            config=config,
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
    config = MoELoraConfig(num_experts=2)
    state = ExpertMaturity(
        *torch.tensor([[0.0] * 2, [0.0] * 2, [4.0] * 2, [4.0] * 2, [0.0] * 2]).double()
    )
    mass = torch.tensor([5.0, 50.0], dtype=torch.float64)
    settings = {"progress": 0.1, "tokens_per_expert": TOKENS, "config": config}
    after = observe(state, mass, mass * 2, **settings)
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
    states = run("schedule", [2.0] * 10, maturity_schedule=(0.2, 0.7), maturity_threshold=1.0)
    expected = [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    assert [state.maturity[0].item() for state in states] == pytest.approx(expected)


def test_manual_moves_only_when_it_is_set():
    start = ExpertMaturity.create(3)._replace(maturity=torch.tensor([0.3, 0.95, 1.0]).double())
    assert torch.equal(run("manual", [2.0] * 20, state=start)[-1].maturity, start.maturity)


@pytest.mark.parametrize("mode", ["plateau", "hybrid"])
def test_a_loss_has_settled_only_once_the_slow_average_had_time_to_differ(mode):
    states = run(mode, [2.0] * 4, mass=(60.0, 60.0, 0.0))
    assert [state.maturity[0].item() > 0 for state in states] == [False, False, True, True]


@pytest.mark.parametrize("mode", ["plateau", "hybrid"])
def test_a_run_of_two_steps_matures_nobody_at_the_first(mode):
    first, _ = run(mode, [2.0, 2.0], mass=(500.0, 500.0, 0.0))
    assert not first.maturity.any()


def test_plateau_is_low_while_the_loss_falls_and_high_when_it_has_settled():
    falling = run("plateau", [4.0, 3.0, 2.0, 1.0])[-1]
    flat = run("plateau", [4.0, 3.0, 2.0, 1.0] + [1.0] * 20)[-1]
    assert falling.maturity[0] < 0.01
    assert flat.maturity[0] > 0.8


def test_settled_is_half_where_the_improvement_is_rho():
    config = MoELoraConfig(maturity_rho=0.05, maturity_s=0.01)
    value = settled(torch.tensor(1.9).double(), torch.tensor(2.0).double(), config)
    assert value.item() == pytest.approx(0.5)


def test_hybrid_is_the_product_of_usage_and_settling():
    config = MoELoraConfig()
    steps = run("hybrid", [4.0, 3.95, 3.9], maturity_threshold=1.0)
    products = [
        (seen(s.evidence / TOKENS, config) * settled(s.fast, s.slow, config))[0].item()
        for s in steps
    ]
    assert 0.01 < max(products) < 0.9
    assert steps[-1].maturity[0].item() == pytest.approx(max(products))


@pytest.mark.parametrize("mode", MODES)
def test_maturity_never_falls(mode):
    losses = [4.0, 3.0, 3.0, 3.0, 3.0, 5.0, 2.0, 1.0, 6.0, 0.5]  # settles, then moves again
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


def test_reset_makes_one_expert_newborn_and_leaves_the_others():
    before = run("hybrid", [2.0] * 10, mass=(100.0, 50.0, 70.0))[-1]
    after, newborn = reset(before, 1), ExpertMaturity.create(1)
    for old, new, fresh in zip(before, after, newborn, strict=True):
        torch.testing.assert_close(new[[1]], fresh, equal_nan=True)
        assert torch.equal(new[[0, 2]], old[[0, 2]])


def test_an_expert_that_was_reset_matures_again():
    grown = run("hybrid", [2.0] * 10)[-1]
    again = run("hybrid", [2.0] * 10, state=reset(grown, 0))
    assert again[0].maturity[0] < again[-1].maturity[0] == grown.maturity[0]


def test_float32_sums_from_a_device_are_kept_in_float64():
    assert {value.dtype for value in run("hybrid", [2.0])[-1]} == {torch.float64}
