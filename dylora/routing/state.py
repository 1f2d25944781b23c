"""What the blocks of one model share: the state of its experts, and the pass under way.

A `Pass` carries what its caller asked for and what its blocks decide. Hooks on the base and on its
decoder make one when either is called and drop it when that returns. Each thread has its own, so
that two threads that generate with one model do not meet.

Shape letters: B batch, S sequence, N blocks, E experts.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dylora.routing.gating import RouterOutput


class Pass:
    """One pass of the base."""

    def __init__(
        self,
        state: "RoutingState",
        *,
        enabled: bool = True,
        routing_weights: Tensor | None = None,
        token_mask: Tensor | None = None,
        decisions: dict[int, RouterOutput] | None = None,
        shape: tuple[int, int] | None = None,
        kept: dict[str, Any] | None = None,
        scope: str = "base",
    ):
        self.state = state
        self.enabled = enabled  # False: the frozen base alone
        self.routing_weights = routing_weights  # [B, E], [B, S, E] or [B, S, N, E]: the gates
        self.token_mask = token_mask  # [B, S], 0 on padding
        self.shape = shape  # B and S of its inputs, where they are known
        self.kept = kept  # values that live as long as one decoding; None: nothing is kept
        self.scope = scope  # whose hooks end it: of the base, its decoder, or a single block
        self.decisions = {} if decisions is None else decisions  # by the index of the block
        self.shared: RouterOutput | None = None  # the first block's decision
        self.blocks: dict[int, Any] = {}  # what each block computes with, while it runs

    def replay(self, scope: str = "recomputation") -> "Pass":
        """The same inputs, for layers that run again in the backward pass."""
        again = Pass(
            self.state,
            enabled=self.enabled,
            routing_weights=self.routing_weights,
            token_mask=self.token_mask,
            shape=self.shape,
            scope=scope,
        )
        again.shared = self.shared
        return again


class Request(NamedTuple):
    """What the caller of the next pass wants of it."""

    routing_weights: Tensor | None
    decisions: dict[int, RouterOutput]  # filled by the blocks


class _PerThread(threading.local):
    """What one thread has asked for, and the pass it runs."""

    current: Pass | None = None
    requested: Request | None = None  # of the next pass
    held: Tensor | None = None  # routing weights of every pass until they are taken back
    disabled = False

    def __reduce__(self) -> Any:
        return _PerThread, ()  # a copy of the model is in no pass


class RoutingState(nn.Module):
    """The experts' maturity, which of them take part, and the passes under way."""

    maturity_E: Tensor
    active_E: Tensor
    fixed_weights_E: Tensor

    def __init__(
        self,
        num_experts: int,
        fixed_weights: list[float] | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        fixed = fixed_weights or [1 / num_experts] * num_experts
        self.register_buffer("maturity_E", torch.zeros(num_experts, device=device))
        self.register_buffer("active_E", torch.ones(num_experts, dtype=torch.bool, device=device))
        self.register_buffer("fixed_weights_E", torch.tensor(fixed, device=device))
        # Host copies of what the device holds, for decisions that must not wait for it.
        self.active = [True] * num_experts
        self.active_count = num_experts
        self.mature = [False] * num_experts
        self.all_immature = True
        self.mine = _PerThread()
        self._traced: Pass | None = None  # of code that torch.compile traces, hooks included
        self._latest: Pass | None = None  # the inputs of the latest pass with gradient
        self._decodings = weakref.WeakKeyDictionary[Cache, dict[str, Any]]()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        return self.__dict__ | {"_traced": None, "_latest": None, "_decodings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._decodings = weakref.WeakKeyDictionary()

    # Passes

    @contextmanager
    def requesting(self, routing_weights: Tensor | None) -> Iterator[dict[int, RouterOutput]]:
        """The next pass within has these routing weights; its decisions come into what this
        gives, by block."""
        request = self.mine.requested = Request(routing_weights, {})
        try:
            yield request.decisions
        finally:
            self.mine.requested = None  # where it failed before it began

    def current(self) -> Pass | None:
        """The pass that this thread runs."""
        if torch.compiler.is_compiling() and self._traced is not None:
            return self._traced
        return self.mine.current

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base."""
        self._begin(module, args, kwargs, "base")

    def begin_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of the base's decoder, for callers who do without the head."""
        if self.current() is None:
            self._begin(module, args, kwargs, "decoder")

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scope: str
    ) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel copies the base without its experts: use DistributedDataParallel"
            )
        mine, mask = self.mine, kwargs.get("attention_mask")
        ids: Any = kwargs.get("input_ids")
        if ids is None:
            ids = args[0] if args else kwargs.get("inputs_embeds")
        request, mine.requested = mine.requested or Request(None, {}), None
        weights = mine.held if request.routing_weights is None else request.routing_weights
        pass_ = Pass(
            self,
            enabled=not mine.disabled,
            routing_weights=weights,
            decisions=request.decisions,
            token_mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            shape=None if ids is None else (ids.shape[0], ids.shape[1]),
            kept=self._kept(ids, kwargs.get("past_key_values")),
            scope=scope,
        )
        if torch.compiler.is_compiling():
            self._traced = pass_
        else:
            mine.current = pass_

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base; called after an error as well."""
        self._end("base")

    def end_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base's decoder; likewise."""
        self._end("decoder")

    def _end(self, scope: str) -> None:
        pass_ = self.current()
        if pass_ is None or pass_.scope != scope:
            return
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self.mine.current = None
            self._latest = pass_.replay() if torch.is_grad_enabled() else None

    def begin_block(self) -> Pass:
        """The pass of a block: the one under way; for a layer that is run again in backward by a
        checkpoint of somebody else, the latest pass with gradient; for a block that is called by
        itself, a pass of its own, which `end_block` ends."""
        pass_ = self.current()
        if pass_ is None:
            backward = torch._C._current_graph_task_id() != -1
            latest = self._latest if backward else None
            mine = self.mine
            pass_ = Pass(self, enabled=not mine.disabled, routing_weights=mine.held, scope="block")
            pass_ = pass_ if latest is None else latest.replay("block")
            mine.current = pass_
        return pass_

    def end_block(self, index: int) -> None:
        """Let go of what a block has computed with; tensors and graphs live by it."""
        pass_ = self.current()
        if pass_ is not None:
            pass_.blocks.pop(index, None)
            if pass_.scope == "block":
                self.mine.current = None

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], ...]:
        """`context_fn` of torch.utils.checkpoint: a recomputed layer has the inputs of its own
        pass, whichever ran since."""
        return nullcontext(), _Recomputation(self, self.current())

    # Values kept between the tokens of one decoding

    def _kept(self, ids: Tensor | None, cache: Any) -> dict[str, Any] | None:
        """Where this pass may keep what it makes of parameters; None: nowhere.

        A pass of one token without gradient that goes on with a cache belongs to the decoding of
        that cache. Every longer one begins anew, so no value outlives a decoding: a write that no
        version counter shows (through `.data`, by a fused optimizer) is seen by the next.
        """
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            if self._decodings:
                self._decodings.clear()
            return None
        if ids is None or not isinstance(cache, Cache):
            return None
        if ids.shape[1] > 1:
            self._decodings.pop(cache, None)
            return None
        return self._decodings.setdefault(cache, {})

    def forget_kept(self) -> None:
        """Make anew what decodings keep: parameters, experts or modes have changed."""
        if self._decodings:
            self._decodings.clear()

    # The experts

    @property
    def num_experts(self) -> int:
        """All experts that ever were: the width of every gate."""
        return len(self.active)

    @property
    def all_active(self) -> bool:
        """Whether every expert takes part."""
        return self.active_count == len(self.active)

    def set_active(self, active: list[bool]) -> None:
        """Which experts take part; the others have probability 0."""
        self.active_E = torch.tensor(active, device=self.active_E.device)
        self._mirror_active(active)

    def _mirror_active(self, active: list[bool]) -> None:
        self.active = list(active)
        self.active_count = sum(active)

    def set_maturity(self, maturity_E: Tensor) -> None:
        """What each expert's maturity is from here on; [E] on the CPU."""
        self.maturity_E.copy_(maturity_E, non_blocking=True)
        self._mirror_maturity(maturity_E.tolist())

    def _mirror_maturity(self, values: list[float]) -> None:
        self.mature = [value == 1 for value in values]
        self.all_immature = not any(values)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Values loaded past `set_maturity` and `set_active` are mirrored as well."""
        super()._load_from_state_dict(*args, **kwargs)
        self._mirror_maturity(self.maturity_E.tolist())
        self._mirror_active(self.active_E.tolist())
        self.forget_kept()

    def resize(self, maturity: list[float], fixed_weights: list[float]) -> None:
        """Room for another number of experts, all of them taking part."""
        device = self.maturity_E.device
        self.maturity_E = torch.tensor(maturity, dtype=self.maturity_E.dtype, device=device)
        self.fixed_weights_E = torch.tensor(fixed_weights, device=device).to(self.maturity_E)
        self._mirror_maturity(maturity)
        self.set_active([True] * len(maturity))

    def fixed_gates(self) -> Tensor:
        """The weights [E] of router_type fixed; what inactive experts had goes to the others."""
        weights_E = self.fixed_weights_E
        if self.all_active:
            return weights_E
        kept_E = weights_E * self.active_E
        even_E = self.active_E.to(weights_E) / self.active_count
        kept_E = torch.where(kept_E.sum() > 0, kept_E, even_E)
        return kept_E * (weights_E.sum() / kept_E.sum())


class _Recomputation:
    """While a layer runs again, its thread is in a replay of its own pass. Entered once a backward
    pass, so maybe more than once."""

    def __init__(self, state: RoutingState, pass_: Pass | None):
        self.state = state
        self.pass_ = pass_
        self.before: list[Pass | None] = []

    def __enter__(self) -> None:
        mine = self.state.mine
        self.before.append(mine.current)
        mine.current = None if self.pass_ is None else self.pass_.replay()

    def __exit__(self, *error: object) -> None:
        self.state.mine.current = self.before.pop()
