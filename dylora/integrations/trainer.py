"""A mixture in transformers' Trainer and in TRL: `Trainer(model.base, …)`, with default arguments.

`install` gives every Trainer of a mixture's base a `MixtureCallback`: after each step it does what
`DyLoRA_MoE.observe` does in a loop by hand, and it logs what routing and experts do. A reference
that TRL has loaded by the base's name is made the mixture as it was when training began.
"""

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from dylora.adapters.optimizer_state import check_held_once
from dylora.experts import ExpertManager
from dylora.integrations.reference import experts_of, make_reference
from dylora.routing.losses import Observation, RoutingStatistics
from dylora.routing.metrics import find_collapses, routing_summary

COLLAPSE_STEPS = 200  # in a row, before it is said
log = logging.getLogger("dylora")


class MixtureCallback(TrainerCallback):
    """Maturity, routing metrics and collapse of the mixture that a Trainer trains.

    The Trainer's logs get router/… and expert/{i}/… beside its losses. It is installed by itself.
    """

    def __init__(self) -> None:
        self.experts: ExpertManager | None = None
        self.trainer: Callable[[], Any] = lambda: None  # a weak reference to it
        self.keeps_reference = False  # it was given one
        self.seen: Observation | None = None  # of the step's passes, added up
        self.last: Observation | None = None  # of the last step
        self.trained: set[int] = set()  # ids of the parameters that the optimizer has
        self.rate = 1.0  # the step's learning rate as a share of its peak
        self.collapsed: dict[str, int] = {}  # steps in a row, by block

    def follow(self, experts: ExpertManager, trainer: Any) -> None:
        """Be told of the passes of this mixture's base."""
        self.experts = experts
        self.trainer = self.trainer if trainer is None else weakref.ref(trainer)
        base: Any = experts.mixture.base
        base.dylora_pass.observer = self

    def observe(self, seen: Observation) -> None:
        """After a training pass with labels."""
        self.seen = seen.plus(self.seen)

    def before_pass(self) -> None:
        """A reference that TRL has loaded by the base's name becomes the mixture, before a weight
        of that changes."""
        trainer = self.trainer()
        reference = getattr(trainer, "ref_model", None)
        if self.experts is None or reference is None or experts_of(reference) is not None:
            return
        if self.keeps_reference:  # another model than the policy began as, and that is meant
            return
        make_reference(reference, self.experts)
        log.warning(
            "the reference of %s was the base without experts: it is the mixture as it is now "
            "(ref_model=model.reference_model() makes it without loading the base again)",
            type(trainer).__name__,
        )

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError for arguments that a mixture cannot be trained with."""
        if getattr(args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model would move base weights that reference and policy share: leave it "
                "out"
            )
        if args.torch_compile:
            raise ValueError(
                "torch_compile would hide passes from the callback of the mixture: leave it out"
            )
        learns = self.experts is not None and self.experts.mixture.config.trains_routers
        if args.label_smoothing_factor and learns:
            raise ValueError(
                "label_smoothing_factor takes the labels from the model, and with them the "
                "routers' losses and the experts' maturity: leave it out"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the optimizer was made for."""
        self.trained = self._trained()

    def _trained(self) -> set[int]:
        own = self.experts.mixture.own_parameters() if self.experts else ()
        return {id(parameter) for _, parameter in own if parameter.requires_grad}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """While the step's learning rate stands. Raises ValueError for a new expert that is not in
        the optimizer."""
        if self.experts is not None and self._trained() != self.trained:
            check_held_once(kwargs["optimizer"], self.experts.mixture.own_parameters())
            self.trained = self._trained()
        group = kwargs["optimizer"].param_groups[0]
        self.rate = float(group["lr"]) / (float(group.get("initial_lr", group["lr"])) or 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step: maturity, and the fractions of the balance losses.

        Raises ValueError where no pass of the step had labels.
        """
        seen, self.seen, experts = self.seen, None, self.experts
        if experts is None:
            return
        if seen is None:
            if not experts.mixture.config.is_learned:
                return
            raise ValueError(
                "no pass of this step had labels, so neither the routers' losses nor the experts' "
                "maturity were trained: leave out compute_loss_func"
            )
        seen = added_over_processes(seen)
        if not bool(seen.loss_sum_E.isfinite().all()) or skipped(kwargs.get("optimizer")):
            return
        step, steps = state.global_step, max(state.max_steps, state.global_step)
        tokens = max(float(seen.target_tokens), 1.0) * steps
        experts.mixture.observe(seen, progress=step / steps, run_tokens=tokens, rate=self.rate)
        experts.count_step(step, step / steps)
        self.last = seen
        self._warn_of_collapse(seen)

    def _warn_of_collapse(self, seen: Observation) -> None:
        assert self.experts is not None
        if seen.statistics is None or not self.experts.mixture.config.trains_routers:
            return
        mixture, usage_NE = self.experts.mixture, seen.statistics.usage_NE.cpu()
        names, shared = mixture.site_names, mixture.config.shared_experts
        for line in find_collapses(
            self.collapsed, usage_NE, mixture.active_NE, names, COLLAPSE_STEPS, shared
        ):
            log.warning(line.removeprefix("warning: "))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A push between steps copies only those files of a checkpoint that a base would have."""
        if self.experts is not None and args.should_save:
            base: Any = self.experts.mixture.base
            base.save_pretrained(args.output_dir)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Beside the losses of a step: what routing and experts do."""
        if self.last is None or self.experts is None or not logs or "loss" not in logs:
            return
        found = self.metrics(self.last)
        logs.update(found)  # what other callbacks get as well, as this one comes first
        if state.log_history:
            state.log_history[-1].update(found)

    def metrics(self, seen: Observation) -> dict[str, float]:
        """router/… over all blocks, and maturity and share of the gates of each live expert."""
        assert self.experts is not None
        mixture, found = self.experts.mixture, {}
        shares = seen.gate_sum_E / seen.gate_sum_E.sum().clamp_min(1e-12)
        count = len(shares)  # of experts that the step had
        if seen.statistics is not None:
            active_NE, shared = mixture.active_NE[:, :count], mixture.config.shared_experts
            found |= routing_summary(seen.statistics, active_NE, shared)
        for expert in (expert for expert in mixture.live if expert < count):
            found[f"expert/{expert}/maturity"] = float(mixture.maturity.maturity[expert])
            found[f"expert/{expert}/load"] = float(shares[expert])
        return found


def skipped(optimizer: Any) -> bool:
    """Whether float16's scale has overflowed, and the step updated nothing."""
    return bool(getattr(optimizer, "step_was_skipped", False))


def added_over_processes(seen: Observation) -> Observation:
    """What all processes have seen of the experts, the same in each of them."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return seen
    parts = [*seen[:3], *(seen.statistics or ())]
    flat = torch.cat([part.detach().float().flatten() for part in parts])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    sums = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
    statistics = None if seen.statistics is None else RoutingStatistics(*sums[3:])
    return Observation(sums[0], sums[1], sums[2], statistics)


def reference_given(trainer: Any) -> bool:
    """Whether a trainer, in whose __init__ this is, was called with a `ref_model`."""
    frame = sys._getframe()
    while frame is not None:
        names = frame.f_locals
        if names.get("self") is trainer and names.get("ref_model") is not None:
            return True
        frame = frame.f_back
    return False


def install() -> None:
    """Give every Trainer of a mixture's base a MixtureCallback, from here on.

    transformers makes a Trainer's callbacks in `CallbackHandler`, wherever the Trainer is from.
    """
    plain = CallbackHandler.__init__
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def with_mixture(self: Any, callbacks: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, callbacks, model, *args, **kwargs)
        if isinstance(getattr(model, "experts", None), ExpertManager):
            raise ValueError("give the trainer model.base, which carries the experts")
        experts = experts_of(model)
        if experts is None:
            return
        own = [callback for callback in self.callbacks if isinstance(callback, MixtureCallback)]
        callback = own[0] if own else MixtureCallback()
        self.callbacks = [callback, *(other for other in self.callbacks if other is not callback)]
        # transformers tells callbacks nothing of their trainer, in whose __init__ this is.
        trainer = sys._getframe(1).f_locals.get("self")
        callback.follow(experts, trainer)
        callback.keeps_reference = reference_given(trainer)

    CallbackHandler.__init__ = with_mixture
