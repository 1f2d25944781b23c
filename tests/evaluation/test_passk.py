"""pass@k, its interval and the paired test, against slow ways to the same numbers."""

import itertools
import math
import random

import numpy as np
import pytest

from dylora.evaluation.passk.estimate import bootstrap, compare, pass_at_k


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (6, 6, 2), (4, 0, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_program_that_passes(samples, passed, k):
    marks = [index < passed for index in range(samples)]
    draws = list(itertools.combinations(marks, k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_has_no_bias():
    n, k, chance = 6, 3, 0.3
    mean = sum(
        math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * pass_at_k(n, c, k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(3, 1, 4), (3, 1, 0), (0, 0, 1), (3, 4, 1), (3, -1, 1)]
)
def test_counts_that_cannot_be_are_refused(samples, passed, k):
    with pytest.raises(ValueError, match=r"samples"):
        pass_at_k(samples, passed, k)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = bootstrap((rng.random(150) < 0.3).tolist(), seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_is_the_same_each_time_and_narrows_with_tasks():
    few, many = bootstrap([0.0, 1.0] * 20), bootstrap([0.0, 1.0] * 320)
    assert few == bootstrap([0.0, 1.0] * 20)
    assert (many.high - many.low) == pytest.approx((few.high - few.low) / 4, rel=0.15)
    assert few.mean == many.mean == 0.5


def test_no_tasks_have_no_score():
    with pytest.raises(ValueError, match="no tasks"):
        bootstrap([])


def test_the_paired_test_counts_every_pattern_of_signs():
    rng = random.Random(0)
    for _ in range(20):
        first = [rng.randint(0, 4) for _ in range(9)]
        second = [rng.randint(0, 4) for _ in range(9)]
        steps = [b - a for a, b in zip(first, second, strict=True)]
        sums = [
            abs(sum(sign * step for sign, step in zip(signs, steps, strict=True)))
            for signs in itertools.product((-1, 1), repeat=9)
        ]
        expected = sum(total >= abs(sum(steps)) for total in sums) / len(sums)
        assert compare(first, second).p_value == pytest.approx(expected)


def test_with_one_sample_a_task_it_is_mcnemars_exact_test():
    first, second = [0] * 9 + [1] * 2 + [1] * 30, [1] * 9 + [0] * 2 + [1] * 30
    found = compare(first, second)
    tail = sum(math.comb(11, wins) for wins in (0, 1, 2)) / 2**11
    assert found[:3] == (9, 2, 30)
    assert found.p_value == pytest.approx(2 * tail)


def test_a_model_equal_to_itself_differs_with_p_1():
    assert compare([1, 0, 3], [1, 0, 3]) == (0, 0, 3, 1.0)
    with pytest.raises(ValueError, match="3 and 2 tasks"):
        compare([1, 0, 3], [1, 0])
