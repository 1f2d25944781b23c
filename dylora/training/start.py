"""Where a new expert starts: at a share of the known expert that explains its rows best.

A whole expert is too sure on rows of another skill, and often no better than the base; half of its
update keeps what the two skills have in common. experiments/LOG.md has what it gives.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.model import DyLoRA_MoE
from dylora.storage.peft_types import PEFT_TYPES
from dylora.training.validation import loss_of_rows

Row = dict[str, list[int]]

COMPARED = 8  # experts of the nearest skills
HALF, SHARES = 0.5, (0.25, 0.75, 1.0)  # of an update: the first of each, the others of the best


class StartPoint(NamedTuple):
    """What a new expert starts as."""

    expert: int  # the known one
    share: float  # of its update
    loss: float  # nats per target token on the rows, as it starts
    fresh: float  # likewise without an update


def start_expert(
    model: DyLoRA_MoE,
    expert: int,
    rows: Sequence[Row],
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> StartPoint | None:
    """Give a new expert the start with the lowest loss on its rows; None: that is as it is.

    Compared are the experts of known skills that have its rank and alpha, those of the nearest
    skills first, each at half of its update; of the best of them then other shares. Afterwards the
    new expert is enabled alone, beside shared ones. What `before_batch` raises ends it, with any of
    the starts.
    """
    library, experts = model.skill_library, model.experts
    made = (experts[expert].rank, experts[expert].alpha)
    known = dict.fromkeys(map(library.expert_of, library.by_distance(rows))) if library else {}
    alike = [
        e
        for e in known
        if e is not None and e != expert and made == (experts[e].rank, experts[e].alpha)
    ]
    if not alike:
        return None
    fresh = update_of(model, expert)
    experts.activate(expert)

    def loss_of(start: tuple[int, float]) -> float:
        load_share(model, expert, fresh, *start)
        return loss_of_rows(model, rows, batch_size, pad_token_id, before_batch)

    losses = {(expert, 0.0): loss_of((expert, 0.0))}
    losses |= {start: loss_of(start) for start in ((e, HALF) for e in alike[:COMPARED])}
    source, _ = min(list(losses)[1:], key=losses.__getitem__)
    losses |= {start: loss_of(start) for start in ((source, share) for share in SHARES)}
    (source, share), loss = min(losses.items(), key=lambda item: item[1])
    load_share(model, expert, fresh, source, share)
    return None if source == expert else StartPoint(source, share, loss, losses[expert, 0.0])


def update_of(model: DyLoRA_MoE, expert: int) -> dict[str, dict[str, Tensor]]:
    """Copies of an expert's tensors, by projection."""
    adapters = model.mixture.adapters.items()
    return {
        path: {name: tensor.clone() for name, tensor in adapter.expert_tensors(expert).items()}
        for path, adapter in adapters
    }


@torch.no_grad()
def load_share(
    model: DyLoRA_MoE,
    expert: int,
    fresh: dict[str, dict[str, Tensor]],
    source: int,
    share: float,
) -> None:
    """Give `expert` a share of another's update; its own number: its `fresh` tensors again.

    The last matrix is scaled, as an update is linear in it; A and DoRA's magnitudes are taken
    whole, biases not at all.
    """
    for path, adapter in model.mixture.adapters.items():
        tensors = fresh[path]
        if source != expert:
            tensors = adapter.expert_tensors(source)
            last = list(PEFT_TYPES[adapter.PEFT_TYPE].matrices)[-1]
            tensors[last] = share * tensors[last]
        adapter.load_expert(expert, tensors)
