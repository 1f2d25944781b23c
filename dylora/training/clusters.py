"""Clusters of prompts, for runs whose sources do not say what is a skill.

Shape letters: N prompts, D width, C clusters.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RESTARTS = 10
_MOST_PASSES = 100


def cluster_prompts(
    parts: Sequence[Tensor], count: int, least: int, seed: int
) -> tuple[Tensor, ...]:
    """The cluster of each prompt, numbered from 0 without gaps, as parts like those given.

    k-means (Lloyd 1982) from centres drawn as k-means++ does (Arthur & Vassilvitskii 2007), the
    best of ten drawings, on features of deviation 1. A cluster with fewer than `least` prompts of a
    part is given up, the smallest first, and its prompts go to the centres next to them; the last
    one is kept, however small it is.

    Args:
        parts: `Features.prompt` of training and of held-out rows, [N, D] each, float64.
        count: C at most.
        least: prompts of each part in a cluster, at least.
        seed: of the drawings.

    Raises ValueError for fewer different prompts than `count`.
    """
    points_ND = standardized(torch.cat(list(parts)))
    different = len(points_ND.unique(dim=0))
    if different < count:
        raise ValueError(f"{different} different prompts cannot form {count} clusters")
    generator = torch.Generator().manual_seed(seed)
    found = [_k_means(points_ND, _draw(points_ND, count, generator)) for _ in range(RESTARTS)]
    centre_CD = min(found, key=lambda centres: float(_squares(points_ND, centres).amin(-1).sum()))
    while True:
        labels = _squares(points_ND, centre_CD).argmin(-1).split([len(part) for part in parts])
        sizes = torch.stack([part.bincount(minlength=len(centre_CD)) for part in labels])
        fewest_C = sizes.amin(0)
        if fewest_C.amin() >= least or len(centre_CD) == 1:
            return labels
        centre_CD = centre_CD[torch.arange(len(centre_CD)) != fewest_C.argmin()]


def merge_clusters(prompts_ND: Tensor, cluster_N: Tensor, count: int) -> list[int]:
    """The group of each cluster, [C], of `count` groups: again and again those two become one whose
    union adds least to the squared distances from the means (Ward 1963)."""
    scaled_ND = standardized(prompts_ND)
    clusters = int(cluster_N.max()) + 1
    members = {number: [number] for number in range(clusters)}
    mean = {number: scaled_ND[cluster_N == number].mean(0) for number in members}
    size = {number: int((cluster_N == number).sum()) for number in members}

    def cost(one: int, other: int) -> float:
        weight = size[one] * size[other] / (size[one] + size[other])
        return weight * float((mean[one] - mean[other]).square().sum())

    while len(members) > count:
        pairs = [(one, other) for one in members for other in members if one < other]
        one, other = min(pairs, key=lambda pair: cost(*pair))
        total = size[one] + size[other]
        mean[one] = (size[one] * mean[one] + size[other] * mean[other]) / total
        size[one] = total
        members[one] += members.pop(other)
    groups = [0] * clusters
    for group, own in enumerate(members.values()):
        for number in own:
            groups[number] = group
    return groups


def standardized(prompts_ND: Tensor) -> Tensor:
    """Of mean 0 and deviation 1 in every dimension; 0 where all are alike."""
    centred_ND = prompts_ND - prompts_ND.mean(0)
    deviation_D = centred_ND.square().mean(0).sqrt()
    return centred_ND / torch.where(deviation_D > 0, deviation_D, 1.0)


def _draw(points_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first at random, each other one with a probability that grows with the squared distance
    to those before."""
    first = int(torch.randint(len(points_ND), (1,), generator=generator))
    chosen = [first]
    nearest_N = torch.full((len(points_ND),), math.inf, dtype=points_ND.dtype)
    while len(chosen) < count:
        nearest_N = nearest_N.minimum(_squares(points_ND, points_ND[chosen[-1:]])[:, 0])
        chosen.append(int(torch.multinomial(nearest_N, 1, generator=generator)))
    return points_ND[chosen]


def _k_means(points_ND: Tensor, centre_CD: Tensor) -> Tensor:
    """Centres that are the means of what is next to them; one with nothing next to it stays."""
    for _ in range(_MOST_PASSES):
        nearest_NC = torch.nn.functional.one_hot(
            _squares(points_ND, centre_CD).argmin(-1), len(centre_CD)
        ).to(points_ND.dtype)
        sizes_C1 = nearest_NC.sum(0)[:, None]
        means_CD = torch.where(
            sizes_C1 > 0, nearest_NC.T @ points_ND / sizes_C1.clamp_min(1), centre_CD
        )
        if torch.equal(means_CD, centre_CD):
            break
        centre_CD = means_CD
    return centre_CD


def _squares(points_ND: Tensor, centre_CD: Tensor) -> Tensor:
    """Squared distances, [N, C]."""
    return torch.cdist(points_ND, centre_CD, compute_mode="donot_use_mm_for_euclid_dist").square()
