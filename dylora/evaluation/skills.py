"""The share of an embedded skill's tasks that a model answers so that its checker passes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.model import DyLoRA_MoE
from dylora.tasks import Task, check_answers, generate_tasks
from dylora.training.prompts import encode_prompts, format_prompt, pad_token_id


class SkillScore(NamedTuple):
    """How one skill went."""

    passed: int
    total: int
    answers: list[str]

    @property
    def share(self) -> float:
        return self.passed / self.total


def score_skills(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    skills: Sequence[str],
    count: int,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, SkillScore]:
    """Answer `count` test tasks of each skill greedily and run the answers.

    Answers are generated in this process and run in others, with limits: see tasks/checking.py.
    """
    scores = {}
    for skill in skills:
        tasks = generate_tasks(skill, "test", count, seed)
        answers = answer(model, tokenizer, tasks, max_new_tokens, batch_size)
        scores[skill] = SkillScore(sum(check_answers(tasks, answers)), len(tasks), answers)
    return scores


@torch.no_grad()
def answer(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers, in the tasks' order; prompts of similar length share a batch."""
    was_training = model.training
    model.eval()
    prompts = encode_prompts(tokenizer, [format_prompt(task.instruction) for task in tasks])
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))
    answers = [""] * len(tasks)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        ids, mask = pad_left([prompts[index] for index in chosen], pad_token_id(tokenizer))
        device = model.injection.state.maturity_E.device
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    model.train(was_training)
    return answers


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask [B, S], padded in front, as generation needs it."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = 1
    return ids, mask
