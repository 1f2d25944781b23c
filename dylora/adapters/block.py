"""A routed block of the base: its router, its projections, and how one pass runs through it.

Shape letters: B batch, S sequence, T tokens (B·S), D hidden width, E experts, K top-k, C columns.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dylora.adapters.plan import Dense, DispatchPlan, DownProjection, make_plan
from dylora.kernels.decode import DECODE_TOKENS, DecodeCache, DecodePass
from dylora.kernels.dense import down_products
from dylora.kernels.frozen_linear import FrozenLinearGrads
from dylora.kernels.grouped import grouped_products
from dylora.routing.gating import RouterOutput, expand_override
from dylora.routing.prompt import normed_running_mean
from dylora.routing.router import Router
from dylora.routing.state import Pass, RoutingState

# Projections of a block that get the same tensor, and so share the product with A.
SHARE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


class RoutedBlock:
    """One routed block: its forward pre-hook routes the hidden state that enters, and leaves the
    decision in the pass, where the projections inside the block read it."""

    def __init__(self, name: str, index: int, state: RoutingState, width: int):
        self.name = name
        self.index = index
        self.state = state
        self.width = width  # D of the hidden states that enter
        self.router: Router | None = None  # None: fixed weights, or the first block's
        self.shares_first = False
        self.count: int | None = None  # of experts that it has, the first ones; None: all
        self.adapters: dict[str, Any] = {}  # Adapter of the block's projections, by their names
        self.groups: dict[str, list[str]] = {}  # of those, which get the same input, by each

    def add(self, adapter: Any) -> None:
        """An Adapter of a projection of this block."""
        self.adapters[adapter.name] = adapter
        sharing = next((names for names in SHARE_INPUT if adapter.name in names), (adapter.name,))
        names = [name for name in sharing if name in self.adapters]
        self.groups |= dict.fromkeys(names, names)

    def route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block; reads its first argument, the hidden states [B, S, D]."""
        pass_ = self.state.begin_block(self.index)
        if pass_.enabled:
            x = args[0] if args else kwargs["hidden_states"]
            # Of this block alone, and those within it; a compiled pass is to read no lengths.
            if pass_.opened_by is not None and pass_.shape is None and x.ndim == 3:
                pass_.shape = (x.shape[0], x.shape[1])
            if x.ndim == 2:  # tokens in one row, as shared experts of an MLP get them
                x = self._by_sequence(x, pass_)
            self.begin(pass_, self.decide(x, pass_), x.dtype)

    def _by_sequence(self, x: Tensor, pass_: Pass) -> Tensor:
        """Tokens [B·S, D] as [B, S, D]. Raises ValueError where they are others than the pass's."""
        if pass_.shape is None or math.prod(pass_.shape) != len(x):
            raise ValueError(
                f"{self.name} gets {len(x)} tokens in one row, which are not those of the pass: "
                "leave its projections out of target_modules"
            )
        return rearrange(x, "(b s) d -> b s d", b=pass_.shape[0])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the block; called after an error as well."""
        self.state.end_block(self.index)

    def decide(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """The decision for hidden states [B, S, D]: the caller's, the router's, the first block's
        or the fixed one."""
        if pass_.routing_weights is not None:
            gates = expand_override(pass_.routing_weights, self.index, x.shape[0], x.shape[1])
            gates = gates[:, -x.shape[1] :]  # Gemma 4's last layers see the last tokens only
            gates = gates.to(x.device, torch.promote_types(x.dtype, torch.float32))
            decision = RouterOutput(gates, gates, None)
        elif self.router is not None:
            decision = self._route(self.router, x, pass_)
        elif self.shares_first and pass_.shared is not None:
            decision = pass_.shared.last(x.shape[1])
        else:
            gates_E = self.state.fixed_gates().to(x.device)
            if self.count is not None:  # the absent have an update of 0, as in files
                gates_E = gates_E * (torch.arange(len(gates_E), device=x.device) < self.count)
            gates = gates_E.expand(*x.shape[:-1], -1)
            decision = RouterOutput(gates, gates, None)
        if self.index == 0:
            pass_.shared = decision if self.router is not None else None
        return decision

    def _route(self, router: Router, x: Tensor, pass_: Pass) -> RouterOutput:
        """The router's decision, and the gate 1 for the experts that all tokens share."""
        state = self.state
        if router.config.router_input == "running_mean":
            x = normed_running_mean(x, pass_)
        if not state.shared and self.count is None:
            return router(x, pass_)
        if any(state.active[state.shared : self.count]):
            decision = router(x, pass_)
        else:  # the shared ones alone
            nobody = torch.zeros(*x.shape[:-1], state.num_experts, device=x.device)
            # Other layers may have some; the logsumexp of these is 0.
            logits = None if self.count is None else nobody - math.log(state.num_experts)
            decision = RouterOutput(nobody, nobody, logits, used=())
        if not state.shared:
            return decision
        ones = state.active_E[: state.shared].to(decision.gates)
        always = ones.expand(*x.shape[:-1], -1)
        gates = torch.cat([always, decision.gates[..., state.shared :]], -1)
        mature = decision.mature
        if mature is not None:
            mature = [False] * state.shared + mature[state.shared :]
        used = decision.used
        if used is not None:
            used = (*(e for e in range(state.shared) if state.active[e]), *used)
        return decision._replace(gates=gates, mature=mature, used=used)

    def begin(self, pass_: Pass, decision: RouterOutput, dtype: torch.dtype) -> None:
        """Inputs of this precision are mixed by this decision until the block returns."""
        pass_.decisions[self.index] = decision
        pass_.blocks[self.index] = BlockPass(self, pass_, decision, dtype)

    def decode_caches(
        self, dtype: torch.dtype, dense: list[Dense] | None = None
    ) -> dict[str, DecodeCache]:
        """The matrices of every projection, laid out for few tokens; of all experts, or of some."""
        caches: dict[str, DecodeCache] = {}
        for name in self.adapters:
            names = self.groups[name]
            if name == names[0]:
                own = {other: self.adapters[other] for other in names}
                weights = {other: one.projection_weights(dense) for other, one in own.items()}
                caches |= dict.fromkeys(names, DecodeCache(weights, dtype))
        return caches


