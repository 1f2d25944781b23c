"""How a step's rows are cut into micro-batches."""

from itertools import combinations, pairwise

import pytest
import torch

from dylora.data import batching
from dylora.data.batching import split_by_length


def computed(lengths: list[int], ends: list[int]) -> list[int]:
    """Tokens of each part, padding among them."""
    return [(end - begin) * lengths[end - 1] for begin, end in pairwise([0, *ends])]


def drawn_lengths(rows: int, seed: int, longest: int = 60) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randint(1, longest, (rows,), generator=generator).tolist())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("rows", "parts"), [(1, 1), (6, 1), (6, 2), (8, 4), (9, 3), (12, 4), (5, 5)]
)
def test_the_cuts_are_the_best_of_all_within_the_memory_of_equal_parts(rows, parts, seed):
    lengths = drawn_lengths(rows, seed, longest=9 if seed % 2 else 60)
    most = rows // parts * lengths[-1]
    ways = [[*inner, rows] for inner in combinations(range(1, rows), parts - 1)]
    allowed = [tokens for ends in ways if max(tokens := computed(lengths, ends)) <= most]
    found = computed(lengths, split_by_length(lengths, parts))
    assert len(found) == parts
    assert max(found) <= most
    assert sum(found) == min(map(sum, allowed))


def test_rows_of_one_length_are_cut_into_equal_parts():
    assert split_by_length([7] * 12, 3) == [4, 8, 12]


@pytest.mark.parametrize(("rows", "parts"), [(1024, 128), (600, 4), (1024, 1024), (514, 2)])
def test_a_step_of_many_rows_is_cut_at_fewer_places_and_no_worse_than_into_equal_parts(rows, parts):
    lengths = drawn_lengths(rows, 0, longest=500)
    equal = [rows // parts * (part + 1) for part in range(parts)]
    ends = split_by_length(lengths, parts)
    assert (len(ends), ends[-1]) == (parts, rows)
    assert sum(computed(lengths, ends)) <= sum(computed(lengths, equal))


def test_looking_at_fewer_places_finds_the_same_cuts_where_they_are_among_them(monkeypatch):
    lengths = [3] * 8 + [9] * 8
    assert split_by_length(lengths, 2) == [8, 16]
    monkeypatch.setattr(batching, "MOST_CUTS", 4)
    assert split_by_length(lengths, 2) == [8, 16]
