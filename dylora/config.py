"""The settings of a mixture, each default once.

`MoELoraConfig` travels with a checkpoint; `run_config.py` has the other sections of a run's YAML
file. All are frozen and validate themselves: a bad value is a `ValueError` that names the field and
the value it got.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from dylora.fields import check_fields, nearest, require, shown

RouterType = Literal["learned", "learned_with_maturity", "fixed"]
RouterScope = Literal["site", "shared"]
RouterLogits = Literal["linear", "absolute"]
RoutingMode = Literal["maturity", "dense", "sparse", "dense_train_sparse_eval"]
MaturityMode = Literal["manual", "schedule", "usage", "plateau", "hybrid"]
BalanceLoss = Literal["aux_loss", "switch", "aux_loss+switch", "none"]
Quantization = Literal["none", "bnb-4bit", "bnb-8bit", "torchao-int8"]
LARGEST = 65_536  # ranks, experts and hidden widths; no projection of any base is as wide
MAX_ALPHA = 1e6
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
    "router_logits",
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
    router_logits: RouterLogits = "linear"
    """linear: w·x + b; absolute: |w·x| + b, which takes a row for what it is up to its sign, as the
    prototypes of Arrow need (Ostapenko et al. 2024)."""
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
    """What makes an expert mature: see dylora/routing/maturity.py."""
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
        check_fields(self)
        require(1 <= self.r <= LARGEST, "r", self.r, f"from 1 to {LARGEST}")
        alpha = self.lora_alpha
        require(0 < alpha <= MAX_ALPHA, "lora_alpha", alpha, f"above 0 and at most {MAX_ALPHA:.0f}")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        self._check_ranks()
        experts = self.num_experts
        require(experts <= LARGEST, "num_experts", experts, f"at most {LARGEST}")
        if self.use_moe_routing:
            require(experts >= 2, "num_experts", experts, "at least 2 with routing")
        else:
            require(experts >= 1, "num_experts", experts, "at least 1")
            self._warn_of_unused_routing()
        require(
            1 <= self.top_k_experts <= max(self.num_experts, 2 if not self.use_moe_routing else 0),
            "top_k_experts",
            self.top_k_experts,
            f"from 1 to num_experts ({self.num_experts})",
        )
        hidden = self.router_hidden_size
        in_bounds = hidden is None or 1 <= hidden <= LARGEST
        require(in_bounds, "router_hidden_size", hidden, f"from 1 to {LARGEST}")
        require(
            self.router_temperature > 0, "router_temperature", self.router_temperature, "above 0"
        )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_noise"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        switch = self.router_switch_loss_coef
        require(switch is None or switch >= 0, "router_switch_loss_coef", switch, "at least 0")
        capacity = self.expert_capacity_factor
        require(capacity is None or capacity > 0, "expert_capacity_factor", capacity, "above 0")
        require(0 <= self.expert_dropout < 1, "expert_dropout", self.expert_dropout, "in [0, 1)")
        weights = self.fixed_routing_weights
        if weights is not None:
            require(
                len(weights) == self.num_experts and all(0 <= w < math.inf for w in weights),
                "fixed_routing_weights",
                weights,
                f"{self.num_experts} finite weights of at least 0",
            )
            require(
                self.router_type == "fixed",
                "fixed_routing_weights",
                weights,
                "unset unless router_type is fixed",
            )
        for name in ("maturity_tau", "maturity_s", "maturity_fast", "maturity_slow"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(
            0 < self.maturity_threshold <= 1,
            "maturity_threshold",
            self.maturity_threshold,
            "in (0, 1]",
        )
        if self.maturity_mode in ("hybrid", "plateau") and self.maturity_threshold < 1:
            highest = 1 / (1 + math.exp(-self.maturity_rho / self.maturity_s))
            require(
                highest >= self.maturity_threshold,
                "maturity_threshold",
                self.maturity_threshold,
                f"at most sigmoid(maturity_rho / maturity_s) = {highest:.3f}, "
                "which is all that a settled loss gives",
            )
        begin, end = self.maturity_schedule
        require(0 <= begin < end, "maturity_schedule", self.maturity_schedule, "two rising shares")

    def _check_ranks(self) -> None:
        """Ranks and alphas of experts and projections, and what goes with them."""
        count = self.expert_count
        for suffix, most in (("rank", LARGEST), ("alpha", MAX_ALPHA)):
            rule = f"values above 0 and at most {most:.0f}"
            name = f"expert_{suffix}s"
            values = getattr(self, name)
            fit = values is None or (len(values) == count and all(0 < v <= most for v in values))
            require(fit, name, values, f"{count} {rule}, one an expert")
            name = f"{suffix}_pattern"
            values = getattr(self, name)
            require(all(0 < v <= most for v in values.values()), name, values, f"of {rule}")
        if self.share_A:
            require(self.expert_ranks is None, "expert_ranks", self.expert_ranks, _ONE_A)
            own = self.init_lora_weights != "orthogonal"
            require(own, "init_lora_weights", self.init_lora_weights, f"true or gaussian: {_ONE_A}")
        if self.init_lora_weights == "orthogonal":
            ranks = [self.r, *(self.expert_ranks or []), *self.rank_pattern.values()]
            require(all(r % 2 == 0 for r in ranks), "r", ranks, "even for orthogonal values")

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
                near = nearest(key[:100], known)
                raise ValueError(f"unknown field {shown(key)} in the MoELoraConfig{near}")
        values = dict(values)
        if isinstance(values.get("maturity_schedule"), list):
            values["maturity_schedule"] = tuple(values["maturity_schedule"])
        return cls(**values)


def matching(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first name in `pattern` that ends the path, as PEFT looks them up."""
    found = (value for name, value in (pattern or {}).items() if ends_with(path, name))
    return next(found, default)


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the last dotted words of `path`."""
    return path == name or path.endswith("." + name)


def is_learned(config: MoELoraConfig) -> bool:
    return config.use_moe_routing and config.router_type != "fixed"
