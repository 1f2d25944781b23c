"""A base with its experts: everything that the facade, the files and the tools stand on.

Shape letters: N blocks, E experts, D input width, O output width, R rank.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.adapters import inject
from dylora.adapters.plan import indices
from dylora.base_fingerprint import fingerprint
from dylora.base_models import keep_as_stored, stored_bytes
from dylora.config import MoELoraConfig
from dylora.expert_table import Expert, groups_of
from dylora.kernels.common import float32_defaults
from dylora.routing import losses, maturity
from dylora.routing.losses import Fractions, Observation
from dylora.routing.maturity import ExpertMaturity
from dylora.routing.router import Router
from dylora.storage.folders import folder_bytes
from dylora.storage.peft_types import PEFT_TYPES


class Mixture:
    """A frozen base, its routed blocks, their adapters and routers, and the table of experts."""

    @float32_defaults()
    def __init__(
        self,
        base: PreTrainedModel,
        config: MoELoraConfig,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        saved: dict[str, Any] | None = None,
    ):
        """Inject adapters and routers into `base`, in place.

        saved: a config.json, which lists the projections and whose experts a loader makes; by
            default what the configuration says, with the experts that it begins with.
        Raises ValueError where nothing can be adapted.
        """
        keep_as_stored(base)
        self.base = base
        self.config = config
        self.base_name = base_name or base.config.name_or_path or None
        self.base_revision = base_revision
        # A file without a fingerprint is older. It is loaded by what is found, so that a base of
        # another depth is refused still.
        listed = saved["projections"] if saved and saved.get("base_fingerprint") else None
        parts = inject.inject(base, config, listed, with_experts=saved is None)
        self.state = parts.state
        self.blocks = parts.blocks  # in the order of the N axis
        self.adapters = parts.adapters  # by the path of their projection
        self.biases = parts.biases  # by the path of their module; bias all only
        self.handles: list[Any] = [*parts.handles]  # what `unload` calls remove() of
        # Of the base as it was given; its tokenizer's is added by whoever loads one.
        self.base_fingerprint = fingerprint(base, list(self.adapters))
        self.maturity = ExpertMaturity.create(config.expert_count)
        self.fractions: Fractions | None = None  # f of the last observed step
        self.training_record: dict[str, Any] = {}  # what it was trained on; kept in config.json
        self.skill_library: Any = None  # a SkillLibrary, kept beside the experts
        self.table: list[Expert] = []
        if saved is None:
            ranks = config.expert_ranks or [config.r] * config.expert_count
            alphas = config.expert_alphas or [config.lora_alpha] * config.expert_count
            self.table = [
                Expert(f"expert_{index}", rank, alpha)
                for index, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
            ]

    @property
    def device(self) -> torch.device:
        """Where routing is decided."""
        return self.state.maturity_E.device

    @property
    def live(self) -> list[int]:
        """The numbers of all experts that are not retired."""
        return [index for index, row in enumerate(self.table) if row.state != "retired"]

    @property
    def site_names(self) -> list[str]:
        """Paths of the routed blocks, in the order of the N axis."""
        return [block.name for block in self.blocks]

    # Parameters

    def routers(self) -> Iterator[tuple[str, Router]]:
        """The learned routers and the paths of their blocks."""
        for block in self.blocks:
            if block.router is not None:
                yield block.name, block.router

    def router_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (unique, stable) and parameters of the routers."""
        for path, router in self.routers():
            for name, parameter in router.named_parameters():
                yield f"{path}.{name}", parameter

    def named_expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all experts that are not retired, frozen ones among them.

        Of every projection the parameters that its experts share, and those of its stacks by
        expert in the first dimension (of LoRA lora_A [E, R, D] and lora_B [E, R, O]; see
        `Adapter`); with bias all a bias_shift [n]. A name says which experts it holds.
        """
        for path, adapter in self.adapters.items():
            for name, parameter in adapter.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter
            for stack in adapter.stacks:
                experts = f"experts_{stack.experts[0]}-{stack.experts[-1]}"
                for name, parameter in stack.named_parameters():
                    yield f"{path}.{experts}.{name}", parameter
        for path, module in self.biases.items():
            yield f"{path}.bias_shift", module.shift

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that is not the base: experts, then routers."""
        yield from self.named_expert_parameters()
        yield from self.router_parameters()

    def count_parameters(self) -> tuple[int, int]:
        """Those that a step trains (of experts and routers), and those of the frozen base."""
        ours = [parameter for _, parameter in self.own_parameters()]
        trainable = sum(parameter.numel() for parameter in ours if parameter.requires_grad)
        trainable -= sum(adapter.filling_parameters() for adapter in self.adapters.values())
        # bitsandbytes packs weights, so its numel says too little; transformers counts them right.
        return trainable, self.base.num_parameters() - sum(p.numel() for p in ours)

    def expert_weights(self, expert: int) -> dict[str, tuple[Tensor, ...]]:
        """Path of a projection -> the matrices of one expert, as PEFT names and orders them: of a
        LoRA A [r, D] and B [O, r].

        Raises KeyError for a retired one.
        """
        weights = {}
        for path, adapter in self.adapters.items():
            own = adapter.expert_tensors(expert)
            weights[path] = tuple(own[name] for name in PEFT_TYPES[adapter.PEFT_TYPE].matrices)
        return weights

    # What changes

    def set_config(self, config: MoELoraConfig) -> None:
        """Another configuration of the same tensors, from the next pass on."""
        self.config = config
        for _, router in self.routers():
            router.config = config
        for adapter in self.adapters.values():
            adapter.config = config

    def set_maturity(self, maturity: ExpertMaturity) -> None:
        """Let the routers follow a new maturity state."""
        self.maturity = maturity
        self.state.set_maturity(maturity.maturity)

    def reassign_skills(self, expert: int, to: int | None) -> None:
        """The skills of an expert that is no more are another's, or nobody's."""
        if self.skill_library:
            self.skill_library.reassign(expert, to)

    def observe(
        self, seen: Observation, *, progress: float, run_tokens: float, rate: float = 1.0
    ) -> None:
        """After an optimizer step: maturity, and the fractions of the balance losses.

        progress: share of the run, or of a stage of it, that is done; run_tokens: target tokens of
        the whole of it; rate: the step's learning rate as a share of its peak.
        """
        self.set_maturity(
            maturity.observe(
                self.maturity,
                seen.gate_sum_E,
                seen.loss_sum_E,
                progress=progress,
                run_tokens=run_tokens,
                active=self._choosing(),
                config=self.config,
                rate=rate,
            )
        )
        if seen.statistics is not None:
            self.fractions = losses.fractions_of(seen.statistics)

    def carried_fractions(self) -> Fractions:
        """f of the balance losses, [N, E] each, of the last step that was observed.

        For `BatchTotals` of an accumulated batch: the loss does not depend on how it is split.
        Uniform before the first step, which exerts no pressure; an expert that is new since has
        none yet, one that is gone keeps none.
        """
        routed, found = self._in_layers(self.state.routed_E), self.fractions
        if found is None:  # of no expert yet, in each block
            found = dict.fromkeys(losses.ASSIGNMENTS, torch.zeros(len(self.blocks), 0))
        return {
            name: losses.carried_fractions(rows_NE.to(routed.device), routed)
            for name, rows_NE in found.items()
        }

    @property
    def active_NE(self) -> Tensor:
        """Which experts each block mixes in."""
        return self._in_layers(self.state.active_E).expand(len(self.blocks), -1)

    @property
    def choices(self) -> int | Tensor:
        """How many experts a router chooses among; [N] where blocks differ in it."""
        if not self.config.layers_differ:
            return self.state.routed_count
        return self._in_layers(self.state.routed_E).sum(-1)

    def _choosing(self) -> int | Tensor:
        """By how many a router's tokens are divided, as far as an expert goes: [E] where layers
        differ. Shared experts get every token."""
        if not self.config.layers_differ:
            return self.state.routed_count or 1
        routed_NE = self._in_layers(self.state.routed_E).cpu().double()
        shares_E = (routed_NE / routed_NE.sum(-1, keepdim=True).clamp_min(1)).mean(0)
        return torch.where(shares_E > 0, 1 / shares_E, 1.0)

    def _in_layers(self, chosen_E: Tensor) -> Tensor:
        """[E], or [N, E] where layers differ in which experts they have."""
        if not self.config.layers_differ:
            return chosen_E
        counts = tuple(block.count for block in self.blocks if block.count is not None)
        counts_N = indices(counts, chosen_E.device)
        numbers_E = torch.arange(len(chosen_E), device=chosen_E.device)
        return chosen_E & (numbers_E < counts_N[:, None])

    @float32_defaults()
    def set_table(self, table: list[Expert]) -> bool:
        """Make the experts of this table, with values that a loader overwrites.

        Returns whether tensors were made anew; not where the table is of the same form.
        """
        forms = [
            [(r.rank, r.alpha, r.state, r.stack) for r in rows] for rows in (table, self.table)
        ]
        self.table = table
        if forms[0] == forms[1]:
            return False
        self.fractions = None  # of as many experts as there were
        weights = self.state.fixed_weights_E.tolist()[: len(table)]
        self.state.resize([0.0] * len(table), weights + [0.0] * (len(table) - len(weights)))
        self.maturity = ExpertMaturity.create(len(table))
        for _, router in self.routers():
            router.resize(len(table))
        for path, adapter in self.adapters.items():
            projection = self.base.get_submodule(path)
            fresh = []
            for group in groups_of(table):
                group = [expert for expert in group if adapter.has(expert)]
                if not group:
                    continue
                first, alphas = group[0], [table[e].alpha for e in group]
                rank = table[first].rank
                fresh.append(adapter.create_stack(first, rank, alphas, projection, drawn=False))
            adapter.set_stacks(fresh)
            adapter.train(adapter.training)
        return True

    def detach_router(self) -> nn.ModuleDict:
        """Take the routers off; until others are attached, blocks mix uniformly or as told.

        Returns them by their block's path, with `.` as `/`.
        """
        removed = {}
        for block in self.blocks:
            router = inject.attach_router(self.base, block, None)
            if router is not None:
                removed[block.name.replace(".", "/")] = router
        return nn.ModuleDict(removed)

    @float32_defaults()
    def attach_router(self, routers: nn.ModuleDict | None = None) -> None:
        """Put routers at the blocks: those that `detach_router` gave, or fresh ones.

        Raises ValueError when a block has one already, or names or numbers of experts do not fit.
        """
        if any(True for _ in self.routers()):
            raise ValueError("routers are attached already: detach_router() first")
        needing = [b for b in self.blocks if self.config.is_learned and not b.shares_first]
        by_name = {block.name.replace(".", "/"): block for block in needing}
        if routers is None:
            routers = nn.ModuleDict()
            for name, block in by_name.items():
                path = next(p for p in self.adapters if p.startswith(f"{block.name}."))
                routers[name] = fresh = inject.new_router(self.base, self.config, block, path)
                if len(self.table) != self.config.num_experts:
                    fresh.resize(len(self.table))
        if set(routers) != by_name.keys():
            raise ValueError(
                f"routers are for {sorted(routers)}, but the blocks are {sorted(by_name)}"
            )
        given: dict[str, Any] = dict(routers)
        for name, block in by_name.items():
            assert isinstance(given[name], Router)
            given[name].check_experts(block.name, len(self.table))
        for name, block in by_name.items():
            given[name].config = self.config
            inject.attach_router(self.base, block, given[name])
        if self.skill_library:
            self.skill_library.update_router()

    def size_message(self, folder: Path) -> str:
        """One line: what the folder weighs beside the base it does not hold."""
        size = folder_bytes(folder)
        ours = {id(p) for _, p in self.own_parameters()}
        frozen = [p for p in self.base.parameters() if id(p) not in ours]
        base = sum(stored_bytes(p) for p in frozen)
        return (
            f"{folder}: {size / 1e6:.1f} MB on disk, no base weight among them "
            f"(the base is {base / 1e6:.1f} MB in memory)"
        )

    # Inner workings

    def unload(self) -> PreTrainedModel:
        """Take everything off and return the base as it was; this object is of no use after."""
        for handle in self.handles:
            handle.remove()
        inject.remove(self.base, self.blocks, self.adapters, self.biases)
        return self.base
