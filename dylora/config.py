"""Every setting of the package, each default once.

`MoELoraConfig` describes the mixture and travels with a checkpoint; the other dataclasses are the
sections of a run's YAML file. All are frozen and validate themselves: a bad value is a
`ValueError` that names the field and the value it got.
"""

import difflib
import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

RouterType = Literal["learned", "learned_with_maturity", "fixed"]
RouterScope = Literal["site", "shared"]
RoutingMode = Literal["maturity", "dense", "sparse", "dense_train_sparse_eval"]
MaturityMode = Literal["manual", "schedule", "usage", "plateau", "hybrid"]
BalanceLoss = Literal["aux_loss", "switch", "aux_loss+switch", "none"]
Precision = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "bnb-4bit", "bnb-8bit", "torchao-int8"]
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
SplitScheme = Literal["published", "70/10/20", "90/10"]
_ONE_A = "unset with share_A: the experts have one A"

ROUTING_FIELDS = (
    "num_experts",
    "top_k_experts",
    "router_hidden_size",
    "router_aux_loss_coef",
    "router_switch_loss_coef",
    "router_z_loss_coef",
    "router_temperature",
    "router_noise",
    "router_type",
    "router_scope",
    "routing_mode",
    "fixed_routing_weights",
    "expert_capacity_factor",
    "expert_dropout",
    "load_balance_loss_type",
)


