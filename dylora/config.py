"""The settings of a mixture, each default once.

`MoELoraConfig` travels with a checkpoint; `run_config.py` has the other sections of a run's YAML
file. All are frozen and validate themselves: a bad value is a `ValueError` that names the field and
the value it got.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from dylora.fields import build, check_fields, option, require

RouterType = Literal["learned", "learned_with_maturity", "fixed", "threshold"]
RouterScope = Literal["site", "shared", "prompt", "running_mean"]
RouterInput = Literal["token", "running_mean"]
RouterLogits = Literal["linear", "absolute"]
RoutingMode = Literal["maturity", "dense", "sparse", "dense_train_sparse_eval"]
GateScale = Literal["keep_size", "sum_to_one"]
MaturityMode = Literal["manual", "schedule", "usage", "plateau", "hybrid"]
BalanceLoss = Literal["aux_loss", "switch", "aux_loss+switch", "z_loss", "none"]
AdapterType = Literal["lora", "loha"]
Quantization = Literal["none", "bnb-4bit", "bnb-8bit", "torchao-int8"]
LARGEST = 65_536  # ranks, experts and hidden widths; no projection of any base is as wide
MAX_ALPHA = 1_000_000
# Options of LoRA that mean nothing for the experts of another type.
_MEANINGLESS = {
    "loha": ("bias", "use_rslora", "use_dora", "freeze_A", "share_A", "init_lora_weights"),
}
OF_ROUTERS = (  # mean nothing without a trained one
    *("router_hidden_size", "router_input", "router_logits", "router_temperature", "router_noise"),
    *("gate_scale", "expert_dropout"),
)


@dataclass(frozen=True, kw_only=True)
class MoELoraConfig:
    """A mixture of experts: LoRA's fields by PEFT's names, then routing, then maturity."""

    RENAMED: ClassVar[dict[str, str | None]] = {"fan_in_fan_out": None}

    adapter_type: AdapterType = "lora"
    """What an expert is. lora: B A (Hu et al. 2021); loha: (W1a W1b) ∘ (W2a W2b), of rank up to r²
    (Hyeon-Woo et al. 2021), which takes r, alpha, dropout and targets alone of LoRA's fields."""
    r: int = option(16, least=1, most=LARGEST)
    """Rank of each expert."""
    lora_alpha: float = option(32, above=0, most=MAX_ALPHA)
    """Numerator of an expert's scale: alpha / r, or alpha / sqrt(r) with use_rslora. Experts of one
    rank that are mixed evenly are one LoRA of rank E·r with this alpha (without rslora)."""
    expert_ranks: list[int] | None = option(None, least=1, most=LARGEST)
    """A rank for each expert; none: r for all."""
    expert_alphas: list[float] | None = option(None, above=0, most=MAX_ALPHA)
    """An alpha for each expert; none: lora_alpha for all."""
    rank_pattern: dict[str, int] = option({}, least=1, most=LARGEST)
    """Other ranks for some projections, by the end of their path; goes before expert_ranks."""
    alpha_pattern: dict[str, float] = option({}, above=0, most=MAX_ALPHA)
    """Other alphas for some projections, likewise."""
    lora_dropout: float = option(0.0, least=0, below=1)
    """Dropout on the input of A, shared by the experts of a projection."""
    target_modules: Literal["all-linear"] | list[str] | None = None
    """Projections to adapt, by the end of their path; none: the attention projections we find;
    all-linear: every projection that maps tokens one by one, but the head."""
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
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """True: Kaiming-uniform A as in PEFT, B = 0; gaussian: normal A with deviation 1/r, B = 0;
    orthogonal: both random, with B·A = 0 up to rounding (even ranks)."""

    use_moe_routing: bool = True
    """False: a plain LoRA of one expert, without a router."""
    num_experts: int = option(4, least=1, most=LARGEST, routing=True)
    """Experts at the start."""
    experts_per_layer: list[int] | None = option(None, least=1, most=LARGEST, routing=True)
    """So many of the experts, the first ones, in each adapted layer, the lowest layer first (MoLA,
    Gao et al. 2024); none: all in each."""
    shared_experts: int = option(0, least=0, routing=True)
    """So many of them, the first ones, have the gate 1 for every token, beside those that routers
    choose (DeepSeekMoE)."""
    top_k_experts: int = option(2, least=1, routing=True)
    """Mature experts that a token keeps."""
    router_hidden_size: int | None = option(None, least=1, most=LARGEST, routing=True)
    """Width of the router's hidden layer; none: a linear router."""
    router_type: RouterType = option("learned_with_maturity", routing=True)
    """learned: top-k from step 0; learned_with_maturity: dense to sparse; fixed: constant;
    threshold: the experts above a learned threshold of each token (AdaMoLE, Liu & Luo 2024)."""
    router_scope: RouterScope = option("site", routing=True)
    """site: a router in every adapted block; shared: the first one serves all; prompt: one decision
    a sequence, in closed form by the skill library, from its prompt; running_mean: likewise a
    decision a token, from the text up to it."""
    router_input: RouterInput = option("token", routing=True)
    """What a trained router reads. token: the hidden state; running_mean: the layer-normed mean of
    the hidden states of the text up to the token, with router_scope shared."""
    router_logits: RouterLogits = option("linear", routing=True)
    """linear: w·x + b; absolute: |w·x| + b, which takes a row for what it is up to its sign, as the
    prototypes of Arrow need (Ostapenko et al. 2024)."""
    routing_mode: RoutingMode = option("maturity", routing=True)
    """maturity: the gate follows the experts' maturity; the others force dense or sparse mixing."""
    router_temperature: float = option(2.0, above=0, routing=True)
    """Divides the logits before the softmax."""
    router_noise: float = option(0.0, least=0, routing=True)
    """Deviation of the normal noise that training adds to the logits (Shazeer et al. 2017)."""
    gate_scale: GateScale = option("keep_size", routing=True)
    """What a token's gates come to once it loses experts. keep_size: their squares sum to what
    they did before, so that the update keeps its expected size; sum_to_one: with top-k of 2 or more
    they sum to 1, which makes it grow (as Mixtral and Arrow mix)."""
    fixed_routing_weights: list[float] | None = option(None, least=0, routing=True)
    """Weights of router_type fixed, one an expert; none: uniform."""
    load_balance_loss_type: BalanceLoss = option("aux_loss", routing=True)
    """aux_loss: fractions from the top-k (GShard); switch: from the argmax (Switch); or both;
    z_loss: no balance loss, and the z loss with the weight of router_aux_loss_coef."""
    router_aux_loss_coef: float = option(0.01, least=0, routing=True)
    """Weight of aux_loss, or of load_balance_loss_type z_loss."""
    router_switch_loss_coef: float | None = option(None, least=0, routing=True)
    """Weight of switch; none: router_aux_loss_coef."""
    router_z_loss_coef: float = option(0.001, least=0, routing=True)
    """Weight of the mean squared logsumexp of the logits (ST-MoE)."""
    expert_capacity_factor: float | None = option(1.25, above=0, routing=True)
    """In sparse training an expert takes at most ceil(factor·K·T/E) tokens; none: no limit."""
    expert_dropout: float = option(0.0, least=0, below=1, routing=True)
    """Probability that a sequence loses an expert in training."""

    maturity_mode: MaturityMode = "schedule"
    """What makes an expert mature: a ramp over its part of the run (schedule), how much it has seen
    (usage), a loss that rests (plateau), both of these (hybrid), or nothing (manual)."""
    maturity_tau: float = option(0.1, above=0)
    """Evidence that counts as much (1 - 1/e), as a share of the tokens expected of an expert when
    it began: an even share of what was left of the run."""
    maturity_rho: float = 0.022
    """Relative change of an expert's loss between its two averages, up or down and averaged over
    time, below which it counts as having settled."""
    maturity_s: float = option(0.002, above=0)
    """Width of that threshold."""
    maturity_fast: float = option(0.05, above=0)
    """Memory of the fast loss average, as a share of the tokens expected of an expert."""
    maturity_slow: float = option(0.1, above=0)
    """Memory of the slow loss average, likewise."""
    maturity_threshold: float = option(0.7, above=0, most=1)
    """Maturity at which an expert becomes fully mature; 1: only by itself, as in mode schedule."""
    maturity_schedule: tuple[float, float] = option((0.2, 0.6), least=0)
    """Shares of the run between which mode schedule raises maturity from 0 to 1."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, holds, rule in self._rules():
            require(holds, name, getattr(self, name), rule)
        unused = [] if self.use_moe_routing else self._changed_routing()
        if unused:
            warnings.warn(
                f"use_moe_routing is false, so these settings do nothing: {', '.join(unused)}",
                stacklevel=3,
            )

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """What must hold of several fields: the one to name in an error, whether it does, what."""
        experts, routed = self.num_experts, self.use_moe_routing
        grows = self.routes_prompts  # with the skills of a stream, from one expert on
        rule = "at least 2 with routing, unless router_scope is prompt or running_mean"
        yield "num_experts", not routed or grows or experts >= 2, rule
        most = experts if routed and not grows else max(experts, 2)
        yield "top_k_experts", self.top_k_experts <= most, f"from 1 to num_experts ({experts})"
        counts = {"expert_ranks": self.expert_count, "expert_alphas": self.expert_count}
        for name, count in {**counts, "fixed_routing_weights": experts}.items():
            values = getattr(self, name)
            yield name, values is None or len(values) == count, f"{count} numbers, one an expert"
        follows = self.router_type != "threshold" or self.routing_mode == "maturity"
        rule = "maturity with router_type threshold, which keeps what is above its threshold"
        yield "routing_mode", follows, rule
        unset = self.router_type == "fixed" or self.fixed_routing_weights is None
        yield "fixed_routing_weights", unset, "unset unless router_type is fixed"
        shared, fixed = self.shared_experts, self.router_type == "fixed"
        fits = not shared or (routed and not fixed and shared < experts + grows)
        rule = f"below num_experts ({experts}), and 0 unless a router chooses among the others"
        yield "shared_experts", fits, rule
        why = f"with router_scope {self.router_scope!r}, which trains no router"
        yield from self.by_default(("router_type", *OF_ROUTERS) if grows else (), why)
        reads = (
            self.router_input == "token" or grows or (self.router_scope == "shared" and not fixed)
        )
        yield "router_input", reads, "token unless router_scope is shared, with a trained router"
        yield from self._rules_by_layer()
        unset = self.router_z_loss_coef == MoELoraConfig.router_z_loss_coef
        rule = "unset with load_balance_loss_type z_loss, whose weight is router_aux_loss_coef"
        yield "router_z_loss_coef", unset or self.load_balance_loss_type != "z_loss", rule

        why = f"with adapter_type {self.adapter_type!r}"
        yield from self.by_default(_MEANINGLESS.get(self.adapter_type, ()), why)
        orthogonal, one_A = self.init_lora_weights == "orthogonal", "with share_A, one A for all"
        yield "expert_ranks", self.expert_ranks is None or not self.share_A, f"unset {one_A}"
        yield "init_lora_weights", not (orthogonal and self.share_A), f"true or gaussian {one_A}"
        ranks = [self.r, *(self.expert_ranks or []), *self.rank_pattern.values()]
        even = all(rank % 2 == 0 for rank in ranks)
        yield "r", even or not orthogonal, "even for orthogonal values, as every other rank"

        follows_loss = self.maturity_mode in ("hybrid", "plateau") and self.maturity_threshold < 1
        settled = 1 / (1 + math.exp(min(-self.maturity_rho / self.maturity_s, 700.0)))
        yield (
            "maturity_threshold",
            settled >= self.maturity_threshold or not follows_loss,
            f"at most sigmoid(maturity_rho / maturity_s) = {settled:.3f}, "
            "which is all that a settled loss gives",
        )
        begin, end = self.maturity_schedule
        yield "maturity_schedule", begin < end, "two rising shares"

    def _rules_by_layer(self) -> Iterator[tuple[str, bool, str]]:
        """As `_rules`, for layers of which not each has every expert."""
        counts = self.experts_per_layer
        if counts is None or not self.layers_differ:
            return
        least = self.shared_experts + self.top_k_experts
        fits = bool(counts) and max(counts) == self.num_experts and min(counts) >= least
        rule = (
            f"numbers from shared_experts + top_k_experts ({least}) to num_experts, which one has"
        )
        yield "experts_per_layer", fits, f"{rule} ({self.num_experts})"
        alone = ("router_scope", "adapter_type", "use_dora", "share_A", "bias")
        yield from self.by_default(alone, "with experts_per_layer")
        learned = self.router_type in ("learned", "learned_with_maturity")
        yield "router_type", learned, "learned or learned_with_maturity with experts_per_layer"

    def by_default(self, names: Iterable[str], why: str) -> Iterator[tuple[str, bool, str]]:
        """Rules as `_rules` gives them: each of these fields has its default, because …"""
        for name in names:
            default = MoELoraConfig.__dataclass_fields__[name].default
            yield name, getattr(self, name) == default, f"{default!r} {why}"

    def _changed_routing(self) -> list[str]:
        """The settings of routing that are not as by default; 1 of 1 expert is not one of them."""
        routing = {item.name: item.default for item in fields(self) if "routing" in item.metadata}
        if self.num_experts == 1:
            routing |= {"num_experts": 1, "top_k_experts": min(self.top_k_experts, 2)}
        return [name for name, default in routing.items() if getattr(self, name) != default]

    @property
    def expert_count(self) -> int:
        """Experts that are built: one without routing."""
        return self.num_experts if self.use_moe_routing else 1

    @property
    def layers_differ(self) -> bool:
        """Whether layers have different numbers of experts."""
        return self.use_moe_routing and self.experts_per_layer is not None

    @property
    def balance_losses(self) -> tuple[str, ...]:
        """The kinds of balance loss that are trained with: aux_loss, switch, both or none."""
        kind = self.load_balance_loss_type
        return tuple(name for name in kind.split("+") if name not in ("z_loss", "none"))

    @property
    def router_file(self) -> str | None:
        """The file of dylora/routing/ that has the router; none: router.py."""
        own = ("learned", "learned_with_maturity", "fixed")
        own_file = None if self.router_type in own else self.router_type
        return "prompt" if self.routes_prompts else own_file

    @property
    def routes_prompts(self) -> bool:
        """Whether the skill library routes, by prompts."""
        return self.use_moe_routing and self.router_scope in ("prompt", "running_mean")

    @property
    def routes_text(self) -> bool:
        """Whether a token's decision depends on the tokens before it."""
        return self.routes_prompts or (self.use_moe_routing and self.router_input != "token")

    @property
    def is_learned(self) -> bool:
        """Whether there are routers: not with constant weights, or without routing."""
        return self.use_moe_routing and self.router_type != "fixed"

    @property
    def trains_routers(self) -> bool:
        """Whether they have parameters, and losses of their own."""
        return self.is_learned and not self.routes_prompts

    @property
    def follows_maturity(self) -> bool:
        """Whether the experts' maturity decides how tokens are routed."""
        kind = self.trains_routers and self.router_type == "learned_with_maturity"
        return kind and self.routing_mode == "maturity"

    @property
    def z_loss_coef(self) -> float:
        """Weight of the z loss, resolved."""
        alone = self.load_balance_loss_type == "z_loss"
        return self.router_aux_loss_coef if alone else self.router_z_loss_coef

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

    @property
    def _name_or_path(self) -> str:
        """Where trainers look for the name of a base. Raises ValueError: this is none's."""
        raise ValueError("this is the configuration of a mixture: give trainers model.base")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoELoraConfig":
        """Raises ValueError on an unknown key, naming the nearest valid one."""
        return build(cls, values)


def matching(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first name in `pattern` that ends the path, as PEFT looks them up."""
    found = (value for name, value in (pattern or {}).items() if ends_with(path, name))
    return next(found, default)


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the last dotted words of `path`."""
    return path == name or path.endswith("." + name)
