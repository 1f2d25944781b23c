"""Routing without training: what a LoRA changes most is what it was trained for.

Arrow (Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
arXiv 2405.11157) gives each expert a prototype, the leading right-singular vector v of its B A:
among all inputs of one length, the one whose output the expert changes most. A token x goes to the
experts with the largest |x·v|; the sign of a singular vector means nothing.

Arrow has a prototype for every projection. Our router serves all projections of a site, so it gets
the leading direction of all those that read the router's own input, stacked: the v that maximises
Σ_p ‖s_p B_p A_p v‖². With one such projection that is Arrow's own.

Shape letters: C columns (the ranks of all projections), D input width, O output width, R rank.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dylora.kernels.common import evaluation_mode
from dylora.model import DyLoRA_MoE
from dylora.routing.router import DynamicHybridRouter


@torch.no_grad()
def set_prototypes(model: DyLoRA_MoE) -> list[str]:
    """Make each router's rows the prototypes of the experts, with biases of 0.

    An expert that changes nothing at a site gets a row of zeros there. Returns the sites in which
    no projection reads the router's input; all their rows are 0, so they mix evenly.
    Raises ValueError where the routers are not linear with absolute logits, one a site.
    """
    config = model.config
    if config.router_logits != "absolute" or config.router_hidden_size is not None:
        raise ValueError(
            "Arrow's prototypes have no sign: they need router_logits 'absolute' and "
            "router_hidden_size unset"
        )
    if config.router_scope != "site" or not any(True for _ in model.routers()):
        raise ValueError("Arrow's prototypes need a learned router at every site")
    readers = readers_of_router_input(model)
    for site, router in model.routers():
        assert isinstance(router, DynamicHybridRouter)
        router.outer.bias.zero_()
        for expert in model.experts.live:
            factors = []
            for path in readers[site]:
                adapter = model.mixture.adapters[path]
                if not adapter.has(expert):
                    continue
                stack, place = adapter.stack_of(expert)
                own = adapter.expert_tensors(expert)
                factors.append((own["lora_A"], own["lora_B"] * stack.scaling_E[place]))
            row = leading_direction(factors) if factors else None
            router.outer.weight[expert] = 0 if row is None else row.to(router.outer.weight)
    return [site for site, paths in readers.items() if not paths]


def leading_direction(factors: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The unit vector v [D] that maximises Σ ‖B A v‖² over pairs of A [R, D] and B [O, R].

    None where all products are 0. By QR of the factors and the singular vectors of a [C, C]
    matrix, in float64 on the CPU; no [O, D] is formed. Its largest entry is positive, so that it is
    unique.
    """
    A_CD = torch.cat([A.cpu().double() for A, _ in factors])
    Q_DC, R_A = torch.linalg.qr(A_CD.T)  # A = R_Aᵀ Qᵀ
    inner = torch.block_diag(*(torch.linalg.qr(B.cpu().double()).R for _, B in factors)) @ R_A.T
    _, sizes, V = torch.linalg.svd(inner, full_matrices=False)
    if sizes[0] == 0:
        return None
    v = Q_DC @ V[0]
    return v / v.norm() * v[v.abs().argmax()].sign()


@torch.no_grad()
def readers_of_router_input(model: DyLoRA_MoE) -> dict[str, list[str]]:
    """Path of a site -> its adapted projections that are given what enters the site, unchanged.

    Seen in one pass of the base over two tokens: of an attention block the projections to queries,
    keys and values read that, and the one of its output reads another space.
    """
    entered: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {site.name: [] for site in model.mixture.blocks}

    def enter(site: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[site] = args[0] if args else kwargs["hidden_states"]

    def read(site: str, path: str, module: Any, args: tuple[Any, ...]) -> None:
        x, given = args[0], entered[site]
        same = x.data_ptr() == given.data_ptr() and x.numel() == given.numel()
        if same and path not in readers[site]:
            readers[site].append(path)

    handles = []
    for site in readers:
        block, hook = model.base.get_submodule(site), partial(enter, site)
        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    for path, adapter in model.mixture.adapters.items():
        hook = partial(read, adapter.block.name, path)
        handles.append(model.base.get_submodule(path).register_forward_pre_hook(hook))
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with model.disable_adapters(), evaluation_mode(model):
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return readers
