"""What is known of a skill: sums over its rows, and the rules that are made of them.

Shape letters: B rows, K skills, D hidden width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from dylora.features import Features
from dylora.fields import shown
from dylora.routing.prompt import PromptRule

FAR = 0.95  # a row is far beyond this share of every skill's held-out rows
# A prompt is far beyond FAR_PROMPTS of a skill's held-out prompts, times FAR_FACTOR: to send a
# prompt of a known skill to no expert costs more than to send an unknown one to the wrong expert.
FAR_PROMPTS, FAR_FACTOR = 0.99, 1.5
SHRINKAGE = 0.1  # of the prompts' covariance, towards the mean of its variances
_FLOOR = 1e-6  # of a variance, as a share of the mean one: no coordinate may decide alone
_PROMPT_FLOOR = 1e-2  # likewise of prompts, which have few tokens each


@dataclass(frozen=True, kw_only=True)
class Skill:
    """Sums over the rows of one skill, [D] in float64; `squares` are of what the mean leaves."""

    name: str
    expert: int | None  # the one that serves it
    rows: int
    held_out: int
    dimensions: float  # (tr R)² / tr R², R the correlation of `whole`: over how many it spreads
    far_level: float  # distance below which FAR of the held-out rows lie
    whole_sum: Tensor
    whole_squares: Tensor
    held_out_sum: Tensor
    held_out_squares: Tensor
    prompt_sum: Tensor
    prompt_squares: Tensor
    prompt_far_level: float  # distance beyond which a prompt is far from this skill

    @property
    def variance(self) -> Tensor:
        """Of `whole` within this skill, [D]."""
        return floored(self.whole_squares / (self.rows - 1))

    @property
    def prompt_variance(self) -> Tensor:
        """Of `prompt` within this skill, [D]."""
        return floored(self.prompt_squares / (self.rows - 1), _PROMPT_FLOOR)

    def prompt_distances(self, prompts: Tensor) -> Tensor:
        """As `row_distances` for `Features.prompt`, [B, D] -> [B]."""
        squared = (prompts - self.prompt_sum / self.rows) ** 2
        return (squared / self.prompt_variance).mean(-1)

    def row_distances(self, whole: Tensor) -> Tensor:
        """Mean squared distance of each row [B, D] in units of this skill's own spread, [B]."""
        return ((whole - self.whole_sum / self.rows) ** 2 / self.variance).mean(-1)


def describe(
    name: str, expert: int | None, features: Features, held_out: Features
) -> tuple[Skill, Tensor]:
    """The sums over a skill's rows and its prompts' scatter [D, D].

    Raises ValueError for rows that are all alike, and for states that are not finite.
    """
    whole, prompt = features
    left, left_held_out = whole - whole.mean(0), held_out.whole - held_out.whole.mean(0)
    around = prompt - prompt.mean(0)
    squares, others = (left**2).sum(0), (left_held_out**2).sum(0)
    if not all(0 < float(part.square().sum()) < math.inf for part in (left, left_held_out, around)):
        raise ValueError(f"the rows of {shown(name)} are all alike, or their states not finite")
    unit = left / floored(squares / (len(whole) - 1)).sqrt()
    gram = unit @ unit.T
    skill = Skill(
        name=name,
        expert=expert,
        rows=len(whole),
        held_out=len(held_out.whole),
        dimensions=float(gram.trace() ** 2 / (gram**2).sum()),
        far_level=1.0,
        whole_sum=whole.sum(0),
        whole_squares=squares,
        held_out_sum=held_out.whole.sum(0),
        held_out_squares=others,
        prompt_sum=prompt.sum(0),
        prompt_squares=(around**2).sum(0),
        prompt_far_level=1.0,
    )
    far_level = float(skill.row_distances(held_out.whole).quantile(FAR))
    far_prompts = float(skill.prompt_distances(held_out.prompt).quantile(FAR_PROMPTS))
    scatter = around.T @ around
    skill = replace(skill, far_level=far_level, prompt_far_level=FAR_FACTOR * far_prompts)
    return skill, (scatter + scatter.T) / 2


def gamma_quantile(mean: float, variance: float, quantile: float) -> float:
    """Of the gamma distribution with this mean and variance, by Wilson and Hilferty's cube root."""
    ninth = variance / (9 * mean**2)
    return mean * (1 - ninth + NormalDist().inv_cdf(quantile) * math.sqrt(ninth)) ** 3


def floored(variance: Tensor, share: float = _FLOOR) -> Tensor:
    return variance.clamp(min=float(variance.mean()) * share)


def joined(one: Skill, more: Skill) -> tuple[Skill, Tensor]:
    """Both as one skill, and the scatter [D, D] of their prompts' means around the common one."""
    rows, held_out = (one.rows, more.rows), (one.held_out, more.held_out)
    weight = rows[0] * rows[1] / sum(rows)
    moved = one.whole_sum / rows[0] - more.whole_sum / rows[1]
    moved_held_out = one.held_out_sum / held_out[0] - more.held_out_sum / held_out[1]
    weight_held_out = held_out[0] * held_out[1] / sum(held_out)
    moved_prompts = one.prompt_sum / rows[0] - more.prompt_sum / rows[1]
    around = one.held_out_squares + more.held_out_squares
    both = replace(
        one,
        rows=sum(rows),
        held_out=sum(held_out),
        dimensions=(one.dimensions * rows[0] + more.dimensions * rows[1]) / sum(rows),
        far_level=max(one.far_level, more.far_level),
        whole_sum=one.whole_sum + more.whole_sum,
        whole_squares=one.whole_squares + more.whole_squares + weight * moved**2,
        held_out_sum=one.held_out_sum + more.held_out_sum,
        held_out_squares=around + weight_held_out * moved_held_out**2,
        prompt_sum=one.prompt_sum + more.prompt_sum,
        prompt_squares=one.prompt_squares + more.prompt_squares + weight * moved_prompts**2,
        prompt_far_level=max(one.prompt_far_level, more.prompt_far_level),
    )
    return both, weight * torch.outer(moved_prompts, moved_prompts)


def prompt_rule(skills: Sequence[Skill], scatter_DD: Tensor) -> PromptRule:
    """The linear discriminant with one covariance, Σ⁻¹μ and -½ μᵀΣ⁻¹μ, and what is far.

    scatter_DD: of the prompts around their skill's mean, over all skills.
    """
    covariance = scatter_DD / (sum(skill.rows for skill in skills) - len(skills))
    width = len(covariance)
    towards = covariance.trace() / width * torch.eye(width, dtype=torch.float64)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * towards
    mean_KD = torch.stack([skill.prompt_sum / skill.rows for skill in skills])
    weight_DK = torch.cholesky_solve(mean_KD.T, torch.linalg.cholesky(shrunk))
    far_K1 = torch.tensor([[skill.prompt_far_level] for skill in skills], dtype=torch.float64)
    variance_KD = torch.stack([skill.prompt_variance for skill in skills])
    return PromptRule(
        weight_DK,
        -0.5 * (mean_KD.T * weight_DK).sum(0),
        mean_KD,
        1 / (variance_KD * width * far_K1),
        [skill.expert for skill in skills],
    )
