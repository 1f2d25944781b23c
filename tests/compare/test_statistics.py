"""What a comparison computes from its numbers, against scipy and by hand."""

import math

import pytest
from scipy import stats

from dylora.compare.statistics import choose, differences, interval, pass_interval, verdict
from dylora.evaluation.passk.estimate import wilson

OURS, THEIRS = [0.30, 0.34, 0.29, 0.35, 0.31], [0.33, 0.36, 0.33, 0.37, 0.35]
CELLS = [(rate, scale) for rate in (1e-4, 2e-4, 4e-4) for scale in (8.0, 16.0, 32.0)]
BRACKETED = {"bracketed": True, "reference_bracketed": True}


def test_the_paired_interval_is_that_of_scipys_paired_t_test():
    found = interval(differences(OURS, THEIRS))
    assert found is not None
    expected = stats.ttest_rel(OURS, THEIRS).confidence_interval(0.95)
    assert found[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == pytest.approx(-0.03)


@pytest.mark.parametrize(("passed", "total"), [(0, 10), (3, 10), (10, 10), (194, 300)])
def test_wilsons_interval_is_scipys(passed, total):
    found = wilson(passed, total)
    expected = stats.binomtest(passed, total).proportion_ci(method="wilson")
    assert found == pytest.approx((passed / total, *expected), abs=1e-12)


def test_answers_that_cannot_be_are_no_share():
    for passed, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="cannot have passed"):
            wilson(passed, total)


def test_passes_have_an_interval_over_seeds_and_with_one_seed_over_its_answers():
    assert pass_interval([3], 10) == wilson(3, 10)
    assert pass_interval([3, 4, 5], 10) == interval([0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("found", "lower_is_better", "told"),
    [
        ([-0.02, -0.03, -0.04], True, "better"),  # mean -0.03, deviation 0.01
        ([0.02, 0.03, 0.04], True, "worse"),
        ([0.02, 0.03, 0.04], False, "better"),
        ([-0.01, -0.03, -0.05], True, "no difference shown"),  # deviation 0.02
        ([-0.015, -0.03, -0.045], True, "no difference shown"),  # two deviations, and not more
        ([0.0, 0.0, 0.0], True, "no difference shown"),
        ([-0.02, -0.03], True, "under 3 seeds"),
        ([-0.02, math.nan, -0.04], True, "a run failed"),
    ],
)
def test_the_verdict_is_two_deviations_of_the_paired_difference(found, lower_is_better, told):
    assert verdict(found, lower_is_better=lower_is_better, **BRACKETED) == told


def test_no_method_loses_whose_own_optimum_is_not_bracketed():
    gain, loss = [-0.02, -0.03, -0.04], [0.02, 0.03, 0.04]
    open_ = "open: the worse one is not bracketed"
    ours = {"lower_is_better": True, "bracketed": False, "reference_bracketed": True}
    theirs = {"lower_is_better": True, "bracketed": True, "reference_bracketed": False}
    assert verdict(gain, **ours) == "better"
    assert verdict(loss, **ours) == open_
    assert verdict(gain, **theirs) == open_
    assert verdict(loss, **theirs) == "worse"


def test_the_best_cell_is_bracketed_only_inside_of_both_axes():
    losses = dict.fromkeys(CELLS, 1.0)
    middle = choose(losses | {(2e-4, 16.0): 0.5})
    assert middle == (2e-4, 16.0, 0.5, True)
    for edge in CELLS:
        if edge != (2e-4, 16.0):
            assert not choose(losses | {edge: 0.5}).bracketed
    assert not choose({(2e-4, 16.0): 0.5}).bracketed  # nothing else was tried


def test_a_cell_that_failed_is_never_chosen():
    assert choose({(1.0, 1.0): math.inf, (2.0, 1.0): 3.0}).rate == 2.0
    with pytest.raises(ValueError, match="no cell of its grid has a finite loss"):
        choose({(1.0, 1.0): math.inf})
