"""The channel between a block's router and its projections, and how one pass mixes there.

Shape letters: B batch, S sequence, T tokens (B·S), D hidden width, E experts, K top-k, C columns.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dylora.adapters.plan import Dense, DispatchPlan, DownProjection, Sparse, _columns, _indices
from dylora.kernels.common import product_dtype, tensor_versions
from dylora.kernels.decode import DECODE_TOKENS, DecodeCache, DecodePass
from dylora.kernels.dense import down_products
from dylora.kernels.frozen_linear import FrozenLinearGrads
from dylora.kernels.grouped import grouped_products
from dylora.kernels.select import select_kernel
from dylora.routing.gating import RouterOutput, expand_override, top_k_indices
from dylora.routing.router import DynamicHybridRouter
from dylora.routing.state import RoutingState

if TYPE_CHECKING:
    from dylora.adapters.projection import StackedLoRA

# Projections of a block that get the same tensor, and so share the product with A.
SHARE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


class RoutedBlock:
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
        self.few: DecodePass | None = None  # with a few tokens, without gradient
        self._dtype = torch.float32
        self._mix: DispatchPlan | None = None
        self._input: weakref.ref[Tensor] | None = None
        self._dropped: Tensor | None = None
        self._entries: dict[str, DownProjection] = {}  # of projections that are still to come
        self.outside: Tensor | None = None  # the input of a projection that runs outside autograd
        self._packs: dict[
            str, DecodeCache
        ] = {}  # of inference, by projection; kept until values change
        self._packs_state: tuple[Any, ...] = ()
        self._watched: list[tuple[dict[str, Any], str]] = []  # where what they are made of lies

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        names = ("output", "few", "_mix", "_input", "_dropped", "outside")
        return self.__dict__ | dict.fromkeys(names) | {"_entries": {}, "_packs": {}, "_watched": []}

    def mix(self, stacks: Any, top_k: int) -> DispatchPlan:
        """The form of this pass's mixture; all projections of a site have the same stacks."""
        if self._mix is None:
            self._mix = self._make_plan(stacks, top_k)
        return self._mix

    def _make_plan(self, stacks: Any, top_k: int) -> DispatchPlan:
        state, routing = self.state, self.output
        assert routing is not None
        gates, mature = routing.gates.flatten(0, -2), routing.mature
        device = gates.device
        if mature is None or (state.all_active and not any(mature)):
            everyone = [Dense(index, None) for index in range(len(stacks))]
            if len(stacks) != 1 or len(stacks[0].ranks) != gates.shape[1]:
                gates = _columns(gates, [e for s in stacks for e in s.experts])
            return DispatchPlan(everyone, gates, [])
        dense, columns, sparse = [], [], []
        for index, stack in enumerate(stacks):
            if not any(state.active[e] for e in stack.experts):
                continue  # its gates are all 0
            ripe = [e for e in stack.experts if mature[e]]
            places = min(top_k, len(ripe))
            way = select_kernel(
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
            gather = way == "gathered"
            sparse.append(Sparse(index, chosen_TK, gates_TK, len(stack.ranks), gather))
        return DispatchPlan(dense, _columns(gates, columns), sparse)

    def _begin_decode(self, dtype: torch.dtype) -> DecodePass | None:
        """For a pass without gradient: its few tokens, where the packed matrices can serve them."""
        assert self.output is not None
        first = next(iter(self.adapters.values()))
        gates = self.output.gates
        if gates.shape[:-1].numel() > DECODE_TOKENS or not first.can_be_packed:
            return None
        mix = self.mix(first.stacks, first.config.top_k_experts)
        whole = len(mix.dense) == len(first.stacks) and all(d.rows is None for d in mix.dense)
        if whole:
            return DecodePass(self.packs(dtype), mix.gates.to(dtype))
        if len(mix.sparse) == len(first.stacks) == 1 and not mix.dense:
            [sparse] = mix.sparse
            if sparse.gather:
                return DecodePass(self.packs(dtype), sparse.gates_TK.to(dtype), sparse.experts_TK)
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

    def packs(self, dtype: torch.dtype) -> dict[str, DecodeCache]:
        """The matrices of every projection, laid out for a few tokens."""
        # Through the modules' own dictionaries: their attributes would take longer than the check.
        state = tensor_versions([values[name] for values, name in self._watched], dtype)
        if not self._packs or state != self._packs_state:
            self._watched = [p for adapter in self.adapters.values() for p in adapter.places()]
            self._packs_state = tensor_versions(
                [values[name] for values, name in self._watched], dtype
            )
            for name in self.adapters:
                names = self.group(name)
                if name == names[0]:
                    members = {other: self.adapters[other].as_member() for other in names}
                    self._packs |= dict.fromkeys(names, DecodeCache(members, dtype))
        return self._packs

    def forget_packs(self) -> None:
        """For when stacks may have changed unseen, and before training, which does not use them."""
        self._packs, self._watched = {}, []

    def enter(self, name: str, x: Tensor, mix: DispatchPlan, dtype: torch.dtype) -> DownProjection:
        """What enters the projection `name` for its input x [..., D], in the precision `dtype`.

        The first projection of those that share an input computes it for all of them; the others
        find it here, as long as they really get the same tensor.
        """
        names, dropped = self.shared_input(name, x)
        if name not in self._entries:
            adapters = [self.adapters[other] for other in names]
            # A projection's own gradient is that of x, not of what dropout left of it.
            own = dropped is x and x.requires_grad and torch.is_grad_enabled()
            taken = (
                FrozenLinearGrads([adapter.out_features for adapter in adapters]) if own else None
            )
            dense, ties = [None] * len(names), []
            if mix.dense:
                As = [adapter.As_of(mix.dense) for adapter in adapters]
                dense, ties = down_products(dropped, As, dtype, taken)
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
                self._entries[other] = DownProjection(dense[place], hs, tie, taken, place)
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
            self.few = self._begin_decode(dtype)

    def end(self) -> None:
        """Let go of what belongs to a pass, but for its decision: tensors and graphs live by it."""
        self.few = self._mix = self._input = self._dropped = self.outside = None
        if self._entries:
            self._entries = {}
