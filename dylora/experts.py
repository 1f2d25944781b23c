"""The experts of a live mixture: create, freeze, retire, merge, choose.

Every call may come between any two steps of a run. The optimizer that `follow` was told of comes
along: a parameter that stays is the same object with the same moments, one that is cut out of a
stack or joined to another takes exactly its rows of the moments with it, and afterwards every
trainable parameter is in the optimizer exactly once.

Shape letters: D input width, O output width, E experts, R rank.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from dylora.adapters import merge_experts, restack
from dylora.fields import is_name, shown
from dylora.routing import maturity

if TYPE_CHECKING:
    from dylora.model import DyLoRA_MoE

Method = TypeVar("Method", bound=Callable[..., Any])
State = Literal["active", "frozen", "retired"]
INITIAL_SHARE = 1e-9  # of the gate mass, at most


@dataclass
class Expert:
    """One row of the table; a checkpoint's config.json holds it as it is."""

    name: str
    rank: int
    alpha: float
    state: State = "active"  # active: trained; frozen: computed but never changed; retired: gone
    takes_part: bool = True  # False: set_active_expert chose another one
    skill: str | None = None
    steps: int = 0  # optimizer steps that could change it
    stack: int = 0  # experts of one number lie in one tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer step changes it."""
        return self.state == "active" and self.takes_part


class MergeReport(NamedTuple):
    """What became of two experts."""

    expert: int  # the place of the merged one
    retired: int
    rank: int
    shares: tuple[float, float]  # how much each counted
    errors: dict[str, float]  # by projection: ‖wanted - kept‖ / ‖wanted‖, Frobenius

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values())


