"""The settings of the training loop."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dylora.fields import check_fields, option, require

Optim = Literal[
    "adamw", "adamw_8bit", "lora_plus", "muon", "adafactor", "lion", "schedule_free", "sgd"
]
Parallel = Literal["none", "ddp", "fsdp2"]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
"""The schedules of `transformers.get_scheduler`, copied because importing them takes seconds."""
# What transformers leaves unread, and says nothing of.
_WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_SETTINGS = ("constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: float = option(1.0, above=0)
    """Passes over the data; max_steps goes before it."""
    max_steps: int | None = option(None, least=1)
    """Optimizer steps; none: from epochs."""
    batch_size: int = option(2, least=1)
    """Examples in a forward pass, on average: a pass takes more short ones and fewer long ones, and
    no more tokens than this many of the longest."""
    gradient_accumulation_steps: int = option(1, least=1)
    """Forward passes in an optimizer step, shared among the processes where there are several."""
    parallel: Parallel = "none"
    """How the processes that torchrun starts train one model. ddp: each holds the base; fsdp2: each
    holds a part of its weights. Results do not depend on how many there are."""
    process_timeout: int = option(600, least=1)
    """Seconds after which a process that waits for another one gives up, and the run ends."""
    learning_rate: float = option(2e-4, above=0)
    """Of the experts."""
    router_learning_rate: float | None = option(None, above=0)
    """Of the routers; none: learning_rate."""
    weight_decay: float = option(0.01, least=0)
    """Of the matrices A and B; routers and biases have none."""
    optim: Optim = "adamw"
    """adamw; adamw_8bit (Dettmers et al. 2022), with dylora[optim]; lora_plus: AdamW with another
    rate for the B's (Hayou et al. 2024); muon (Jordan et al. 2024) for A and B, and AdamW for
    all else; adafactor (Shazeer and Stern 2018), with learning_rate as its rate; lion
    (Chen et al. 2023) and schedule_free (AdamW, Defazio et al. 2024), with dylora[optim]; sgd, with
    momentum adam_beta1. Compared in docs/trainers.md."""
    lora_plus_ratio: float = option(16.0, above=0)
    """With optim lora_plus: the rate of the B's in terms of learning_rate."""
    adam_beta1: float = option(0.9, least=0, below=1)
    """Decay of the first moment of AdamW and Lion, and of sgd's momentum; schedule_free's share of
    the average in the point that gradients are taken at."""
    adam_beta2: float = option(0.999, least=0, below=1)
    """Decay of the second moment of AdamW and schedule_free, and of Lion's moment between steps."""
    adam_epsilon: float = option(1e-8, above=0)
    """Of AdamW and schedule_free."""
    max_grad_norm: float = option(1.0, least=0)
    """Gradients are clipped to this norm; 0: not clipped."""
    lr_scheduler_type: Schedule = "cosine"
    """Any schedule of transformers.get_scheduler."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its own settings, such as num_cycles for cosine_with_restarts; constant and
    constant_with_warmup have none."""
    warmup_steps: int = option(0, least=0)
    """Steps over which the rate rises from 0; constant, reduce_lr_on_plateau and greedy have none:
    see constant_with_warmup."""
    label_smoothing: float = option(0.0, least=0, below=1)
    """Share of the target probability spread over the vocabulary."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Let torch.compile compile the base's passes in training. The first step takes minutes, and so
    does the first one after experts have come, gone or matured."""
    tf32: bool = False
    """Multiply float32 matrices in TensorFloat-32, with 10 bits after the point in place of 23; on
    CUDA."""
    training_subset: int | float | str | None = option(
        None,
        accept=lambda value: rows_or_share(value) is not None,
        rule="a whole number of rows, a share between 0 and 1, or a percentage such as 10%",
    )
    """Use only so many training rows of each set: a whole number is rows (of plain text windows),
    0.1 or 10% a share."""
    save_steps: int | None = option(None, least=1)
    """Checkpoint every so many steps; none: at the end only (and the best one)."""
    save_total_limit: int | None = option(None, least=1)
    """Keep this many newest checkpoints that verify, at least two, and the best besides; none:
    all."""
    max_nonfinite_steps: int = option(3, least=1)
    """Stop when the loss or the gradient was not finite so many steps in a row; such a step updates
    nothing, is counted, and the run goes on."""
    early_stopping_patience: int | None = option(None, least=1)
    """Stop after so many evaluations without a better validation loss."""
    deterministic: bool = False
    """Take torch's deterministic kernels, or stop where it has none: the same seed gives the same
    bits on a GPU, too."""
    seed: int = option(0, least=0, most=2**32 - 1)  # what numpy takes
    """Of the adapters' initial values and of dropout."""
    init_from: str | None = None
    """Begin with the experts, routers and maturity of this checkpoint, a folder or user/name on the
    hub; what is not said of the mixture and its base is as it is there."""
    train_experts: bool | None = None
    """With init_from. False: freeze all experts and train the routers alone; true: none is frozen;
    none: as the checkpoint has it."""
    prompt_clusters: int | None = option(None, least=2, most=1024)
    """With moe.router_scope prompt: so many clusters of the training prompts (k-means) are the
    skills, the similar ones of an expert; none: each source is one."""
    freeze_routers: bool = False
    """Routers stay as they were drawn, or as init_from has them: a control for what learned routing
    gives."""

    def __post_init__(self) -> None:
        check_fields(self)
        alone = self.train_experts is None or self.init_from is not None
        require(alone, "train_experts", self.train_experts, "unset without init_from")
        self._check_optimizer()

    def check_acts(self) -> None:
        """Raises FieldError for a setting that the schedule would not follow."""
        schedule = self.lr_scheduler_type
        steps, kwargs = self.warmup_steps, self.lr_scheduler_kwargs
        rule = (
            f"0 with lr_scheduler_type {schedule}, which has no warm-up: constant_with_warmup has"
        )
        require(not steps or schedule not in _WITHOUT_WARM_UP, "warmup_steps", steps, rule)
        rule = f"empty with lr_scheduler_type {schedule}"
        read = not kwargs or schedule not in _WITHOUT_SETTINGS
        require(read, "lr_scheduler_kwargs", kwargs, rule)

    def _check_optimizer(self) -> None:
        """Raises ValueError for a setting that means nothing to the optimizer, or that it rules
        out."""
        optim = self.optim
        unused = optim != "lora_plus" and self.lora_plus_ratio != 16.0
        require(
            not unused, "lora_plus_ratio", self.lora_plus_ratio, "unset without optim lora_plus"
        )
        if optim == "adafactor":
            for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                value = getattr(self, name)
                require(value == getattr(TrainConfig, name), name, value, "unset with adafactor")
        if optim == "schedule_free":
            beta, schedule = self.adam_beta1, self.lr_scheduler_type
            require(beta > 0, "adam_beta1", beta, "above 0 with optim schedule_free")
            rule = "constant or constant_with_warmup with optim schedule_free"
            require(schedule.startswith("constant"), "lr_scheduler_type", schedule, rule)

    @property
    def subset(self) -> int | float | None:
        """training_subset as a number of rows, an int, or as a share of them, a float."""
        return None if self.training_subset is None else rows_or_share(self.training_subset)


def rows_or_share(written: int | float | str) -> int | float | None:
    """A number of rows, an int, or a share of them, a float; None where it is neither."""
    if isinstance(written, str):
        percent = re.fullmatch(r"(\d{1,3}(\.\d*)?)%", written)
        share = float(percent[1]) / 100 if percent else 0.0
        return share if 0 < share <= 1 else None
    valid = written >= 1 if isinstance(written, int) else 0 < written < 1
    return written if valid else None
