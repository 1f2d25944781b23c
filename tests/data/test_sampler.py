import itertools
import json
from collections import Counter

import pytest
import torch

from dylora.data.sampler import InterleavedSampler


def stream(sampler, count):
    return list(itertools.islice(sampler, count))


def test_small_sets_are_repeated_not_truncated():
    epoch = stream(InterleavedSampler([10, 3]), 20)
    counts = Counter(epoch)
    assert all(counts[0, row] == 1 for row in range(10))
    assert sorted(counts[1, row] for row in range(3)) == [3, 3, 4]


def test_a_small_set_comes_whole_each_time_round_in_a_fresh_order():
    rows = [row for index, row in stream(InterleavedSampler([40, 8]), 80) if index == 1]
    rounds = [rows[i : i + 8] for i in range(0, 40, 8)]
    assert all(sorted(part) == list(range(8)) for part in rounds)
    assert len(set(map(tuple, rounds))) == 5


def test_each_group_has_one_example_of_each_set_in_a_drawn_order():
    epoch = stream(InterleavedSampler([50, 20, 5]), 150)
    groups = [tuple(index for index, _ in epoch[i : i + 3]) for i in range(0, 150, 3)]
    assert all(sorted(group) == [0, 1, 2] for group in groups)
    assert len(set(groups)) == 6


def test_proportional_sampling_gives_every_example_once():
    sampler = InterleavedSampler([10, 3, 1], interleaved=False)
    epoch = stream(sampler, len(sampler))
    everything = [(i, row) for i, length in enumerate([10, 3, 1]) for row in range(length)]
    assert sorted(epoch) == everything
    assert epoch != everything


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_resumed_sampler_continues_the_same_sequence(interleaved):
    lengths = [7, 4]
    whole = stream(InterleavedSampler(lengths, seed=5, interleaved=interleaved), 60)
    for taken in range(45):
        first = InterleavedSampler(lengths, seed=5, interleaved=interleaved)
        stream(first, taken)
        state = json.loads(json.dumps(first.state_dict()))
        second = InterleavedSampler(lengths, seed=5, interleaved=interleaved)
        second.load_state_dict(state)
        assert stream(second, 15) == whole[taken : taken + 15]


@pytest.mark.parametrize("interleaved", [True, False])
def test_epochs_and_seeds_have_orders_of_their_own(interleaved):
    sampler = InterleavedSampler([30, 30], interleaved=interleaved)
    first, second = stream(sampler, 60), stream(sampler, 60)
    assert sorted(first) == sorted(second)
    for index in range(2):
        assert [row for i, row in first if i == index] != [row for i, row in second if i == index]
    assert (sampler.epoch, sampler.position) == (2, 0)
    assert first == stream(InterleavedSampler([30, 30], interleaved=interleaved), 60)
    assert first != stream(InterleavedSampler([30, 30], seed=1, interleaved=interleaved), 60)


def test_equal_sets_do_not_share_a_permutation():
    epoch = stream(InterleavedSampler([30, 30]), 60)
    assert [r for i, r in epoch if i == 0] != [r for i, r in epoch if i == 1]


def test_an_epoch_has_as_many_examples_as_it_says():
    assert len(InterleavedSampler([10, 3])) == 20
    assert len(InterleavedSampler([10, 3], interleaved=False)) == 13


def test_the_mean_goes_by_the_shares_of_an_epoch():
    assert InterleavedSampler([9, 1]).mean([10.0, 20.0]) == 15
    assert InterleavedSampler([9, 1], interleaved=False).mean([10.0, 20.0]) == 11


def test_the_state_of_other_sets_is_refused():
    state = InterleavedSampler([10, 3]).state_dict()
    with pytest.raises(ValueError, match=r"lengths \[10, 3\], but the run now has \[10, 4\]"):
        InterleavedSampler([10, 4]).load_state_dict(state)
    with pytest.raises(ValueError, match="interleaved"):
        InterleavedSampler([10, 3], interleaved=False).load_state_dict(state)
    with pytest.raises(ValueError, match="position is 20"):
        InterleavedSampler([10, 3]).load_state_dict(state | {"position": 20})
    with pytest.raises(ValueError, match="a sampler's state has"):
        InterleavedSampler([10, 3]).load_state_dict({})


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match=r"the lengths are \[3, 0\]"):
        InterleavedSampler([3, 0])


# Windows of similar length

TOKENS = [torch.randint(5, 500, (90,)), torch.randint(5, 500, (40,))]


def bucketed(steps=4, **settings):
    settings = {"interleaved": False, "rows_per_step": 6} | settings
    return InterleavedSampler([90, 40], bucket_steps=steps, tokens=TOKENS, **settings)


def steps_of(sampler, count, size=6):
    return [stream(sampler, size) for _ in range(count)]


