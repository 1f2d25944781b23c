"""From probabilities to gates: the maturity-aware top-k, expert dropout and capacity, and gates
given by a caller.

    g = maturity_gates(p, m): dense over immature experts, top-k over mature ones, of the size that
        the configuration asks for

Shape letters: B batch, S sequence, N blocks, E experts, T tokens, K top-k.
A leading `...` stands for the token dimensions, [B, S] in every family we know.
"""

import math
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor

from dylora.config import GateScale


class RouterOutput(NamedTuple):
    """What one site decided for each token; all float32."""

    gates: Tensor  # [B, S, E] weights of the experts' updates, after top-k
    probabilities: Tensor  # [B, S, E] the softmax before top-k
    logits: Tensor | None  # [B, S, E] before temperature; None where nothing is learned
    mature: list[bool] | None = None  # experts that only their chosen tokens use; None: none is
    used: tuple[int, ...] | None = None  # all others have the gate 0 throughout; None: not known

    def last(self, length: int) -> "RouterOutput":
        """The decisions for the last `length` tokens."""
        if self.gates.shape[1] == length:
            return self
        logits = None if self.logits is None else self.logits[:, -length:]
        gates, probabilities = self.gates[:, -length:], self.probabilities[:, -length:]
        return RouterOutput(gates, probabilities, logits, self.mature, self.used)


def maturity_gates(probabilities: Tensor, maturity: Tensor, top_k: int, scale: GateScale) -> Tensor:
    """The maturity-aware gate of DESIGN section 2.

    top = TopK(p · m);  g_e = p_e · (1 - m_e · [e not in top]), times |p| / |g| (keep_size) or, with
    K >= 2, 1 / sum(g) (sum_to_one).

    Args:
        probabilities: [..., E], rows sum to 1.
        maturity: [E] in [0, 1]; 0 mixes densely, 1 keeps the expert only where it is chosen.
        top_k: K. With K = 1 sum_to_one leaves the raw probability, as Switch does: a gate that is
            divided by itself is the constant 1 and teaches its router nothing.
        scale: keep_size: Σ g² stays what Σ p² was. The updates of different experts are nearly
            orthogonal, so their mixture keeps its expected size when tokens lose some of them. The
            factor is a constant to the gradient.

    Returns: gates [..., E].
    """
    chosen = top_k_mask(probabilities * maturity, top_k)
    gates = probabilities * (1 - maturity * (~chosen).to(probabilities.dtype))
    if scale == "keep_size":
        norms = [value.detach().norm(dim=-1, keepdim=True) for value in (probabilities, gates)]
        return gates * (norms[0] / norms[1].clamp_min(torch.finfo(gates.dtype).tiny))
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
    whatever the tokens are. probabilities [B, S, E] -> [B, S, E]; they are above 0 for every token
    where an expert is enabled, and 0 for every token where it is not.
    """
    enabled_B1E = probabilities.detach()[:, :1] > 0
    draw_B1E = torch.rand_like(probabilities[:, :1]) * enabled_B1E
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
    experts: how many are enabled, which is the E of the formula; none: all.
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


def check_routing_weights(
    weights: Tensor, batch: int, length: int, sites: int, live: list[bool]
) -> None:
    """Raises ValueError for weights of another shape than `expand_override` takes, for values that
    are negative or not finite, and for a weight of an expert that is not live: it has no update."""
    experts = len(live)
    allowed = [[batch, experts], [batch, length, experts], [batch, length, sites, experts]]
    if list(weights.shape) not in allowed:
        raise ValueError(
            f"routing_weights have shape {list(weights.shape)}, but must be [B, E], [B, S, E] "
            f"or [B, S, sites, E]: one of {allowed}"
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("routing_weights must be finite and not negative")
    for expert in range(experts):
        if not live[expert] and bool(weights[..., expert].any()):
            raise ValueError(f"expert_{expert} is retired: its routing weights must be 0")


def expand_override(weights: Tensor, site: int, batch: int, length: int) -> Tensor:
    """Routing weights given by a caller -> the gates [B, S, E] of one site.

    weights: [B, E], [B, S, E] or [B, S, N, E]. A [B, E] of fewer rows than the batch is repeated
    row by row, as generate does with its prompts for beams and several returned sequences.
    """
    if weights.ndim == 4:
        return weights[:, :, site]
    if weights.ndim == 3:
        return weights
    copies = batch // weights.shape[0]
    return repeat(weights, "b e -> (b copies) s e", copies=copies, s=length)
