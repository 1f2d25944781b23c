"""The experts of a live mixture: create, freeze, retire, merge, choose.

Every call may come between any two steps of a run. The optimizer that was attached comes
along: a parameter that stays is the same object with the same moments, one that is cut out of a
stack or joined to another takes exactly its rows of the moments with it, and afterwards every
trainable parameter is in the optimizer exactly once.

Shape letters: D input width, O output width, E experts, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dylora.adapters import restack
from dylora.adapters.optimizer_state import check_held_once, check_separable, grow
from dylora.expert_table import (
    Expert,
    MergeReport,
    State,
    check_left,
    check_merge,
    check_new,
    format_table,
    number_stacks,
)
from dylora.fields import shown
from dylora.mixture import Mixture
from dylora.rollback import all_or_nothing, restoring_values, without_autograd
from dylora.routing import maturity
from dylora.storage.schema import current_keys

INITIAL_SHARE = 1e-9  # of the gate mass, at most


class ExpertManager:
    """The table of a model's experts, and everything that changes it."""

    def __init__(self, mixture: Mixture, records: list[dict[str, Any]] | None = None):
        """Those of the mixture's table, or of `records`, a saved one."""
        self.mixture = mixture
        self.step = 0  # of the run, for the histories
        self.progress = 0.0  # share of the run that is done
        self.optimizer: torch.optim.Optimizer | None = None
        self.paused: list[nn.Parameter] = []  # of routers, while one expert is enabled
        if records is not None:
            self.load_state_dict(records)

    @property
    def table(self) -> list[Expert]:
        """A row for every expert that ever was."""
        return self.mixture.table

    def __len__(self) -> int:
        """All that ever were: the width of the gates. Numbers are never used again."""
        return len(self.table)

    def __getitem__(self, expert: int) -> Expert:
        return self.table[expert]

    def __str__(self) -> str:
        """The table: state, rank, alpha, maturity, steps trained, skill."""
        return format_table(self.table, self.mixture.maturity.maturity)

    @property
    def live(self) -> list[int]:
        """The numbers of all that are not retired."""
        return self.mixture.live

    # What a run tells

    @without_autograd
    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take this optimizer along from here on.

        Raises ValueError when it does not hold every trainable parameter exactly once, or keeps a
        state that cannot be cut by expert (`check_separable`).
        """
        check_held_once(optimizer, self.mixture.own_parameters())
        stacks = [s for adapter in self.mixture.adapters.values() for s in adapter.stacks]
        stacked = [parameter for stack in stacks for parameter in stack.parameters()]
        routers = [parameter for _, parameter in self.mixture.router_parameters()]
        check_separable(optimizer, stacked, routers)
        self.optimizer = optimizer

    def set_progress(self, step: int, progress: float) -> None:
        """Where the run stands; what happens next is noted with it."""
        self.step, self.progress = step, progress

    def count_step(self, step: int, progress: float) -> None:
        """One optimizer step is done: number `step`, with `progress` of the run done."""
        self.set_progress(step, progress)
        for row in self.table:
            row.steps += row.is_trained

    def check_optimizer(self) -> None:
        """Raises ValueError unless every trainable parameter is in the optimizer exactly once."""
        if self.optimizer is not None:
            check_held_once(self.optimizer, self.mixture.own_parameters())

    # What changes the table

    @all_or_nothing
    def create_expert(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        skill: str | None = None,
        share: float = INITIAL_SHARE,
    ) -> int:
        """A new, immature expert; returns its number. No other expert's parameters change.

        Args:
            rank, alpha: the configuration's by default.
            share: bound on its share of any token's gate mass at first. The default
                leaves every output as it is, and too little to learn from: train the expert
                after `set_active_expert`, or give a larger share. Routers of fixed weights give 0.

        Where it begins in each router is the router's (`Router.add_expert`).
        """
        mixture, config = self.mixture, self.mixture.config
        rank, alpha = rank or config.r, alpha or config.lora_alpha
        check_new(config, rank, alpha, skill, share)
        index = len(self.table)
        for path, adapter in mixture.adapters.items():
            stack = adapter.create_stack(index, rank, [alpha], mixture.base.get_submodule(path))
            restack.add_to_optimizer(self.optimizer, adapter, stack)
            adapter.set_stacks([*adapter.stacks, stack])
        self._grow_routers(share)
        state = mixture.state
        mixture.maturity = maturity.extended(mixture.maturity, self.progress)
        state.resize([*state.maturity_E.tolist(), 0.0], [*state.fixed_weights_E.tolist(), 0.0])
        stack = 1 + max(row.stack for row in self.table)
        self.table.append(Expert(f"expert_{index}", rank, alpha, skill=skill, stack=stack))
        self._record(index, "created")
        self._sync()
        return index

    @all_or_nothing
    def freeze(self, *experts: int) -> None:
        """Never change these experts any more: no gradient is computed for them.

        They go on serving, and their moments are kept for `unfreeze`. What experts have in common
        (share_A's A, the shifts of bias all) stands still unless all of them are trained.
        """
        self._change(experts, "active", "frozen")

    @all_or_nothing
    def unfreeze(self, *experts: int) -> None:
        """Train these frozen experts again, with the moments they had."""
        self._change(experts, "frozen", "active")

    @all_or_nothing
    def retire(self, *experts: int) -> None:
        """Take these experts out of compute, routing and exports for good.

        Their numbers and their rows in the table stay. Raises ValueError when none would be left.
        """
        self._require_live(experts)
        left = [expert for expert in self.live if expert not in experts]
        check_left(self.mixture.adapters, left)
        for expert in experts:
            self.table[expert].state = "retired"
            self.table[expert].enabled = False
            self._record(expert, "retired")
            self.mixture.reassign_skills(expert, None)
        if any(self.table[index].enabled for index in left):
            self._sync()
        else:
            self.activate_all_experts()  # the only enabled one is gone

    @all_or_nothing
    def activate(self, *experts: int, shared: bool = True) -> None:
        """Enable only these experts: one alone has all of the gate mass.

        shared: the shared ones are enabled besides. Raises ValueError where none would be.
        """
        self._require_live(experts)
        always = self.mixture.config.shared_experts if shared else 0
        chosen = {*experts, *(expert for expert in self.live if expert < always)}
        if not chosen:
            raise ValueError("no expert is named, and one at least must be enabled")
        for index, row in enumerate(self.table):
            row.enabled = index in chosen
        self._sync()

    set_active_expert = activate

    @all_or_nothing
    def activate_all_experts(self) -> None:
        """Enable all experts but the retired ones."""
        for row in self.table:
            row.enabled = row.state != "retired"
        self._sync()

    @all_or_nothing
    def merge(
        self, i: int, j: int, *, rank: int | None = None, shares: tuple[float, float] | None = None
    ) -> MergeReport:
        """Two experts into one at the place of `i`; `j` retires.

        The merged update is a_i s_i B_i A_i + a_j s_j B_j A_j, cut to `rank` by singular value
        decomposition (the best of that rank, Eckart and Young 1936); with share_A no cut is needed.
        What becomes of a router's rows is the router's (`Router.merge_experts`).

        Args:
            rank: of the result; the larger of the two by default.
            shares: a, by default in proportion to the sum of gates that each has received.

        Raises ValueError for DoRA experts, whose update is not of low rank.
        """
        self._require_live((i, j))
        next(iter(self.mixture.adapters.values())).check_merge()
        live, config = self.mixture.maturity, self.mixture.config
        rank, shares = check_merge(self.table, config, live.evidence, (i, j), rank, shares)
        errors = {}
        for path, adapter in self.mixture.adapters.items():
            alpha = self.table[i].alpha
            merged, errors[path] = adapter.merged_stack(i, j, rank, alpha, shares)
            restack.split_off(self.optimizer, adapter, i)
            restack.replace_stack(self.optimizer, adapter, adapter.stack_of(i)[0], merged)
        state = self.mixture.state
        state.fixed_weights_E[i] += state.fixed_weights_E[j]
        state.fixed_weights_E[j] = 0
        self.table[i].rank = rank
        self.table[i].stack = 1 + max(row.stack for row in self.table)
        self._record(i, f"merged with {self.table[j].name}")
        self.table[j].history.append({"event": f"merged into expert_{i}", "step": self.step})
        self.mixture.set_maturity(maturity.merged(live, i, j, shares))
        self.mixture.reassign_skills(j, i)
        self.retire(j)
        for _, router in self.mixture.routers():  # last, as they write in place
            router.merge_experts(i, j, shares)
        return MergeReport(i, j, rank, shares, errors)

    # Files

    def state_dict(self) -> list[dict[str, Any]]:
        """The table as JSON types."""
        return [asdict(row) for row in self.table]

    @without_autograd
    def load_expert_weights(self, expert: int, weights: Mapping[str, Sequence[Tensor]]) -> None:
        """Give an expert matrices as `Mixture.expert_weights` returns them: path of a projection ->
        of a LoRA A [r, D] and B [O, r]. Its moments stay.

        Raises ValueError, and changes nothing, for a projection too many or too few, another shape,
        values that are not finite, another A than the one that experts share, and DoRA, whose
        magnitudes belong to the matrices.
        """
        self._require_live((expert,))
        adapters = self.mixture.adapters
        if self.mixture.config.use_dora:
            raise ValueError("a DoRA expert is more than its matrices: load_lora_experts reads all")
        for path in adapters.keys() ^ weights.keys():
            raise ValueError(f"{shown(path)} is adapted or given, but not both")
        with restoring_values(self.mixture, [expert]):
            for path, adapter in adapters.items():
                adapter.load_matrices(expert, weights[path])

    @without_autograd
    def load_state_dict(self, records: list[dict[str, Any]]) -> None:
        """Give the mixture the experts of a saved table, with values that a loader overwrites.

        Raises ValueError for a record that cannot be parsed. An optimizer has to be built anew.
        """
        try:
            rows = [{k: v for k, v in current_keys(r).items() if k != "maturity"} for r in records]
            table = [Expert(**row) for row in rows]
        except TypeError as error:
            raise ValueError(f"the table of experts cannot be parsed: {error}") from None
        if self.mixture.set_table(table):
            self.optimizer = None
        self._apply_states()

    # Inner workings

    def _require_live(self, experts: tuple[int, ...]) -> None:
        for expert in experts:
            if not 0 <= expert < len(self.table):
                raise ValueError(f"there is no expert {expert}, only 0 to {len(self.table) - 1}")
            if self.table[expert].state == "retired":
                raise ValueError(f"expert {expert} is retired")

    def _change(self, experts: tuple[int, ...], before: State, after: State) -> None:
        self._require_live(experts)
        for expert in experts:
            if self.table[expert].state == before:
                self.table[expert].state = after
                self._record(expert, after)
        self._sync()

    def _record(self, expert: int, event: str) -> None:
        self.table[expert].history.append({"event": event, "step": self.step})

    def _sync(self) -> None:
        """Make stacks, gradients, gates and optimizer agree with the table."""
        groups = number_stacks(self.table, self.mixture.adapters.values(), self.optimizer)
        for adapter in self.mixture.adapters.values():
            restack.repartition(self.optimizer, adapter, groups)
        self._apply_states()
        self.check_optimizer()

    def _grow_routers(self, share: float) -> None:
        """Room for one more expert in every router, moments included."""
        for _, router in self.mixture.routers():
            for name, old in router.add_expert(share, self.mixture.state.routed_E).items():
                new = router.get_parameter(name)
                self.paused = [new if p is old else p for p in self.paused]
                grow(self.optimizer, old, new)

    def _apply_states(self) -> None:
        """Gates for the enabled experts; gradients for what is trained, and for what experts
        share while all of them are."""
        mixture = self.mixture
        free = all(self.table[expert].is_trained for expert in self.live)
        shared = [shift.shift for shift in mixture.biases.values()]
        for adapter in mixture.adapters.values():
            own = adapter.named_parameters(recurse=False)
            shared += [parameter for name, parameter in own if name not in adapter.fixed]
            for stack in adapter.stacks:
                trained = self.table[stack.first].is_trained
                for name, parameter in stack.named_parameters():
                    restack.set_requires_grad(parameter, trained and name not in adapter.fixed)
        for parameter in shared:
            restack.set_requires_grad(parameter, free)
        shared = mixture.config.shared_experts
        alone = sum(row.enabled for row in self.table[shared:]) <= 1
        routers = [parameter for _, parameter in mixture.router_parameters()]
        if alone:  # those that somebody else has frozen stay so afterwards
            self.paused += [p for p in routers if p.requires_grad]
        for parameter in self.paused:
            restack.set_requires_grad(parameter, not alone)
        self.paused = self.paused if alone else []
        mixture.state.set_active([row.enabled for row in self.table])
