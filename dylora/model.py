"""DyLoRA_MoE: a frozen causal LM whose projections carry a routed mixture of LoRA experts.

Shape letters: B batch, S sequence, N sites, E experts, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.adapters import inject
from dylora.base_models import (
    BaseSpec,
    LoadOptions,
    fingerprint,
    keep_as_stored,
    require_same_base,
    stored_bytes,
)
from dylora.config import MoELoraConfig, RoutingMode
from dylora.experts import ExpertManager
from dylora.integrations import merge
from dylora.integrations.static_weights import Weights
from dylora.kernels import cross_entropy
from dylora.kernels.cross_entropy import (
    Head,
    capture_head_input,
    chunked_token_losses,
    find_logit_transform,
    is_trained,
)
from dylora.model_io import load_model, write_model
from dylora.routing import losses, maturity
from dylora.routing.gating import RouterOutput, check_routing_weights
from dylora.routing.losses import (
    BatchTotals,
    Fractions,
    Observation,
    RoutingStatistics,
    observe_pass,
)
from dylora.routing.maturity import ExpertMaturity
from dylora.routing.router import DynamicHybridRouter
from dylora.routing.state import Request
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import folder_bytes, write_folder


class Routing(NamedTuple):
    """What every site decided in one pass; float32, differentiable."""

    gates: Tensor  # [B, S, N, E] weights of the experts' updates
    probabilities: Tensor  # [B, S, N, E] softmax before top-k
    logits: Tensor | None  # [B, S, N, E]; None where nothing was learned
    statistics: RoutingStatistics | None  # sums over the real tokens; None likewise


class DyLoRAOutput(NamedTuple):
    """What a pass returns. The losses are None without labels."""

    loss: Tensor | None  # lm_loss + each of the others times its coefficient
    losses: dict[str, Tensor]  # by name: lm_loss and routing.losses.ROUTING_LOSSES; else empty
    logits: Tensor  # [B, S, V]; None where they were not to be kept
    routing: Routing | None  # None while the adapters are disabled
    token_losses: Tensor | None  # [B, S] detached, 0 where nothing is learned

    @property
    def lm_loss(self) -> Tensor | None:
        """Mean cross-entropy over the targets, in nats; 0 without targets."""
        return self.losses.get("lm_loss")

    @property
    def aux_loss(self) -> Tensor | None:
        """Balance loss over the top-k, 1 when uniform; 0 where it is not trained with."""
        return self.losses.get("aux_loss")

    @property
    def switch_loss(self) -> Tensor | None:
        """Balance loss over the argmax, likewise."""
        return self.losses.get("switch_loss")

    @property
    def z_loss(self) -> Tensor | None:
        """Mean squared logsumexp of the router's logits."""
        return self.losses.get("z_loss")

    def observation(self, labels: Tensor) -> Observation:
        """What this pass shows of the experts, for `DyLoRA_MoE.observe`; labels [B, S] as given.

        Raises ValueError for a pass without labels or with the adapters disabled.
        """
        if self.routing is None or self.token_losses is None:
            raise ValueError("there is nothing to observe: pass labels, with the adapters enabled")
        statistics = self.routing.statistics
        return observe_pass(self.routing.gates, statistics, self.token_losses, labels)


