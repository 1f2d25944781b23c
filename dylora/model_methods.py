"""What a mixture has of its parts, and what it answers as transformers' and PEFT's models do."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dylora.config import MoELoraConfig, RoutingMode
from dylora.expert_table import beginning_with
from dylora.experts import ExpertManager
from dylora.integrations.reference import reference_model
from dylora.mixture import Mixture


def _of(part: str, kind: type, name: str) -> Any:
    """An attribute or a method that a part has; of the base's, with transformers' arguments."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
        doc=getattr(kind, name, None).__doc__,
    )


_of_mixture, _of_base = partial(_of, "mixture", Mixture), partial(_of, "base", PreTrainedModel)


class MixtureMethods(nn.Module):
    """Everything of `DyLoRA_MoE` but its passes, training and files."""

    base: Any  # the transformers model, which carries the experts
    mixture: Mixture
    experts: ExpertManager

    @property
    def config(self) -> MoELoraConfig:
        """What the mixture is; `set_routing` changes what may change."""
        return self.mixture.config

    @config.setter
    def config(self, value: Any) -> None:
        what = "set_routing(top_k=…, temperature=…, mode=…) changes routing"
        raise AttributeError(f"config cannot be assigned: {what}")

    base_name = _of_mixture("base_name")  # by which a checkpoint names its base
    base_revision = _of_mixture("base_revision")
    base_fingerprint = _of_mixture("base_fingerprint")
    training_record = _of_mixture("training_record")  # what it was trained on
    skill_library = _of_mixture("skill_library")  # None, or the SkillLibrary that was made for it
    maturity = _of_mixture("maturity")  # `set_maturity` changes it
    device = _of_mixture("device")
    site_names = _of_mixture("site_names")
    routers = _of_mixture("routers")
    router_parameters = _of_mixture("router_parameters")
    named_expert_parameters = _of_mixture("named_expert_parameters")
    own_parameters = _of_mixture("own_parameters")
    count_parameters = _of_mixture("count_parameters")
    expert_weights = _of_mixture("expert_weights")
    set_maturity = _of_mixture("set_maturity")
    carried_fractions = _of_mixture("carried_fractions")
    detach_router = _of_mixture("detach_router")
    attach_router = _of_mixture("attach_router")
    size_message = _of_mixture("size_message")
    unload = _of_mixture("unload")

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Deprecated name of `named_expert_parameters`; in the next version it gives the parameters
        alone, as torch's `parameters` does."""
        warnings.warn(
            "expert_parameters() will give parameters without names: use named_expert_parameters()",
            FutureWarning,
            stacklevel=2,
        )
        return self.mixture.named_expert_parameters()

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within this context a pass is the frozen base's own."""
        mine = self.mixture.state.mine
        before, mine.disabled = mine.disabled, True
        try:
            yield
        finally:
            mine.disabled = before

    def set_routing(
        self,
        top_k: int | None = None,
        temperature: float | None = None,
        mode: RoutingMode | None = None,
    ) -> None:
        """Change how tokens are routed, from the next pass on; a checkpoint keeps it.

        Args: as top_k_experts, router_temperature and routing_mode of the configuration; None
        leaves one as it is. Where top_k is more than the mixture began with, num_experts becomes
        how many there are. Raises ValueError for values out of range and without learned routing.
        """
        if not self.config.is_learned:
            raise ValueError("nothing is routed here: router_type is fixed, or it is a plain LoRA")
        given = {"top_k_experts": top_k, "router_temperature": temperature, "routing_mode": mode}
        changes: Any = {name: value for name, value in given.items() if value is not None}
        if top_k is not None and top_k > self.config.num_experts:
            changes |= beginning_with(self.config, self.experts.table)
        self.mixture.set_config(replace(self.config, **changes))

    def reference_model(self) -> PreTrainedModel:
        """The mixture as it is now, frozen, as a transformers model: `ref_model=` of TRL.

        Experts, routers, buffers and what of the base is trained are copied; all other base weights
        are this mixture's own.
        """
        return reference_model(self.experts)

    # As transformers' models

    dtype: Any = _of_base("dtype")
    generation_config: GenerationConfig = _of_base("generation_config")
    num_parameters = _of_base("num_parameters")
    get_input_embeddings = _of_base("get_input_embeddings")
    get_output_embeddings = _of_base("get_output_embeddings")
    gradient_checkpointing_enable = _of_base("activation_checkpointing_enable")
    activation_checkpointing_enable = _of_base("activation_checkpointing_enable")

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; never reentrant."""
        self.base.activation_checkpointing_enable()

    # As PEFT's models

    disable_adapter = disable_adapters

    def set_adapter(self, adapter_name: str | int | list[str | int]) -> None:
        """Only these experts take part: `expert_2`, 2, or a list; `experts.activate` otherwise.

        Raises ValueError for a name that no expert has.
        """
        names = adapter_name if isinstance(adapter_name, list) else [adapter_name]
        numbers = {row.name: number for number, row in enumerate(self.experts.table)}
        for name in names:
            if isinstance(name, str) and name not in numbers:
                raise ValueError(f"there is no expert {name!r}: there are {', '.join(numbers)}")
        self.experts.activate(*(numbers.get(n, n) for n in names))  # type: ignore[arg-type]

    def get_base_model(self) -> PreTrainedModel:
        """`base`, which carries the experts, as PEFT's does."""
        return self.base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Those that a step trains, and all there are."""
        trainable, frozen = self.count_parameters()
        return trainable, frozen + sum(p.numel() for _, p in self.own_parameters())

    def print_trainable_parameters(self) -> None:
        """One line, as PEFT prints it."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        counts = f"trainable params: {trainable:,d} || all params: {total:,d}"
        print(f"{counts} || trainable%: {share:.4f}")
