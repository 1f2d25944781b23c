"""The channel between a block's router and its projections, and how one pass mixes there.

Shape letters: B batch, S sequence, T tokens (B·S), D hidden width, E experts, K top-k, C columns.
"""

import weakref
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dylora.compute.grouped import Plan, grouped_products, plan_pairs
from dylora.compute.packed import PACKED_TOKENS, FewTokens, Pack
from dylora.compute.pieces import product_dtype, state_of
from dylora.compute.rule import choose_way
from dylora.compute.taken import Taken
from dylora.compute.wide import products_with_A
from dylora.router import (
    DynamicHybridRouter,
    RouterOutput,
    RoutingState,
    expand_override,
    top_k_indices,
)

if TYPE_CHECKING:
    from dylora.adapter import StackedLoRA

# Projections of a block that get the same tensor, and so share the product with A.
SHARE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


class Dense(NamedTuple):
    """Experts of a stack that every token uses."""

    stack: int  # its place among the stacks
    rows: Tensor | None  # theirs in it; None: all


class Sparse:
    """Mature experts of a stack, which only their chosen tokens use."""

    def __init__(
        self, stack: int, experts_TK: Tensor, gates_TK: Tensor, rows: int, looked_up: bool
    ):
        self.stack = stack
        self.experts_TK = experts_TK  # rows of the stack
        self.gates_TK = gates_TK  # 0 where a place is not used
        self.rows = rows  # how many the stack has
        self.looked_up = looked_up  # wanted so, where packed matrices can serve

    @cached_property
    def plan(self) -> Plan:
        """For the grouped way; looking rows up needs none."""
        return plan_pairs(self.experts_TK, self.rows)


class Mix(NamedTuple):
    """How the projections of a site compute one pass."""

    dense: list[Dense]
    gates: Tensor  # [T, E] of the experts in `dense`, in that order
    sparse: list[Sparse]


class Entry(NamedTuple):
    """What enters one projection; made once for all that share its input."""

    dense: Tensor | None  # h [T, C] of the experts that every token uses
    sparse: list[Tensor]  # h [P, R] of every stack in Mix.sparse
    tie: Tensor | None  # of the projection's output, where it can be taken over
    taken: Taken | None
    place: int  # the projection's among those that share the input

    def take_over(self, weight: Tensor) -> Tensor:
        """The tie, for a projection that has run outside autograd with this weight [O, D]."""
        assert self.taken is not None
        assert self.tie is not None
        self.taken.take(self.place, weight)
        return self.tie


