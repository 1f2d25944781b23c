"""Which rows are trained on: splits by question, by task and by id, and the hashes behind them."""

import hashlib
import json
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset

MBPP_TASKS = 974
MBPP_PUBLISHED = {
    "train": range(601, 975),
    "validation": range(511, 601),
    "test": range(11, 511),
    "prompt": range(1, 11),
}


def mbpp_split(scheme: str, seed: int = 0) -> dict[str, list[int]]:
    """Task ids of each split, sorted.

    `published`: 374 train, 90 validation, 500 test, 10 prompt. `70/10/20`: 682, 97 and 195 of all
    974, so that most published test tasks are trained on: score only those that are not.
    """
    if scheme == "published":
        return {split: list(ids) for split, ids in MBPP_PUBLISHED.items()}
    if scheme != "70/10/20":
        raise ValueError(f"split is {scheme!r}, but mbpp has published and 70/10/20")
    ids = list(range(1, MBPP_TASKS + 1))
    random.Random(derived_seed("mbpp", seed)).shuffle(ids)
    train, validation = round(0.7 * MBPP_TASKS), round(0.8 * MBPP_TASKS)
    parts = {"train": ids[:train], "validation": ids[train:validation], "test": ids[validation:]}
    return {split: sorted(part) for split, part in parts.items()}


def content_hash(*parts: str | int) -> str:
    """SHA-256 of the parts and of where they begin and end, as 64 hex digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_hash(text: str) -> str:
    """12 hex digits of SHA-256 of the words: equal for texts that differ in white space alone.

    Between 10,000 texts and 100,000 others two that differ share one with a chance of 4 in a
    million.
    """
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


def derived_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) for one purpose: near seeds and other purposes share no sequence."""
    return int(content_hash(*parts)[:16], 16) >> 1


def seeded_generator(*parts: str | int) -> torch.Generator:
    """A generator of its own for whatever the parts name."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def split_by_question(
    rows: "Dataset", seed: int, scheme: tuple[int, int] = (90, 10)
) -> dict[str, list[int]]:
    """A share of the questions, by default a tenth, those whose seeded hash is lowest, for
    validation. A text is its own question."""
    triples = zip(rows["instruction"], rows["input"], rows["output"], strict=True)
    hashes = [
        content_hash(seed, question, more) if question else content_hash(seed, text)
        for question, more, text in triples
    ]
    questions = sorted(set(hashes))
    held_out = set(questions[: max(1, round(len(questions) * scheme[1] / sum(scheme)))])
    return _indices("validation" if question in held_out else "train" for question in hashes)


def split_by_task(rows: "Dataset", task_ids: dict[str, list[int]]) -> dict[str, list[int]]:
    """Rows of MBPP, whose ids are those of its tasks; the other splits of it are left out."""
    split_of = {str(task): split for split, tasks in task_ids.items() for task in tasks}
    return _indices(split_of.get(id_, "") for id_ in rows["id"])


def split_by_id(rows: "Dataset") -> dict[str, list[int]]:
    """Rows of a skill, whose ids begin with the name of the split."""
    return _indices(id_.partition("/")[0] for id_ in rows["id"])


def _indices(splits: Iterable[str]) -> dict[str, list[int]]:
    """The split of each row -> the rows of train and validation."""
    found: dict[str, list[int]] = {"train": [], "validation": []}
    for index, split in enumerate(splits):
        if split in found:
            found[split].append(index)
    return found