class BlockPass:
    """One pass through one block: its plan, and what projections that share an input share."""

    def __init__(self, block: RoutedBlock, pass_: Pass, decision: RouterOutput, dtype: torch.dtype):
        self.block = block
        self.decision = decision
        self._dtype = dtype
        self._plan: DispatchPlan | None = None
        self._input: Callable[[], Tensor | None] | None = None
        self._dropped: Tensor | None = None
        self._down: dict[str, DownProjection] = {}  # of projections that are still to come
        self.detached_input: Tensor | None = None  # of a projection that runs outside autograd
        self.decode = None if pass_.kept is None else self._begin_decode(pass_.kept)

    def plan(self) -> DispatchPlan:
        """How this pass mixes; all projections of a block have the same stacks."""
        if self._plan is None:
            first = next(iter(self.block.adapters.values()))
            top_k, state = first.config.top_k_experts, self.block.state
            self._plan = make_plan(self.decision, first.stacks, state, top_k, self._dtype)
        return self._plan

    def _begin_decode(self, kept: dict[str, Any]) -> DecodePass | None:
        """The decode kernel, where it can serve this pass."""
        first = next(iter(self.block.adapters.values()))
        if self.decision.gates.shape[:-1].numel() > DECODE_TOKENS or not first.can_be_packed:
            return None
        plan, dtype = self.plan(), self._dtype
        key = f"{self.block.name}.{dtype}"
        if self.decision.used is not None and not plan.sparse:
            key += f".{self.decision.used}"
            if key not in kept:
                kept[key] = self.block.decode_caches(dtype, plan.dense)
            return DecodePass(kept[key], plan.gates.to(dtype))
        one = plan.sparse[0] if len(plan.sparse) == len(first.stacks) == 1 else None
        if len(plan.dense) == len(first.stacks) and all(d.expert_ids is None for d in plan.dense):
            gates, experts_TK = plan.gates, None
        elif one is not None and one.gather and not plan.dense:
            gates, experts_TK = one.gates_TK, one.experts_TK
        else:
            return None
        if key not in kept:
            kept[key] = self.block.decode_caches(dtype)
        return DecodePass(kept[key], gates.to(dtype), experts_TK)

    def shared_input(self, name: str, x: Tensor) -> tuple[list[str], Tensor]:
        """The projections that get the input of `name`, and drop(x), drawn once for them."""
        names = self.block.groups[name]
        if self._input is None or self._input() is not x:
            # Compilers know no weak references, and hold no tensor longer than they need it.
            self._input = (lambda: x) if torch.compiler.is_compiling() else weakref.ref(x)
            self._down = {}
            dropped = self.block.adapters[name].dropout(x)
            self._dropped = None if dropped is x else dropped
        return names, x if self._dropped is None else self._dropped

    def project_down(self, name: str, x: Tensor, dtype: torch.dtype) -> DownProjection:
        """x Aᵀ for the projection `name` and its input x [..., D], in the precision `dtype`.

        The first projection of those that share an input computes it for all of them; the others
        find it here, as long as they really get the same tensor.
        """
        names, dropped = self.shared_input(name, x)
        if name not in self._down:
            plan, adapters = self.plan(), [self.block.adapters[other] for other in names]
            # A projection's own gradient is that of x, not of what dropout left of it.
            own = dropped is x and x.requires_grad and torch.is_grad_enabled()
            grads = FrozenLinearGrads([a.out_features for a in adapters]) if own else None
            dense, carriers = [None] * len(names), []
            if plan.dense:
                As = [adapter.dense_As(plan.dense) for adapter in adapters]
                dense, carriers = down_products(dropped, As, dtype, grads)
            sparse = []
            for part in plan.sparse:
                As = [adapter.stacks[part.stack].lora_A for adapter in adapters]
                own_grads = None if carriers else grads
                hs, more = grouped_products(dropped, As, dtype, part.pairs, own_grads)
                sparse.append(hs)
                carriers = carriers or more
            for index, other in enumerate(names):
                carrier = carriers[index] if carriers else None
                hs = [of_part[index] for of_part in sparse]
                self._down[other] = DownProjection(dense[index], hs, carrier, grads, index)
        return self._down.pop(name)