class DyLoRA_MoE(nn.Module):
    """A frozen base with injected experts. `base` stays an ordinary transformers model."""

    def __init__(
        self,
        base: PreTrainedModel,
        config: MoELoraConfig,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        records: list[dict[str, Any]] | None = None,
    ):
        """Inject experts into `base`, in place: those of `records`, a saved table, or else those
        that the configuration begins with. See `from_base` and `from_pretrained`."""
        super().__init__()
        keep_as_stored(base)
        self.base = base
        self._config = config
        self.base_name = base_name or base.config.name_or_path or None
        self.base_revision = base_revision
        self.mixture = inject.inject(base, config, with_experts=records is None)
        self.training = base.training
        self._head: tuple[Head | None] | None = None  # not looked for yet
        self.maturity = ExpertMaturity.create(config.expert_count)
        try:
            self.experts = ExpertManager(self, records)
        except ValueError:  # a base that was given is as it was
            inject.remove(base, self.mixture)
            raise
        self.fractions: Fractions | None = None  # f of the last observed step
        # Of the base as it was given; its tokenizer's is added by whoever loads one.
        self.base_fingerprint = fingerprint(base, list(self.mixture.adapters))
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
        **options: Unpack[LoadOptions],
    ) -> "DyLoRA_MoE":
        """Fresh experts on a base given by name or as a model (which is changed in place).

        options: how a base given by name is loaded: dtype (float32), device ("cpu"),
            attn_implementation, quantization ("none").

        Raises ValueError when the base cannot be loaded or nothing in it can be adapted.
        """
        if isinstance(base, PreTrainedModel):
            return cls(base, config, base_revision=revision)
        spec = BaseSpec.resolve(base, revision, **options)
        return cls(spec.load(), config, base_name=spec.name, base_revision=revision)

    # One pass

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        totals: BatchTotals | None = None,
        keep_logits: bool = True,
        target_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput:
        """One pass of the base with the experts mixed in.

        Args:
            input_ids, attention_mask, labels: [B, S]; labels are -100 where nothing is learned
                and are shifted here, as in transformers. A mask of four dimensions goes to the base
                as it is; every token counts in the statistics then.
            routing_weights: [B, E], [B, S, E] or [B, S, N, E]; used as gates instead of the
                routers' decisions, as they are. Raises ValueError for another shape, negative or
                non-finite values.
            totals: how this batch counts in a larger one; the default is its own means.
            keep_logits: False, with labels: compute logits at the positions with a target alone, in
                chunks, and return none. The same loss, without a tensor of [B, S, V].
            target_positions: [N] indices into B·S of those positions, for a caller who knows them
                already (finding them waits for the device).
            kwargs: for the base's forward.
        """
        state = self.mixture.state
        if routing_weights is not None:
            self._check_routing_weights(routing_weights, input_ids)
        head = self._find_logit_transform() if labels is not None and not keep_logits else None
        decisions: dict[int, RouterOutput] = {}
        # Of the next pass, so after the one that finds a head.
        state.mine.requested = Request(routing_weights, decisions)
        kwargs.setdefault("use_cache", False)
        last: Any = self.base.get_output_embeddings()
        with nullcontext() if head is None else capture_head_input(last) as seen:
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        routing = None
        if not state.mine.disabled:
            routing = self._collect_routing(decisions, attention_mask)
        if labels is None:
            return DyLoRAOutput(None, {}, output.logits, routing, None)

        if head is None or seen is None or seen.hidden is None:
            logits = output.logits
            token_losses = cross_entropy.token_losses(logits, labels, label_smoothing)
        else:
            if target_positions is None:
                target_positions = cross_entropy.target_positions(labels)
            logits: Any = None
            token_losses = chunked_token_losses(
                head, last, seen.hidden, labels, target_positions, label_smoothing
            )
        statistics = routing.statistics if routing else None
        loss, parts = losses.combined_loss(
            token_losses, labels, statistics, self.config, totals, state.active_count
        )
        return DyLoRAOutput(loss, parts, logits, routing, token_losses.detach())

    def generate(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' generate, KV cache included; routing_weights [B, E] hold for all tokens."""
        if routing_weights is not None:
            if routing_weights.ndim != 2:
                raise ValueError(
                    f"generate takes routing_weights of [B, E], got {list(routing_weights.shape)}"
                )
            prompt: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            self._check_routing_weights(routing_weights, prompt)
        self.mixture.state.mine.held = routing_weights
        try:
            generate: Any = self.base.generate  # its stub is a Tensor's
            return generate(*args, **kwargs)
        finally:
            self.mixture.state.mine.held = None

    @torch.no_grad()
    def get_routing_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The gates of every site for every token, [B, S, N, E]."""
        routing = self(input_ids, attention_mask).routing
        if routing is None:
            raise ValueError("the adapters are disabled, so nothing is routed")
        return routing.gates

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within this context a pass is the frozen base's own."""
        mine = self.mixture.state.mine
        before, mine.disabled = mine.disabled, True
        try:
            yield
        finally:
            mine.disabled = before

    # Training by hand

    def observe(
        self,
        output: DyLoRAOutput | Observation,
        labels: Tensor | None = None,
        *,
        steps: int,
        step: int | None = None,
        target_tokens: float | None = None,
    ) -> None:
        """After an optimizer step: update the experts' maturity, their counts of steps, and the
        fractions of the balance losses (`carried_fractions`).

        Args:
            output, labels: of the step's pass. Of an accumulated batch: its passes'
                `output.observation(labels)`, added up, and no labels.
            steps: optimizer steps of the whole run.
            step: the number of this one, from 1; by default one more than in the last call.
            target_tokens: what the whole run trains on; by default `steps` times this step's.

        Raises ValueError for a step outside of the run.
        """
        step = self.experts.step + 1 if step is None else step
        if not 1 <= step <= steps:
            raise ValueError(f"step is {step}, but must be from 1 to steps ({steps})")
        if isinstance(output, DyLoRAOutput):
            if labels is None:
                raise ValueError("labels are missing: give those of the pass")
            output = output.observation(labels)
        if target_tokens is None:
            target_tokens = max(float(output.target_tokens), 1.0) * steps
        self.set_maturity(
            maturity.observe(
                self.maturity,
                output.gate_sum_E,
                output.loss_sum_E,
                progress=step / steps,
                tokens_per_expert=target_tokens / self.mixture.state.active_count,
                config=self.config,
            )
        )
        self.experts.count_step(step, step / steps)
        if output.statistics is not None:
            self.fractions = losses.fractions_of(output.statistics)

    def carried_fractions(self) -> Fractions:
        """f of the balance losses, [N, E] each, of the last step that was observed.

        For `BatchTotals` of an accumulated batch: the loss does not depend on how it is split.
        Uniform before the first step, which exerts no pressure; an expert that is new since has
        none yet, one that is gone keeps none.
        """
        active_E = self.mixture.state.active_E
        if self.fractions is None:
            even_NE = (active_E / active_E.sum()).expand(len(self.site_names), -1)
            return dict.fromkeys(losses.ASSIGNMENTS, even_NE)
        return {
            name: losses.carried_fractions(rows_NE.to(active_E.device), active_E)
            for name, rows_NE in self.fractions.items()
        }

    def set_routing(
        self,
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        mode: RoutingMode | None = None,
    ) -> None:
        """Change how tokens are routed, from the next pass on; a checkpoint keeps it.

        Args: as top_k_experts, router_temperature and routing_mode of the configuration; None
        leaves one as it is. Raises ValueError for values out of range and without learned routing.
        """
        if not self.config.is_learned:
            raise ValueError("nothing is routed here: router_type is fixed, or it is a plain LoRA")
        given = {
            "top_k_experts": top_k,
            "router_temperature": temperature,
            "routing_mode": mode,
        }
        changes: Any = {name: value for name, value in given.items() if value is not None}
        self._config = replace(self.config, **changes)
        for _, router in self.routers():
            router.config = self._config
        for adapter in self.mixture.adapters.values():
            adapter.config = self._config

    # Parts

    @property
    def config(self) -> MoELoraConfig:
        """What the mixture is; `set_routing` changes what may change."""
        return self._config

    @config.setter
    def config(self, value: Any) -> None:
        raise AttributeError(
            "config cannot be assigned: set_routing(top_k=…, temperature=…, mode=…) changes routing"
        )

    @property
    def device(self) -> torch.device:
        """Where routing is decided."""
        return self.mixture.state.maturity_E.device

    @property
    def site_names(self) -> list[str]:
        """Paths of the routed blocks, in the order of the N axis."""
        return [site.name for site in self.mixture.blocks]

    def router_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (unique, stable) and parameters of the routers."""
        for site, router in self.routers():
            for name, parameter in router.named_parameters():
                yield f"{site}.{name}", parameter

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all experts that are not retired, frozen ones among them.

        Of every projection and stack: lora_A [E, R, D] and lora_B [E, R, O], with DoRA
        lora_magnitude [E, O], with trained biases lora_bias [E, O]; a shared_A [1, R, D] instead
        of every lora_A; with bias all a bias_shift [n]. A name says which experts it holds.
        """
        for path, adapter in self.mixture.adapters.items():
            if adapter.shared_A is not None:
                yield f"{path}.shared_A", adapter.shared_A
            for stack in adapter.stacks:
                experts = f"experts_{stack.experts[0]}-{stack.experts[-1]}"
                for name, parameter in stack.named_parameters():
                    yield f"{path}.{experts}.{name}", parameter
        for path, module in self.mixture.biases.items():
            yield f"{path}.bias_shift", module.shift

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that is not the base: experts, then routers."""
        yield from self.expert_parameters()
        yield from self.router_parameters()

    def routers(self) -> Iterator[tuple[str, DynamicHybridRouter]]:
        """The learned routers and the paths of their sites."""
        for site in self.mixture.blocks:
            if site.router is not None:
                yield site.name, site.router

    def count_parameters(self) -> tuple[int, int]:
        """Those that a step trains (of experts and routers), and those of the frozen base."""
        ours = [parameter for _, parameter in self.own_parameters()]
        trainable = sum(parameter.numel() for parameter in ours if parameter.requires_grad)
        # bitsandbytes packs weights, so its numel says too little; transformers counts them right.
        return trainable, self.base.num_parameters() - sum(p.numel() for p in ours)

    def set_maturity(self, maturity: ExpertMaturity) -> None:
        """Let the routers follow a new maturity state."""
        self.maturity = maturity
        self.mixture.state.set_maturity(maturity.maturity)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Never reentrant, which would lose the routers' gradient; the recomputation sees the wishes
        of its own pass, whatever ran since.
        """
        contexts = self.mixture.state.checkpoint_contexts
        settings = {"use_reentrant": False, "context_fn": contexts}
        # transformers 5.23 renamed the method; 5.17 has the old name only.
        base: Any = self.base
        enable = getattr(base, "activation_checkpointing_enable", None)
        if enable is None:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        else:
            enable(settings)
        # transformers asks for gradients of the embeddings here, as reentrant checkpointing needs.
        # Ours does not, and they would cost a backward pass below the first adapted layer.
        base.disable_input_require_grads()

    def detach_router(self) -> nn.ModuleDict:
        """Take the routers off; until others are attached, sites mix uniformly or as they are told.

        Returns them by their site's path, with `.` as `/`.
        """
        removed = {}
        for site in self.mixture.blocks:
            router = inject.attach_router(self.base, site, None)
            if router is not None:
                removed[site.name.replace(".", "/")] = router
        return nn.ModuleDict(removed)

    def attach_router(self, routers: nn.ModuleDict | None = None) -> None:
        """Put routers at the sites: those that `detach_router` gave, or fresh ones.

        Raises ValueError when a site has one already or the names do not fit.
        """
        if any(True for _ in self.routers()):
            raise ValueError("routers are attached already: detach_router() first")
        needing = [
            site for site in self.mixture.blocks if self.config.is_learned and not site.shares_first
        ]
        if routers is None:
            paths = list(self.mixture.adapters)
            fresh = {
                site.name.replace(".", "/"): inject.new_router(
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
            router.config = self.config
            inject.attach_router(self.base, site, router)

    def unload(self) -> PreTrainedModel:
        """Take everything off and return the base as it was; this object is of no use after."""
        inject.remove(self.base, self.mixture)
        del self.base.save_pretrained
        return self.base

    def merge_and_unload(
        self,
        expert: int | None = None,
        weights: Weights | None = None,
        *,
        dequantize: bool = False,
    ) -> PreTrainedModel:
        """Write one expert or a constant mixture into the base's weights and return the base.

        Args:
            weights: one an expert, [E], or one a site and expert, [N, E], as gates. Neither these
                nor an expert: the weights of router_type fixed.
            dequantize: make a quantised base whole, in float32 for the sum, then as it was loaded.

        Like `unload`, this leaves nothing of use here. Raises ValueError, changing nothing, where
        routing depends on the token and neither is given, and for a quantised base otherwise.
        """
        return merge.merge_and_unload(self, expert, weights, dequantize=dequantize)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write experts, routers and configuration; never a base weight.

        Layout: peft_adapters/expert_<i>/ in PEFT's format, router.safetensors, config.json,
        manifest.json. Raises FileExistsError if the folder holds something else.
        """
        write_folder(Path(folder), lambda temporary: write_model(self, temporary))

    def expert_weights(self, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Path of a projection -> A [r, D], B [O, r] of one expert, as PEFT orders them.

        Raises KeyError for a retired one.
        """
        weights = {}
        for path, adapter in self.mixture.adapters.items():
            stack, place = adapter.stack_of(expert)
            A, rank = adapter.A_of(stack).detach(), stack.ranks[place]
            A_RD = A[place] if adapter.shared_A is None else A[0]
            weights[path] = (A_RD[:rank], stack.lora_B.detach()[place, :rank].T)
        return weights

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | Checkpoint,
        base: str | PreTrainedModel | BaseSpec | None = None,
        *,
        allow_other_base: bool = False,
        **options: Unpack[LoadOptions],
    ) -> "DyLoRA_MoE":
        """A mixture from a folder written by `save_pretrained` or by training.

        Args:
            folder: or a run's folder, which stands for its best checkpoint.
            base: the base by name or as a model; by default the one the folder names, which a
                stranger may have chosen: `run.py info` says which it is. No code that comes with
                a base is ever run.
            allow_other_base: take a base whose size or weights differ from what the mixture was
                trained on; without it, that is refused.
            options: as in `from_base`; quantization by default as in training.

        Raises ValueError or FileNotFoundError naming the file when the folder is not whole or
        does not fit the base.
        """
        checkpoint = Checkpoint.open(folder)
        description, name, revision = checkpoint.description, None, None
        if not isinstance(base, PreTrainedModel):
            given = isinstance(base, BaseSpec)
            spec = base if given else checkpoint.base_spec(base, **options)
            base, name, revision = spec.load(), spec.name, spec.revision
        model = cls(
            base,
            checkpoint.config,
            base_name=name,
            base_revision=revision,
            records=checkpoint.experts,
        )
        try:
            load_model(model, checkpoint)
            kept = description.get("base_fingerprint", {})
            if not allow_other_base:
                require_same_base(model.base_fingerprint, kept, checkpoint.file)
        except Exception:
            model.unload()  # a base that was given is as it was
            raise
        model.base_fingerprint["tokenizer"] = kept.get("tokenizer")
        model.training_record = description["training"]
        return model

    def size_message(self, folder: Path) -> str:
        """One line: what the folder weighs beside the base it does not hold."""
        ours = {id(p) for _, p in self.own_parameters()}
        frozen = [p for p in self.base.parameters() if id(p) not in ours]
        base = sum(stored_bytes(p) for p in frozen)
        return (
            f"{folder}: {folder_bytes(folder) / 1e6:.1f} MB on disk, no base weight among them "
            f"(the base is {base / 1e6:.1f} MB in memory)"
        )

    # Inner workings

    def _find_logit_transform(self) -> Head | None:
        """The base's head, looked for once; None while it is trained itself."""
        linear: Any = self.base.get_output_embeddings()
        if linear is not None and is_trained(linear):
            warnings.warn(
                "the output embeddings are trained, so logits are computed whole", stacklevel=3
            )
            return None
        if self._head is None:
            evaluating = [module for module in self.base.modules() if not module.training]
            with self.disable_adapters():
                self._head = (find_logit_transform(self.base.eval()),)
            self.base.train()
            for module in evaluating:
                module.training = False
            if self._head[0] is None:
                warnings.warn(
                    f"the logits of {type(self.base).__name__} are not its head of its last hidden "
                    "states, so they are computed whole",
                    stacklevel=3,
                )
        return self._head[0]

    def _collect_routing(
        self, decisions: dict[int, RouterOutput], attention_mask: Tensor | None
    ) -> Routing:
        outputs = [decisions.get(site.index) for site in self.mixture.blocks]
        silent = [site.name for site in self.mixture.blocks if site.index not in decisions]
        if silent:
            raise ValueError(f"{silent[0]} took no part in this pass: leave it out of the targets")
        device = self.device

        def stack(values: list[Tensor]) -> Tensor:
            length = min(value.shape[1] for value in values)  # some layers run the last tokens only
            return torch.stack([value[:, -length:].to(device) for value in values], dim=2)

        gates = stack([output.gates for output in outputs if output])
        probabilities = stack([output.probabilities for output in outputs if output])
        found = [output.logits for output in outputs if output and output.logits is not None]
        if len(found) < len(outputs):
            return Routing(gates, probabilities, None, None)
        logits = stack(found)
        if (
            torch.is_grad_enabled()
            and not logits.requires_grad
            and any(parameter.requires_grad for _, parameter in self.router_parameters())
        ):
            raise ValueError(
                "the routers ran without a graph, so the balance loss would teach them nothing: "
                "checkpoint activations with use_reentrant=False"
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            attention_mask = None  # it says what attends to what, not which tokens are real
        if attention_mask is not None:
            attention_mask = attention_mask[:, -gates.shape[1] :]  # it covers a cache as well
        statistics = losses.routing_statistics(
            gates,
            probabilities,
            logits,
            attention_mask,
            top_k=min(self.config.top_k_experts, self.mixture.state.active_count),
        )
        return Routing(gates, probabilities, logits, statistics)

    def _check_routing_weights(self, weights: Tensor, input_ids: Tensor) -> None:
        batch, length = input_ids.shape
        sites, experts = len(self.mixture.blocks), len(self.experts)
        check_routing_weights(weights, batch, length, sites, experts)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "this model carries experts, and transformers would write files that reload without them: "
        "call save_pretrained of the DyLoRA_MoE, or unload() first"
    )


def _first_below(site: str, paths: list[str]) -> str:
    return next(path for path in paths if path.startswith(site + "."))
