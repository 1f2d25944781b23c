"""Question: do clusters of prompts follow the skills, and do they once similar ones are merged?

Method: 256 training prompts of each embedded skill and 128 of validation, k-means with three seeds
for each number of clusters, then merged to six groups. Purity is the share of prompts in a cluster,
or a group, most of whose prompts are of the same skill.
Result: experiments/LOG.md; a minute of one core.

    python -m experiments.routing.clusters
"""

import torch
from torch import Tensor

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.features import embed
from dylora.tasks import SKILLS, generate_tasks
from dylora.training.clusters import cluster_prompts, merge_clusters
from experiments.growth.methods import BASE, tokenized

COUNTS, SEEDS = (6, 12, 24, 48), (0, 1, 2)
ROWS = {"train": 256, "validation": 128}


def purity(label_N: Tensor, skill_N: Tensor) -> float:
    """Prompts of the commonest skill of their label, as a share of all."""
    most = [int(skill_N[label_N == label].bincount().max()) for label in label_N.unique()]
    return sum(most) / len(skill_N)


def main() -> None:
    model = DyLoRA_MoE.from_base(BASE, MoELoraConfig(num_experts=2))
    parts, skills = [], []
    for split, count in ROWS.items():
        tasks = [task for skill in SKILLS for task in generate_tasks(skill, split, count)]
        rows = tokenized([(task.instruction, "", task.answer) for task in tasks])
        parts.append(embed(model.mixture, rows).prompt)
        skills.append(torch.arange(len(SKILLS)).repeat_interleave(count))
    skill_N = torch.cat(skills)
    print("| clusters | found | purity | merged to six |\n|---|---|---|---|")
    for count in COUNTS:
        found, pure, merged = [], [], []
        for seed in SEEDS:
            label_N = torch.cat(cluster_prompts(parts, count, 16, seed))
            group_C = torch.tensor(merge_clusters(torch.cat(parts), label_N, len(SKILLS)))
            found.append(str(len(group_C)))
            pure.append(f"{purity(label_N, skill_N):.1%}")
            merged.append(f"{purity(group_C[label_N], skill_N):.1%}")
        cells = (", ".join(each) for each in (found, pure, merged))
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
