"""Programs from a model: batches of prompts, each row until its own end, and samples in a file.

Shape letters: B batch, S sequence.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteriaList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import encode_prompts, pad_token_id
from dylora.data.sources import derived_seed
from dylora.evaluation.passk.problem import Problem, program_of
from dylora.model import DyLoRA_MoE


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How programs are drawn."""

    max_new_tokens: int
    samples: int = 1
    """Programs a task."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    """Rows of a batch: tasks when greedy, samples of one task otherwise."""


class Draw(NamedTuple):
    """One program to come."""

    problem: Problem
    number: int  # of this task's samples, from 0


@contextmanager
def evaluation_mode(model: DyLoRA_MoE) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


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
    """What the model says to each prompt, in one batch, padded in front, with a KV cache.

    A row ends at EOS, at any other special token, once its text holds one of its stops, after
    `max_new_tokens`, or where the base's positions end; a text may reach beyond its stop by the
    rest of a token. The random state of the process is as it was afterwards.

    Raises:
        ValueError: A prompt that leaves the base no position for an answer.
    """
    prompts = encode_prompts(tokenizer, [problem.prompt for problem in problems])
    room = [
        _room(model, problem, ids, max_new_tokens)
        for problem, ids in zip(problems, prompts, strict=True)
    ]
    ids, mask = pad_left(prompts, pad_token_id(tokenizer))
    device = model.device
    special = set(tokenizer.all_special_ids)
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    cuda = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(room),
            do_sample=temperature > 0,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList(
                [
                    _ended(
                        tokenizer,
                        [problem.stops for problem in problems],
                        room,
                        ids.shape[1],
                        special,
                    )
                ]  # type: ignore[list-item]  # any callable will do
            ),
            # A base may come with settings of its own, which are no part of a benchmark.
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            **(drawn if temperature > 0 else {}),
        )
    rows = output[:, ids.shape[1] :].tolist()
    return [_text(tokenizer, row, special) for row in rows]  # a row that is done is padded


def _room(model: DyLoRA_MoE, problem: Problem, ids: Sequence[int], wanted: int) -> int:
    """Tokens that may follow a prompt."""
    limit = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return wanted
    if len(ids) >= limit:
        raise ValueError(
            f"{problem.task_id} has {len(ids)} tokens and {model.base_name} {limit} positions, so "
            "nothing could follow; take another base, or --limit the tasks"
        )
    return min(wanted, limit - len(ids))


def _ended(
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[Sequence[str]],
    room: Sequence[int],
    begin: int,
    special: set[int],
) -> Callable[..., Tensor]:
    """Tells transformers' generate which rows are done, [B], after each token.

    A stop ends with the newest token or it was found before, and each of its letters takes a token
    at most: the last few tokens are enough to look at, however long the text has become.
    """
    tail = max((len(stop) for row in stops for stop in row), default=0) + 2
    done = [False] * len(stops)

    def ended(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        length = input_ids.shape[1] - begin
        for row, ids in enumerate(input_ids[:, begin:][:, -tail:].tolist()):
            if not done[row]:
                text = _decode(tokenizer, ids) if stops[row] else ""
                done[row] = (
                    ids[-1] in special
                    or length >= room[row]
                    or any(stop in text for stop in stops[row])
                )
        return torch.tensor(done, device=input_ids.device)

    return ended


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: set[int]) -> str:
    """The text up to the first special token."""
    end = next((place for place, one in enumerate(ids) if one in special), len(ids))
    return _decode(tokenizer, ids[:end])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # Spaces before punctuation are part of a program.
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask [B, S], padded in front, as generation needs it."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = 1
    return ids, mask


def by_length(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], size: int
) -> Iterator[list[int]]:
    """Indices of problems whose prompts are of similar length, `size` at a time."""
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [one.prompt for one in problems])]
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
    for indices in by_length(tokenizer, problems, batch_size):
        batch = [problems[index] for index in indices]
        found = generate(model, tokenizer, batch, max_new_tokens=max_new_tokens)
        for index, text in zip(indices, found, strict=True):
            texts[index] = text
    return texts


# Samples in a file


def sample_to_file(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    file: Path,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, list[str]]:
    """Programs of each task: those of the file, and the missing ones, which are added to it.

    A batch is the same whatever the file holds already, so a killed and continued sampling gives
    the samples of an undisturbed one. What `before_batch` raises ends it, with nothing lost.
    """
    programs = read_samples(file)
    batches = list(_batches(tokenizer, problems, sampling))
    bar = tqdm(total=sum(map(len, batches)), desc=file.stem, disable=None)
    with bar, file.open("a", encoding="utf-8") as stream:
        for batch in batches:
            kept = {
                one.problem.task_id: len(programs.get(one.problem.task_id, [])) for one in batch
            }
            missing = [draw for draw in batch if draw.number >= kept[draw.problem.task_id]]
            if missing:
                before_batch()
                for draw, solution in _draw(model, tokenizer, batch, sampling):
                    if draw.number >= kept[draw.problem.task_id]:
                        row = {"task_id": draw.problem.task_id, "solution": solution}
                        stream.write(json.dumps(row) + "\n")
                        programs.setdefault(draw.problem.task_id, []).append(solution)
                stream.flush()
                os.fsync(stream.fileno())
            bar.update(len(batch))
    return {one.task_id: programs[one.task_id][: sampling.samples] for one in problems}


def _batches(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], sampling: Sampling
) -> Iterator[list[Draw]]:
    """Tasks of similar length together when greedy; else the samples of one task."""
    size = sampling.batch_size
    if sampling.temperature == 0:
        for indices in by_length(tokenizer, problems, size):
            yield [Draw(problems[index], 0) for index in indices]
        return
    for problem in problems:
        for begin in range(0, sampling.samples, size):
            numbers = range(begin, min(begin + size, sampling.samples))
            yield [Draw(problem, number) for number in numbers]


def _draw(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Draw],
    sampling: Sampling,
) -> Iterator[tuple[Draw, str]]:
    first = batch[0]
    texts = generate(
        model,
        tokenizer,
        [draw.problem for draw in batch],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=derived_seed("benchmark", sampling.seed, first.problem.task_id, first.number),
    )
    for draw, text in zip(batch, texts, strict=True):
        yield draw, program_of(draw.problem, text)


def read_samples(file: Path) -> dict[str, list[str]]:
    """Programs by task of a JSONL of samples; a last line that a kill cut off is cut from the file.

    Raises:
        ValueError: Another line that is no sample.
    """
    programs: dict[str, list[str]] = {}
    if not file.exists():
        return programs
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            programs.setdefault(row["task_id"], []).append(row["solution"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: no sample; remove the file") from None
    return programs