@dataclass(frozen=True, kw_only=True)
class MoELoraConfig:
    """A mixture of LoRA experts: LoRA fields by PEFT's names, then routing, then maturity."""

    r: int = 16
    """Rank of each expert."""
    lora_alpha: float = 32
    """Numerator of an expert's scale: alpha / r, or alpha / sqrt(r) with use_rslora."""
    expert_ranks: list[int] | None = None
    """A rank for each expert; none: r for all."""
    expert_alphas: list[float] | None = None
    """An alpha for each expert; none: lora_alpha for all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some projections, by the end of their path; goes before expert_ranks."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some projections, likewise."""
    lora_dropout: float = 0.0
    """Dropout on the input of A, shared by the experts of a projection."""
    target_modules: list[str] | None = None
    """Projections to adapt, by the end of their path; none: the attention projections we find."""
    exclude_modules: list[str] | None = None
    """Projections to leave alone, by the end of their path."""
    layers_to_transform: list[int] | None = None
    """Indices of the layers to adapt; none: all."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """lora_only: each expert shifts the biases of its projections; all: and one shift, common to
    the experts, for every other bias of the base (Zaken et al. 2022)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Each expert has a magnitude for every output besides its direction (Liu et al. 2024)."""
    freeze_A: bool = False
    """LoRA-FA: A stays as drawn and only B is trained (Zhang et al. 2023)."""
    share_A: bool = False
    """HydraLoRA: the experts of a projection have one A and a B each (Tian et al. 2024)."""
    fan_in_fan_out: bool | None = None
    """Whether base weights are stored [in, out]; none: seen from the module (GPT-2's Conv1D)."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """True: Kaiming-uniform A as in PEFT, B = 0; gaussian: normal A with deviation 1/r, B = 0;
    orthogonal: both random, with B·A = 0 up to rounding (even ranks)."""

    use_moe_routing: bool = True
    """False: a plain LoRA of one expert, without a router."""
    num_experts: int = 4
    """Experts at the start."""
    top_k_experts: int = 2
    """Mature experts that a token keeps."""
    router_hidden_size: int | None = None
    """Width of the router's hidden layer; none: a linear router."""
    router_type: RouterType = "learned_with_maturity"
    """learned: top-k from step 0; learned_with_maturity: dense to sparse; fixed: constant."""
    router_scope: RouterScope = "site"
    """site: a router in every adapted block; shared: the first one serves all."""
    routing_mode: RoutingMode = "maturity"
    """maturity: the gate follows the experts' maturity; the others force dense or sparse mixing."""
    router_temperature: float = 2.0
    """Divides the logits before the softmax."""
    router_noise: float = 0.0
    """Deviation of the normal noise that training adds to the logits (Shazeer et al. 2017)."""
    fixed_routing_weights: list[float] | None = None
    """Weights of router_type fixed, one an expert; none: uniform."""
    load_balance_loss_type: BalanceLoss = "aux_loss"
    """aux_loss: fractions from the top-k (GShard); switch: from the argmax (Switch); or both."""
    router_aux_loss_coef: float = 0.01
    """Weight of aux_loss."""
    router_switch_loss_coef: float | None = None
    """Weight of switch; none: router_aux_loss_coef."""
    router_z_loss_coef: float = 0.001
    """Weight of the mean squared logsumexp of the logits (ST-MoE)."""
    expert_capacity_factor: float | None = 1.25
    """In sparse training an expert takes at most ceil(factor·K·T/E) tokens; none: no limit."""
    expert_dropout: float = 0.0
    """Probability that a sequence loses an expert in training."""

    maturity_mode: MaturityMode = "hybrid"
    """What makes an expert mature: see dylora/maturity.py."""
    maturity_tau: float = 0.1
    """Evidence that counts as much (1 - 1/e), as a share of the tokens the run gives an expert."""
    maturity_rho: float = 0.02
    """Relative improvement of an expert's loss below which it counts as having settled."""
    maturity_s: float = 0.005
    """Width of that threshold."""
    maturity_fast: float = 0.02
    """Memory of the fast loss average, as a share of the tokens the run gives an expert."""
    maturity_slow: float = 0.1
    """Memory of the slow loss average, likewise."""
    maturity_threshold: float = 0.9
    """Maturity at which an expert becomes fully mature and stays so; 1: only by itself."""
    maturity_schedule: tuple[float, float] = (0.2, 0.6)
    """Shares of the run between which mode schedule raises maturity from 0 to 1."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _require(self.r >= 1, "r", self.r, "at least 1")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        self._check_ranks()
        if self.use_moe_routing:
            _require(
                self.num_experts >= 2, "num_experts", self.num_experts, "at least 2 with routing"
            )
        else:
            _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1")
            self._warn_of_unused_routing()
        _require(
            1 <= self.top_k_experts <= max(self.num_experts, 2 if not self.use_moe_routing else 0),
            "top_k_experts",
            self.top_k_experts,
            f"from 1 to num_experts ({self.num_experts})",
        )
        hidden = self.router_hidden_size
        _require(hidden is None or hidden >= 1, "router_hidden_size", hidden, "at least 1")
        _require(
            self.router_temperature > 0, "router_temperature", self.router_temperature, "above 0"
        )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_noise"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        switch = self.router_switch_loss_coef
        _require(switch is None or switch >= 0, "router_switch_loss_coef", switch, "at least 0")
        capacity = self.expert_capacity_factor
        _require(capacity is None or capacity > 0, "expert_capacity_factor", capacity, "above 0")
        _require(0 <= self.expert_dropout < 1, "expert_dropout", self.expert_dropout, "in [0, 1)")
        weights = self.fixed_routing_weights
        if weights is not None:
            _require(
                len(weights) == self.num_experts and all(0 <= w < math.inf for w in weights),
                "fixed_routing_weights",
                weights,
                f"{self.num_experts} finite weights of at least 0",
            )
            _require(
                self.router_type == "fixed",
                "fixed_routing_weights",
                weights,
                "unset unless router_type is fixed",
            )
        for name in ("maturity_tau", "maturity_s", "maturity_fast", "maturity_slow"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(
            0 < self.maturity_threshold <= 1,
            "maturity_threshold",
            self.maturity_threshold,
            "in (0, 1]",
        )
        if self.maturity_mode in ("hybrid", "plateau") and self.maturity_threshold < 1:
            highest = 1 / (1 + math.exp(-self.maturity_rho / self.maturity_s))
            _require(
                highest >= self.maturity_threshold,
                "maturity_threshold",
                self.maturity_threshold,
                f"at most sigmoid(maturity_rho / maturity_s) = {highest:.3f}, "
                "which is all that a settled loss gives",
            )
        begin, end = self.maturity_schedule
        _require(0 <= begin < end, "maturity_schedule", self.maturity_schedule, "two rising shares")

    def _check_ranks(self) -> None:
        """Ranks and alphas of experts and projections, and what goes with them."""
        count = self.expert_count
        for name in ("expert_ranks", "expert_alphas"):
            values = getattr(self, name)
            rule = f"{count} values above 0, one an expert"
            _require(
                values is None or (len(values) == count and all(v > 0 for v in values)),
                name,
                values,
                rule,
            )
        for name in ("rank_pattern", "alpha_pattern"):
            values = getattr(self, name)
            _require(all(v > 0 for v in values.values()), name, values, "of values above 0")
        if self.share_A:
            _require(self.expert_ranks is None, "expert_ranks", self.expert_ranks, _ONE_A)
            own = self.init_lora_weights != "orthogonal"
            _require(
                own, "init_lora_weights", self.init_lora_weights, f"true or gaussian: {_ONE_A}"
            )
        if self.init_lora_weights == "orthogonal":
            ranks = [self.r, *(self.expert_ranks or []), *self.rank_pattern.values()]
            _require(all(r % 2 == 0 for r in ranks), "r", ranks, "even for orthogonal values")

    def _warn_of_unused_routing(self) -> None:
        defaults = {item.name: item.default for item in fields(self)}
        changed = [
            name
            for name in ROUTING_FIELDS
            if getattr(self, name) != defaults[name]
            and not (name == "num_experts" and self.num_experts == 1)
        ]
        if changed:
            warnings.warn(
                f"use_moe_routing is false, so these settings do nothing: {', '.join(changed)}",
                stacklevel=4,
            )

    @property
    def expert_count(self) -> int:
        """Experts that are built: one without routing."""
        return self.num_experts if self.use_moe_routing else 1

    @property
    def balance_losses(self) -> tuple[str, ...]:
        """The kinds of balance loss that are trained with: aux_loss, switch, both or none."""
        kind = self.load_balance_loss_type
        return () if kind == "none" else tuple(kind.split("+"))

    @property
    def switch_loss_coef(self) -> float:
        """Weight of the switch loss, resolved."""
        own = self.router_switch_loss_coef
        return self.router_aux_loss_coef if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; `from_dict` reads it back."""
        values = asdict(self)
        values["maturity_schedule"] = list(self.maturity_schedule)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoELoraConfig":
        """Raises ValueError on an unknown key, naming the nearest valid one."""
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"unknown field {key!r} in the MoELoraConfig{nearest(key, known)}")
        values = dict(values)
        if "maturity_schedule" in values:
            values["maturity_schedule"] = tuple(values["maturity_schedule"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base."""

    base: str = "google/codegemma-2b"
    """A hub name, a folder, or tiny-code-llama (the embedded model)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Precision = "bfloat16"
    """Precision of the base and its activations; experts and routers are float32 always."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu; or a torch device."""
    attn_implementation: str | None = None
    """Attention back end of transformers; none: its own choice."""
    quantization: Quantization = "none"
    """How the base's linear layers are stored (4 bit: nf4); all but none need dylora[quant]."""

    def __post_init__(self) -> None:
        _check_literals(self)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of instruction-shaped rows."""

    name: str
    """code_alpaca, mbpp, skill/<skill>, or a name of your own for a file or hub set."""
    path: str | None = None
    """A .json, .jsonl or .parquet file, or a hub name; none: where the built-in source lives."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    instruction_column: str | None = None
    """Column of the instruction; needed for a source of your own."""
    input_column: str | None = None
    """Column of an optional further input."""
    output_column: str | None = None
    """Column of the answer; needed for a source of your own."""
    split_scheme: SplitScheme | None = None
    """code_alpaca and your own: 90/10; mbpp: published (default) or 70/10/20."""
    rows: int | None = None
    """Skills only: training examples to generate."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _require(bool(self.name), "name", self.name, "a word")
        _require(self.rows is None or self.rows >= 1, "rows", self.rows, "at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained and validated on."""

    sources: list[SourceConfig] = field(default_factory=list)
    """The sets, in the order of their reports."""
    max_length: int = 512
    """Most tokens of an example, BOS and EOS included."""
    over_long: Literal["truncate", "drop"] = "drop"
    """What happens to a longer one; both are counted."""
    interleaved_sampling: bool = True
    """True: equal shares of each set, smaller ones repeated; false: in proportion to their size."""
    seed: int = 0
    """Seed of the splits and of the order."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _require(self.max_length >= 8, "max_length", self.max_length, "at least 8")
        names = [source.name for source in self.sources]
        _require(len(names) == len(set(names)), "sources", names, "of different names")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: float = 1.0
    """Passes over the data; max_steps goes before it."""
    max_steps: int | None = None
    """Optimizer steps; none: from epochs."""
    batch_size: int = 2
    """Examples in a forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes in an optimizer step."""
    learning_rate: float = 2e-4
    """Of the experts."""
    router_learning_rate: float | None = None
    """Of the routers; none: learning_rate."""
    weight_decay: float = 0.01
    """Of the matrices A and B; routers and biases have none."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not clipped."""
    lr_scheduler_type: Schedule = "cosine"
    """Any schedule of transformers.get_scheduler."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its own settings, such as num_cycles for cosine_with_restarts."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0."""
    label_smoothing: float = 0.0
    """Share of the target probability spread over the vocabulary."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    training_subset: int | None = None
    """Use only this many training rows of each set."""
    save_steps: int | None = None
    """Checkpoint every so many steps; none: at the end only (and the best one)."""
    save_total_limit: int | None = None
    """Keep this many newest checkpoints that verify, at least two, and the best besides; none:
    all."""
    max_nonfinite_steps: int = 3
    """Stop when the loss or the gradient was not finite so many steps in a row; such a step updates
    nothing, is counted, and the run goes on."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better validation loss."""
    seed: int = 0
    """Of the adapters' initial values and of dropout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "max_steps",
            "training_subset",
            "save_steps",
            "save_total_limit",
            "max_nonfinite_steps",
            "early_stopping_patience",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("epochs", "learning_rate", "adam_epsilon"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        rate = self.router_learning_rate
        _require(rate is None or rate > 0, "router_learning_rate", rate, "above 0")
        _check_literals(self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during and after training."""

    eval_steps: int | None = None
    """Evaluate every so many steps; none: at the end only."""
    batch_size: int = 8
    """Examples in a forward pass."""
    eval_subset: int | None = None
    """Use only this many validation rows of each set."""
    skill_answers: int = 0
    """Test answers of each embedded skill to generate and check before and after training."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.skill_answers >= 0, "skill_answers", self.skill_answers, "at least 0")
        for name in ("eval_steps", "eval_subset"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells."""

    logging_steps: int = 10
    """Steps between two lines of metrics."""
    collapse_steps: int = 100
    """Warn when a site has been collapsed for so many steps: see training/monitor.py."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases (offline without a key)."""
    wandb_project: str = "dylora"
    """Its project."""

    def __post_init__(self) -> None:
        for name in ("logging_steps", "collapse_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: everything it writes lies under <output_dir>/<name>/."""

    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder of all runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoELoraConfig = field(default_factory=MoELoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        _require(plain, "name", self.name, "the name of a folder, without slashes")


def dump_run_config(config: RunConfig) -> str:
    """All settings as YAML that `load_run_config` reads back as the same config."""
    import yaml  # comes with transformers

    values = asdict(config)
    values["moe"] = config.moe.to_dict()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean …?' with the closest of the known words, or what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(known))}"


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, but must be {rule}")


def _check_literals(config: Any) -> None:
    """Enumerated fields hold one of their values; dataclasses do not check that themselves."""
    for item in fields(config):
        choices = _literal_choices(item.type)
        value = getattr(config, item.name)
        if choices and value not in choices:
            shown = ", ".join(map(str, choices))
            hint = nearest(value, [str(c) for c in choices]) if isinstance(value, str) else ""
            raise ValueError(f"{item.name} is {value!r}, but must be one of {shown}{hint}")


def _literal_choices(annotation: Any) -> tuple[Any, ...]:
    """The values a Literal, or an optional Literal, allows; empty for other types."""
    members = get_args(annotation)
    if getattr(annotation, "__origin__", None) is Literal:
        return members
    for member in members:
        if getattr(member, "__origin__", None) is Literal:
            return (*get_args(member), None)
    return ()
