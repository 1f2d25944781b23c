"""The loss at the positions that have a target, in chunks: logits of [T, V] are never held.

A vocabulary of 256,000 makes the logits the largest tensor of a step by far, and most positions of
an instruction row (prompt, padding) have no target. Here the base runs up to its head, and the head
and the cross-entropy run chunk by chunk over the target positions alone, forward and backward.

Shape letters: B batch, S sequence, N target positions, D hidden width, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dylora.kernels.common import at_least_float32, evaluation_mode


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each position with the token that follows it, in nats.

    logits [B, S, V], labels [B, S] with -100 where nothing is to be learned -> [B, S] float32;
    position t holds the loss of label t+1, and is 0 where that is -100 and at the last position.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(
        rearrange(
            at_least_float32(logits), "b s v -> (b s) v"
        ),  # bf16 sums over a vocabulary lose small terms
        targets.flatten().to(logits.device),
        ignore_index=-100,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view_as(labels)


def target_positions(labels: Tensor) -> Tensor:
    """Where labels [B, S] have a target after them, as indices [N] into B·S positions."""
    return F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)


def count_targets(labels: Tensor) -> Tensor:
    """How many positions of labels [B, S] are learned: the first has nothing before it."""
    return (labels[:, 1:] != -100).sum()


# Logits held at once, in numbers: few enough to be small beside a layer's activations, enough to
# fill a matrix product.
CHUNK_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 26}


class LogitTransform(NamedTuple):
    """Logits from what the output embeddings give: · factor / divisor, then capped."""

    factor: float = 1.0  # Cohere
    divisor: float = 1.0  # Granite
    cap: float | None = None  # Gemma 2: cap · tanh(logits / cap)

    def logits(self, linear: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] that enter the output embeddings -> [N, V]."""
        logits = linear(hidden)
        if self.factor != 1:
            logits = logits * self.factor
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class HeadInput:
    """What entered a model's head in a pass."""

    hidden: Tensor | None = None  # [B, S, D]


@torch.no_grad()
def find_logit_transform(base: PreTrainedModel) -> LogitTransform | None:
    """How this model makes logits of the hidden states that enter its output embeddings.

    Found by trying: the embeddings alone, with the soft cap of Gemma 2, and with the scales of
    Cohere and Granite, against the logits of a tiny pass. None where none of them fits.
    """
    linear: Any = base.get_output_embeddings()
    if not hasattr(linear, "out_features"):
        return None
    config: Any = base.config.get_text_config()
    candidates = [LogitTransform()]
    names = {"cap": "final_logit_softcapping", "factor": "logit_scale", "divisor": "logits_scaling"}
    for field, name in names.items():
        if value := getattr(config, name, None):
            candidates.append(LogitTransform(**{field: value}))
    ids = torch.tensor([[1, 2, 3]], device=next(base.parameters()).device)
    with capture_head_input(linear) as seen:
        logits = base(input_ids=ids, use_cache=False).logits
    if seen.hidden is None:
        return None
    for transform in candidates:
        tried = transform.logits(linear, seen.hidden[:, -1:])
        close = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
        if tried.shape == logits.shape and torch.allclose(tried, logits, **close):
            return transform
    return None


class LogitTransformFinder:
    """Looks for a base's transform, once."""

    def __init__(self) -> None:
        self._found: tuple[LogitTransform | None] | None = None  # not looked for yet

    def find(self, base: PreTrainedModel) -> LogitTransform | None:
        """None, with a warning, where logits have to be computed whole: the output embeddings are
        trained, which chunks give no gradient for, or no transform fits."""
        linear: Any = base.get_output_embeddings()
        if linear is not None and any(p.requires_grad for p in linear.parameters()):
            warnings.warn(
                "the output embeddings are trained, so logits are computed whole", stacklevel=3
            )
            return None
        if self._found is None:
            with evaluation_mode(base):
                self._found = (find_logit_transform(base),)
            if self._found[0] is None:
                warnings.warn(
                    f"the logits of {type(base).__name__} are not its head of its last hidden "
                    "states, so they are computed whole",
                    stacklevel=3,
                )
        return self._found[0]


@contextmanager
def capture_head_input(linear: nn.Module) -> Iterator[HeadInput]:
    """Within this context a pass keeps what enters its head, which sees the last position only."""
    seen = HeadInput()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.hidden = args[0]
        return (args[0][:, -1:], *args[1:])

    handle = linear.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def losses_of_pass(
    logits: Tensor,
    head: LogitTransform | None,
    linear: nn.Module,
    hidden: Tensor | None,
    labels: Tensor,
    positions: Tensor | None,
    label_smoothing: float,
) -> tuple[Any, Tensor]:
    """Logits [B, S, V] and token losses [B, S] of a pass; no logits where `hidden` [B, S, D] was
    captured before the head, and losses are computed from it in chunks."""
    if head is None or hidden is None:
        return logits, token_losses(logits, labels, label_smoothing)
    where = target_positions(labels) if positions is None else positions
    return None, chunked_token_losses(head, linear, hidden, labels, where, label_smoothing)


def chunked_token_losses(
    transform: LogitTransform,
    linear: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    positions: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each position with the token that follows it, [B, S], 0 elsewhere; nats.

    They are where the labels are: the head of a base that is spread over devices lies on another.

    linear: the frozen output embeddings; hidden [B, S, D], what enters them; labels [B, S];
    positions [N] from target_positions.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()[positions].to(hidden.device)
    positions = positions.to(hidden.device)
    chosen = rearrange(hidden, "b s d -> (b s) d")[positions]
    losses: Any = _ChunkedCrossEntropy.apply(chosen, targets, transform, linear, label_smoothing)
    zeros = torch.zeros(labels.numel(), dtype=losses.dtype, device=hidden.device)
    return zeros.index_copy(0, positions, losses).view_as(labels).to(labels.device)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses [N] of hidden states [N, D]; the gradient is made in forward, chunk by chunk.

    The loss of a position depends on its own hidden state alone, so the gradient of any weighting
    of the losses is the gradient of their sum, row by row times the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        linear: Any,
        label_smoothing: float,
    ) -> Tensor:
        losses, gradients = [], []
        wanted = ctx.needs_input_grad[0]
        numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS["cuda"])
        chunk = max(16, numbers // linear.out_features)
        with torch.set_grad_enabled(wanted):
            for begin in range(0, len(hidden), chunk):
                part = hidden[begin : begin + chunk].detach().requires_grad_(wanted)
                logits = at_least_float32(transform.logits(linear, part))
                own = F.cross_entropy(
                    logits,
                    targets[begin : begin + chunk],
                    reduction="none",
                    label_smoothing=label_smoothing,
                )
                if wanted:
                    gradients.append(torch.autograd.grad(own.sum(), part)[0])
                losses.append(own.detach())
                del logits, own
        if wanted:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        [gradients] = ctx.saved_tensors
        return (gradients * dlosses[:, None]).to(gradients.dtype), None, None, None, None
