"""Which skills a mixture knows, whether a batch shows a new one, and which one a prompt asks for.

A row is described by the frozen base alone (adapters off), so that what is known of a skill never
changes while experts are trained: by the mean of the last layer's states over all its tokens
(whole), and by the mean of what enters the first routed block over its prompt's (prompt). Padding
and a leading BOS count in neither. Of the rows only sums are kept, no text and no row.

Novelty is the distance of a batch's mean from a skill's, coordinate by coordinate in units of the
spread within skills; which skill a prompt asks for is a linear discriminant with one covariance
(Fisher 1936), shrunk towards a multiple of the identity.

Shape letters: B rows, S tokens, K skills, D hidden width.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylora.features import Row, embed, split_row, widths_of
from dylora.fields import is_name, nearest, shown
from dylora.mixture import Mixture
from dylora.routing.prompt import PromptRouter, PromptRule
from dylora.skill_statistics import Skill, describe, floored, gamma_quantile, joined, prompt_rule
from dylora.storage import skill_file
from dylora.storage.skill_file import LEAST_ROWS, RECORD, SCATTER, VECTORS


class Verdict(NamedTuple):
    """What a batch is, of which all rows should be of one skill."""

    novel: bool
    nearest: str  # the known skill with the smallest margin
    distance: float  # from it; 1 is what chance alone gives
    threshold: float  # of that skill, for a batch of this size
    margin: float  # distance / threshold: novel above 1
    far_share: float  # of the rows, in [0, 1]: about 0.05 where all are known


class Choice(NamedTuple):
    """Which known skill a prompt asks for."""

    skill: str
    log_probabilities: dict[str, float]  # by skill, all of them equally likely beforehand
    distance: float  # from the skill that is nearest, in units of what is far from it
    known: bool  # False: it is far from every skill, and routing by the prompt uses no expert


class SkillLibrary:
    """The skills that a mixture knows. It belongs to the mixture: `save_pretrained` writes it.

    Not safe to use while another thread runs the same model.
    """

    def __init__(self, model: Any):
        """A library without skills. model: a DyLoRA_MoE or its `mixture`.

        Raises ValueError where the model has one with skills already.
        """
        mixture: Mixture = getattr(model, "mixture", model)
        if mixture.skill_library:
            raise ValueError("the model has a skill library already: use model.skill_library")
        self.mixture = mixture
        self.skills: dict[str, Skill] = {}  # by name, in the order they came
        # Of the prompts around their skill's mean, over all skills [D, D].
        self.prompt_scatter = torch.zeros(*[widths_of(mixture)[1]] * 2, dtype=torch.float64)
        self._rule: PromptRule | None = None
        mixture.skill_library = self
        self.update_router()

    def __len__(self) -> int:
        return len(self.skills)

    def add(
        self, name: str, rows: Sequence[Row], held_out: Sequence[Row], expert: int | None = None
    ) -> Skill:
        """Learn what a skill looks like. Sums of other skills stay as they are, bit by bit.

        Args:
            rows, held_out: at least LEAST_ROWS of each. `held_out` are of another split than what
                experts are trained on: a threshold made of training rows alone calls every other
                row of the skill new.
            expert: the number of the expert that serves it.

        Raises ValueError for a name or an expert that will not do, for too few rows, for rows that
        are all alike, and for held-out rows that are among the others.
        """
        if not is_name(name):
            raise ValueError(f"{shown(name)} is no name of a skill: give a short printable text")
        if name in self.skills:
            raise ValueError(f"the library has a skill {shown(name)} already: extend it")
        if expert is not None and (type(expert) is not int or expert not in self.mixture.live):
            raise ValueError(f"there is no expert {shown(expert)} to serve {shown(name)}")
        skill, scatter = self._describe(name, rows, held_out, expert)
        self.put(skill, scatter)
        return skill

    def put(self, skill: Skill, scatter_DD: Tensor) -> None:
        """A skill and the scatter of its prompts, as `describe` gives them."""
        self.skills[skill.name] = skill
        self.prompt_scatter = self.prompt_scatter + scatter_DD
        self.update_router()

    def extend(self, name: str, rows: Sequence[Row], held_out: Sequence[Row]) -> Skill:
        """More rows of a known skill: its sums are as if they had come with the first, its levels
        of what is far the larger of both, its dimensions their mean by rows. Raises as `add`."""
        before = self._skill(name)
        more, scatter = self._describe(name, rows, held_out, before.expert)
        self.skills[name], between = joined(before, more)
        self.prompt_scatter = self.prompt_scatter + scatter + between
        self.update_router()
        return self.skills[name]

    def remove(self, name: str) -> None:
        """Forget a skill; the covariance that the others share stays. Raises ValueError for one
        that is not known."""
        self._skill(name)
        degrees = self._degrees()
        del self.skills[name]
        self.prompt_scatter = self.prompt_scatter * (self._degrees() / degrees)
        self.update_router()

    def reassign(self, expert: int, to: int | None) -> None:
        """Let another expert, or none, serve the skills of an expert that is no more."""
        for name, skill in self.skills.items():
            if skill.expert == expert:
                self.skills[name] = replace(skill, expert=to)
        self.update_router()

    def _describe(
        self, name: str, rows: Sequence[Row], held_out: Sequence[Row], expert: int | None
    ) -> tuple[Skill, Tensor]:
        for what, given in (("rows", rows), ("held_out", held_out)):
            if len(given) < LEAST_ROWS:
                raise ValueError(
                    f"{what} has {len(given)} rows of {shown(name)}, but at least {LEAST_ROWS} are "
                    "needed to calibrate a threshold"
                )
        known = {tuple(split_row(row)[0]) for row in rows}
        if shared := sum(tuple(split_row(row)[0]) in known for row in held_out):
            raise ValueError(
                f"{shared} held-out rows of {shown(name)} are among its other rows: a threshold "
                "needs rows that nothing else is made of"
            )
        return describe(name, expert, embed(self.mixture, rows), embed(self.mixture, held_out))

    def _degrees(self) -> int:
        """Of freedom, of the covariance of prompts."""
        return sum(skill.rows - 1 for skill in self.skills.values())

    def _skill(self, name: str) -> Skill:
        if name not in self.skills:
            raise ValueError(
                f"the library has no skill {shown(name)}{nearest(name, list(self.skills))}"
            )
        return self.skills[name]

    def update_router(self) -> None:
        """Let the router decide by what is known now."""
        self._rule = prompt_rule(list(self.skills.values()), self.prompt_scatter) if self else None
        for _, router in self.mixture.routers():
            if isinstance(router, PromptRouter):
                router.set_rule(self._rule)

    def expert_of(self, name: str) -> int | None:
        """The expert that serves a skill. Raises ValueError for one that is not known."""
        return self._skill(name).expert

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Whether a batch shows a skill that is not known. Raises as `NoveltyDetector.judge`."""
        detector = NoveltyDetector(self)
        detector.check_size(len(rows))
        return detector.judge(embed(self.mixture, rows).whole)

    def by_distance(self, rows: Sequence[Row]) -> list[str]:
        """The names of the known skills, that nearest to a batch first."""
        order = NoveltyDetector(self).distances(embed(self.mixture, rows).whole).argsort()
        names = list(self.skills)
        return [names[place] for place in order.tolist()]

    def which(self, prompt: Row) -> Choice:
        """Which known skill one prompt asks for: token ids [S], or a row, whose answer is not read.

        Raises ValueError while the library has no skills.
        """
        self.require_skills()
        ids, length = split_row(prompt)
        rule, asked = self.prompt_rule(), embed(self.mixture, [ids[:length]]).prompt
        chances = rule.log_probabilities(asked)[0].tolist()
        by_name = dict(zip(self.skills, chances, strict=True))
        distance = float(rule.distances(asked).min())
        likeliest = max(by_name, key=by_name.__getitem__)
        return Choice(likeliest, by_name, distance, distance <= 1)

    def log_probabilities(self, prompts: Tensor) -> Tensor:
        """Of every skill for every prompt, [B, K] in nats; prompts as `Features.prompt`, [B, D]."""
        return self.prompt_rule().log_probabilities(prompts.double())

    def prompt_rule(self) -> PromptRule:
        """The rule by which prompts are routed. Raises ValueError without skills."""
        self.require_skills()
        assert self._rule is not None
        return self._rule

    def require_skills(self) -> None:
        """Raises ValueError while there is nothing to compare with."""
        if not self.skills:
            raise ValueError("the skill library is empty: add a skill first")

    # Files

    def save(self, file: Path) -> None:
        """Sums and names, no rows and no text of them. Raises ValueError for an empty library."""
        self.require_skills()
        skills = list(self.skills.values())
        tensors = {name: torch.stack([getattr(s, name) for s in skills]) for name in VECTORS}
        table = [{key: getattr(skill, key) for key in RECORD} for skill in skills]
        skill_file.write_skills(file, table, tensors | {SCATTER: self.prompt_scatter})

    @classmethod
    def read(cls, file: Path, model: Any) -> "SkillLibrary":
        """The library that `save` wrote, as that of a DyLoRA_MoE or its `mixture`.

        Raises ValueError, naming the file, for anything else or where it does not fit the model.
        """
        mixture: Mixture = getattr(model, "mixture", model)
        table, tensors = skill_file.read_skills(file, widths_of(mixture), len(mixture.table))
        mixture.skill_library = None
        library = cls(mixture)
        for index, record in enumerate(table):
            vectors: dict[str, Any] = {name: tensors[name][index] for name in VECTORS}
            library.skills[record["name"]] = Skill(**record, **vectors)
        library.prompt_scatter = tensors[SCATTER]
        library.update_router()
        return library


