"""The order in which a run takes its rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dylora.data.splits import seeded_generator


class InterleavedSampler:
    """The order of training over several sets: endless, and resumable at any example.

    Interleaved, every set gives as many examples to an epoch as the largest has: smaller ones are
    repeated, in a new order each time round, and each run of len(lengths) examples holds one of
    each set. Otherwise an epoch is one permutation of all examples together. A weight multiplies
    what a set gives to an epoch; interleaved, its examples are spread evenly over it.

    With bucket_steps above 1 the examples of so many steps, a bucket, are sorted by their tokens
    and shared out to those steps in that order, so that a step holds rows of similar length and
    computes little padding; the steps of a bucket come in a random order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        interleaved: bool = True,
        bucket_steps: int = 1,
        rows_per_step: int = 1,
        tokens: Sequence[Tensor] = (),
        weights: Sequence[float] = (),
        streamed: Sequence[int] = (),
    ) -> None:
        """Raises ValueError where a set is empty.

        lengths: examples of each set; weights: of each set, by default 1. For bucket_steps above 1
        alone: rows_per_step, the examples of an optimizer step, and tokens, those of every example,
        [length] of each set. streamed: sets whose rows come in their own order, epoch after epoch
        numbered on.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every set needs an example, but the lengths are {list(lengths)}")
        self.lengths = list(lengths)
        self.seed = seed
        self.interleaved = interleaved
        self.bucket_steps = bucket_steps
        self.rows_per_step = rows_per_step if bucket_steps > 1 else 1
        self._tokens = torch.cat(list(tokens)) if bucket_steps > 1 else None
        self.weights = list(weights) or [1.0] * len(self.lengths)
        each = [max(self.lengths)] * len(self.lengths) if interleaved else self.lengths
        self.counts = [  # what each set gives to an epoch
            max(1, round(weight * count)) for weight, count in zip(self.weights, each, strict=True)
        ]
        self._streamed = list(streamed)
        self.epoch = 0
        self.position = 0  # examples given out in this epoch; below len(self)
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Examples of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        """(set index, row index) of the next example. It never stops: epoch follows epoch."""
        set_index, row_index = self._order[self.position].tolist()
        self.position += 1
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        return set_index, row_index

    def mean(self, values: Sequence[float]) -> float:
        """Mean over an epoch's examples of something known per set, such as their length."""
        weighted = (value * count for value, count in zip(values, self.counts, strict=True))
        return sum(weighted) / sum(self.counts)

    def state_dict(self) -> dict[str, Any]:
        """JSON types; `load_state_dict` goes on with exactly the sequence from here."""
        weights = {"weights": self.weights} if self._is_weighted else {}
        return weights | {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "lengths": list(self.lengths),
            "interleaved": self.interleaved,
            "window": self.bucket_steps,
            "rows_per_step": self.rows_per_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of other sets: the sequence would be another."""
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"a sampler's state has {sorted(own)}, but got {sorted(state)}")
        for name in own.keys() - {"seed", "epoch", "position"}:
            if state[name] != own[name]:
                raise ValueError(
                    f"the saved order is for {name} {state[name]}, but the run now has "
                    f"{own[name]}; resume with the data and settings the run began with"
                )
        if not 0 <= state["position"] < len(self):
            raise ValueError(f"position is {state['position']}, but an epoch has {len(self)}")
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.position = state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> Tensor:
        """[examples, 2] of set index and row index."""
        order = self._drawn_order()
        for index in self._streamed:
            own = order[:, 0] == index
            order[own, 1] = torch.arange(int(own.sum())) + self.epoch * int(own.sum())
        return order if self._tokens is None else self._sorted_in_buckets(order)

    def _sorted_in_buckets(self, order: Tensor) -> Tensor:
        """Whole steps of an epoch in buckets; what belongs to a step of two epochs stays."""
        assert self._tokens is not None
        size = self.rows_per_step
        begin = -self.epoch * len(order) % size  # these rows complete the last epoch's last step
        end = begin + (len(order) - begin) // size * size
        firsts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        generator = seeded_generator("windows", self.seed, self.epoch)
        parts = [order[:begin]]
        for rows in order[begin:end].split(self.bucket_steps * size):
            tokens = self._tokens[firsts[rows[:, 0]] + rows[:, 1]]
            steps = rearrange(rows[tokens.argsort(stable=True)], "(s r) pair -> s r pair", r=size)
            drawn = steps[torch.randperm(len(steps), generator=generator)]
            parts.append(rearrange(drawn, "s r pair -> (s r) pair"))
        return torch.cat([*parts, order[end:]])

    @property
    def _is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weights)

    def _drawn_order(self) -> Tensor:
        if self._is_weighted:
            return self._weighted_order()
        if not self.interleaved:
            ends = torch.tensor(self.lengths).cumsum(0)
            flat = torch.randperm(
                int(ends[-1]), generator=seeded_generator("order", self.seed, self.epoch)
            )
            sets = torch.bucketize(flat, ends, right=True)
            return torch.stack([sets, flat - (ends - torch.tensor(self.lengths))[sets]], dim=1)
        groups, count = max(self.lengths), len(self.lengths)
        rows = torch.stack([self._repeated(i, groups) for i in range(count)], dim=1)
        # The order within a group is drawn too: ranks that share a group see every set.
        within = torch.rand(
            groups, count, generator=seeded_generator("groups", self.seed, self.epoch)
        )
        sets = within.argsort(dim=1)
        return rearrange([sets, rows.gather(1, sets)], "pair g i -> (g i) pair")

    def _weighted_order(self) -> Tensor:
        """Each set's examples at random places, interleaved one in each of as many equal parts."""
        generator = seeded_generator("weighted", self.seed, self.epoch)
        pairs, places = [], []
        for index, count in enumerate(self.counts):
            pairs.append(
                torch.stack([torch.tensor(index).expand(count), self._repeated(index, count)], 1)
            )
            place = torch.rand(count, generator=generator, dtype=torch.float64)
            places.append((torch.arange(count) + place) / count if self.interleaved else place)
        return torch.cat(pairs)[torch.cat(places).argsort(stable=True)]

    def _repeated(self, set_index: int, count: int) -> Tensor:
        """[count] rows of a set, a fresh permutation each time round."""
        generator = seeded_generator("rows", self.seed, self.epoch, set_index)
        length = self.lengths[set_index]
        rounds = range(-(-count // length))
        return torch.cat([torch.randperm(length, generator=generator) for _ in rounds])[:count]
