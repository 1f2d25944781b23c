"""Slow answers from the formulas of DESIGN section 2; no code of dylora.

Loops over tokens and experts, one small product at a time. All are differentiable where the fast
code is, so gradients can be compared too.

Shape letters: T tokens, D input width, O output width, E experts, R rank, K top-k, N sites,
B batch, S sequence, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def mixture_update(
    x_TD: Tensor, A_ERD: Tensor, B_ERO: Tensor, gates_TE: Tensor, scaling_E: Tensor
) -> Tensor:
    """Σ_e g_e · s_e · B_e A_e x for each token -> [T, O]."""
    rows = []
    for x_D, gates_E in zip(x_TD, gates_TE, strict=True):
        row_O = torch.zeros(B_ERO.shape[-1], dtype=x_TD.dtype)
        for A_RD, B_RO, gate, scale in zip(A_ERD, B_ERO, gates_E, scaling_E, strict=True):
            row_O = row_O + gate * scale * (B_RO.T @ (A_RD @ x_D))
        rows.append(row_O)
    return torch.stack(rows)


def loha_update(
    x_TD: Tensor,
    w1_a_ERO: Tensor,
    w1_b_ERD: Tensor,
    w2_a_ERO: Tensor,
    w2_b_ERD: Tensor,
    gates_TE: Tensor,
    scaling_E: Tensor,
) -> Tensor:
    """Σ_e g_e · s_e · ((W1a W1b) ∘ (W2a W2b)) x for each token, entry by entry -> [T, O]."""
    rows = []
    for x_D, gates_E in zip(x_TD, gates_TE, strict=True):
        row_O = torch.zeros(w1_a_ERO.shape[-1], dtype=x_TD.dtype)
        for expert, gate in enumerate(gates_E):
            for o in range(len(row_O)):
                ranks = range(w1_a_ERO.shape[1])
                one_D = sum(w1_a_ERO[expert, r, o] * w1_b_ERD[expert, r] for r in ranks)
                two_D = sum(w2_a_ERO[expert, r, o] * w2_b_ERD[expert, r] for r in ranks)
                unit_O = torch.nn.functional.one_hot(torch.tensor(o), len(row_O))
                row_O = row_O + unit_O * gate * scaling_E[expert] * (one_D * two_D * x_D).sum()
        rows.append(row_O)
    return torch.stack(rows)


def top_k(scores: list[float], k: int) -> list[int]:
    """Indices of the k largest; of equal ones the lowest index."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k]


def maturity_gate(
    probabilities_TE: Tensor, maturity_E: Tensor, k: int, scale: str = "keep_size"
) -> Tensor:
    """g_e = p_e · (1 - m_e · [e not in TopK(p·m)]) -> [T, E], as it is scaled: to the length of p
    by a constant (keep_size), or by its sum when K >= 2 (sum_to_one)."""
    rows = []
    for p_E in probabilities_TE:
        chosen = top_k([(p * m).item() for p, m in zip(p_E, maturity_E, strict=True)], k)
        gates = [
            p if expert in chosen else p * (1 - m)
            for expert, (p, m) in enumerate(zip(p_E, maturity_E, strict=True))
        ]
        if scale == "keep_size":
            lengths = [math.sqrt(sum(g.item() ** 2 for g in row)) for row in (p_E, gates)]
            gates = [gate * (lengths[0] / lengths[1]) for gate in gates]
        elif k >= 2:
            total = sum(gates)
            gates = [gate / total for gate in gates]
        rows.append(torch.stack(gates))
    return torch.stack(rows)


def balance_loss(probabilities_TE: Tensor, real_T: list[bool], k: int, kind: str) -> Tensor:
    """E·Σ f_e P_e of one site over its real tokens; f from the top-k, or the argmax for switch."""
    experts = probabilities_TE.shape[-1]
    assigned = [0] * experts
    mass = [torch.zeros((), dtype=probabilities_TE.dtype) for _ in range(experts)]
    tokens = 0
    for p_E, real in zip(probabilities_TE, real_T, strict=True):
        if not real:
            continue
        tokens += 1
        for expert in top_k(p_E.tolist(), 1 if kind == "switch" else k):
            assigned[expert] += 1
        for expert in range(experts):
            mass[expert] = mass[expert] + p_E[expert]
    total = torch.zeros((), dtype=probabilities_TE.dtype)
    for expert in range(experts):
        total = total + assigned[expert] / sum(assigned) * mass[expert] / tokens
    return experts * total