class NoveltyDetector:
    """Tells a batch of a new skill from one of those in a library, by the distance of means.

    The means of a skill's other rows lie apart from those of its training rows by more than chance
    (they are about other things), and the more plainly the larger the batch. So the threshold is
    calibrated on held-out rows: `factor` times the `quantile` of the distance of such batches.
    """

    def __init__(self, library: SkillLibrary, *, quantile: float = 0.995, factor: float = 1.5):
        """quantile: below 1. factor: 1.5 to 2; the higher, the fewer known batches are called new.

        The quantile is that of a skill of which there is no end of rows. Of a hundred rows that
        are drawn from again and again it is lower, and twice that one is about 1.5 times this.
        """
        if not 0.5 <= quantile < 1 or not 0 < factor < math.inf:
            raise ValueError(f"quantile {quantile} or factor {factor} is out of range")
        self.library, self.quantile, self.factor = library, quantile, factor

    def variance(self) -> Tensor:
        """Of `whole` within skills, all of them pooled, [D]."""
        skills = self.library.skills.values()
        degrees = sum(skill.rows - 1 for skill in skills)
        return floored(torch.stack([skill.whole_squares for skill in skills]).sum(0) / degrees)

    def distances(self, whole: Tensor) -> Tensor:
        """Of the mean of a batch [B, D] from each skill's, [K], without a unit: the squared
        differences over variance · (1/B + 1/rows), averaged over D; 1 is what chance gives."""
        skills = self.library.skills.values()
        means = torch.stack([skill.whole_sum / skill.rows for skill in skills])
        chance = [1 / len(whole) + 1 / skill.rows for skill in skills]
        squared = ((whole.mean(0) - means) ** 2 / self.variance()).mean(-1)
        return squared / torch.tensor(chance, dtype=torch.float64)

    def thresholds(self, batch: int) -> Tensor:
        """Distance from each skill above which a batch of so many rows is not of it, [K].

        The distance of a batch is a sum of squares; its quantile is that of the gamma distribution
        with its mean and variance, by Wilson and Hilferty (1931).
        """
        variance, found = self.variance(), []
        for skill in self.library.skills.values():
            shift = skill.held_out_sum / skill.held_out - skill.whole_sum / skill.rows
            moved = float((shift**2 / variance).sum())
            spread = float((skill.held_out_squares / (skill.held_out - 1) / variance).sum())
            unit = 1 / (1 / batch + 1 / skill.rows) / len(variance)
            mean = unit * (moved + spread / batch)
            # The shift lies where the spread is large: as a direction drawn by its share of it.
            deviation = spread / batch * (2 * spread / batch + 4 * moved) / skill.dimensions
            found.append(self.factor * gamma_quantile(mean, unit**2 * deviation, self.quantile))
        return torch.tensor(found, dtype=torch.float64)

    def check_size(self, batch: int) -> None:
        """Raises ValueError for a batch that is too small to judge, and without known skills."""
        self.library.require_skills()
        if batch < LEAST_ROWS:
            raise ValueError(
                f"a batch of {batch} rows is too small to judge: at least {LEAST_ROWS} are needed, "
                "as with fewer the means of similar skills cannot be told apart"
            )

    def judge(self, whole: Tensor) -> Verdict:
        """Whether a batch [B, D], as `Features.whole`, is of none of the skills.

        Half a batch of a known skill and half of a new one is called new: give one skill at a time,
        and look at the share of far rows. Raises ValueError below LEAST_ROWS rows.
        """
        self.check_size(len(whole))
        distances, thresholds = self.distances(whole), self.thresholds(len(whole))
        margins = distances / thresholds
        place = int(margins.argmin())
        skills = list(self.library.skills.values())
        rows = torch.stack([s.row_distances(whole) / s.far_level for s in skills])
        return Verdict(
            novel=bool(margins[place] > 1),
            nearest=skills[place].name,
            distance=float(distances[place]),
            threshold=float(thresholds[place]),
            margin=float(margins[place]),
            far_share=float((rows.min(0).values > 1).double().mean()),
        )
