"""What stream.py compares: ways to learn skills that arrive one after another on one frozen base.

All have the same number of trainable parameters (within 0.2 %; what a library keeps counts), see
the same number of rows a stage, with replay the repeated ones among them, in batches of one size.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dylora import DyLoRA_MoE, MoELoraConfig, load_tokenizer
from dylora.data.batching import collate
from dylora.data.prompts import encode_answers, encode_prompts, format_prompt, pad_token_id
from dylora.tasks import Task

BASE = "tiny-code-llama"
SINGLE_RANK = 103  # of one LoRA with as many parameters as six experts of rank 16 and a library
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Stage:
    """One skill of a stream, as tokenized rows."""

    name: str
    rows: list[Row]
    held_out: list[Row]  # for a library's thresholds and for losses, of another split


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained: AdamW without decay, a warm-up, a cosine to 0, clipped at norm 1."""

    updates: int = 320
    batch: int = 2
    warmup: int = 8
    library: tuple[int, int] = (32, 24)  # rows of a skill that it is fitted to, and calibrated on


def tokenized(texts: Sequence[tuple[str, str, str]], longest: int = 512) -> list[Row]:
    """Rows of (instruction, input, answer); labels are -100 on the prompt."""
    tokenizer = load_tokenizer(BASE)
    prompts = encode_prompts(tokenizer, [format_prompt(a, b) for a, b, _ in texts])
    rows = []
    for prompt, answer in zip(
        prompts, encode_answers(tokenizer, [c for _, _, c in texts]), strict=True
    ):
        target = [*answer, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + target
        rows.append({"input_ids": (prompt + target)[:longest], "labels": labels[:longest]})
    return rows


def fit(
    model: DyLoRA_MoE,
    draw: Callable[[], list[Row]],
    rate: float,
    recipe: Recipe,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train what requires a gradient on batches that `draw` gives."""
    pad = pad_token_id(load_tokenizer(BASE))
    parameters = [p for _, p in model.own_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.experts.attach_optimizer(optimizer)  # frozen neighbours may share a stack then
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / recipe.warmup, 0.5 + 0.5 * math.cos(math.pi * step / recipe.updates)
        ),
    )
    model.train()
    for _ in range(recipe.updates):
        loss = model(**collate(draw(), pad), keep_logits=False).loss
        assert loss is not None
        (loss if penalty is None else loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.experts.optimizer = None  # it holds none that the next stage unfreezes
    model.eval()


def drawer(rows: Sequence[Row], size: int, seed: str) -> Callable[[], list[Row]]:
    """Batches of rows, shuffled anew whenever all have been seen."""
    rng, left = random.Random(seed), []

    def draw() -> list[Row]:
        batch = []
        while len(batch) < size:
            if not left:
                left.extend(rng.sample(list(rows), len(rows)))
            batch.append(left.pop())
        return batch

    return draw


@dataclass
class Method:
    """One LoRA that is trained on every stage in turn, and what the others override.

    With `kept` every other row is, from the second stage on, one of so many of each earlier skill.
    Rates and scales are those that rates.py found, where a method does not say otherwise.
    """

    seed: int
    recipe: Recipe = field(default_factory=Recipe)
    rate: float = 5e-5
    scale: float = 32.0  # alpha / r of an update as it enters the model
    kept: int = 0
    work: Path | None = None  # a folder in which trained experts are kept
    stages: list[Stage] = field(default_factory=list)  # learned so far

    JOINT: ClassVar[bool] = False  # all stages at once
    ORACLE: ClassVar[bool] = False  # after `learn` the new expert answers alone, until `admit`

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = DyLoRA_MoE.from_base(BASE, self.config()).eval()

    def config(self) -> MoELoraConfig:
        rank = SINGLE_RANK
        return MoELoraConfig(
            use_moe_routing=False, num_experts=1, r=rank, lora_alpha=self.scale * rank
        )

    def learn(self, stage: Stage) -> None:
        self.stages.append(stage)
        fit(self.model, self.draw(), self.rate, self.recipe)

    def admit(self, stage: Stage) -> None:
        """What follows the training of a stage."""

    def draw(self) -> Callable[[], list[Row]]:
        stage, size = self.stages[-1], self.recipe.batch
        old = [row for earlier in self.stages[:-1] for row in earlier.rows[: self.kept]]
        seed = f"{self.seed}/{stage.name}"
        if not old:
            return drawer(stage.rows, size, seed)
        new, again = drawer(stage.rows, size // 2, seed), drawer(old, size // 2, seed)
        return lambda: new() + again()

    def learned(self, stages: int) -> list[int]:
        """The stage after which each skill counts as learned."""
        return list(range(stages))

    def decisions(self, tasks: Sequence[Task]) -> Any:
        """What answers depend on besides the task, as far as it may change; None: on everything."""
        return None

    def parameters(self) -> int:
        """Trainable ones over the whole stream, and numbers that a library keeps."""
        experts = expert_tensors(self.model, self.model.experts.live).values()
        routers = [p for _, p in self.model.router_parameters()]
        return sum(tensor.numel() for tensor in (*experts, *routers))

    def frozen(self) -> dict[str, Tensor]:
        """Copies of what must never change again, by name."""
        return {}


@dataclass
class Orthogonal(Method):
    """O-LoRA (Wang et al. 2023, arXiv:2310.14152): a LoRA a stage, earlier ones frozen, all summed;
    the new expert's A is held orthogonal to theirs by 0.5 Σ ||A_old Aᵀ||²."""

    count: int = 6
    rate: float = 4e-4
    scale: float = 8.0

    def config(self) -> MoELoraConfig:
        rank = round(SINGLE_RANK / self.count)
        return MoELoraConfig(
            num_experts=self.count,
            r=rank,
            lora_alpha=self.scale * rank,
            router_type="fixed",
            fixed_routing_weights=[1.0] * self.count,
        )

    def learn(self, stage: Stage) -> None:
        self.stages.append(stage)
        newest = len(self.stages) - 1
        self.model.experts.unfreeze(newest)
        self.model.experts.freeze(*(e for e in range(self.count) if e != newest))
        fit(self.model, self.draw(), self.rate, self.recipe, self.overlap if newest else None)
        self.model.experts.freeze(newest)

    def overlap(self) -> Tensor:
        total, newest = torch.zeros(()), len(self.stages) - 1
        for adapter in self.model.mixture.adapters.values():
            A = [s.lora_A[place] for s, place in map(adapter.stack_of, range(newest + 1))]
            total = total + sum((old.detach() @ A[-1].T).square().sum() for old in A[:-1])
        return 0.5 * total

    def frozen(self) -> dict[str, Tensor]:
        return expert_tensors(self.model, range(len(self.stages)))


@dataclass
class Joint(Method):
    """A dense mixture with a router at every site, all rows in one shuffle."""

    rank: int = 17
    rate: float = 1.25e-3  # of a feasibility study, as is the scale
    scale: float = 2.0

    JOINT: ClassVar[bool] = True

    def config(self) -> MoELoraConfig:
        return MoELoraConfig(
            num_experts=6,
            r=self.rank,
            lora_alpha=self.scale * self.rank * 6,
            maturity_mode="manual",
            load_balance_loss_type="none",
            router_z_loss_coef=0.0,
        )

    def learn_all(self, stages: Sequence[Stage]) -> None:
        self.stages.extend(stages)
        rows = [row for stage in stages for row in stage.rows]
        draw = drawer(rows, self.recipe.batch, f"{self.seed}/joint")
        updates = self.recipe.updates * len(stages)
        fit(self.model, draw, self.rate, Recipe(updates, self.recipe.batch, self.recipe.warmup))


@dataclass
class JointLora(Method):
    """One LoRA on all rows in one shuffle."""

    rate: float = 1.5e-4
    scale: float = 32.0

    JOINT: ClassVar[bool] = True
    learn_all = Joint.learn_all


@dataclass
class Grow(Joint):
    """A new expert a stage beside frozen experts, and token routers that are trained with it; kept
    rows of earlier skills as with replay, if there are any."""

    rate: float = 1.25e-3  # an expert's; not searched
    scale: float = 8.0

    JOINT: ClassVar[bool] = False

    def config(self) -> MoELoraConfig:
        return MoELoraConfig(
            num_experts=2,
            r=self.rank,
            lora_alpha=self.scale * self.rank,
            maturity_mode="manual",
            load_balance_loss_type="none",
            router_z_loss_coef=0.0,
        )

    def learn(self, stage: Stage) -> None:
        self.stages.append(stage)
        experts, newest = self.model.experts, len(self.stages) - 1
        if newest >= len(experts):
            experts.create_expert(share=0.5)
        experts.set_active_expert(*range(newest + 1))
        fit(self.model, self.draw(), self.rate, self.recipe)
        experts.freeze(newest)

    def frozen(self) -> dict[str, Tensor]:
        return expert_tensors(self.model, range(len(self.stages)))


def expert_tensors(model: DyLoRA_MoE, experts: Any) -> dict[str, Tensor]:
    """Copies of the experts' matrices by name."""
    return {
        f"{expert}/{path}/{name}": tensor.clone()
        for expert in experts
        for path, adapter in model.mixture.adapters.items()
        for name, tensor in adapter.expert_tensors(expert).items()
    }
