"""Losses and passed answers of a model, by skill, as the experiments of this folder take them."""

from collections.abc import Sequence

import torch

from dylora import DyLoRA_MoE, load_tokenizer
from dylora.data.batching import collate
from dylora.data.prompts import format_prompt, pad_token_id
from dylora.evaluation.passk.generation import generate_in_batches
from dylora.evaluation.passk.problem import Problem, answer_of
from dylora.evaluation.passk.skills import SkillCheck
from dylora.tasks import Task, check_answers
from experiments.growth.methods import BASE, Row

MOST_TOKENS = 40  # of an answer; the longest reference has 32


@torch.no_grad()
def loss_of(model: DyLoRA_MoE, rows: Sequence[Row]) -> float:
    """Mean nats per target token, in evaluation mode."""
    pad, total, count = pad_token_id(load_tokenizer(BASE)), 0.0, 0
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for begin in range(0, len(ordered), 8):
        batch = collate(ordered[begin : begin + 8], pad)
        losses = model(**batch, keep_logits=False).token_losses
        assert losses is not None
        total += float(losses.double().sum())
        count += len(batch["target_positions"])
    return total / count


def answers_of(model: DyLoRA_MoE, tasks: Sequence[Task]) -> list[str]:
    """Greedy answers to tasks of one skill."""
    problems = [
        Problem(
            task_id=f"{task.skill}/{number}",
            prompt=format_prompt(task.instruction),
            prefix="",
            stops=("\n### ",),
            reference=task.answer,
            texts=(task.instruction,),
            checker=SkillCheck(task.check),
        )
        for number, task in enumerate(tasks)
    ]
    tokenizer = load_tokenizer(BASE)
    texts = generate_in_batches(model, tokenizer, problems, 100, max_new_tokens=MOST_TOKENS)
    return [answer_of(problem, text) for problem, text in zip(problems, texts, strict=True)]


def passed_of(model: DyLoRA_MoE, tasks: Sequence[Task]) -> float:
    """Share of tasks whose greedy answer passes its checker."""
    passed, _ = check_answers(tasks, answers_of(model, tasks), workers=1)
    return sum(passed) / len(passed)
