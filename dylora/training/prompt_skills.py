"""The skill library of a joint run, from its start on: its sources are the skills, or clusters of
its prompts are."""

from collections.abc import Sequence
from typing import Literal

import torch

from dylora.data.prepare import PreparedData
from dylora.data.streamed import TrainingSet
from dylora.features import Features, embed, split_row
from dylora.model import DyLoRA_MoE
from dylora.skill_statistics import describe
from dylora.skills import SkillLibrary
from dylora.storage.skill_file import LEAST_ROWS
from dylora.training.clusters import cluster_prompts, merge_clusters

Split = Literal["train", "validation"]
# Of a skill, at most, of which the library keeps the sums.
LIBRARY_ROWS: dict[Split, int] = {"train": 256, "validation": 128}


def fit_library(
    model: DyLoRA_MoE, data: PreparedData, clusters: int | None = None, seed: int = 0
) -> None:
    """Fill the library of which prompts are routed from the first step on, unless init_from has
    brought one.

    Args:
        clusters: so many clusters of the prompts are the skills; none: each source is one, and the
            first expert after the shared ones serves the first source, and so on.
        seed: of the clusters.

    Raises ValueError where there are more or fewer experts than sources, where fewer clusters are
    found than there are experts, for clusters where there is a library, and as `SkillLibrary.add`.
    """
    if model.skill_library:
        if clusters is not None:
            raise ValueError(
                f"train.prompt_clusters is {clusters}, but train.init_from has a skill library, "
                "which routes by the skills that it knows: leave prompt_clusters out"
            )
        return
    if clusters is not None:
        fit_clusters(model, data, clusters, seed)
        return
    shared, sources = model.config.shared_experts, len(data.train)
    if len(model.experts) - shared != sources:
        raise ValueError(
            f"moe.num_experts is {len(model.experts)}, {shared} of them shared, but data.sources "
            f"has {sources} sets; with router_scope {model.config.router_scope!r} each has an "
            f"expert of its own: set moe.num_experts {shared + sources}, or train.prompt_clusters "
            "for skills that no source names"
        )
    library = SkillLibrary(model)
    for number, (train, validation) in enumerate(zip(data.train, data.validation, strict=True)):
        rows = evenly([train], LIBRARY_ROWS["train"])
        held_out = evenly([validation], LIBRARY_ROWS["validation"])
        library.add(train.name, rows, held_out, expert=shared + number)
        model.experts[shared + number].skill = train.name


def fit_clusters(model: DyLoRA_MoE, data: PreparedData, count: int, seed: int) -> None:
    """Let clusters of the prompts of all sources be the skills; where there are more of them than
    routed experts, similar ones share an expert.

    Args:
        count: clusters, at most; one with too few rows for the library is given up.

    Raises ValueError where fewer clusters are found than there are routed experts, and for fewer
    rows than a skill needs.
    """
    shared = model.config.shared_experts
    experts = len(model.experts) - shared
    rows = evenly(data.train, LIBRARY_ROWS["train"] * experts)
    known = {tuple(split_row(row)[0]) for row in rows}
    held_out = [
        row
        for row in evenly(data.validation, LIBRARY_ROWS["validation"] * experts)
        if tuple(split_row(row)[0]) not in known
    ]
    if min(len(rows), len(held_out)) < LEAST_ROWS:  # of which a single cluster is made all the same
        raise ValueError(
            f"train.prompt_clusters is {count}, but there are {len(rows)} training rows and "
            f"{len(held_out)} other validation rows, and a skill needs {LEAST_ROWS} of each: give "
            "more rows (eval.eval_subset)"
        )
    features = [embed(model.mixture, part) for part in (rows, held_out)]
    prompts = [part.prompt for part in features]
    labels = cluster_prompts(prompts, count, LEAST_ROWS, seed)
    found = int(labels[0].max()) + 1
    if found < experts:
        raise ValueError(
            f"train.prompt_clusters is {count}, but of {len(rows)} training and {len(held_out)} "
            f"validation rows {found} clusters have {LEAST_ROWS} each, for {experts} experts: give "
            f"more rows (eval.eval_subset), or set moe.num_experts {shared + found}"
        )
    group_of = merge_clusters(torch.cat(prompts), torch.cat(labels), experts)
    library, members = SkillLibrary(model), [0] * experts
    for cluster, group in enumerate(group_of):
        members[group] += 1
        own = (
            Features(*(values[label_N == cluster] for values in part))
            for part, label_N in zip(features, labels, strict=True)
        )
        name, expert = f"prompts-{group + 1}.{members[group]}", shared + group
        library.put(*describe(name, expert, *own))
    for group in range(experts):
        model.experts[shared + group].skill = f"prompts-{group + 1}"


def evenly(sets: Sequence[TrainingSet], most: int) -> list[dict[str, list[int]]]:
    """So many rows of these sets at most, evenly from all of them."""
    places = [(examples, index) for examples in sets for index in range(len(examples))]
    count = min(most, len(places))
    chosen = (places[number * len(places) // count] for number in range(count))
    return [examples[index] for examples, index in chosen]
