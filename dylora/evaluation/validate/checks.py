"""The checks of `run.py validate`: each computes the same numbers in two ways and compares them.

Shape letters: B batch, S sequence, T real tokens of a batch in row order, N sites, E experts,
V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dylora.evaluation.validate.cost import n_passes, one_hot
from dylora.evaluation.validate.reference import (
    TokenOutputs,
    base_logits,
    full_pass,
    largest,
    largest_gap,
    loop_logits,
    relative_difference,
)
from dylora.model import DyLoRA_MoE
from dylora.storage.checkpoint import Checkpoint

# Where two experts tie, rounding may choose the other one. That is no fault if it is rare, the
# probabilities agree, and the logits agree once both ways have equal gates.
TIED_SHARE = 0.05  # of all decisions, at most
TIED_DISTANCE = 0.05  # of probabilities, and the least that counts as a jump of a gate


class Check(NamedTuple):
    """One row of the table."""

    name: str
    compared: str
    worst: float  # largest difference found
    tolerance: float | None  # None: reported, not judged

    @property
    def ok(self) -> bool | None:
        """None where nothing is judged; NaN is a failure."""
        return None if self.tolerance is None else self.worst <= self.tolerance


def check_folded(model: DyLoRA_MoE, ids: Tensor, first: TokenOutputs, tolerance: float) -> Check:
    """The one-pass mixture against the formula, with the gates that the routers chose."""
    gates = first.gates.unflatten(0, ids.shape)  # [B, S, N, E]
    worst = relative_difference(first.logits, loop_logits(model, ids, gates).flatten(0, 1))
    return Check("folded = loop", "one pass, a loop over experts, same gates", worst, tolerance)


def check_one_hot(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """Every expert alone: as a one-hot mixture, and as a single LoRA."""
    ones = torch.ones(*ids.shape, len(model.site_names), len(model.experts), device=ids.device)
    worst = []
    for expert in model.experts.live:
        mixture = model(ids, routing_weights=one_hot(model, expert, len(ids), ids.device)).logits
        worst.append(relative_difference(mixture, loop_logits(model, ids, ones, [expert])))
    text = "one-hot weights, that expert's LoRA alone"
    return Check("one-hot = single expert", text, largest(worst), tolerance)


def check_n_passes(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """One text under E one-hot weights: E rows of one pass, and E passes mixed by the weights."""
    weights_EE = torch.eye(len(model.experts), device=ids.device)[model.experts.live]
    text_ES = ids[-1:].expand(len(weights_EE), -1)
    single = model(text_ES, routing_weights=weights_EE).logits
    worst = relative_difference(single, n_passes(model, text_ES, weights_EE[:, None]))
    return Check("one pass = N passes", "one-hot weights, another in every row", worst, tolerance)


def report_soft(model: DyLoRA_MoE, ids: Tensor) -> list[Check]:
    """Mixing updates is another model than mixing logits; their distance is not a fault."""
    gates = model.get_routing_weights(ids)  # [B, S, N, E]
    weights_BSE = gates.mean(2)
    single = model(ids, routing_weights=weights_BSE).logits.float()
    mixed = n_passes(model, ids, weights_BSE)
    p, q = single.log_softmax(-1), mixed.log_softmax(-1)
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    return [
        Check("one pass ~ N passes", "soft weights: mean KL in nats", float(divergence), None),
        Check("", "soft weights: largest difference of logits", largest_gap(single, mixed), None),
    ]


def check_decoding(model: DyLoRA_MoE, ids: Tensor, first: TokenOutputs, tolerance: float) -> Check:
    """One token at a time with the KV cache, as in generation, against the whole text at once."""

    def step_by_step(gates_T: Tensor | None) -> TokenOutputs:
        gates = None if gates_T is None else gates_T.unflatten(0, ids.shape)  # [B, S, N, E]
        parts = [None] * ids.shape[1] if gates is None else gates.split(1, 1)
        cache = DynamicCache(config=model.base.config)
        steps = []
        for ids_B1, part in zip(ids.split(1, 1), parts, strict=True):
            output = model(ids_B1, routing_weights=part, past_key_values=cache, use_cache=True)
            routing = output.routing
            assert routing is not None
            steps.append((output.logits, routing.gates, routing.probabilities))
        logits, chosen, probabilities = (
            torch.cat(parts, 1).flatten(0, 1) for parts in zip(*steps, strict=True)
        )
        return TokenOutputs(logits.float(), chosen, probabilities)

    worst, ties = compare_routed(first, step_by_step, tolerance)
    return Check(
        "decode = prefill", f"token by token with a cache, one pass{ties}", worst, tolerance
    )


def check_causality(model: DyLoRA_MoE, ids: Tensor) -> Check:
    """Another token at t; exact, because the sums of earlier tokens are the same ones."""
    t = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, t] = (changed[:, t] - 1).abs()  # 0 becomes 1: some other token of the vocabulary
    worst = largest_gap(model(ids).logits[:, :t], model(changed).logits[:, :t])
    return Check("causality", f"logits before token {t}, when it changes", worst, 0.0)


def check_padding(model: DyLoRA_MoE, ids: Tensor, tolerance: float) -> Check:
    """Texts of unequal length in one batch, padded behind and in front."""
    length = ids.shape[1]
    ends = [length - row * (length // len(ids)) for row in range(len(ids))]
    right, left = torch.zeros_like(ids), torch.zeros_like(ids)
    right_mask, left_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, end in enumerate(ends):
        right[row, :end], right_mask[row, :end] = ids[row, :end], 1
        left[row, length - end :], left_mask[row, length - end :] = ids[row, :end], 1

    behind = full_pass(model, right, mask=right_mask)
    worst, ties = compare_routed(
        behind, lambda gates: full_pass(model, left, gates, left_mask), tolerance
    )
    text = f"texts of {', '.join(map(str, ends))} tokens{ties}"
    return Check("left padding = right padding", text, worst, tolerance)


def check_batches(model: DyLoRA_MoE, ids: Tensor, first: TokenOutputs, tolerance: float) -> Check:
    """The logits of a text do not depend on the other texts of its batch."""

    def row_by_row(gates_T: Tensor | None) -> TokenOutputs:
        parts = [None] * len(ids) if gates_T is None else gates_T.chunk(len(ids))
        rows = [
            full_pass(model, ids_1S, part) for ids_1S, part in zip(ids.split(1), parts, strict=True)
        ]
        return TokenOutputs(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    worst, ties = compare_routed(first, row_by_row, tolerance)
    text = f"a batch of {len(ids)}, {len(ids)} batches of 1{ties}"
    return Check("batch = its rows", text, worst, tolerance)


def check_disabled(model: DyLoRA_MoE, ids: Tensor, before: Tensor) -> Check:
    """Exact: disabled, unloaded and never injected run the same operations. Unloads the model."""
    with model.disable_adapters():
        disabled = model(ids).logits
    after = base_logits(model.unload(), ids)
    worst = largest([largest_gap(disabled, before), largest_gap(disabled, after)])
    return Check("disabled = base", "adapters off, never added, taken off", worst, 0.0)


def check_loaded(model: DyLoRA_MoE, checkpoint: Checkpoint) -> Check:
    """The weights in memory, which `loop_logits` uses, equal those of the files."""
    worst = []
    for expert in model.experts.live:
        on_disk = checkpoint.adapter(expert)
        for path, pair in model.expert_weights(expert).items():
            for loaded, kept in zip(pair, on_disk.weights[path], strict=True):
                worst.append(largest_gap(loaded.cpu(), kept.to(loaded.dtype)))
    return Check("experts = their files", "weights in memory, on disk", largest(worst), 0.0)


def check_finite(model: DyLoRA_MoE, first: TokenOutputs) -> Check:
    """Parameters of base, experts and routers, and the outputs of a pass (half may overflow)."""
    values = [*model.base.parameters(), *first]
    bad = sum(int((~value.isfinite()).sum()) for value in values)
    text = "parameters, logits and gates that are not"
    return Check("all is finite", text, float(bad), 0.0)


def check_manifest(checkpoint: Checkpoint) -> Check:
    """Loading verifies it; here it shows that the files are still the ones validated."""
    changed = checkpoint.changed()
    said = "files that are not as they were written"
    said = f"{checkpoint.path / changed[0]} has changed since it was opened" if changed else said
    return Check("manifest", said, float(bool(changed)), 0.0)


def compare_routed(
    first: TokenOutputs, second: Callable[[Tensor | None], TokenOutputs], tolerance: float
) -> tuple[float, str]:
    """Largest relative difference of two ways that route independently, and a note on ties.

    second: the other way, given the gates [T, N, E] to use, or None.
    """
    free = second(None)
    worst = relative_difference(free.logits, first.logits)
    jumped_TN = (free.gates - first.gates).abs().amax(-1) > TIED_DISTANCE
    apart = largest_gap(free.probabilities, first.probabilities)
    explained = jumped_TN.any() and jumped_TN.float().mean() <= TIED_SHARE
    if worst <= tolerance or not (explained and apart <= TIED_DISTANCE):
        return worst, ""
    held = second(first.gates)
    ties = f" ({int(jumped_TN.sum())} of {jumped_TN.numel()} decisions tie)"
    return relative_difference(held.logits, first.logits), ties
