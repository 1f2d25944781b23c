"""Measures of a stream: against their formulas, written out; intervals against known quantiles."""

import math
import random

import pytest

from dylora.evaluation.forgetting import (
    Transfer,
    format_matrix,
    format_methods,
    measure,
    over_seeds,
    t_quantile,
)

NAN = math.nan


def test_measures_are_those_of_the_formulas():
    rng = random.Random(0)
    size = 4
    r = [[rng.random() for _ in range(size)] for _ in range(size)]
    before = [rng.random() for _ in range(size)]
    average = (r[3][0] + r[3][1] + r[3][2] + r[3][3]) / 4
    backward = (r[3][0] - r[0][0] + r[3][1] - r[1][1] + r[3][2] - r[2][2]) / 3
    forward = (r[0][1] - before[1] + r[1][2] - before[2] + r[2][3] - before[3]) / 3
    peaks = [max(r[0][j], r[1][j], r[2][j]) for j in range(3)]
    forgetting = sum(peaks[j] - r[3][j] for j in range(3)) / 3
    assert measure(r, before) == pytest.approx((average, backward, forward, forgetting))


def test_a_loss_turns_the_signs_of_transfer_and_not_of_the_average():
    falling = [[1.0, 5.0], [3.0, 2.0]]  # the second stage costs the first skill 2 nats
    assert measure(falling, [4.0, 6.0], smaller_is_better=True) == Transfer(2.5, -2.0, 1.0, 2.0)


def test_a_stream_that_changes_nothing_old_forgets_nothing():
    kept = [[0.5, 0.1, 0.0], [0.5, 0.75, 0.0], [0.5, 0.75, 0.25]]
    found = measure(kept)
    assert (found.average, found.backward, found.forgetting) == (0.5, 0.0, 0.0)


def test_forgetting_is_from_the_best_stage_and_backward_from_the_skills_own():
    rising = [[0.2, 0.0, 0.0], [0.9, 0.4, 0.0], [0.6, 0.4, 0.5]]
    found = measure(rising)
    assert found.backward == pytest.approx((0.4 + 0.0) / 2)
    assert found.forgetting == pytest.approx((0.3 + 0.0) / 2)


def test_a_stage_may_teach_several_skills_and_a_skill_may_come_again():
    # Stages: skills 0 and 1; skill 2; skill 0 once more.
    scores = [[0.4, 0.5, 0.0], [0.3, 0.5, 0.6], [0.8, 0.1, 0.6]]
    found = measure(scores, [0.0, 0.0, 0.2], learned=[0, 0, 1])
    assert found.backward == pytest.approx((0.4 - 0.4 + 0.0) / 3)
    assert found.forward == pytest.approx(-0.2)
    assert found.forgetting == pytest.approx((-0.4 + 0.4 + 0.0) / 3)  # below 0: better than ever


def test_what_was_not_taken_makes_that_measure_alone_unknown():
    # Only after its own stage and after the last.
    scores = [[0.5, NAN, NAN], [NAN, 0.6, NAN], [0.4, 0.6, 0.7]]
    found = measure(scores, [0.0, 0.0, 0.0])
    assert found.backward == pytest.approx(-0.05)
    assert found.forgetting == pytest.approx(0.05)
    assert math.isnan(found.forward)
    assert math.isnan(measure([[0.5]]).backward)
    assert math.isnan(measure(scores).forward)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "must be a matrix"),
        (([[1.0, 2.0], [1.0]],), {}, "must be a matrix"),
        (([[1.0, 2.0]],), {}, r"learned is \[0, 1\]"),
        (([[1.0], [2.0]],), {"learned": [2]}, "from 0 to 1"),
        (([[1.0]], [1.0, 2.0]), {}, "before has 2 scores, but there are 1 skills"),
    ],
)
def test_scores_that_are_no_matrix_of_a_stream_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        measure(*arguments, **options)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_quantiles_are_those_of_the_printed_tables(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-5)


def test_the_interval_of_three_seeds_covers_the_truth_95_times_in_100():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        interval = over_seeds([rng.gauss(2.0, 0.5) for _ in range(3)])
        covered += interval.low <= 2.0 <= interval.high
    assert 0.935 < covered / 2000 < 0.965


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least two, not 1"):
        over_seeds([0.5])


def test_the_tables_show_every_score_and_what_was_not_taken():
    matrix = format_matrix([[0.5, NAN], [0.25, 1.0]], ["lists", "sql"], ["1 lists", "2 sql"])
    assert [line.split() for line in matrix.splitlines()[1:]] == [
        ["1", "lists", "50.0", "%", "-", "-"],
        ["2", "sql", "25.0", "%", "100.0", "%", "62.5", "%"],
    ]
    one, two = Transfer(0.5, 0.0, NAN, 0.0), Transfer(0.7, -0.1, NAN, 0.1)
    lines = format_methods({"ours": [one, two], "single": [one]}).splitlines()
    assert " ".join(lines[1].split()) == "ours 2 60.0 % ± 127.1 % -5.0 % ± 63.5 % - 5.0 % ± 63.5 %"
    assert " ".join(lines[2].split()) == "single 1 50.0 % 0.0 % - 0.0 %"
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(ValueError, match="must name the rows"):
        format_matrix([[0.5]], ["lists"], [])
