"""Routing: from the hidden state that enters a site to the weight of every expert.

    p = softmax(W x / temperature)
    g = maturity_gates(p, m): dense over immature experts, top-k over mature ones

Shape letters: B batch, S sequence, N sites, E experts, D hidden width, H router width, K top-k.
A leading `...` stands for the token dimensions, [B, S] in every family we know.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.config import MoELoraConfig


class RouterOutput(NamedTuple):
    """What one site decided for each token; all float32."""

    gates: Tensor  # [B, S, E] weights of the experts' updates, after top-k
    probabilities: Tensor  # [B, S, E] the softmax before top-k
    logits: Tensor | None  # [B, S, E] before temperature; None where nothing is learned
    mature: list[bool] | None = None  # experts that only their chosen tokens use; None: none is

    def last(self, length: int) -> "RouterOutput":
        """The decisions for the last `length` tokens."""
        if self.gates.shape[1] == length:
            return self
        logits = None if self.logits is None else self.logits[:, -length:]
        gates, probabilities = self.gates[:, -length:], self.probabilities[:, -length:]
        return RouterOutput(gates, probabilities, logits, self.mature)


class RoutingState(nn.Module):
    """What the sites of one model share: the experts' maturity, which of them take part, and the
    wishes for one pass.

    Hooks on the base (`begin_pass`, `end_pass`) fix the wishes when a pass begins and let go of
    what it leaves at its sites when it ends. The wishes of a pass with gradient stand until the
    next one begins: gradient checkpointing runs the sites again in backward, and where that may
    come after another pass, `checkpoint_contexts` gives them the wishes of their own.
    """

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
        # What the device knows, too, for decisions that must not wait for it.
        self.active = [True] * num_experts
        self.active_count = num_experts
        self.mature = [False] * num_experts
        self.all_newborn = True
        self.enabled = True  # False: the frozen base alone
        self.requested: Tensor | None = None  # routing weights for the next pass only
        self.held: Tensor | None = None  # routing weights for every pass until taken back
        self.override: Tensor | None = None  # the ones of the pass under way
        self.token_mask: Tensor | None = None  # [B, S], 0 on padding, of the pass under way
        self.first_site: RouterOutput | None = None  # what router_scope shared hands on
        self.sites: list[Any] = []  # which follow this state

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what belongs to a pass: it may be part of a graph."""
        return self.__dict__ | dict.fromkeys(("requested", "override", "token_mask", "first_site"))

    def begin_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        self.override = self.held if self.requested is None else self.requested
        self.requested = None
        mask = kwargs.get("attention_mask")
        self.token_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        for site in self.sites:
            site.output = None  # a block that this pass skips has decided nothing

    def end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the base model."""
        for site in self.sites:
            site.end()
        if not torch.is_grad_enabled():
            self.override = self.token_mask = self.first_site = None

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
        self._know_active(active)

    def _know_active(self, active: list[bool]) -> None:
        self.active = list(active)
        self.active_count = sum(active)

    def set_maturity(self, maturity_E: Tensor) -> None:
        """What each expert's maturity is from here on; [E] on the CPU."""
        self.maturity_E.copy_(maturity_E, non_blocking=True)
        self._know_maturity(maturity_E.tolist())

    def _know_maturity(self, values: list[float]) -> None:
        self.mature = [value == 1 for value in values]
        self.all_newborn = not any(values)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Values loaded past `set_maturity` and `set_active` are known here as well."""
        super()._load_from_state_dict(*args, **kwargs)
        self._know_maturity(self.maturity_E.tolist())
        self._know_active(self.active_E.tolist())

    def resize(self, maturity: list[float], fixed_weights: list[float]) -> None:
        """Room for another number of experts, all of them taking part."""
        device = self.maturity_E.device
        self.maturity_E = torch.tensor(maturity, dtype=self.maturity_E.dtype, device=device)
        self.fixed_weights_E = torch.tensor(fixed_weights, device=device).to(self.maturity_E)
        self._know_maturity(maturity)
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

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], ...]:
        """`context_fn` of torch.utils.checkpoint: a recomputed layer sees what it saw at first."""
        return nullcontext(), _Recomputation(self)


class _Recomputation:
    """While a layer runs again its sites see the wishes of their own pass; after it they hold
    nothing of it. Entered once a backward pass, so maybe more than once.
    """

    def __init__(self, state: RoutingState):
        self.state = state
        self.wishes = self._read()

    def _read(self) -> tuple[Any, ...]:
        return self.state.override, self.state.token_mask, self.state.first_site

    def _write(self, wishes: tuple[Any, ...]) -> None:
        self.state.override, self.state.token_mask, self.state.first_site = wishes

    def __enter__(self) -> None:
        self.latest, self.outputs = self._read(), [site.output for site in self.state.sites]
        self._write(self.wishes)

    def __exit__(self, *error: object) -> None:
        self._write(self.latest)
        for site, output in zip(self.state.sites, self.outputs, strict=True):
            if site.output is not output:
                site.output = output
                site.end()
        del self.latest, self.outputs


class DynamicHybridRouter(nn.Module):
    """A linear or two-layer router with the maturity-aware gate; float32 whatever the base is.

    Routers start near uniform: each row of the last layer is normal with deviation 0.5/sqrt(width)
    (rows of exact zeros would tie, and ties go to the lowest index), biases are 0.
    """

    def __init__(
        self, width: int, config: MoELoraConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.router_hidden_size
        self.inner = nn.Linear(width, hidden, device=device) if hidden else None
        self.outer = nn.Linear(hidden or width, config.num_experts, device=device)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(hidden or width))
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, state: RoutingState) -> RouterOutput:
        """x [B, S, D] -> gates, probabilities and logits [B, S, E]."""
        logits = self.score(x)
        if self.training and self.config.router_noise:
            logits = logits + self.config.router_noise * torch.randn_like(logits)
        if not state.all_active:
            logits = logits.masked_fill(~state.active_E.to(logits.device), -math.inf)
        temperature = self.config.router_temperature
        scaled = logits if temperature == 1 else logits / temperature
        probabilities = scaled.softmax(-1)
        gates = self.gate(probabilities, state)
        return RouterOutput(gates, probabilities, logits, self.mature_experts(state))

    def resize(self, experts: int) -> None:
        """Rows for another number of experts, with fresh values where there were none."""
        old, kept = self.outer, min(experts, self.outer.out_features)
        self.outer = nn.Linear(old.in_features, experts, device=old.weight.device).to(old.weight)
        nn.init.normal_(self.outer.weight, std=0.5 / math.sqrt(old.in_features))
        nn.init.zeros_(self.outer.bias)
        with torch.no_grad():
            self.outer.weight[:kept] = old.weight[:kept]
            self.outer.bias[:kept] = old.bias[:kept]

    def score(self, x: Tensor) -> Tensor:
        """Logits [..., E] of hidden states [..., D]."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._score(x)
        return self._score(x)

    def _score(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)  # bf16 logits change the chosen experts for up to 1 % of tokens
        inner, outer = self.inner, self.outer
        if inner is not None:
            x = F.silu(F.linear(x, inner.weight.to(x.dtype), inner.bias.to(x.dtype)))
        weight, bias = outer.weight.to(x.dtype), outer.bias.to(x.dtype)
        if self.config.router_logits == "absolute":
            return F.linear(x, weight).abs() + bias
        return F.linear(x, weight, bias)

    def mature_experts(self, state: RoutingState) -> list[bool] | None:
        """Which experts only their chosen tokens use; None where every token uses all."""
        mode = self._mode()
        if mode == "dense":
            return None
        return [True] * state.num_experts if mode == "sparse" else state.mature

    def _mode(self) -> str:
        """How this pass mixes: dense, sparse or maturity."""
        mode = self.config.routing_mode
        if mode == "dense_train_sparse_eval":
            return "dense" if self.training else "sparse"
        if mode == "maturity" and self.config.router_type == "learned":
            return "sparse"
        return mode

    def gate(self, probabilities: Tensor, state: RoutingState) -> Tensor:
        """Probabilities [..., E] -> gates [..., E] by routing mode, dropout and capacity."""
        config, mode = self.config, self._mode()
        if self.training and config.expert_dropout:
            probabilities = drop_experts(probabilities, config.expert_dropout)
        if mode == "dense":
            return probabilities
        if mode == "maturity" and state.all_newborn:
            return probabilities  # what the gate below amounts to, without its operations
        if mode == "sparse":
            maturity = torch.ones_like(state.maturity_E)
        else:
            maturity = state.maturity_E
        gates = maturity_gates(probabilities, maturity.to(probabilities), config.top_k_experts)
        if mode == "sparse" and self.training and config.expert_capacity_factor is not None:
            # Experts that take no part hold no tokens, so they count neither in K nor in E.
            top_k = min(config.top_k_experts, state.active_count)
            gates = cap_tokens(
                gates, top_k, config.expert_capacity_factor, state.token_mask, state.active_count
            )
        return gates


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays, for the sake of exact tests."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def maturity_gates(probabilities: Tensor, maturity: Tensor, top_k: int) -> Tensor:
    """The maturity-aware gate of DESIGN section 2.

    top = TopK(p · m);  g_e = p_e · (1 - m_e · [e not in top]);  K >= 2: g / sum(g).

    Args:
        probabilities: [..., E], rows sum to 1.
        maturity: [E] in [0, 1]; 0 mixes densely, 1 keeps the expert only where it is chosen.
        top_k: K. With K = 1 nothing is renormalised: a renormalised top-1 gate is the constant 1
            and teaches its router nothing (Switch keeps the raw probability for this reason).

    Returns: gates [..., E].
    """
    chosen = top_k_mask(probabilities * maturity, top_k)
    gates = probabilities * (1 - maturity * (~chosen).to(probabilities.dtype))
    return gates if top_k == 1 else gates / gates.sum(-1, keepdim=True)


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """Boolean [..., E], True at the K largest; ties go to the lowest index, unlike torch.topk."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, top_k_indices(scores, top_k), True)


def top_k_indices(scores: Tensor, top_k: int) -> Tensor:
    """Which the K largest of [..., E] are, the largest first, [..., K]; ties as in `top_k_mask`.

    With fewer than K all of them.
    """
    left, top_k = scores.detach(), min(top_k, scores.shape[-1])
    if top_k > 4:
        return left.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    if top_k == 1:
        return left.argmax(dim=-1, keepdim=True)
    left, found = left.clone(), []
    for _ in range(top_k):  # argmax gives the first of equal ones; far cheaper than to sort
        found.append(left.argmax(dim=-1, keepdim=True))
        left.scatter_(-1, found[-1], -math.inf)
    return torch.cat(found, -1)


def drop_experts(probabilities: Tensor, rate: float) -> Tensor:
    """Drop each expert of a sequence with probability `rate` and renormalise.

    An expert stays where its random number is at least `rate`; a sequence that would lose all
    keeps the one with the largest. So an expert is kept with probability 1 - rate + rateᴱ/E,
    whatever the tokens are. probabilities [B, S, E] -> [B, S, E].
    """
    takes_part_B1E = probabilities.detach()[:, :1] > 0
    draw_B1E = torch.rand_like(probabilities[:, :1]) * takes_part_B1E
    kept = probabilities * ((draw_B1E >= rate) | top_k_mask(draw_B1E, 1))
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)


def cap_tokens(
    gates: Tensor,
    top_k: int,
    factor: float,
    token_mask: Tensor | None,
    experts: int | None = None,
) -> Tensor:
    """Let an expert keep its ceil(factor·K·T/E) largest gates; the other tokens lose it.

    gates [B, S, E] -> [B, S, E]; padding (token_mask 0) neither counts in T nor takes a place.
    experts: how many take part, which is the E of the formula; none: all.
    """
    gates_TE = gates.flatten(0, -2)
    ranked_TE = gates_TE.detach()
    if token_mask is None:
        tokens = torch.full((), float(gates_TE.shape[0]), device=gates.device)
    else:
        real_T1 = token_mask[:, -gates.shape[1] :].reshape(-1, 1).to(gates.device)
        ranked_TE = ranked_TE * real_T1
        tokens = real_T1.sum().float()
    capacity = torch.ceil(factor * top_k * tokens / (experts or gates.shape[-1]))
    place_TE = ranked_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return (gates_TE * (place_TE < capacity)).view_as(gates)


def check_routing_weights(weights: Tensor, batch: int, length: int, sites: int, experts: int):
    """Raises ValueError for weights of another shape than `expand_override` takes, or for values
    that are negative or not finite."""
    allowed = [[batch, experts], [batch, length, experts], [batch, length, sites, experts]]
    if list(weights.shape) not in allowed:
        raise ValueError(
            f"routing_weights have shape {list(weights.shape)}, but must be [B, E], [B, S, E] "
            f"or [B, S, sites, E]: one of {allowed}"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("routing_weights must be finite and not negative")


def expand_override(weights: Tensor, site: int, batch: int, length: int) -> Tensor:
    """Routing weights given by a caller -> the gates [B, S, E] of one site.

    weights: [B, E], [B, S, E] or [B, S, N, E]. A [B, E] of fewer rows than the batch is repeated
    row by row, as generate does with its prompts for beams and several returned sequences.
    """
    if weights.ndim == 4:
        return weights[:, :, site]
    if weights.ndim == 3:
        return weights
    if weights.shape[0] != batch:
        weights = weights.repeat_interleave(batch // weights.shape[0], 0)
    return weights[:, None].expand(-1, length, -1)
