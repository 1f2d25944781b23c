"""Methods of stream.py that route by the prompt: an expert a skill, with or without a shared one.

Both keep their experts frozen and no rows; a library of sums says which expert answers a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dylora import DyLoRA_MoE, MoELoraConfig, SkillLibrary, load_tokenizer
from dylora.data.prompts import pad_token_id
from dylora.features import embed
from dylora.storage.skill_file import VECTORS
from dylora.tasks import Task
from dylora.training.start import start_expert
from experiments.growth.methods import (
    BASE,
    Method,
    Recipe,
    Stage,
    drawer,
    expert_tensors,
    fit,
    tokenized,
)


@dataclass
class Experts(Method):
    """An expert a skill, trained alone and frozen; the library's rule chooses by the prompt.

    With `from_known` it starts as a stage of the package does, at a share of the known expert that
    explains its rows best.
    """

    rate: float = 1.25e-3
    scale: float = 8.0
    rank: int = 16
    from_known: bool = False

    ORACLE: ClassVar[bool] = True

    def config(self) -> MoELoraConfig:
        return MoELoraConfig(
            num_experts=1,
            top_k_experts=1,
            r=self.rank,
            lora_alpha=self.scale * self.rank,
            router_scope="prompt",
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.library = SkillLibrary(self.model)

    def learn(self, stage: Stage) -> None:
        """The new expert's values and rows depend on seed and skill alone, whatever came before."""
        self.stages.append(stage)
        newest = self.new_expert(stage)
        self.model.experts.activate(newest)
        self.train_newest(newest, stage)
        self.model.experts.freeze(newest)

    def new_expert(self, stage: Stage) -> int:
        """The number of the expert that this stage trains."""
        experts, newest = self.model.experts, len(self.stages) - 1
        if newest >= len(experts):
            torch.manual_seed(self.seed)
            experts.create_expert(skill=stage.name)
        return newest

    def train_newest(self, expert: int, stage: Stage) -> None:
        """Or take what an earlier run has trained likewise."""
        if self.from_known:
            pad = pad_token_id(load_tokenizer(BASE))
            print(" ", start_expert(self.model, expert, stage.rows[:64], 8, pad), flush=True)
        recipe = f"{self.recipe.updates}x{self.recipe.batch}-{self.rate}-{self.scale}-r{self.rank}"
        name = f"{type(self).__name__}-{stage.name}-{self.seed}-{recipe}.safetensors"
        file = None if self.work is None or self.from_known else self.work / name
        if file is not None and file.exists():
            kept = load_file(file)
            for path, adapter in self.model.mixture.adapters.items():
                own = f"{path}|"
                adapter.load_expert(
                    expert, {k.removeprefix(own): v for k, v in kept.items() if k.startswith(own)}
                )
            return
        fit(self.model, self.draw(), self.rate, self.recipe)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{path}|{name}": tensor.contiguous()
                for path, adapter in self.model.mixture.adapters.items()
                for name, tensor in adapter.expert_tensors(expert).items()
            }
            save_file(tensors, file)

    def admit(self, stage: Stage) -> None:
        """Into the library; from here on prompts choose among all that are known."""
        expert = self.expert_of(len(self.stages) - 1)
        fitted, calibrated = self.recipe.library
        rows, held_out = stage.rows[:fitted], stage.held_out[-calibrated:]
        self.library.add(stage.name, rows, held_out, expert=expert)
        self.model.experts.activate_all_experts()

    def expert_of(self, place: int) -> int:
        return place

    def decisions(self, tasks: Sequence[Task]) -> Any:
        """Which expert answers each task, -1 for the base: with the gate 1, as top-k is 1."""
        prompts = prompt_features(self.model, tasks)
        rule = self.library.prompt_rule()
        chosen = rule.log_probabilities(prompts).argmax(-1).tolist()
        known = (rule.distances(prompts).amin(-1) <= 1).tolist()
        return (
            tasks[0].skill,
            tuple(rule.experts[k] if ok else -1 for k, ok in zip(chosen, known, strict=True)),
        )

    def parameters(self) -> int:
        skills = list(self.library.skills.values())
        vectors = sum(getattr(skill, name).numel() for skill in skills for name in VECTORS)
        return super().parameters() + self.library.prompt_scatter.numel() + vectors

    def frozen(self) -> dict[str, Tensor]:
        return expert_tensors(self.model, range(len(self.model.experts)))


@dataclass
class Shared(Experts):
    """An always-on expert of rank 48 learned in the first `first` stages and then frozen, with
    new experts of rank 8 on top. With first > 1 these stages are learned as one, of all their rows:
    a general mixture, to which the others come one after another."""

    rank: int = 8
    first: int = 1
    first_rate: float = 1.25e-3

    ORACLE: ClassVar[bool] = False

    def config(self) -> MoELoraConfig:
        ranks = [48] + [self.rank] * self.first
        return MoELoraConfig(
            num_experts=len(ranks),
            shared_experts=1,
            top_k_experts=1,
            r=self.rank,
            lora_alpha=self.scale * self.rank,
            expert_ranks=ranks,
            expert_alphas=[self.scale * rank for rank in ranks],
            router_scope="prompt",
        )

    def learn(self, stage: Stage) -> None:
        if len(self.stages) >= self.first:
            super().learn(stage)
            return
        self.stages.append(stage)
        Experts.admit(self, stage)
        if len(self.stages) == self.first:
            rows = [row for known in self.stages for row in known.rows]
            draw = drawer(rows, self.recipe.batch, f"{self.seed}/first")
            updates = self.recipe.updates * self.first
            recipe = Recipe(updates, self.recipe.batch, self.recipe.warmup)
            fit(self.model, draw, self.first_rate, recipe)
            self.model.experts.freeze(*range(self.first + 1))

    def admit(self, stage: Stage) -> None:
        if len(self.stages) > self.first:
            super().admit(stage)

    def new_expert(self, stage: Stage) -> int:
        torch.manual_seed(self.seed)
        return self.model.experts.create_expert(skill=stage.name)

    def train_newest(self, expert: int, stage: Stage) -> None:
        fit(self.model, self.draw(), self.rate, self.recipe)

    def expert_of(self, place: int) -> int:
        return place + 1

    def learned(self, stages: int) -> list[int]:
        return [max(place, self.first - 1) for place in range(stages)]

    def frozen(self) -> dict[str, Tensor]:
        trained = len(self.stages) >= self.first
        return expert_tensors(self.model, range(len(self.model.experts)) if trained else ())


_FEATURES: dict[str, Tensor] = {}


def prompt_features(model: DyLoRA_MoE, tasks: Sequence[Task]) -> Tensor:
    """[B, D]; of the frozen base alone, so they are taken once."""
    skill = tasks[0].skill
    if skill not in _FEATURES:
        rows = tokenized([(task.instruction, "", task.answer) for task in tasks])
        _FEATURES[skill] = embed(model.mixture, rows).prompt
    return _FEATURES[skill]