def z_loss(logits_TE: Tensor, real_T: list[bool]) -> float:
    """Mean over the real tokens of log(Σ exp)², of one site."""
    values = [
        math.log(sum(math.exp(logit) for logit in logits_E)) ** 2
        for logits_E, real in zip(logits_TE.tolist(), real_T, strict=True)
        if real
    ]
    return sum(values) / len(values)


def lm_loss(logits_BSV: Tensor, labels_BS: Tensor, label_smoothing: float = 0.0) -> float:
    """Mean over the targets of the cross-entropy of each token with the one after it, in nats."""
    values = []
    for logits_SV, labels_S in zip(logits_BSV.tolist(), labels_BS.tolist(), strict=True):
        for logits_V, label in zip(logits_SV[:-1], labels_S[1:], strict=True):
            if label == -100:
                continue
            normaliser = math.log(sum(math.exp(logit) for logit in logits_V))
            losses = [normaliser - logit for logit in logits_V]
            mean = sum(losses) / len(losses)
            values.append((1 - label_smoothing) * losses[label] + label_smoothing * mean)
    return sum(values) / len(values)


def capacity(gates_TE: Tensor, real_T: list[bool], k: int, factor: float) -> Tensor:
    """Gates after each expert has kept its ceil(factor·K·T/E) largest real ones; padding gets 0."""
    experts = gates_TE.shape[1]
    limit = math.ceil(factor * k * sum(real_T) / experts)
    kept_TE = torch.zeros_like(gates_TE)
    for expert in range(experts):
        tokens = [t for t, real in enumerate(real_T) if real]
        tokens.sort(key=lambda t: (-gates_TE[t, expert].item(), t))
        for t in tokens[:limit]:
            kept_TE[t, expert] = gates_TE[t, expert]
    return kept_TE


class OracleSite(NamedTuple):
    """One block with its router and experts."""

    block: str
    router_ED: Tensor
    router_bias_E: Tensor
    experts: dict[str, tuple[Tensor, Tensor]]  # path of a projection -> A [E, R, D], B [E, R, O]


def logits_with_experts(
    base: nn.Module,
    sites: list[OracleSite],
    input_ids: Tensor,
    *,
    scaling: float,
    temperature: float,
    maturity_E: Tensor,
    k: int,
) -> Tensor:
    """Logits of an untouched base whose projections are corrected token by token."""
    handles = []
    for site in sites:
        gates: dict[str, Tensor] = {}

        def decide(
            module: nn.Module, args: Any, kwargs: Any, *, site: OracleSite = site, gates=gates
        ) -> None:
            x_BSD = args[0] if args else kwargs["hidden_states"]
            rows = []
            for x_D in x_BSD.flatten(0, 1):
                weights = zip(site.router_ED.to(x_D), site.router_bias_E, strict=True)
                scores = [torch.dot(w_D, x_D) + bias for w_D, bias in weights]
                powers = [torch.exp(score / temperature) for score in scores]
                rows.append(torch.stack([power / sum(powers) for power in powers]))
            gates["TE"] = maturity_gate(torch.stack(rows), maturity_E, k)

        handles.append(
            base.get_submodule(site.block).register_forward_pre_hook(decide, with_kwargs=True)
        )
        for path, (A_ERD, B_ERO) in site.experts.items():

            def correct(
                module: nn.Module, args: Any, output: Tensor, *, A=A_ERD, B=B_ERO, gates=gates
            ) -> Tensor:
                x_TD = args[0].flatten(0, 1)
                update_TO = mixture_update(
                    x_TD,
                    A.to(x_TD.dtype),
                    B.to(x_TD.dtype),
                    gates["TE"].to(x_TD.dtype),
                    torch.full((len(A),), scaling, dtype=x_TD.dtype),
                )
                return output + update_TO.view_as(output)

            handles.append(base.get_submodule(path).register_forward_hook(correct))
    try:
        return base(input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
