"""Samples of a suite in a JSONL file, which survives a kill and is continued."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.splits import derived_seed
from dylora.evaluation.passk.generation import by_length, generate
from dylora.evaluation.passk.options import Sampling
from dylora.evaluation.passk.problem import Problem, answer_of
from dylora.model import DyLoRA_MoE

Draw = tuple[Problem, int]
"""An answer to be drawn: its task, and its number among the task's samples, from 0."""


def sample_to_file(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    file: Path,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, list[str]]:
    """Answers to each task: those of the file, and the missing ones, which are added to it.

    A batch is the same whatever the file holds already, so a continued sampling gives the samples
    of an undisturbed one. An exception of `before_batch` ends it, with nothing lost.
    """
    answers = read_samples(file)
    batches = list(_batches(model, tokenizer, problems, sampling))
    bar = tqdm(total=sum(map(len, batches)), desc=file.stem, disable=None)
    with bar, file.open("a", encoding="utf-8") as stream:
        for batch in batches:
            kept = {problem.task_id: len(answers.get(problem.task_id, [])) for problem, _ in batch}
            if any(number >= kept[problem.task_id] for problem, number in batch):
                before_batch()
                first, number = batch[0]
                texts = generate(
                    model,
                    tokenizer,
                    [problem for problem, _ in batch],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=derived_seed("benchmark", sampling.seed, first.task_id, number),
                )
                for (problem, number), text in zip(batch, texts, strict=True):
                    if number >= kept[problem.task_id]:
                        solution = answer_of(problem, text)
                        row = {"task_id": problem.task_id, "solution": solution}
                        stream.write(json.dumps(row) + "\n")
                        answers.setdefault(problem.task_id, []).append(solution)
                stream.flush()
                os.fsync(stream.fileno())
            bar.update(len(batch))
    return {one.task_id: answers[one.task_id][: sampling.samples] for one in problems}


def _batches(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
) -> Iterator[list[Draw]]:
    """Tasks of similar length together when greedy; else the samples of one task."""
    size = sampling.batch_size
    if sampling.temperature == 0:
        for indices in by_length(model, tokenizer, problems, size):
            yield [(problems[index], 0) for index in indices]
        return
    for problem in problems:
        draws = [(problem, number) for number in range(sampling.samples)]
        yield from (draws[begin : begin + size] for begin in range(0, len(draws), size))


def read_samples(file: Path) -> dict[str, list[str]]:
    """Answers by task of a JSONL of samples; a last line that a kill cut off is removed from it.

    Raises ValueError for another line that is not a sample.
    """
    answers: dict[str, list[str]] = {}
    if not file.exists():
        return answers
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            answers.setdefault(row["task_id"], []).append(row["solution"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not a sample; remove the file") from None
    return answers
