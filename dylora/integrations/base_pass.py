"""A base that is called by itself, as trainers do: its loss, and what its passes show of experts.

While it trains, the loss of a pass with labels holds the routers' losses as well. By Mixtral's
convention `output_router_logits` (an argument, or a field of the base's configuration) puts
`aux_loss` and `router_logits` into the output, and the former into the loss in evaluation too.

Shape letters: B batch, S sequence, E experts.
"""

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora.kernels.cross_entropy import count_targets, token_losses
from dylora.mixture import Mixture
from dylora.outputs import collect_routing
from dylora.routing import losses
from dylora.routing.gating import RouterOutput

# Fields of the configurations of transformers' MoEs.
ASKS, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"


class Observer(Protocol):
    """Who is told of the passes of a base."""

    def before_pass(self) -> None:
        """Before a pass, and before a state dict is loaded."""

    def observe(self, seen: losses.Observation) -> None:
        """After a training pass with labels and a gradient."""


class BasePass:
    """The hooks of a base, and who is told of its passes."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self.observer: Observer | None = None
        base, config = mixture.base, mixture.config
        self.text_config: Any = base.config.get_text_config()
        # What trainers multiply `aux_loss` with; where the balance loss has none, 1.
        self.coefficient = config.router_aux_loss_coef or 1.0
        factors = [loss.coefficient(config) for loss in losses.ROUTING_LOSSES.values()]
        self.before: dict[str, Any] = {}  # fields of the base's configuration, as they were
        if config.trains_routers:
            fields = {ASKS: False, COEFFICIENT: self.coefficient if any(factors) else 0.0}
            self.before = {name: getattr(self.text_config, name, None) for name in fields}
            for name, value in fields.items():
                setattr(self.text_config, name, value)
        mixture.handles += [
            base.register_forward_pre_hook(self.begin, with_kwargs=True),
            base.register_forward_hook(self.end, with_kwargs=True, prepend=True, always_call=True),
            self,
        ]

    def remove(self) -> None:
        """Put back the fields of the base's configuration; as a handle of the mixture."""
        for name, value in self.before.items():
            if value is None:
                delattr(self.text_config, name)
            else:
                setattr(self.text_config, name, value)

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the base, after that of its pass.

        Raises ValueError for packed sequences beside a mask, which transformers keeps apart for
        nobody, and whose prompts could not be told either.
        """
        if self.observer is not None:
            self.observer.before_pass()
        pass_, positions = self.mixture.state.current(), kwargs.get("position_ids")
        told = pass_ is not None and pass_.sequences is not None
        if self.mixture.config.routes_text and not told and _several_in_a_row(positions):
            raise ValueError(
                "these rows hold several packed sequences, which are told only without an "
                "attention_mask: leave it out"
            )
        if pass_ is None or not self.before or (ASKS not in kwargs and not self._config_asks):
            return None
        asked = kwargs.pop(ASKS, None)
        pass_.router_logits = self._config_asks if asked is None else bool(asked)
        if self._config_asks:  # the base itself would look for routers of its own
            pass_.restore = True
            setattr(self.text_config, ASKS, False)
        return args, kwargs

    @property
    def _config_asks(self) -> bool:
        return bool(getattr(self.text_config, ASKS, False))

    def end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook of the base, before that of its pass; called after an error as well."""
        mixture = self.mixture
        pass_ = mixture.state.current()
        labels = cast(Any, kwargs.get("labels"))
        if pass_ is None:
            return None
        if pass_.restore:
            setattr(self.text_config, ASKS, True)
        if output is None or not pass_.enabled:
            return None
        asked, trains = pass_.router_logits, labels is not None and module.training
        observed = trains and self.observer is not None and torch.is_grad_enabled()
        learns = mixture.config.trains_routers and mixture.state.routed_count > 1
        adds = learns and labels is not None and (asked or trains)
        if not (asked or adds or observed):
            return None
        routing = collect_routing(mixture, pass_.decisions, kwargs.get("attention_mask"))
        extra = routing.gates.new_zeros(())
        if routing.statistics is not None and learns:
            config, experts = mixture.config, mixture.choices
            parts = losses.routing_losses(routing.statistics, config, losses.BatchTotals(), experts)
            extra = losses.add_weighted(extra, parts, config)
        if adds:
            _add_to_loss(output, extra * _share_of_batch(labels, kwargs))
        if asked:
            output["aux_loss"] = extra / self.coefficient
            output["router_logits"] = _by_site(pass_.decisions)
        if observed:
            assert self.observer is not None
            assert labels is not None
            found = _token_losses(output, labels)
            self.observer.observe(
                losses.observe_pass(routing.gates, routing.statistics, found, labels)
            )
        return output


def _several_in_a_row(positions: Any) -> bool:
    """Whether position ids [B, S] begin anew within a row."""
    return isinstance(positions, Tensor) and bool((positions.diff(dim=-1) < 0).any())


def _add_to_loss(output: Any, extra: Tensor) -> None:
    """Raises ValueError for an output that is a tuple: nothing can be added in place."""
    if isinstance(output, tuple):
        raise ValueError("return_dict=False leaves no place for the routers' losses: leave it out")
    if getattr(output, "loss", None) is not None:
        output["loss"] = output.loss + extra.to(output.loss.device)


def _share_of_batch(labels: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """How much these labels [B, S] count in an accumulated batch, whose targets are given."""
    whole = kwargs.get("num_items_in_batch")
    return 1.0 if whole is None else count_targets(labels) / torch.as_tensor(whole).clamp_min(1)


def _by_site(decisions: dict[int, RouterOutput]) -> tuple[Tensor, ...]:
    """Logits of each routed block, [B·S, E], as Mixtral returns those of its layers."""
    found = (decisions[index].logits for index in sorted(decisions))
    return tuple(logits.flatten(0, 1) for logits in found if logits is not None)


@torch.no_grad()
def _token_losses(output: Any, labels: Tensor) -> Tensor:
    """[B, S] as in `cross_entropy.token_losses`; TRL's own forward gives log-probabilities."""
    if getattr(output, "log_probs", None) is not None:
        return F.pad(-output.log_probs, (0, labels.shape[1] - output.log_probs.shape[1]))
    # Row by row, as logits in float32 are large.
    rows = zip(output.logits.split(1), labels.split(1), strict=True)
    return torch.cat([token_losses(logits, own) for logits, own in rows])
