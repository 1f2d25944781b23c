"""The routed low-rank update of one projection, by hooks on it.

    y = base(x) + Σ_e g_e · s_e · B_e A_e drop(x)

`StackedLoRA.forward` is the plain form (`lora.py`); `add_update` does the same by `dylora.kernels`,
which keep less for backward and add in place.

Shape letters: T tokens, D input width, O output width, E experts, R rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from dylora.adapters.adapter import Adapter, fitting_gates
from dylora.adapters.dora import magnitude_ratio, row_norms, weight_OD
from dylora.adapters.lora import mixture_update
from dylora.adapters.merge_experts import truncated_sum
from dylora.adapters.plan import Dense
from dylora.adapters.stack import LoRAStack, initial_A, orthogonal_pair
from dylora.adapters.targets import check_plain_weight
from dylora.config import MoELoraConfig
from dylora.kernels.common import product_dtype
from dylora.kernels.decode import ProjectionWeights
from dylora.kernels.dense import Block, add_dense
from dylora.kernels.grouped import add_grouped


class StackedLoRA(Adapter):
    """The LoRA experts of one projection: lora_A and lora_B, DoRA's magnitudes, trained biases."""

    PEFT_TYPE = "LORA"
    STACK = LoRAStack

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        config = self.config
        self.fixed = ("lora_A", "shared_A") if config.freeze_A else ()
        self.shared_A: nn.Parameter | None = None  # [1, R, D]
        if config.share_A:
            shared = initial_A(1, self.rank(config.r), self.in_features, config, self.device)
            self.shared_A = nn.Parameter(shared, requires_grad=not config.freeze_A)

    @staticmethod
    def check_projection(path: str, projection: nn.Module, config: MoELoraConfig) -> None:
        """DoRA needs a weight whose rows it can measure."""
        if config.use_dora:
            check_plain_weight(path, projection)

    def initial_values(
        self, count: int, rank: int, projection: nn.Module, *, drawn: bool
    ) -> dict[str, Tensor | None]:
        """A is random and different for each expert (equal ones would stay twins for ever) and B is
        0, so that they change nothing (with init orthogonal: B·A is 0 up to rounding)."""
        config, D, O, device = self.config, self.in_features, self.out_features, self.device  # noqa: E741
        A = None if config.share_A else torch.zeros(count, rank, D, device=device)
        B = torch.zeros(count, rank, O, device=device)
        for expert in range(count if drawn and A is not None else 0):
            assert A is not None
            if config.init_lora_weights == "orthogonal":
                A[expert], B[expert] = orthogonal_pair(rank, D, O, device)
            else:
                A[expert] = initial_A(1, rank, D, config, device)[0]
        magnitude = bias = None
        if config.use_dora:
            magnitude = row_norms(weight_OD(projection)).to(B).expand(count, -1).clone()
        if config.bias != "none" and getattr(projection, "bias", None) is not None:
            bias = torch.zeros(count, O, device=device)
        return {"lora_A": A, "lora_B": B, "lora_magnitude": magnitude, "lora_bias": bias}

    def matrix(self, stack: LoRAStack, name: str) -> Tensor:
        return self.A_of(stack) if name == "lora_A" else getattr(stack, name)

    def A_of(self, stack: LoRAStack) -> Tensor:
        """[E, R, D], or [1, R, D] where the experts share it."""
        A = stack.lora_A if self.shared_A is None else self.shared_A
        assert A is not None
        return A

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """With DoRA its magnitude as well."""
        found = super().expert_tensors(expert)
        if self.config.use_dora:
            stack, place = self.stack_of(expert)
            found["lora_magnitude_vector"] = stack.lora_magnitude.detach()[place]
        return found

    def load_expert(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError, too, where share_A is true and an A is not that of the others."""
        loaded = self.shared_A is not None and expert != self.stacks[0].first
        before = self.expert_tensors(expert)["lora_A"].clone() if loaded else None
        super().load_expert(expert, tensors)
        if before is not None and not torch.equal(self.expert_tensors(expert)["lora_A"], before):
            raise ValueError(
                f"{self.path}.lora_A differs from another expert's, but share_A is true"
            )

    def peft_settings(self) -> dict[str, Any]:
        names = ("bias", "lora_dropout", "use_dora", "use_rslora")
        return {name: getattr(self.config, name) for name in names}

    def check_merge(self) -> None:
        if self.config.use_dora:
            raise ValueError("DoRA experts cannot be merged: their updates are not of low rank")

    def merged_stack(
        self, i: int, j: int, rank: int, alpha: float, shares: tuple[float, float]
    ) -> tuple[LoRAStack, float]:
        """W = Σ_k a_k s_k B_kᵀ A_k is of rank 2R at most, and cut to `rank`; with one A for both no
        cut is needed."""
        pieces = [self.stack_of(expert) for expert in (i, j)]
        own, scale = self.rank(rank), self.scaling(rank, alpha)
        Bs, As, biases = [], [], []
        for share, (stack, place) in zip(shares, pieces, strict=True):
            Bs.append(share * float(stack.scaling_E[place]) * stack.lora_B[place].cpu().double())
            if self.shared_A is None:
                As.append(stack.lora_A[place].cpu().double())
            if stack.lora_bias is not None:
                biases.append(share * stack.lora_bias[place])
        bias, like = (biases[0] + biases[1])[None] if biases else None, pieces[0][0].lora_B
        if self.shared_A is not None:
            A, B, error = None, Bs[0] + Bs[1], 0.0
        else:
            A, B, error = truncated_sum(torch.cat(As), torch.cat(Bs), own)
            A = A.to(like)[None]
        values = {"lora_A": A, "lora_B": (B / scale).to(like)[None], "lora_bias": bias}
        return LoRAStack(i, own, [scale], values), error

    def forward(self, x: Tensor, gates: Tensor, ratios: list[Tensor] | None = None) -> Tensor:
        """x [..., D], gates [..., E] -> Σ_e g_e s_e B_e A_e drop(x), [..., O], in x's precision.

        ratios [E, O] of each stack multiply the outputs of B (DoRA).
        """
        return self.mix(self.dropout(x), gates, ratios)

    def mix(self, x: Tensor, gates: Tensor, ratios: list[Tensor] | None = None) -> Tensor:
        """`forward` of an input that dropout has been at."""
        update = None
        for index, stack in enumerate(self.stacks):
            B = stack.lora_B if ratios is None else stack.lora_B * ratios[index][:, None]
            part = mixture_update(x, stack.own(gates), self.A_of(stack), B, stack.scaling_E)
            update = part if update is None else update + part
        return x.new_zeros(*x.shape[:-1], self.out_features) if update is None else update

    def add_hooks(self, projection: nn.Module) -> list[RemovableHandle]:
        return [
            projection.register_forward_pre_hook(self.run_outside_autograd),
            *super().add_hooks(projection),
        ]

    def add_update(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the projection."""
        run = self._run()
        if run is None:
            return output
        x, run.detached_input = args[0] if run.detached_input is None else run.detached_input, None
        outside = x is not args[0]
        if run.decode is not None and run.decode.fits(x, output):
            return run.decode.add(self.name, x, output)
        gates = fitting_gates(run.decision.gates, x, self.path)
        if self.config.use_dora:
            return self._add_dora(module, x, gates, output)
        if self.config.bias != "none":
            output = self._add_biases(gates, output)
        if torch.compiler.is_compiling():  # the compiler fuses the plain form as well as can be
            return output + self.mix(run.shared_input(self.name, x)[1], gates).to(output.dtype)
        plan = run.plan()
        if not (plan.dense or plan.sparse):
            return output
        down = run.project_down(self.name, x, product_dtype(output.dtype, output.device))
        carrier = down.carry_gradient(weight_OD(module)) if outside else None
        if down.dense is not None:
            Bs = [self._rows(dense, "lora_B") for dense in plan.dense]
            scalings = [self._rows(dense, "scaling_E") for dense in plan.dense]
            scaling_E = scalings[0] if len(scalings) == 1 else torch.cat(scalings)
            blocks = self.column_blocks(plan.dense)
            output = add_dense(output, down.dense, plan.gates, scaling_E, blocks, Bs, carrier)
            carrier = None
        for sparse, h_PR in zip(plan.sparse, down.sparse, strict=True):
            stack = self.stacks[sparse.stack]
            weights_TK = sparse.gates_TK * stack.scaling_E[sparse.experts_TK]
            output = add_grouped(output, h_PR, weights_TK, stack.lora_B, sparse.pairs, carrier)
            carrier = None
        return output

    def run_outside_autograd(
        self, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Forward pre-hook of the projection: lets it run outside autograd, where it is sure to be
        a frozen product and no more; the experts' gradient of x then has its part in it, too
        (`kernels/frozen_linear.py`)."""
        if not torch.is_grad_enabled() or self.config.use_dora or torch.compiler.is_compiling():
            return None
        x = args[0] if args else None
        if x is None or not x.requires_grad or torch.is_autocast_enabled(x.device.type):
            return None
        run = self._run()
        if run is None or run.decode is not None:
            return None
        run.detached_input = None
        # The experts' gradient is that of drop(x): the projection's own only where nothing drops.
        if not is_frozen_product(module, x) or run.shared_input(self.name, x)[1] is not x:
            return None
        plan = run.plan()
        if not (plan.dense or plan.sparse):
            return None
        run.detached_input = x
        return (x.detach(), *args[1:])

    def filling_parameters(self) -> int:
        """Rows that are 0 in A and in B, as those of imported adapters of a smaller rank here."""
        count = 0
        for stack in self.stacks:
            pair = [matrix for matrix in (self.A_of(stack), stack.lora_B) if matrix.requires_grad]
            unused_ER = ~(self.A_of(stack).any(-1) | stack.lora_B.any(-1))
            count += int(unused_ER.sum()) * sum(matrix.shape[-1] for matrix in pair)
        return count

    @property
    def can_be_packed(self) -> bool:
        """Whether the update is the plain sum that the decode kernel computes."""
        config = self.config
        drops = self.training and config.lora_dropout > 0
        return not (config.use_dora or config.bias != "none" or drops)

    def projection_weights(self, dense: list[Dense] | None = None) -> ProjectionWeights:
        """The matrices for decoding, by stack: of all experts, or of those in `dense`."""
        if dense is None:
            dense = [Dense(index, None) for index in range(len(self.stacks))]
        return ProjectionWeights(
            self.dense_As(dense),
            [self._rows(part, "lora_B") for part in dense],
            [self._rows(part, "scaling_E") for part in dense],
        )

    def dense_As(self, dense: list[Dense]) -> list[Tensor]:
        """A of the experts that every token uses, [E, R, D] by stack; or the one they share."""
        if self.shared_A is not None:
            return [self.shared_A]
        return [self._rows(part, "lora_A") for part in dense]

    def column_blocks(self, dense: list[Dense]) -> list[Block]:
        """Their columns in h; stacks of equal rank side by side are one block."""
        shared = self.shared_A is not None
        blocks: list[Block] = []
        first = 0
        for part in dense:
            stack = self.stacks[part.stack]
            experts = stack.count if part.expert_ids is None else len(part.expert_ids)
            if blocks and blocks[-1].rank == stack.rank:
                blocks[-1] = blocks[-1]._replace(experts=blocks[-1].experts + experts)
            else:
                blocks.append(Block(first, experts, stack.rank, shared))
            first += experts
        return blocks

    def _rows(self, part: Dense, name: str) -> Tensor:
        """The rows of a stack's tensor that every token uses."""
        tensor = getattr(self.stacks[part.stack], name)
        return tensor if part.expert_ids is None else tensor.index_select(0, part.expert_ids)

    def _add_dora(self, module: nn.Module, x: Tensor, gates: Tensor, output: Tensor) -> Tensor:
        """What `magnitude_ratio` says of a mixture of DoRA experts."""
        weight = weight_OD(module)
        ratios = self._ratios(weight)
        update = self(x, gates, ratios)
        bias = getattr(module, "bias", None)
        directed = output if bias is None else output - bias  # W x without its bias
        for stack, ratio_EO in zip(self.stacks, ratios, strict=True):
            own = stack.own(gates)
            update = update + (own.to(ratio_EO) @ (ratio_EO - 1)).to(x.dtype) * directed
        return self._add_biases(gates, output) + update.to(output.dtype)

    def _ratios(self, weight: Tensor) -> list[Tensor]:
        """`magnitude_ratio` of every stack; kept within a decoding, where nothing changes."""
        pass_ = self.block.state.current()
        kept = None if pass_ is None else pass_.kept
        key = f"{self.path}.ratios"
        if kept is not None and key in kept:
            return kept[key]
        ratios = [magnitude_ratio(stack, self.A_of(stack), weight) for stack in self.stacks]
        if kept is not None:
            kept[key] = ratios
        return ratios

    def _add_biases(self, gates: Tensor, output: Tensor) -> Tensor:
        """The shifts of the experts' biases, mixed by the gates."""
        for stack in self.stacks:
            if stack.lora_bias is not None:
                own = stack.own(gates)
                output = output + (own.to(stack.lora_bias) @ stack.lora_bias).to(output.dtype)
        return output


def is_frozen_product(module: Any, x: Tensor) -> bool:
    """Whether a projection of x is x Wᵀ + b with frozen W and b, and nobody else listens in."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False  # quantised, or wrapped
    weight, bias = module.weight, module.bias
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    # Hooks of others may take x apart, or expect a gradient of the output.
    alone = len(module._forward_pre_hooks) == len(module._forward_hooks) == 1
    alone = alone and not (module._backward_hooks or module._backward_pre_hooks)
    alone = alone and not nn.modules.module._has_any_global_hook()
    return frozen and alone and type(weight) is nn.Parameter and x.dtype == weight.dtype


ADAPTER = StackedLoRA
