"""The contract of an adapter type: the experts of one projection, whatever an expert is.

`StackedLoRA` (projection.py) is the usual one; others have files of their own here, named by
`adapter_type`. Around it, injection calls `add_hooks`; a pass `add_update`; the experts' life
`create_stack`, `check_merge` and `merged_stack`; files `expert_tensors` and `load_expert`.

Shape letters: E experts, R rank, D input width, O output width.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dylora.adapters.block import BlockPass, RoutedBlock
from dylora.adapters.stack import ExpertStack
from dylora.config import MoELoraConfig, matching
from dylora.storage.peft_types import PEFT_TYPES
from dylora.storage.tensors import fill


class Adapter(nn.Module):
    """The experts of one projection, in stacks.

    The experts a mixture starts with are one stack, or one for each run of equal ranks; an expert
    that is created, frozen or unfrozen alone becomes a stack of its own, so that what is frozen is
    a parameter without gradient and what is new has optimizer moments of its own. The parameters of
    a stack lie by expert in their first dimension; a parameter of the adapter itself belongs to all
    experts. All are float32 whatever the base is, and cast to the activations' precision for the
    products.

    Matrices of a stack have the names of PEFT's tensors and are [E, R, D] where PEFT's are [r, D],
    [E, R, O] where they are [O, r].
    """

    PEFT_TYPE: ClassVar[str]  # a key of PEFT_TYPES
    STACK: ClassVar[type[ExpertStack]]
    fixed: tuple[str, ...] = ()  # names of parameters that are never trained

    def __init__(
        self,
        block: RoutedBlock,
        path: str,
        in_features: int,
        out_features: int,
        config: MoELoraConfig,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.block = block
        self.path = path
        self.name = path.rpartition(".")[2]
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        self.device = device
        self.dropout = nn.Dropout(config.lora_dropout)
        self.stacks: Any = nn.ModuleList()  # of ExpertStack, in the order of the E axis

    # What a type defines

    @staticmethod
    def check_projection(path: str, projection: nn.Module, config: MoELoraConfig) -> None:
        """Raises ValueError for a projection that cannot be adapted."""

    @abstractmethod
    def initial_values(
        self, count: int, rank: int, projection: nn.Module, *, drawn: bool
    ) -> dict[str, Tensor | None]:
        """The parameters of a stack of so many experts of this rank, which change nothing yet; all
        0 unless `drawn`, for a loader."""

    @abstractmethod
    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x [..., D], gates [..., E] -> what the mixture adds, [..., O], in x's precision."""

    def peft_settings(self) -> dict[str, Any]:
        """The keys of adapter_config.json that only this type has, where not as by default."""
        return {}

    def filling_parameters(self) -> int:
        """How many only fill up a rank: of those that require a gradient, which is always 0."""
        return 0

    @property
    def can_be_packed(self) -> bool:
        """Whether the decode kernel computes the update."""
        return False

    def check_merge(self) -> None:
        """Raises ValueError where two experts cannot be merged into one."""
        kind = self.config.adapter_type
        raise ValueError(f"experts of adapter_type {kind!r} cannot be merged: retire one of them")

    def merged_stack(
        self, i: int, j: int, rank: int, alpha: float, shares: tuple[float, float]
    ) -> tuple[ExpertStack, float]:
        """A stack of one expert whose update is the mean of two, and its relative error."""
        raise NotImplementedError  # check_merge has refused

    # What all have in common

    def rank(self, expert_rank: int) -> int:
        """Rank at this projection of an expert of a given rank."""
        return int(matching(self.config.rank_pattern, self.path, expert_rank))

    def scaling(self, expert_rank: int, expert_alpha: float) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rslora, at this projection."""
        rank = self.rank(expert_rank)
        alpha = matching(self.config.alpha_pattern, self.path, expert_alpha)
        return alpha / (rank**0.5 if self.config.use_rslora else rank)

    def create_stack(
        self, first: int, rank: int, alphas: list[float], projection: nn.Module, drawn: bool = True
    ) -> ExpertStack:
        """Experts `first`, `first + 1`, … of one rank and these alphas, with initial values."""
        values = self.initial_values(len(alphas), self.rank(rank), projection, drawn=drawn)
        scalings = [self.scaling(rank, alpha) for alpha in alphas]
        stack = self.STACK(first, self.rank(rank), scalings, values)
        for name, parameter in stack.named_parameters():
            parameter.requires_grad_(name not in self.fixed)
        return stack

    def has(self, expert: int) -> bool:
        """Whether its layer has this expert; one that it has not changes nothing here, and is 0 in
        files."""
        return self.block.count is None or expert < self.block.count

    def set_stacks(self, stacks: list[ExpertStack]) -> None:
        """Other stacks from here on."""
        self.stacks = nn.ModuleList(stacks)
        self.block.state.forget_kept()

    def stack_of(self, expert: int) -> tuple[Any, int]:
        """The stack that holds an expert, and its place in it; KeyError for a retired one."""
        for stack in self.stacks:
            if expert in stack.experts:
                return stack, expert - stack.first
        raise KeyError(expert)

    def matrix(self, stack: Any, name: str) -> Tensor:
        """A stack's matrix by PEFT's name, [E, R, D] or [E, R, O]; one for all: [1, R, D]."""
        return getattr(stack, name)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """One expert by PEFT's names and in its orientation, 0 where the layer has it not; KeyError
        for a retired one that it had."""
        if not self.has(expert):
            return self._nothing(expert)
        stack, place = self.stack_of(expert)
        found = {}
        for name, axes in PEFT_TYPES[self.PEFT_TYPE].matrices.items():
            matrix = self.matrix(stack, name).detach()
            rows = matrix[place if len(matrix) > 1 else 0]
            found[name] = rows.T if axes == "o r" else rows
        return found

    def _nothing(self, expert: int) -> dict[str, Tensor]:
        """The matrices, all 0, of an expert that this layer has not; it has the rank it began with,
        as experts_per_layer lets none be created or merged."""
        ranks = self.config.expert_ranks
        rank = self.rank(self.config.r if ranks is None else ranks[expert])
        like = self.stacks[0].scaling_E
        return {
            "lora_A": like.new_zeros(rank, self.in_features),
            "lora_B": like.new_zeros(self.out_features, rank),
        }

    @torch.no_grad()
    def load_expert(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Give an expert the values that `expert_tensors` returns.

        Raises ValueError for a tensor that is missing, of another shape or not finite, and for an
        update of an expert that this layer has not.
        """
        own = self.expert_tensors(expert)
        fill(own, tensors, f"{self.path}.")
        if not self.has(expert) and bool(own["lora_B"].any()):
            raise ValueError(
                f"{self.path} has {self.block.count} experts by experts_per_layer, so that the "
                f"update of expert {expert} must be 0"
            )

    def load_matrices(self, expert: int, matrices: Sequence[Tensor]) -> None:
        """Give an expert its matrices alone, in PEFT's order. Raises as `load_expert`."""
        names = PEFT_TYPES[self.PEFT_TYPE].matrices
        if len(matrices) != len(names):
            raise ValueError(f"{self.path} has {len(matrices)} matrices, not {len(names)}")
        self.load_expert(expert, dict(zip(names, matrices, strict=True)))

    # Within a pass

    def add_hooks(self, projection: nn.Module) -> list[RemovableHandle]:
        """Let the projection's output carry the update."""
        return [projection.register_forward_hook(self.add_update)]

    def add_update(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the projection."""
        run = self._run()
        if run is None:
            return output
        gates = fitting_gates(run.decision.gates, args[0], self.path)
        return output + self(args[0], gates).to(output.dtype)

    def _run(self) -> BlockPass | None:
        """The pass through the block; None while the adapters are disabled.

        Raises ValueError outside the block, where nothing has been routed.
        """
        state = self.block.state
        pass_ = state.current()
        if not (state.mine.disabled if pass_ is None else not pass_.enabled):
            run = None if pass_ is None else pass_.blocks.get(self.block.index)
            if run is None:
                raise ValueError(
                    f"{self.path} was called outside {self.block.name}, which routes its tokens: "
                    "call the block, or leave the projection out of target_modules"
                )
            return run
        return None

    def train(self, mode: bool = True) -> "Adapter":
        """As of every module; nothing is kept across it."""
        self.block.state.forget_kept()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Adapter":
        """As of every module (moves, casts); nothing is kept across it."""
        self.block.state.forget_kept()
        return super()._apply(*args, **kwargs)


def adapter_class(config: MoELoraConfig) -> type[Adapter]:
    """The adapter that a configuration names: that of the file of its name, or StackedLoRA."""
    file = "projection" if config.adapter_type == "lora" else config.adapter_type
    module: Any = import_module(f"{__package__}.{file}")
    return module.ADAPTER


def fitting_gates(gates: Tensor, x: Tensor, path: str) -> Tensor:
    """The gates [B, S, E] of a block for an input [B, S, D] of its projection, or [B·S, D].

    Raises ValueError where the tokens of the two differ: broadcasting would hide it.
    """
    if gates.shape[:-1] == x.shape[:-1]:
        return gates
    if gates.shape[:-1].numel() != x.shape[:-1].numel():
        raise ValueError(
            f"{path} got an input of shape {list(x.shape)}, but its block has routed "
            f"{list(gates.shape[:-1])} tokens: leave it out of the targets"
        )
    return gates.reshape(*x.shape[:-1], -1)
