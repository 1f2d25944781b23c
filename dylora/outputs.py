"""What a pass of a mixture returns.

Shape letters: B batch, S sequence, N blocks, E experts, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from dylora.mixture import Mixture
from dylora.routing import losses
from dylora.routing.gating import RouterOutput
from dylora.routing.losses import Observation, RoutingStatistics, observe_pass


class Routing(NamedTuple):
    """What every site decided in one pass; float32, differentiable."""

    gates: Tensor  # [B, S, N, E] weights of the experts' updates
    probabilities: Tensor  # [B, S, N, E] softmax before top-k
    logits: Tensor | None  # [B, S, N, E]; None where nothing was learned
    statistics: RoutingStatistics | None  # sums over the real tokens; None likewise


@dataclass
class DyLoRAOutput(ModelOutput):
    """What a pass returns: transformers' fields, and those of a mixture. The losses are None
    without labels."""

    loss: Any = None  # Tensor: lm_loss + each of the others times its coefficient
    logits: Any = None  # Tensor [B, S, V]; None where they were not to be kept
    past_key_values: Any = None  # these three as the base gives them
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # by name: lm_loss and routing.losses.ROUTING_LOSSES
    routing: Any = None  # Routing; None while the adapters are disabled
    token_losses: Tensor | None = None  # [B, S] detached, 0 where nothing is learned

    @classmethod
    def of_base(cls, output: Any, routing: Routing | None) -> "DyLoRAOutput":
        """What a base has given, before there is a loss."""
        names = ("logits", "past_key_values", "hidden_states", "attentions")
        passed_on = {name: getattr(output, name, None) for name in names}
        return cls(**passed_on, losses={}, routing=routing)

    @property
    def lm_loss(self) -> Tensor | None:
        """Mean cross-entropy over the targets, in nats; 0 without targets."""
        return self._loss_named("lm_loss")

    @property
    def aux_loss(self) -> Tensor | None:
        """Balance loss over the top-k, 1 when uniform; 0 where it is not trained with."""
        return self._loss_named("aux_loss")

    @property
    def switch_loss(self) -> Tensor | None:
        """Balance loss over the argmax, likewise."""
        return self._loss_named("switch_loss")

    @property
    def z_loss(self) -> Tensor | None:
        """Mean squared logsumexp of the router's logits."""
        return self._loss_named("z_loss")

    def _loss_named(self, name: str) -> Tensor | None:
        return (self.losses or {}).get(name)

    def observation(self, labels: Tensor) -> Observation:
        """What this pass shows of the experts, for `DyLoRA_MoE.observe`; labels [B, S] as given.

        Raises ValueError for a pass without labels or with the adapters disabled.
        """
        if self.routing is None or self.token_losses is None:
            raise ValueError("there is nothing to observe: pass labels, with the adapters enabled")
        statistics = self.routing.statistics
        return observe_pass(self.routing.gates, statistics, self.token_losses, labels)


def collect_routing(
    mixture: Mixture, decisions: dict[int, RouterOutput], attention_mask: Tensor | None
) -> Routing:
    """The decisions of all blocks, side by side; attention_mask [B, S] says which tokens are real.

    Raises ValueError for a block that took no part, and where the balance losses would be without
    a gradient.
    """
    outputs = [decisions.get(site.index) for site in mixture.blocks]
    silent = [site.name for site in mixture.blocks if site.index not in decisions]
    if silent:
        raise ValueError(f"{silent[0]} took no part in this pass: leave it out of the targets")
    device = mixture.device

    def stack(values: list[Tensor]) -> Tensor:
        length = min(value.shape[1] for value in values)  # some layers run the last tokens only
        return torch.stack([value[:, -length:].to(device) for value in values], dim=2)

    gates = stack([output.gates for output in outputs if output])
    probabilities = stack([output.probabilities for output in outputs if output])
    found = [output.logits for output in outputs if output and output.logits is not None]
    if len(found) < len(outputs):
        return Routing(gates, probabilities, None, None)
    logits = stack(found)
    if (
        torch.is_grad_enabled()
        and not logits.requires_grad
        and any(parameter.requires_grad for _, parameter in mixture.router_parameters())
    ):
        raise ValueError(
            "the routers ran without a graph, so the balance loss would teach them nothing: "
            "checkpoint activations with use_reentrant=False"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        attention_mask = None  # it says what attends to what, not which tokens are real
    if attention_mask is not None:
        attention_mask = attention_mask[:, -gates.shape[1] :]  # it covers a cache as well
    statistics = losses.routing_statistics(
        gates,
        probabilities,
        logits,
        attention_mask,
        top_k=min(mixture.config.top_k_experts, max(mixture.state.routed_count, 1)),
        shared=mixture.config.shared_experts,
    )
    return Routing(gates, probabilities, logits, statistics)