@pytest.mark.parametrize("interleaved", [True, False])
def test_buckets_give_the_rows_of_each_epoch_once_as_before(interleaved):
    plain, sampler = bucketed(1, interleaved=interleaved), bucketed(interleaved=interleaved)
    for _ in range(3):
        before, now = stream(plain, len(plain)), stream(sampler, len(sampler))
        assert Counter(now) == Counter(before)
        assert now != before


def test_a_bucket_holds_the_rows_that_were_drawn_for_its_steps():
    before, now = stream(bucketed(1), 130), stream(bucketed(), 130)
    for begin in range(0, 120, 24):
        part = slice(begin, begin + 24)
        assert sorted(now[part]) == sorted(before[part])


def test_the_steps_of_a_bucket_hold_neighbours_by_length_in_a_drawn_order():
    steps = steps_of(bucketed(), 20)
    falls = 0
    for begin in range(0, 20, 4):
        spans = []
        for step in steps[begin : begin + 4]:
            tokens = [int(TOKENS[index][row]) for index, row in step]
            spans.append((min(tokens), max(tokens)))
        ordered = sorted(spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ordered))
        falls += spans != ordered
    assert falls >= 3  # of five; each is in order by chance once in 24 times


def test_steps_stay_whole_in_every_epoch_although_they_do_not_divide_it():
    """130 rows are no multiple of 6: a bucket begins with a step and not within one."""

    def padded(sampler):
        lengths = [[int(TOKENS[i][r]) for i, r in step] for step in steps_of(sampler, 85)]
        return sum(6 * max(step) for step in lengths)

    assert padded(bucketed(8)) < 0.75 * padded(bucketed(1))


def test_a_resumed_sampler_with_buckets_continues_the_same_sequence():
    whole = stream(bucketed(), 400)
    for taken in range(0, 380, 7):
        first, second = bucketed(), bucketed()
        stream(first, taken)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert stream(second, 20) == whole[taken : taken + 20]


def test_a_state_of_other_buckets_or_steps_is_refused():
    state = bucketed().state_dict()
    with pytest.raises(ValueError, match="the saved order is for window 4, but the run now has 8"):
        bucketed(8).load_state_dict(state)
    with pytest.raises(ValueError, match="rows_per_step 6, but the run now has 12"):
        bucketed(rows_per_step=12).load_state_dict(state)
    # Without buckets the order does not depend on how many rows a step takes.
    bucketed(1, rows_per_step=12).load_state_dict(bucketed(1).state_dict())


# Weights


def drawn(sampler: InterleavedSampler, count: int) -> list[tuple[int, int]]:
    return [next(sampler) for _ in range(count)]


@pytest.mark.parametrize(("interleaved", "counts"), [(True, [20, 80]), (False, [20, 40])])
def test_a_weight_multiplies_what_a_set_gives_to_an_epoch(interleaved, counts):
    sampler = InterleavedSampler([40, 20], interleaved=interleaved, weights=[0.5, 2])
    epoch = drawn(sampler, len(sampler))
    assert [sum(index == one for index, _ in epoch) for one in (0, 1)] == counts
    times = [sum(row == one for index, row in epoch if index == 1) for one in range(20)]
    assert set(times) == {counts[1] // 20}  # every row as often
    assert len({row for index, row in epoch if index == 0}) == 20  # the first half of its rows
    later = drawn(sampler, len(sampler))
    assert {row for index, row in later if index == 0} != {
        row for index, row in epoch if index == 0
    }
    assert sampler.mean([3.0, 6.0]) == (counts[0] * 3 + counts[1] * 6) / sum(counts)
    if interleaved:  # evenly spread
        parts = [epoch[begin : begin + 10] for begin in range(0, 100, 10)]
        assert all(1 <= sum(index == 0 for index, _ in part) <= 3 for part in parts)


def test_a_weighted_order_goes_on_from_its_state_and_with_its_weights_alone():
    sampler = InterleavedSampler([7, 5], weights=[1, 3])
    drawn(sampler, 9)
    state = sampler.state_dict()
    going_on = InterleavedSampler([7, 5], weights=[1, 3])
    going_on.load_state_dict(state)
    assert drawn(going_on, 40) == drawn(sampler, 40)
    for weights in ([1, 2], [1, 1]):
        with pytest.raises(ValueError, match=r"weights|state has"):
            InterleavedSampler([7, 5], weights=weights).load_state_dict(state)


def test_weights_of_one_change_no_order_and_no_state():
    plain, weighted = InterleavedSampler([7, 5]), InterleavedSampler([7, 5], weights=[1, 1])
    assert plain.state_dict() == weighted.state_dict()
    assert drawn(plain, 40) == drawn(weighted, 40)
