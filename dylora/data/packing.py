"""Rows packed into one: several sequences share a row of a micro-batch, and none sees another.

The block-diagonal mask is transformers' own: where it is given no mask, sequences are told by
position ids that begin again (`find_packed_sequence_indices`; in flash attention of a single row,
`_is_packed_sequence`). What fills up a row is a sequence of its own.

Shape letters: B batch, S sequence.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dylora.data.tokenize import IGNORED
from dylora.kernels.cross_entropy import target_positions

Example = dict[str, list[int]]


def packed_batches(
    examples: Sequence[Example], rows: int, pad_token_id: int, *, one_row: bool = False
) -> list[dict[str, Tensor]]:
    """Micro-batches of all examples, of at most so many rows as long as the longest example.

    one_row: each as a single row without padding, in which flash attention knows sequences.
    """
    bins = pack([len(example["input_ids"]) for example in examples])
    count = -(-len(bins) // rows)
    ends = [len(bins) * part // count for part in range(count + 1)]
    batches = []
    for begin, end in pairwise(ends):
        parts = [[examples[index] for index in one] for one in bins[begin:end]]
        parts = [[example for part in parts for example in part]] if one_row else parts
        batches.append(collate_packed(parts, pad_token_id))
    return batches


def fill_up(batches: list[dict[str, Tensor]], multiple: int) -> list[dict[str, Tensor]]:
    """The batches, and copies of the last one in which nothing counts, up to a multiple: as many
    passes for each process, whose collectives meet in every one of them."""
    last = batches[-1]
    nothing = {
        "labels": torch.full_like(last["labels"], IGNORED),
        "token_mask": torch.zeros_like(last["token_mask"]),
        "target_positions": last["target_positions"][:0],
    }
    return batches + [last | nothing] * (-len(batches) % multiple)


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences that share a row, of no more tokens than the longest has.

    As many rows as first-fit decreasing takes (at most 11/9 of the fewest, Johnson 1973), filled
    evenly where that is possible: the next shorter sequence goes into the row that has the least.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest = lengths[order[0]]
    fitted: list[list[int]] = []
    for index in order:
        room = (row for row in fitted if _size(row, lengths) + lengths[index] <= longest)
        row = next(room, None)
        if row is None:
            fitted.append([index])
        else:
            row.append(index)
    even: list[list[int]] = [[] for _ in fitted]
    for index in order:
        min(even, key=lambda row: _size(row, lengths)).append(index)
    fits = max(_size(row, lengths) for row in even) <= longest
    return even if fits else fitted


def _size(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)


def collate_packed(rows: Sequence[Sequence[Example]], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `position_ids`, `labels` and `token_mask` (0 on padding), int64 [B, S], and
    `target_positions` [N]. Nothing is learned of a sequence's first token, which another precedes.
    """
    longest = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    names = ("input_ids", "position_ids", "labels", "token_mask")
    batch: dict[str, list[list[int]]] = {name: [] for name in names}
    for row in rows:
        ids = [token for example in row for token in example["input_ids"]]
        places = [place for example in row for place in range(len(example["input_ids"]))]
        labels = [label for one in row for label in (IGNORED, *one["labels"][1:])]
        left = longest - len(ids)
        batch["input_ids"].append(ids + [pad_token_id] * left)
        batch["position_ids"].append(places + list(range(left)))
        batch["labels"].append(labels + [IGNORED] * left)
        batch["token_mask"].append([1] * len(ids) + [0] * left)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    return tensors | {"target_positions": target_positions(tensors["labels"])}
