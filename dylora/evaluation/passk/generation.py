"""Texts from a model: batches of prompts, each row until its own end.

Shape letters: B batch, S sequence.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import max_positions
from dylora.data.prompts import PROMPT_WITH_INPUT, encode_prompts, pad_token_id
from dylora.data.templates import question, recorded_template
from dylora.evaluation.loading import decode_after
from dylora.evaluation.passk.problem import Problem
from dylora.kernels.common import evaluation_mode
from dylora.model import DyLoRA_MoE

_CONTEXT = 8
"""Tokens before those looked at for a stop, so that these are decoded in context."""


def generate(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The model's text for each prompt, in one batch, padded in front, with a KV cache.

    A row ends at EOS, at any other special token, once its text holds one of its stops, after
    `max_new_tokens`, or at the base's last position; a text may reach beyond its stop by the rest
    of a token. The base's own generation_config has no effect, and the random state is restored.
    Raises ValueError for a prompt that leaves the base no position for an answer.
    """
    prompts = prompt_ids(model, tokenizer, problems)
    limit, room = max_positions(model.base.config) or math.inf, []
    for problem, row in zip(problems, prompts, strict=True):
        if len(row) >= limit:
            raise ValueError(
                f"{problem.task_id} has {len(row)} tokens and {model.base_name} {limit} positions, "
                "so nothing could follow; take another base, or --limit the tasks"
            )
        room.append(int(min(max_new_tokens, limit - len(row))))
    ids, mask = pad_left(prompts, pad_token_id(tokenizer))
    cuda = [model.device] if model.device.type == "cuda" else []
    sampled: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    ends = recorded_template(model.training_record, tokenizer).end_ids
    ended: Any = StopCondition(tokenizer, problems, prompts, room, ids.shape[1], ends)
    with evaluation_mode(model), default_generation_config(model.base), torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(room),
            do_sample=temperature > 0,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=ends,
            stopping_criteria=StoppingCriteriaList([ended]),
            **(sampled if temperature > 0 else {}),
        )
    rows = output[:, ids.shape[1] :].tolist()
    return [
        decode_after(tokenizer, prompt, row[: ended.length(row)])
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def prompt_ids(
    model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[list[int]]:
    """The prompt of each problem; an instruction in the template of the model's training."""
    template = recorded_template(model.training_record, tokenizer)
    found = encode_prompts(tokenizer, [problem.prompt for problem in problems])
    if template.text == PROMPT_WITH_INPUT:
        return found
    asked = [place for place, problem in enumerate(problems) if problem.instruction]
    chats = [question(template, problems[place].instruction) for place in asked]
    for place, ids in zip(asked, template.prompts(chats), strict=True):
        found[place] = ids
    return found


@contextmanager
def default_generation_config(base: PreTrainedModel) -> Iterator[None]:
    """Within this context the base has transformers' default generation_config.

    As an argument of generate it is not enough: what it does not set comes from the base's own.
    """
    before, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


class StopCondition:
    """Tells transformers' generate which rows are done, after each token.

    Only the last tokens are searched for stops: each of a stop's characters takes one at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        room: Sequence[int],
        begin: int,
        ends: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.prompts, self.room, self.begin = tokenizer, prompts, room, begin
        self.stops = [problem.stops for problem in problems]
        self.special = {*tokenizer.all_special_ids, *ends}
        self.tail = max((len(stop) for row in self.stops for stop in row), default=0) + 2
        self.done = [False] * len(problems)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, ids in enumerate(input_ids[:, self.begin :].tolist()):
            if not self.done[row]:
                self.done[row] = (
                    ids[-1] in self.special
                    or len(ids) >= self.room[row]
                    or self._has_stop(row, ids)
                )
        return torch.tensor(self.done, device=input_ids.device)

    def _has_stop(self, row: int, ids: list[int]) -> bool:
        before = [*self.prompts[row], *ids[: -self.tail]][-_CONTEXT:]
        text = decode_after(self.tokenizer, before, ids[-self.tail :]) if self.stops[row] else ""
        return any(stop in text for stop in self.stops[row])

    def length(self, ids: Sequence[int]) -> int:
        """The tokens of a row before its first special token, with which a done row is padded."""
        return next((place for place, one in enumerate(ids) if one in self.special), len(ids))


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask [B, S], padded in front, as generation needs it."""
    ids, mask = (
        pad_sequence(parts, batch_first=True, padding_value=value, padding_side="left")
        for parts, value in (
            ([torch.tensor(row) for row in rows], pad),
            ([torch.ones(len(row), dtype=torch.long) for row in rows], 0),
        )
    )
    return ids, mask


def by_length(
    model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], size: int
) -> Iterator[list[int]]:
    """Indices of problems whose prompts are of similar length, `size` at a time."""
    lengths = [len(ids) for ids in prompt_ids(model, tokenizer, problems)]
    order = sorted(range(len(problems)), key=lambda index: lengths[index])
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def generate_in_batches(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int,
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy texts, in the problems' order."""
    texts = [""] * len(problems)
    for indices in by_length(model, tokenizer, problems, batch_size):
        batch = [problems[index] for index in indices]
        found = generate(model, tokenizer, batch, max_new_tokens=max_new_tokens)
        for index, text in zip(indices, found, strict=True):
            texts[index] = text
    return texts