class Site:
    """The channel between one block's router and the adapters of its projections.

    Handed to both at construction. `route` is a forward pre-hook of the block: it routes the
    hidden state that enters and leaves the decision in `output`, where the projections inside the
    block read it.
    """

    def __init__(self, name: str, index: int, state: RoutingState):
        self.name = name
        self.index = index
        self.state = state
        self.router: DynamicHybridRouter | None = None  # None: fixed weights, or the first site's
        self.shares_first = False
        self.output: RouterOutput | None = None
        self.adapters: dict[str, StackedLoRA] = {}  # of the block's projections, by their names
        self._groups: dict[str, list[str]] = {}  # of those, which share an input
        # Of the pass under way: the mixture's form, and what projections with one input share.
        self.few: FewTokens | None = None  # with a few tokens, without gradient
        self._dtype = torch.float32
        self._mix: Mix | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._dropped: Tensor | None = None
        self._entries: dict[str, Entry] = {}  # of projections that are still to come
        self.outside: Tensor | None = None  # the input of a projection that runs outside autograd
        self._packs: dict[str, Pack] = {}  # of inference, by projection; kept until values change
        self._packs_state: tuple[Any, ...] = ()
        self._watched: list[tuple[dict[str, Any], str]] = []  # where what they are made of lies

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        names = ("output", "few", "_mix", "_input", "_dropped", "outside")
        return self.__dict__ | dict.fromkeys(names) | {"_entries": {}, "_packs": {}, "_watched": []}

    def mix(self, stacks: Any, top_k: int) -> Mix:
        """The form of this pass's mixture; all projections of a site have the same stacks."""
        if self._mix is None:
            self._mix = self._choose_mix(stacks, top_k)
        return self._mix

    def _choose_mix(self, stacks: Any, top_k: int) -> Mix:
        state, routing = self.state, self.output
        assert routing is not None
        gates, mature = routing.gates.flatten(0, -2), routing.mature
        device = gates.device
        if mature is None or (state.all_active and not any(mature)):
            everyone = [Dense(index, None) for index in range(len(stacks))]
            if len(stacks) != 1 or len(stacks[0].ranks) != gates.shape[1]:
                gates = _columns(gates, [e for s in stacks for e in s.experts])
            return Mix(everyone, gates, [])
        dense, columns, sparse = [], [], []
        for index, stack in enumerate(stacks):
            if not any(state.active[e] for e in stack.experts):
                continue  # its gates are all 0
            ripe = [e for e in stack.experts if mature[e]]
            places = min(top_k, len(ripe))
            way = choose_way(
                tokens=gates.shape[0],
                mature=len(ripe),
                top_k=places,
                needs_grad=torch.is_grad_enabled(),
                device=device.type,
                half=product_dtype(self._dtype, device).itemsize == 2,
            )
            if way == "wide" or not ripe or stack.lora_A is None:
                dense.append(Dense(index, None))
                columns += stack.experts
                continue
            young = [e for e in stack.experts if not mature[e]]
            if young:
                rows = _indices(tuple(e - stack.first for e in young), device)
                dense.append(Dense(index, rows))
                columns += young
            of_ripe = _columns(gates, ripe)
            chosen_TK = top_k_indices(of_ripe, places)
            gates_TK = of_ripe.gather(-1, chosen_TK)
            if young:
                chosen_TK = _indices(tuple(e - stack.first for e in ripe), device)[chosen_TK]
            looked_up = way == "gathered"
            sparse.append(Sparse(index, chosen_TK, gates_TK, len(stack.ranks), looked_up))
        return Mix(dense, _columns(gates, columns), sparse)

    def _begin_few(self, dtype: torch.dtype) -> FewTokens | None:
        """For a pass without gradient: its few tokens, where the packed matrices can serve them."""
        assert self.output is not None
        first = next(iter(self.adapters.values()))
        gates = self.output.gates
        if gates.shape[:-1].numel() > PACKED_TOKENS or not first.can_be_packed:
            return None
        mix = self.mix(first.stacks, first.config.top_k_experts)
        whole = len(mix.dense) == len(first.stacks) and all(d.rows is None for d in mix.dense)
        if whole:
            return FewTokens(self.packs(dtype), mix.gates.to(dtype))
        if len(mix.sparse) == len(first.stacks) == 1 and not mix.dense:
            [sparse] = mix.sparse
            if sparse.looked_up:
                return FewTokens(self.packs(dtype), sparse.gates_TK.to(dtype), sparse.experts_TK)
        return None

    def group(self, name: str) -> list[str]:
        """The projections that get the same input as `name`, itself among them."""
        names = self._groups.get(name)
        if names is None:
            group = next((names for names in SHARE_INPUT if name in names), (name,))
            names = self._groups[name] = [other for other in group if other in self.adapters]
        return names

    def shared_input(self, name: str, x: Tensor) -> tuple[list[str], Tensor]:
        """The projections that get the input of `name`, and drop(x), drawn once for them."""
        names = self.group(name)
        if self._input is None or self._input() is not x:
            self._input, self._entries = weakref.ref(x), {}
            dropped = self.adapters[name].dropout(x)
            self._dropped = None if dropped is x else dropped
        return names, x if self._dropped is None else self._dropped

    def packs(self, dtype: torch.dtype) -> dict[str, Pack]:
        """The matrices of every projection, laid out for a few tokens."""
        # Through the modules' own dictionaries: their attributes would take longer than the check.
        state = state_of([values[name] for values, name in self._watched], dtype)
        if not self._packs or state != self._packs_state:
            self._watched = [p for adapter in self.adapters.values() for p in adapter.places()]
            self._packs_state = state_of([values[name] for values, name in self._watched], dtype)
            for name in self.adapters:
                names = self.group(name)
                if name == names[0]:
                    members = {other: self.adapters[other].as_member() for other in names}
                    self._packs |= dict.fromkeys(names, Pack(members, dtype))
        return self._packs

    def forget_packs(self) -> None:
        """For when stacks may have changed unseen, and before training, which does not use them."""
        self._packs, self._watched = {}, []

    def enter(self, name: str, x: Tensor, mix: Mix, dtype: torch.dtype) -> Entry:
        """What enters the projection `name` for its input x [..., D], in the precision `dtype`.

        The first projection of those that share an input computes it for all of them; the others
        find it here, as long as they really get the same tensor.
        """
        names, dropped = self.shared_input(name, x)
        if name not in self._entries:
            adapters = [self.adapters[other] for other in names]
            # A projection's own gradient is that of x, not of what dropout left of it.
            own = dropped is x and x.requires_grad and torch.is_grad_enabled()
            taken = Taken([adapter.out_features for adapter in adapters]) if own else None
            dense, ties = [None] * len(names), []
            if mix.dense:
                As = [adapter.As_of(mix.dense) for adapter in adapters]
                dense, ties = products_with_A(dropped, As, dtype, taken)
            sparse = []
            for part in mix.sparse:
                As = [adapter.stacks[part.stack].lora_A for adapter in adapters]
                own_ties = None if ties else taken
                hs, more = grouped_products(dropped, As, dtype, part.plan, own_ties)
                sparse.append(hs)
                ties = ties or more
            for place, other in enumerate(names):
                tie = ties[place] if ties else None
                hs = [of_part[place] for of_part in sparse]
                self._entries[other] = Entry(dense[place], hs, tie, taken, place)
        return self._entries.pop(name)

    def route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block; reads its first argument, the hidden states [B, S, D]."""
        state = self.state
        if not state.enabled:
            return
        x = args[0] if args else kwargs["hidden_states"]
        if state.override is not None:
            gates = expand_override(state.override, self.index, x.shape[0], x.shape[1])
            gates = gates[:, -x.shape[1] :]  # Gemma 4's last layers see the last tokens only
            gates = gates.to(x.device, torch.promote_types(x.dtype, torch.float32))
            decision = RouterOutput(gates, gates, None)
        elif self.router is not None:
            decision = self.router(x, state)
        elif self.shares_first and state.first_site is not None:
            decision = state.first_site.last(x.shape[1])
        else:
            gates = state.fixed_gates().to(x.device).expand(*x.shape[:-1], -1)
            decision = RouterOutput(gates, gates, None)
        if self.index == 0:
            state.first_site = decision if self.router is not None else None
        self.begin(decision, x.dtype)

    def begin(self, decision: RouterOutput, dtype: torch.dtype) -> None:
        """Begin a pass of inputs of this precision whose experts mix by this decision."""
        self.output, self._dtype = decision, dtype
        self.end()
        if torch.is_grad_enabled():
            if self._packs:
                self.forget_packs()
        elif not torch.compiler.is_compiling():
            self.few = self._begin_few(dtype)

    def end(self) -> None:
        """Let go of what belongs to a pass, but for its decision: tensors and graphs live by it."""
        self.few = self._mix = self._input = self._dropped = self.outside = None
        if self._entries:
            self._entries = {}


def _columns(gates: Tensor, experts: list[int]) -> Tensor:
    """Columns of gates [T, E]; a view where they lie side by side."""
    if not experts:
        return gates[:, :0]
    first, count = experts[0], len(experts)
    if experts == list(range(first, first + count)):
        return gates if count == gates.shape[1] else gates[:, first : first + count]
    return gates.index_select(1, _indices(tuple(experts), gates.device))


@lru_cache(maxsize=1024)
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    """As a tensor, copied once: a copy to a device waits for it, and no CUDA graph may hold one."""
    with torch.inference_mode(False):  # or training could not use what inference made
        return torch.tensor(places, device=device)
