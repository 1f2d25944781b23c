"""What the blocks of one model share: the state of its experts, and the passes under way.

A `Pass` carries what its caller asked for and what its blocks decide. Hooks on the base and on its
decoder make one when either is called and drop it when that returns. Each thread has its own, so
that two threads that generate with one model do not meet.

Shape letters: B batch, S sequence, N blocks, E experts.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from dylora.routing.expert_state import ExpertState
from dylora.routing.gating import RouterOutput
from dylora.routing.prompt_tokens import PromptTokens, packed_sequences

HELD = "_dylora_held"  # attribute of a cache: what `Pass.held` is
DECIDED = ("gates", "probabilities", "used")  # of what is held: a sequence's decision


@dataclass(eq=False)
class Pass:
    """One pass of the base: its inputs, and what its blocks decide."""

    state: "RoutingState"
    _: KW_ONLY
    enabled: bool = True  # False: the frozen base alone
    routing_weights: Tensor | None = None  # [B, E], [B, S, E] or [B, S, N, E]: the gates
    token_mask: Tensor | None = None  # [B, S], 0 on padding
    shape: tuple[int, int] | None = None  # B and S of its inputs, where they are known
    kept: dict[str, Any] | None = None  # what lives as long as one decoding; None: nothing is kept
    # Of routing by the prompt: which tokens are its own, [B, S], and what is held to be used for
    # the tokens that follow in later passes.
    prompt_mask: Tensor | None = None
    sequences: Tensor | None = None  # [B, S], which packed one a token is of; None: each row is one
    held: dict[str, Any] = field(default_factory=dict)
    scope: str = "base"  # whose hooks end it: of the base, its decoder, or a single block
    opened_by: int | None = None  # which block that is
    decisions: dict[int, RouterOutput] = field(default_factory=dict)  # by the index of the block
    shared: RouterOutput | None = None  # the first block's decision
    blocks: dict[int, Any] = field(default_factory=dict)  # what each computes with, while it runs
    router_logits: bool = False  # whether the output is asked for them, as in Mixtral
    restore: bool = False  # whether the configuration asked, to which that goes back

    def replay(self, scope: str = "recomputation") -> "Pass":
        """The same inputs, for layers that run again in the backward pass."""
        held = {name: value for name, value in self.held.items() if name in DECIDED}
        return replace(self, scope=scope, held=held, kept=None, decisions={}, blocks={})


class Request(NamedTuple):
    """What the caller of the next pass wants of it."""

    routing_weights: Tensor | None = None
    labels: Tensor | None = None  # [B, S], where the base is given none
    token_mask: Tensor | None = None  # [B, S], 0 on padding, where the base is given no mask
    decisions: dict[int, RouterOutput] | None = None  # filled by the blocks


class _PerThread(threading.local):
    """What one thread has asked for, and the pass it runs."""

    current: Pass | None = None
    requested: Request | None = None  # of the next pass
    held: Tensor | None = None  # routing weights of every pass until they are taken back
    disabled = False
    generation: dict[str, Any] | None = None  # what one call of `generate` holds of its prompts

    def __reduce__(self) -> Any:
        return _PerThread, ()  # a copy of the model is in no pass


class RoutingState(ExpertState):
    """The state of the experts, and the passes under way."""

    prompts: PromptTokens | None = None  # where tokens are routed by the prompt they belong to

    def __init__(self, *experts: Any):
        """experts: see `ExpertState`."""
        super().__init__(*experts)
        self.mine = _PerThread()
        self._traced: Pass | None = None  # of code that torch.compile traces
        self._latest: Pass | None = None  # the inputs of the latest pass with gradient
        self._decodings = weakref.WeakKeyDictionary[Cache, dict[str, Any]]()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        return self.__dict__ | {"_traced": None, "_latest": None, "_decodings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._decodings = weakref.WeakKeyDictionary()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_kept()

    # Passes

    @contextmanager
    def requesting(
        self,
        routing_weights: Tensor | None,
        labels: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Iterator[dict[int, RouterOutput]]:
        """The next pass within has these inputs; its decisions come into what this gives, by
        block."""
        decisions: dict[int, RouterOutput] = {}
        self.mine.requested = Request(routing_weights, labels, token_mask, decisions)
        try:
            yield decisions
        finally:
            self.mine.requested = None  # where it failed before it began

    def current(self) -> Pass | None:
        """The pass that this thread runs."""
        if torch.compiler.is_compiling() and self._traced is not None:
            return self._traced
        return self.mine.current

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """The base's hooks have begun a pass, and compiled code within computes it: torch.compile
        reads an attribute, but not (before torch 2.12) what a thread has of its own."""
        self._traced = self.mine.current
        try:
            yield
        finally:
            self._traced = None

    def hook_pass(self, module: nn.Module, scope: str) -> list[RemovableHandle]:
        """Let a pass begin and end with calls of this module: the base, or its decoder for callers
        who do without the head. It ends after an error as well."""
        begin, end = partial(self._begin, scope), partial(self._end, scope)
        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, always_call=True),
        ]

    def _begin(
        self, scope: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if scope == "decoder" and self.current() is not None:
            return
        if getattr(module, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel copies the base without its experts: use DistributedDataParallel"
            )
        mine, mask = self.mine, kwargs.get("attention_mask")
        ids: Any = kwargs.get("input_ids")
        if ids is None:
            ids = args[0] if args else kwargs.get("inputs_embeds")
        request, mine.requested = mine.requested or Request(), None
        weights = mine.held if request.routing_weights is None else request.routing_weights
        token_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else request.token_mask
        cache: Any = kwargs.get("past_key_values")
        own, held, sequences = None, None, None
        if self.prompts and ids is not None:
            labels = kwargs.get("labels") if request.labels is None else request.labels
            if mask is None and cache is None:  # else transformers packs nothing
                sequences = packed_sequences(kwargs.get("position_ids"))
            own = self.prompts.mask(ids, token_mask, labels, sequences)
            held = self._held(cache)
        pass_ = Pass(
            self,
            enabled=not mine.disabled,
            routing_weights=weights,
            decisions={} if request.decisions is None else request.decisions,
            token_mask=token_mask,
            shape=None if ids is None else (ids.shape[0], ids.shape[1]),
            kept=self._kept(ids, cache),
            prompt_mask=own,
            sequences=sequences,
            held={} if held is None else held,
            scope=scope,
        )
        if torch.compiler.is_compiling():
            self._traced = pass_
        else:
            mine.current = pass_

    def _end(self, scope: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        pass_ = self.current()
        if pass_ is None or pass_.scope != scope:
            return
        cache = getattr(output, "past_key_values", None)
        if pass_.held and isinstance(cache, Cache):
            read = pass_.enabled and pass_.routing_weights is None
            if read and "total" in pass_.held and not cache.is_compileable:  # else on the device
                pass_.held["end"] = cache.get_seq_length()
            setattr(cache, HELD, pass_.held)  # copies of a cache take it along
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self.mine.current = None
            self._latest = pass_.replay() if torch.is_grad_enabled() else None

    def begin_block(self, index: int) -> Pass:
        """The pass of a block: the one under way; for a layer that is run again in backward by a
        checkpoint of somebody else, the latest pass with gradient; for a block that is called by
        itself, a pass of its own. The block that opens one ends it; others may lie within."""
        pass_ = self.current()
        if pass_ is None:
            backward = torch._C._current_graph_task_id() != -1
            latest = self._latest if backward else None
            mine = self.mine
            pass_ = Pass(self, enabled=not mine.disabled, routing_weights=mine.held, scope="block")
            pass_ = pass_ if latest is None else latest.replay("block")
            pass_.opened_by = index
            mine.current = pass_
        return pass_

    def end_block(self, index: int) -> None:
        """Let go of what a block has computed with; tensors and graphs live by it."""
        pass_ = self.current()
        if pass_ is not None:
            pass_.blocks.pop(index, None)
            if pass_.scope == "block" and pass_.opened_by == index:
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

    def _held(self, cache: Any) -> dict[str, Any] | None:
        """What the passes before this one hold of its prompts: those of one `generate`, or of a
        cache that is not empty."""
        held = self.mine.generation
        if held is not None:
            if "end" in held and isinstance(cache, Cache) and not torch.compiler.is_compiling():
                check_read(held, int(cache.get_seq_length()))
            return held
        if getattr(cache, HELD, None) is None or torch.compiler.is_compiling():
            return getattr(cache, HELD, None)
        return held_of(cache)  # None: it was emptied for another text

    def forget_kept(self) -> None:
        """Make anew what decodings keep: parameters, experts or modes have changed."""
        if self._decodings:
            self._decodings.clear()


def held_of(cache: Cache) -> dict[str, Any] | None:
    """What passes hold of the texts in a cache; None for an empty one.

    Raises ValueError where tokens were taken out, or put in past the router: sums over all of them
    cannot follow.
    """
    held, length = getattr(cache, HELD, None), int(cache.get_seq_length())
    if held is None or length == 0:
        return None
    check_read(held, length)
    return held


def check_read(held: dict[str, Any], length: int) -> None:
    """Raises ValueError where a cache of so many tokens is not what the sums have read."""
    if "total" in held and held.get("end", length) != length:
        raise ValueError(
            f"this cache holds {length} tokens, but routing by the running mean has read "
            f"{held['end']} of them: begin with the text anew"
        )


@dataclass(eq=False)
class _Recomputation:
    """While a layer runs again, its thread is in a replay of its own pass. Entered once a backward
    pass, so maybe more than once."""

    state: RoutingState
    pass_: Pass | None
    before: list[Pass | None] = field(default_factory=list)

    def __enter__(self) -> None:
        mine = self.state.mine
        self.before.append(mine.current)
        mine.current = None if self.pass_ is None else self.pass_.replay()

    def __exit__(self, *error: object) -> None:
        self.state.mine.current = self.before.pop()
