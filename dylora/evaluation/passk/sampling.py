"""Samples of a suite in a JSONL file, which survives a kill and is continued."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.splits import derived_seed
from dylora.evaluation.passk.generation import by_length, generate
from dylora.evaluation.passk.options import Sampling
from dylora.evaluation.passk.problem import Problem, answer_of
from dylora.model import DyLoRA_MoE
from dylora.training.distributed import ALONE, Processes

Draw = tuple[Problem, int]
"""An answer to be drawn: its task, and its number among the task's samples, from 0."""


def sample_to_file(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    file: Path,
    before_batch: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> dict[str, list[str]]:
    """Answers to each task: those of the file, and the missing ones, which are added to it.

    A batch is the same whatever the file holds already, so a continued sampling gives the samples
    of an undisturbed one. An exception of `before_batch` ends it, with nothing lost. Processes
    share the batches, and have the same answers; the first writes the file.
    """
    answers = processes.from_first(lambda: read_samples(file))
    batches = list(_batches(model, tokenizer, problems, sampling))
    left = [batch for batch in batches if any(_is_missing(draw, answers) for draw in batch)]
    total, missing = (sum(map(len, some)) for some in (batches, left))
    silent = None if processes.is_first else True
    with tqdm(total=total, initial=total - missing, desc=file.stem, disable=silent) as bar:
        for begin in range(0, len(left), processes.size):
            before_batch()
            now = left[begin : begin + processes.size]
            own = now[processes.rank : processes.rank + 1]  # the last ones may lack one
            found = processes.gather(partial(_texts, model, tokenizer, own, sampling))
            for batch, texts in zip(now, chain(*found), strict=True):
                _keep(batch, texts, answers, file if processes.is_first else None)
                bar.update(len(batch))
    return {one.task_id: answers[one.task_id][: sampling.samples] for one in problems}


def _is_missing(draw: Draw, answers: dict[str, list[str]]) -> bool:
    problem, number = draw
    return number >= len(answers.get(problem.task_id, []))


def _texts(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Draw]],
    sampling: Sampling,
) -> list[list[str]]:
    """The texts of each batch, which its first draw seeds."""
    return [
        generate(
            model,
            tokenizer,
            [problem for problem, _ in batch],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=derived_seed("benchmark", sampling.seed, batch[0][0].task_id, batch[0][1]),
        )
        for batch in batches
    ]


def _keep(
    batch: Sequence[Draw], texts: Sequence[str], answers: dict[str, list[str]], file: Path | None
) -> None:
    """Add the answers of a batch that are missing, to the file too if there is one."""
    lines = []
    for draw, text in zip(batch, texts, strict=True):
        if _is_missing(draw, answers):
            problem, _ = draw
            solution = answer_of(problem, text)
            answers.setdefault(problem.task_id, []).append(solution)
            lines.append(json.dumps({"task_id": problem.task_id, "solution": solution}) + "\n")
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())


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
