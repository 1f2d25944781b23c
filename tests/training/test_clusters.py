"""Clusters of prompts."""

import itertools

import pytest
import torch

from dylora.training.clusters import cluster_prompts, merge_clusters, standardized


@pytest.fixture
def blobs():
    """Three groups of 40 points far apart, in another order, and the group of each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0, 0], [9, 0, 2], [0, 9, -2]], dtype=torch.float64)
    group = torch.arange(3).repeat(40)
    noise = torch.randn(120, 3, generator=generator, dtype=torch.float64)
    return centres[group] + noise, group


def partition(labels):
    """Which places are together, whatever the clusters' numbers."""
    return {tuple((labels == value).nonzero()[:, 0].tolist()) for value in labels.unique()}


def test_groups_that_are_far_apart_are_found_whatever_the_units_are(blobs):
    points, group = blobs
    (found,) = cluster_prompts([points * torch.tensor([1.0, 1e4, 1e-4])], 3, 1, seed=0)
    assert partition(found) == partition(group)


def test_no_assignment_of_few_points_has_a_smaller_sum_of_squares():
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = cluster_prompts([points], 2, 1, seed=0)

    def cost(labels):
        own = [standardized(points)[labels == value] for value in (0, 1)]
        return sum(float((part - part.mean(0)).square().sum()) for part in own if len(part))

    every = [torch.tensor(labels) for labels in itertools.product((0, 1), repeat=8)]
    assert cost(found) == pytest.approx(min(map(cost, every)))


def test_the_same_seed_gives_the_same_clusters_and_numbers_have_no_gaps(blobs):
    points, _ = blobs
    one, two = (cluster_prompts([points], 7, 8, seed=3)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert one.unique().tolist() == list(range(int(one.max()) + 1))


def test_a_cluster_with_too_few_prompts_of_one_part_is_given_up(blobs):
    points, group = blobs
    held_out = points[group != 2][:40]  # none of the third group
    rows, others = cluster_prompts([points, held_out], 3, 5, seed=0)
    assert int(rows.max()) == 1
    assert min(*rows.bincount().tolist(), *others.bincount().tolist()) >= 5


def test_more_clusters_than_different_prompts_are_refused():
    with pytest.raises(ValueError, match="1 different prompts cannot form 2 clusters"):
        cluster_prompts([torch.ones(9, 4, dtype=torch.float64)], 2, 1, seed=0)


def test_clusters_of_one_group_are_merged_first(blobs):
    points, group = blobs
    (cluster,) = cluster_prompts([points], 9, 1, seed=0)
    merged = torch.tensor(merge_clusters(points, cluster, 3))
    assert partition(merged[cluster]) == partition(group)


def test_each_merge_is_that_of_the_smallest_growth_of_the_sum_of_squares(blobs):
    """Ward's formula against the sums themselves."""
    points = standardized(blobs[0])
    (cluster,) = cluster_prompts([points], 6, 1, seed=1)

    def within(labels):
        own = [points[labels == value] for value in labels.unique()]
        return sum(float((part - part.mean(0)).square().sum()) for part in own)

    pairs = itertools.combinations(range(6), 2)
    joined = [torch.where(cluster == other, one, cluster) for one, other in pairs]
    found = torch.tensor(merge_clusters(points, cluster, 5))[cluster]
    assert within(found) == pytest.approx(min(map(within, joined)))


def test_as_many_groups_as_clusters_change_nothing(blobs):
    (cluster,) = cluster_prompts([blobs[0]], 4, 1, seed=0)
    assert merge_clusters(blobs[0], cluster, 4) == [0, 1, 2, 3]
