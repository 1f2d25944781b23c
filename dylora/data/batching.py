"""From examples to the batches of forward passes.

Shape letters: B batch, S sequence.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dylora.data.tokenize import IGNORED
from dylora.kernels.cross_entropy import target_positions

MOST_CUTS = 256  # places that are looked at; a step of more rows is cut at every second, third, …


def split_by_length(lengths: Sequence[int], parts: int) -> list[int]:
    """Where to cut rows, sorted by length, into `parts` micro-batches: the end of each.

    A part costs its rows times its longest one. The sum is the least, with no part above what equal
    numbers of rows come to at most: many short rows share a part, in the memory of equal parts.
    len(lengths) is a multiple of `parts`. A dynamic programme: the best cut of the first e rows
    into p parts is the best of the first b into p - 1, and one part of the rest.
    """
    rows = len(lengths) // parts
    strides = [n for n in range(1, rows + 1) if rows % n == 0]  # equal parts end at such places
    stride = next((n for n in strides if len(lengths) <= n * MOST_CUTS), rows)
    if stride == rows:
        return list(range(rows, len(lengths) + 1, rows))
    places = torch.arange(0, len(lengths) + 1, stride)
    longest = torch.tensor([0, *lengths])[places]
    cost = (places - places[:, None]) * longest  # [b, e]: of one part of the rows from b to e
    never = len(lengths) * lengths[-1] + 1
    cost[(cost <= 0) | (cost > rows * lengths[-1])] = never
    best, begins = cost[0], []
    for _ in range(parts - 1):
        best, begin = (best[:, None] + cost).min(0)
        begins.append(begin)
    ends = [len(places) - 1]
    for begin in reversed(begins):
        ends.append(int(begin[ends[-1]]))
    return places[ends[::-1]].tolist()


def micro_batches(
    examples: Sequence[dict[str, list[int]]], parts: int, pad_token_id: int
) -> list[dict[str, Tensor]]:
    """All examples in so many padded micro-batches, rows of similar length in one."""
    rows = sorted(examples, key=lambda row: len(row["input_ids"]))
    ends = split_by_length([len(row["input_ids"]) for row in rows], parts)
    return [collate(rows[begin:end], pad_token_id) for begin, end in pairwise([0, *ends])]


def collate(examples: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, int64 [B, S], S the longest; and
    `target_positions` [N], where labels have a target after them.

    The mask goes by position, so a padding id that equals EOS hides no real EOS.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)

    def padded(name: str, filler: int) -> Tensor:
        rows = [example[name] + [filler] * (longest - len(example[name])) for example in examples]
        return torch.tensor(rows)

    positions, labels = torch.arange(longest), padded("labels", IGNORED)
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": (positions < torch.tensor(lengths)[:, None]).long(),
        "labels": labels,
        "target_positions": target_positions(labels),
    }


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch there, without waiting for what the device is still doing."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