def without_autograd(method: Method) -> Method:
    """No graph is made; nor are parameters of inference mode, which training could not use."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class ExpertManager:
    """The table of a model's experts, and everything that changes it."""

    def __init__(self, model: "DyLoRA_MoE", records: list[dict[str, Any]] | None = None):
        """Those of a saved table, or else those that the configuration begins with."""
        self.model = model
        self.step = 0  # of the run, for the histories
        self.progress = 0.0  # share of the run that is done
        self._optimizer: torch.optim.Optimizer | None = None
        self.table: list[Expert] = []
        if records is not None:
            self.restore(records)
            return
        config = model.config
        ranks = config.expert_ranks or [config.r] * config.expert_count
        alphas = config.expert_alphas or [config.lora_alpha] * config.expert_count
        self.table = [
            Expert(f"expert_{index}", rank, alpha)
            for index, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
        ]

    def __len__(self) -> int:
        """All that ever were: the width of the gates. Numbers are never used again."""
        return len(self.table)

    def __getitem__(self, expert: int) -> Expert:
        return self.table[expert]

    def __str__(self) -> str:
        """The table: state, rank, alpha, maturity, steps trained, skill."""
        lines = [f"{'expert':10} {'state':8} {'rank':>4} {'alpha':>6} {'maturity':>8} {'steps':>7}"]
        for index, row in enumerate(self.table):
            ripe = float(self.model.maturity.maturity[index])
            state = row.state if row.takes_part or row.state == "retired" else "off"
            line = f"{row.name:10} {state:8} {row.rank:4} {row.alpha:6g} {ripe:8.3f} {row.steps:7}"
            lines.append(line + (f"  {row.skill}" if row.skill else ""))
        return "\n".join(lines)

    @property
    def live(self) -> list[int]:
        """The numbers of all that are not retired."""
        return [index for index, row in enumerate(self.table) if row.state != "retired"]

    # What a run tells

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Take this optimizer along from here on.

        Raises ValueError when it does not hold every trainable parameter exactly once.
        """
        self._optimizer = optimizer
        self.check_optimizer()

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
        if self._optimizer is None:
            return
        groups = self._optimizer.param_groups
        held = Counter(id(parameter) for group in groups for parameter in group["params"])
        for name, parameter in self.model.own_parameters():
            times = held[id(parameter)]
            if times > 1 or (parameter.requires_grad and times == 0):
                raise ValueError(f"the optimizer holds {name} {times} times, not once")

    # What changes the table

    @without_autograd
    def create_expert(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        skill: str | None = None,
        share: float = INITIAL_SHARE,
    ) -> int:
        """A newborn expert; returns its number. No other expert's parameters change.

        Args:
            rank, alpha: the configuration's by default.
            share: bound on the newcomer's share of any token's gate mass at first. The default
                leaves every output as it is, and too little to learn from: train the newcomer
                after `set_active_expert`, or give a larger share. Routers of fixed weights give 0.

        The newcomer's row in each router is the mean of the others' rows with its bias lowered by
        T·log((1 - share) / (share·E)), so that by Jensen's inequality its probability stays below
        `share` for every hidden state.
        """
        model, config = self.model, self.model.config
        if not config.use_moe_routing:
            raise ValueError("use_moe_routing is false: a plain LoRA has one expert")
        rank, alpha = rank or config.r, alpha or config.lora_alpha
        if rank < 1 or alpha <= 0:
            raise ValueError(f"rank is {rank} and alpha {alpha}, but both must be above 0")
        if skill is not None and not is_name(skill):
            raise ValueError(f"skill is {shown(skill)}, but must be a short text of one line")
        if config.share_A and rank != config.r:
            raise ValueError(f"rank is {rank}, but with share_A it must be r ({config.r})")
        if not 0 < share < 1:
            raise ValueError(f"share is {share}, but must lie between 0 and 1")
        index = len(self.table)
        for path, adapter in model.mixture.adapters.items():
            stack = adapter.create_stack(index, [rank], [alpha], model.base.get_submodule(path))
            restack.add_to_optimizer(self._optimizer, adapter, stack)
            adapter.set_stacks([*adapter.stacks, stack])
        self._grow_routers(share)
        state = model.mixture.state
        model.maturity = maturity.extended(model.maturity, self.progress)
        state.resize([*state.maturity_E.tolist(), 0.0], [*state.fixed_weights_E.tolist(), 0.0])
        newcomer = Expert(f"expert_{index}", rank, alpha, skill=skill)
        newcomer.stack = 1 + max(row.stack for row in self.table)
        self.table.append(newcomer)
        self._note(index, "created")
        self._sync()
        return index

    def freeze(self, *experts: int) -> None:
        """Never change these experts any more: no gradient is computed for them.

        They go on serving, and their moments are kept for `unfreeze`. What experts have in common
        (share_A's A, the shifts of bias all) stands still unless all of them are trained.
        """
        self._change(experts, "active", "frozen")

    def unfreeze(self, *experts: int) -> None:
        """Train these frozen experts again, with the moments they had."""
        self._change(experts, "frozen", "active")

    def retire(self, *experts: int) -> None:
        """Take these experts out of compute, routing and exports for good.

        Their numbers and their rows in the table stay. Raises ValueError when none would be left.
        """
        self._require_live(experts)
        left = [expert for expert in self.live if expert not in experts]
        if not left:
            raise ValueError("the last expert cannot be retired")
        for expert in experts:
            self.table[expert].state = "retired"
            self.table[expert].takes_part = False
            self._note(expert, "retired")
        if any(self.table[index].takes_part for index in left):
            self._sync()
        else:
            self.activate_all_experts()  # the only one that took part is gone

    def set_active_expert(self, expert: int) -> None:
        """Only this expert takes part: its gate is the whole mass, and only it is trained."""
        self._require_live((expert,))
        for index, row in enumerate(self.table):
            row.takes_part = index == expert
        self._sync()

    def activate_all_experts(self) -> None:
        """All experts but the retired ones take part again."""
        for row in self.table:
            row.takes_part = row.state != "retired"
        self._sync()

    def reset_maturity(self, expert: int) -> None:
        """Make an expert newborn again: maturity, evidence and loss averages start afresh."""
        self._require_live((expert,))
        self.model.set_maturity(maturity.reset(self.model.maturity, expert, self.progress))
        self._note(expert, "maturity reset")

    @without_autograd
    def merge(
        self,
        i: int,
        j: int,
        *,
        rank: int | None = None,
        shares: tuple[float, float] | None = None,
    ) -> MergeReport:
        """Two experts into one at the place of `i`; `j` retires.

        The merged update is a_i s_i B_i A_i + a_j s_j B_j A_j, cut to `rank` by singular value
        decomposition (the best of that rank, Eckart and Young 1936); with share_A no cut is needed.
        The merged row of each router is a_i w_i + a_j w_j with T·H(a) added to its bias, the best
        lower bound on the two experts' common probability.

        Args:
            rank: of the result; the larger of the two by default.
            shares: a, by default in proportion to the gate mass each has received.

        Raises ValueError for DoRA experts, whose update is not of low rank.
        """
        config, live = self.model.config, self.model.maturity
        self._require_live((i, j))
        if i == j:
            raise ValueError(f"expert {i} cannot be merged with itself")
        if config.use_dora:
            raise ValueError("DoRA experts cannot be merged: their updates are not of low rank")
        if self.table[i].state != self.table[j].state:
            raise ValueError(
                f"expert {i} is {self.table[i].state} and expert {j} {self.table[j].state}: "
                "freeze or unfreeze one of them first"
            )
        rank = rank or max(self.table[i].rank, self.table[j].rank)
        if config.share_A and rank != config.r:
            raise ValueError(f"rank is {rank}, but with share_A it must be r ({config.r})")
        mass = (float(live.evidence[i]), float(live.evidence[j]))
        if shares is None:
            shares = mass if sum(mass) > 0 else (1.0, 1.0)
        if min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise ValueError(f"shares are {shares}, but must be two weights of at least 0")
        shares = (shares[0] / sum(shares), shares[1] / sum(shares))

        errors = {}
        for path, adapter in self.model.mixture.adapters.items():
            alpha = self.table[i].alpha
            merged, errors[path] = merge_experts.merged_stack(adapter, i, j, rank, alpha, shares)
            restack.split_off(self._optimizer, adapter, i)
            restack.replace_stack(self._optimizer, adapter, adapter.stack_of(i)[0], merged)
        temperature = config.router_temperature
        entropy = -sum(a * math.log(a) for a in shares if a > 0)
        for _, router in self.model.routers():
            weight, bias = router.outer.weight, router.outer.bias
            weight[i] = shares[0] * weight[i] + shares[1] * weight[j]
            bias[i] = shares[0] * bias[i] + shares[1] * bias[j] + temperature * entropy
        state = self.model.mixture.state
        state.fixed_weights_E[i] += state.fixed_weights_E[j]
        state.fixed_weights_E[j] = 0
        a, b = shares
        # An expert that has seen nothing has no averages yet, and no share in these.
        fast, slow = (
            a * value[i].nan_to_num(float(value[j])) + b * value[j].nan_to_num(float(value[i]))
            for value in (live.fast, live.slow)
        )
        values = {
            "maturity": torch.minimum(live.maturity[i], live.maturity[j]),
            "evidence": live.evidence[i] + live.evidence[j],
            "fast": fast,
            "slow": slow,
            "born": torch.minimum(live.born[i], live.born[j]),
        }
        changed = {name: value.clone() for name, value in live._asdict().items()}
        for name, value in values.items():
            changed[name][i] = value
        self.table[i].rank = rank
        self.table[i].stack = 1 + max(row.stack for row in self.table)
        self._note(i, f"merged with {self.table[j].name}")
        self.table[j].history.append({"event": f"merged into expert_{i}", "step": self.step})
        self.model.set_maturity(type(live)(**changed))
        self.retire(j)
        return MergeReport(i, j, rank, shares, errors)

    # Files

    def records(self) -> list[dict[str, Any]]:
        """The table as JSON types."""
        return [asdict(row) for row in self.table]

    @without_autograd
    def restore(self, records: list[dict[str, Any]]) -> None:
        """Give the model the experts of a saved table, with values that a loader overwrites.

        Raises ValueError for a record that does not read. An optimizer has to be built anew.
        """
        try:
            table = [Expert(**{k: v for k, v in r.items() if k != "maturity"}) for r in records]
        except TypeError as error:
            raise ValueError(f"the table of experts does not read: {error}") from None
        model, first = self.model, self.table
        if [(r.rank, r.alpha, r.state, r.stack) for r in table] != [
            (r.rank, r.alpha, r.state, r.stack) for r in first
        ]:
            self._optimizer = None
            state = model.mixture.state
            weights = state.fixed_weights_E.tolist()
            state.resize([0.0] * len(table), weights + [0.0] * (len(table) - len(weights)))
            model.maturity = maturity.ExpertMaturity.create(len(table))
            for _, router in model.routers():
                router.resize(len(table))
            for path, adapter in model.mixture.adapters.items():
                projection = model.base.get_submodule(path)
                fresh = []
                for run in groups_of(table):
                    ranks, alphas = [table[e].rank for e in run], [table[e].alpha for e in run]
                    stack = adapter.create_stack(run[0], ranks, alphas, projection, drawn=False)
                    fresh.append(stack)
                adapter.set_stacks(fresh)
                adapter.train(model.training)
        self.table = table
        self._set_trainable()
        self._set_active()

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
                self._note(expert, after)
        self._sync()

    def _note(self, expert: int, event: str) -> None:
        self.table[expert].history.append({"event": event, "step": self.step})

    @without_autograd
    def _set_active(self) -> None:
        self.model.mixture.state.set_active([row.takes_part for row in self.table])

    @without_autograd
    def _sync(self) -> None:
        """Make stacks, gradients, gates and optimizer agree with the table."""
        for adapter in self.model.mixture.adapters.values():
            for index, row in enumerate(self.table):
                if row.state == "retired" and any(
                    index in stack.experts for stack in adapter.stacks
                ):
                    restack.split_off(self._optimizer, adapter, index)
                    restack.replace_stack(self._optimizer, adapter, adapter.stack_of(index)[0])
        self._number_stacks()
        runs = groups_of(self.table)
        for adapter in self.model.mixture.adapters.values():
            restack.restack(self._optimizer, adapter, runs)
        self._set_trainable()
        self._set_active()
        self.check_optimizer()

    def _number_stacks(self) -> None:
        """Neighbours share a stack when both are trained or neither, with one width and one age.

        Without an optimizer to take along stacks are cut but never joined, so that a parameter
        which an optimizer elsewhere may hold is not replaced without need.
        """
        number, previous = -1, None
        for index, row in enumerate(self.table):
            if row.state == "retired":
                row.stack = -1
                continue
            before = row.stack if self._optimizer is None else None
            key = (row.is_trained, before, self._age(index))
            if previous is None or previous != (index - 1, key):
                number += 1
            row.stack, previous = number, (index, key)

    def _age(self, expert: int) -> tuple[Any, ...]:
        """What the parameters of a stack must have in common."""
        ages = []
        for adapter in self.model.mixture.adapters.values():
            stack, _ = adapter.stack_of(expert)
            ages.append(stack.lora_B.shape[1])
            if self._optimizer is not None:
                state = self._optimizer.state.get(stack.lora_B, {})
                ages.append(
                    tuple(
                        (name, float(value) if torch.is_tensor(value) else value)
                        for name, value in state.items()
                        if not torch.is_tensor(value) or value.numel() == 1
                    )
                )
        return tuple(ages)

    def _grow_routers(self, share: float) -> None:
        """One more row in every router; see `create_expert`."""
        experts = len(self.table)
        takes_part = self.model.mixture.state.active_E
        offset = self.model.config.router_temperature * math.log(
            share / (1 - share) * int(takes_part.sum())
        )
        for _, router in self.model.routers():
            before = {"weight": router.outer.weight, "bias": router.outer.bias}
            means = {
                name: value.detach()[takes_part.to(value.device)].mean(0, keepdim=True)
                for name, value in before.items()
            }
            router.resize(experts + 1)
            with torch.no_grad():
                for name, old in before.items():
                    new = getattr(router.outer, name)
                    row = means[name] + (offset if name == "bias" else 0)
                    new.copy_(torch.cat([old, row]))
                    new.requires_grad_(old.requires_grad)
                    restack.extend_moments(self._optimizer, old, new)

    def _set_trainable(self) -> None:
        """Gradients for what is trained, and for what experts share while all of them are."""
        mixture, config = self.model.mixture, self.model.config
        free = all(self.table[expert].is_trained for expert in self.live)
        shared = [shift.shift for shift in mixture.biases.values()]
        for adapter in mixture.adapters.values():
            if adapter.shared_A is not None and not config.freeze_A:
                shared.append(adapter.shared_A)
            for stack in adapter.stacks:
                trained = self.table[stack.first].is_trained
                for name, parameter in stack.named_parameters():
                    fixed = name == "lora_A" and config.freeze_A
                    _set_requires_grad(parameter, trained and not fixed)
        for parameter in shared:
            _set_requires_grad(parameter, free)


def groups_of(table: list[Expert]) -> list[list[int]]:
    """The live experts by stack, in order."""
    runs: list[list[int]] = []
    for index, row in enumerate(table):
        if row.state == "retired":
            continue
        if runs and runs[-1][-1] == index - 1 and table[index - 1].stack == row.stack:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _set_requires_grad(parameter: nn.Parameter, trains: bool) -> None:
    """Without a gradient, no optimizer touches a parameter: not by decay, not by momentum."""
    parameter.requires_grad_(trains)
    if not trains:
        parameter.grad = None
