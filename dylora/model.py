"""DyLoRA_MoE: a frozen causal LM whose projections carry a routed mixture of LoRA experts.

Shape letters: B batch, S sequence, N sites, E experts, V vocabulary.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylora import injection, losses
from dylora.bases import load_base
from dylora.config import MoELoraConfig
from dylora.losses import RoutingStatistics
from dylora.maturity import ExpertMaturity
from dylora.router import DynamicHybridRouter
from dylora.storage.checkpoint import folder_bytes, verify, write_folder
from dylora.storage.peft_format import (
    PeftAdapter,
    adapter_config,
    read_adapter,
    read_json,
    read_tensors,
    write_adapter,
)

FORMAT_VERSION = 1


class Routing(NamedTuple):
    """What every site decided in one pass; float32, differentiable."""

    gates: Tensor  # [B, S, N, E] weights of the experts' updates
    probabilities: Tensor  # [B, S, N, E] softmax before top-k
    logits: Tensor | None  # [B, S, N, E]; None where nothing was learned
    statistics: RoutingStatistics | None  # sums over the real tokens; None likewise


class DyLoRAOutput(NamedTuple):
    """What a pass returns. The losses are None without labels."""

    loss: Tensor | None  # lm_loss + coefficient · aux_loss + coefficient · z_loss
    lm_loss: Tensor | None  # mean cross-entropy over the targets, in nats
    aux_loss: Tensor | None  # balance loss, 1 when uniform
    z_loss: Tensor | None  # mean squared logsumexp of the router's logits
    logits: Tensor  # [B, S, V]
    routing: Routing
    token_losses: Tensor | None  # [B, S] detached, 0 where nothing is learned


class LossScale(NamedTuple):
    """How one micro-batch counts in an accumulated batch; the default is a batch of its own."""

    targets: Tensor | float | None = None  # divides the summed cross-entropy
    tokens: Tensor | float | None = None  # divides the summed probabilities and logsumexps
    fractions_NE: Tensor | None = None  # f of the balance loss


class DyLoRA_MoE(nn.Module):  # noqa: N801 - the system's specification names it so
    """A frozen base with injected experts. `base` stays an ordinary transformers model."""

    def __init__(
        self,
        base: PreTrainedModel,
        config: MoELoraConfig,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
    ):
        """Inject experts into `base`, in place. See `from_base` and `from_pretrained`."""
        super().__init__()
        self.base = base
        self.config = config
        self.base_name = base_name or base.config.name_or_path or None
        self.base_revision = base_revision
        self.injection = injection.inject(base, config)
        self.maturity = ExpertMaturity.create(config.expert_count)
        self.training_record: dict[str, Any] = {}  # what it was trained on; kept in config.json
        # Saving an injected model would write files that reload with fresh weights.
        base.save_pretrained = _refuse_to_save  # type: ignore[method-assign]

    @classmethod
    def from_base(
        cls,
        base: str | PreTrainedModel,
        config: MoELoraConfig,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
    ) -> "DyLoRA_MoE":
        """Fresh experts on a base given by name or as a model (which is changed in place).

        Raises ValueError when the base cannot be loaded or nothing in it can be adapted.
        """
        if isinstance(base, PreTrainedModel):
            return cls(base, config, base_revision=revision)
        model = load_base(
            base,
            revision=revision,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
        )
        return cls(model, config, base_name=base, base_revision=revision)

    # One pass

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        scale: LossScale | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput:
        """One pass of the base with the experts mixed in.

        Args:
            input_ids, attention_mask, labels: [B, S]; labels are -100 where nothing is learned
                and are shifted here, as in transformers.
            routing_weights: [B, E], [B, S, E] or [B, S, N, E]; used as gates instead of the
                routers' decisions, as they are. Raises ValueError for another shape, negative or
                non-finite values.
            scale: how this batch counts in a larger one; the default is its own means.
            kwargs: for the base's forward.
        """
        state = self.injection.state
        if routing_weights is not None:
            self._check_routing_weights(routing_weights, input_ids)
        state.requested = routing_weights
        kwargs.setdefault("use_cache", False)
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        routing = self._collect_routing(attention_mask)
        if labels is None:
            return DyLoRAOutput(None, None, None, None, output.logits, routing, None)

        scale = scale or LossScale()
        token_losses = losses.token_losses(output.logits, labels, label_smoothing)
        targets = losses.count_targets(labels) if scale.targets is None else scale.targets
        lm_loss = token_losses.sum() / targets
        aux_loss = z_loss = lm_loss.new_zeros(())
        if (statistics := routing.statistics) is not None:
            tokens = statistics.tokens if scale.tokens is None else scale.tokens
            fractions = scale.fractions_NE
            if fractions is None:
                fractions = losses.assignment_fractions(statistics.assigned_NE)
            z_loss = losses.z_loss(statistics.squared_logsumexp_N, tokens)
            if self.config.load_balance_loss_type != "none":
                aux_loss = losses.balance_loss(statistics.probability_NE, fractions, tokens)
        loss = (
            lm_loss
            + self.config.router_aux_loss_coef * aux_loss
            + self.config.router_z_loss_coef * z_loss
        )
        return DyLoRAOutput(
            loss, lm_loss, aux_loss, z_loss, output.logits, routing, token_losses.detach()
        )

    def generate(
        self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """transformers' generate, KV cache included; routing_weights [B, E] hold for every token."""
        if routing_weights is not None:
            if routing_weights.ndim != 2:
                raise ValueError(
                    f"generate takes routing_weights of [B, E], got {list(routing_weights.shape)}"
                )
            prompt = args[0] if args else kwargs["input_ids"]
            self._check_routing_weights(routing_weights, prompt)
        self.injection.state.held = routing_weights
        try:
            return self.base.generate(*args, **kwargs)
        finally:
            self.injection.state.held = None

    @torch.no_grad()
    def get_routing_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The gates of every site for every token, [B, S, N, E]."""
        return self(input_ids, attention_mask).routing.gates

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within this context a pass is the frozen base's own."""
        state = self.injection.state
        before, state.enabled = state.enabled, False
        try:
            yield
        finally:
            state.enabled = before

    # Parts

    @property
    def site_names(self) -> list[str]:
        """Paths of the routed blocks, in the order of the N axis."""
        return [site.name for site in self.injection.sites]

    def router_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (unique, stable) and parameters of the routers."""
        for site, router in self._routers():
            for name, parameter in router.named_parameters():
                yield f"{site}.{name}", parameter

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and stacks: lora_A [E, R, D] and lora_B [E, R, O] of every projection."""
        for path, adapter in self.injection.adapters.items():
            yield f"{path}.lora_A", adapter.lora_A
            yield f"{path}.lora_B", adapter.lora_B

    def count_parameters(self) -> tuple[int, int]:
        """Trainable (experts and routers) and frozen parameters."""
        ours = [parameter for _, parameter in [*self.expert_parameters(), *self.router_parameters()]]
        trainable = sum(parameter.numel() for parameter in ours)
        # bitsandbytes packs weights, so its numel says too little; transformers counts them right.
        return trainable, self.base.num_parameters() - trainable

    def set_maturity(self, maturity: ExpertMaturity) -> None:
        """Let the routers follow a new maturity state."""
        self.maturity = maturity
        self.injection.state.maturity_E.copy_(maturity.maturity)

    def detach_router(self) -> nn.ModuleDict:
        """Take the routers off; until others are attached, sites mix uniformly or as they are told.

        Returns them by their site's path, with `.` as `/`.
        """
        removed = {}
        for site in self.injection.sites:
            router = injection.attach_router(self.base, site, None)
            if router is not None:
                removed[site.name.replace(".", "/")] = router
        return nn.ModuleDict(removed)

    def attach_router(self, routers: nn.ModuleDict | None = None) -> None:
        """Put routers at the sites: those that `detach_router` gave, or fresh ones.

        Raises ValueError when a site has one already or the names do not fit.
        """
        if any(True for _ in self._routers()):
            raise ValueError("routers are attached already: detach_router() first")
        needing = [site for site in self.injection.sites if not site.shares_first]
        if routers is None:
            paths = list(self.injection.adapters)
            fresh = {
                site.name.replace(".", "/"): injection.new_router(
                    self.base, site.name, self.config, _first_below(site.name, paths)
                )
                for site in needing
            }
            routers = nn.ModuleDict(fresh)
        expected = {site.name.replace(".", "/") for site in needing}
        if set(routers) != expected:
            raise ValueError(
                f"routers are for {sorted(routers)}, but the sites are {sorted(expected)}"
            )
        for site in needing:
            router = routers[site.name.replace(".", "/")]
            assert isinstance(router, DynamicHybridRouter)
            injection.attach_router(self.base, site, router)

    def unload(self) -> PreTrainedModel:
        """Take everything off and return the base as it was; this object is of no use after."""
        injection.remove(self.base, self.injection)
        del self.base.save_pretrained
        return self.base

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write experts, routers and configuration; never a base weight.

        Layout: peft_adapters/expert_<i>/ in PEFT's format, router.safetensors, config.json,
        manifest.json. Raises FileExistsError if the folder holds something else.
        """
        write_folder(Path(folder), self.write_files)

    def write_files(self, folder: Path) -> None:
        """The files of `save_pretrained`, without the atomic folder around them."""
        targets = injection.shortest_targets(self.base, list(self.injection.adapters))
        conv = any(isinstance(self.base.get_submodule(p), Conv1D) for p in self.injection.adapters)
        for expert in range(self.config.expert_count):
            config = adapter_config(
                r=self.config.r,
                lora_alpha=self.config.lora_alpha,
                target_modules=targets,
                base_model=self.base_name,
                revision=self.base_revision,
                lora_dropout=self.config.lora_dropout,
                use_rslora=self.config.use_rslora,
                fan_in_fan_out=conv,
            )
            adapter = PeftAdapter(config, self.expert_weights(expert))
            write_adapter(folder / "peft_adapters" / f"expert_{expert}", adapter)
        tensors = {f"router.{name}": p.detach().cpu() for name, p in self.router_parameters()}
        tensors |= {f"maturity.{name}": v for name, v in self.maturity._asdict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "router.safetensors")
        description = {
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": self.base_name,
            "base_revision": self.base_revision,
            "moe": self.config.to_dict(),
            "sites": self.site_names,
            "projections": list(self.injection.adapters),
            "experts": [
                {
                    "name": f"expert_{expert}",
                    "state": "active",
                    "rank": self.config.r,
                    "alpha": self.config.lora_alpha,
                    "maturity": round(float(self.maturity.maturity[expert]), 6),
                    "skill": None,
                }
                for expert in range(self.config.expert_count)
            ],
            "training": self.training_record,
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")

    def expert_weights(self, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Path of a projection -> A [r, D], B [O, r] of one expert, as PEFT orders them."""
        return {
            path: (adapter.lora_A[expert].detach(), adapter.lora_B[expert].detach().T)
            for path, adapter in self.injection.adapters.items()
        }

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: str | PreTrainedModel | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
    ) -> "DyLoRA_MoE":
        """A mixture from a folder written by `save_pretrained` or by training.

        Args:
            base: the base by name or as a model; by default the one the folder names.

        Raises ValueError or FileNotFoundError naming the file when the folder is not whole or
        does not fit the base.
        """
        folder = Path(folder)
        description = read_description(folder)
        base = base or description["base_model_name_or_path"]
        if base is None:
            raise ValueError(f"{folder}/config.json names no base model: give one as base=")
        model = cls.from_base(
            base,
            MoELoraConfig.from_dict(description["moe"]),
            revision=description["base_revision"],
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
        )
        model.load_files(folder)
        model.training_record = description["training"]
        return model

    @torch.no_grad()
    def load_files(self, folder: Path) -> None:
        """Fill experts, routers and maturity from a folder. Raises ValueError where it does not fit."""
        for expert in range(self.config.expert_count):
            source = folder / "peft_adapters" / f"expert_{expert}"
            weights = read_adapter(source).weights
            _check_same_keys(source, set(weights), set(self.injection.adapters))
            for path, adapter in self.injection.adapters.items():
                A, B = weights[path]
                _copy(adapter.lora_A[expert], A, f"{source}: {path}.lora_A")
                _copy(adapter.lora_B[expert], B.T, f"{source}: {path}.lora_B")
        file = folder / "router.safetensors"
        tensors = read_tensors(file)
        routers = {f"router.{name}": p for name, p in self.router_parameters()}
        maturity = {f"maturity.{name}": v for name, v in self.maturity._asdict().items()}
        _check_same_keys(file, set(tensors), {*routers, *maturity})
        for name, parameter in routers.items():
            _copy(parameter, tensors[name], f"{file}: {name}")
        self.set_maturity(
            ExpertMaturity(**{name.partition(".")[2]: tensors[name] for name in maturity})
        )

    def size_message(self, folder: Path) -> str:
        """One line: what the folder weighs beside the base it does not hold."""
        ours, trainable = folder_bytes(folder), self.count_parameters()[0]
        base = sum(p.numel() * p.element_size() for p in self.base.parameters()) - 4 * trainable
        return (
            f"{folder}: {ours / 1e6:.1f} MB on disk, no base weight among them "
            f"(the base is {base / 1e6:.1f} MB in memory)"
        )

    # Inner workings

    def _routers(self) -> Iterator[tuple[str, DynamicHybridRouter]]:
        for site in self.injection.sites:
            if site.router is not None:
                yield site.name, site.router

    def _collect_routing(self, attention_mask: Tensor | None) -> Routing:
        outputs = [site.output for site in self.injection.sites]
        assert all(outputs), "every site has routed"
        device = outputs[0].gates.device  # type: ignore[union-attr]

        def stack(values: list[Tensor]) -> Tensor:
            return torch.stack([value.to(device) for value in values], dim=2)

        gates = stack([output.gates for output in outputs if output])
        probabilities = stack([output.probabilities for output in outputs if output])
        found = [output.logits for output in outputs if output and output.logits is not None]
        if len(found) < len(outputs):
            return Routing(gates, probabilities, None, None)
        logits = stack(found)
        statistics = losses.routing_statistics(
            gates,
            probabilities,
            logits,
            attention_mask,
            top_k=self.config.top_k_experts,
            balance=self.config.load_balance_loss_type,
        )
        return Routing(gates, probabilities, logits, statistics)

    def _check_routing_weights(self, weights: Tensor, input_ids: Tensor) -> None:
        batch, length = input_ids.shape
        sites, experts = len(self.injection.sites), self.config.expert_count
        allowed = [[batch, experts], [batch, length, experts], [batch, length, sites, experts]]
        if list(weights.shape) not in allowed:
            raise ValueError(
                f"routing_weights have shape {list(weights.shape)}, but must be [B, E], [B, S, E] "
                f"or [B, S, sites, E]: one of {allowed}"
            )
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("routing_weights must be finite and not negative")


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a verified folder. Raises ValueError for another format version."""
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    verify(folder)
    description = read_json(folder / "config.json")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/config.json has format_version {description.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}"
        )
    return description


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "this model carries experts, and transformers would write files that reload without them: "
        "call save_pretrained of the DyLoRA_MoE, or unload() first"
    )


def _check_same_keys(source: Path, found: set[str], expected: set[str]) -> None:
    for name in sorted(expected - found):
        raise ValueError(f"{source}: {name} is missing")
    for name in sorted(found - expected):
        raise ValueError(f"{source}: {name} fits nothing in this model")


def _copy(target: Tensor, source: Tensor, what: str) -> None:
    if target.shape != source.shape:
        raise ValueError(f"{what} has shape {list(source.shape)}, expected {list(target.shape)}")
    target.copy_(source)


def _first_below(site: str, paths: list[str]) -> str:
    return next(path for path in paths if path.startswith(site + "."))
