"""DyLoRA_MoE: a frozen causal LM whose projections carry a routed mixture of LoRA experts.

Shape letters: B batch, S sequence, N sites, E experts, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylora.base_models import BaseSpec, LoadOptions, require_gradients
from dylora.config import MoELoraConfig
from dylora.experts import ExpertManager
from dylora.fields import nearest
from dylora.integrations import merge
from dylora.integrations.base_methods import prepare_base
from dylora.integrations.static_weights import Weights
from dylora.kernels import cross_entropy
from dylora.kernels.cross_entropy import LogitTransform, LogitTransformFinder, capture_head_input
from dylora.mixture import Mixture
from dylora.model_io import load_model, write_model
from dylora.model_methods import MixtureMethods
from dylora.outputs import DyLoRAOutput, collect_routing
from dylora.routing import losses
from dylora.routing.gating import check_routing_weights
from dylora.routing.losses import BatchTotals, Observation
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import check_place, write_folder
from dylora.storage.hub import push_folder, push_saved


class DyLoRA_MoE(MixtureMethods):
    """A frozen base with injected experts. `base` stays an ordinary transformers model."""

    def __init__(
        self,
        base: PreTrainedModel,
        config: MoELoraConfig,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        saved: dict[str, Any] | None = None,
    ):
        """Inject experts into `base`, in place: those of `saved`, a config.json, or else those
        that the configuration begins with. See `from_base` and `from_pretrained`."""
        super().__init__()
        self.base = base
        names = {"base_name": base_name, "base_revision": base_revision}
        self.mixture = Mixture(base, config, **names, saved=saved)
        self.training = base.training
        self._head = LogitTransformFinder()
        try:
            self.experts = ExpertManager(self.mixture, saved["experts"] if saved else None)
        except ValueError:  # a base that was given is as it was
            self.mixture.unload()
            raise
        prepare_base(self.experts)

    @classmethod
    def from_base(
        cls,
        base: str | PreTrainedModel,
        config: MoELoraConfig | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> "DyLoRA_MoE":
        """Fresh experts on a base given by name or as a model (which is changed in place).

        Args:
            config: the mixture; by default all of its fields' defaults.
            options: fields of the configuration (r=8, num_experts=4), which go before `config`'s;
                and how a base given by name is loaded: dtype (float32), device ("cpu"), device_map,
                offload_folder, attn_implementation, quantization ("none").

        Raises ValueError when the base cannot be loaded or trained through or nothing in it can be
        adapted, and for an option that is neither, naming the nearest.
        """
        config, options = _settings(config, options)
        if isinstance(base, PreTrainedModel):
            _refuse_options(options)
            require_gradients(base)
            return cls(base, config, base_revision=revision)
        if not isinstance(base, str):
            raise ValueError(
                f"base is a {type(base).__name__}, but must be a name, a path or a causal LM: "
                "unwrap it first (a PeftModel by unload(), a compiled model by _orig_mod)"
            )
        spec = BaseSpec.resolve(base, revision, **options)
        model = spec.load()
        require_gradients(model)
        return cls(model, config, base_name=spec.name, base_revision=revision)

    # One pass

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        totals: BatchTotals | None = None,
        keep_logits: bool = True,
        target_positions: Tensor | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> DyLoRAOutput:
        """One pass of the base with the experts mixed in.

        Args:
            input_ids, attention_mask, labels: [B, S]; labels are -100 where nothing is learned
                and are shifted here, as in transformers. A mask of four dimensions goes to the base
                as it is; every token counts in the statistics then.
            routing_weights: [B, E], [B, S, E] or [B, S, N, E]; gates instead of the routers'
                decisions. Raises ValueError for another shape, negative or non-finite values, and
                a weight of a retired expert.
            totals: how this batch counts in a larger one; the default is its own means.
            keep_logits: False, with labels: compute logits at the positions with a target alone, in
                chunks, and return none. The same loss, without a tensor of [B, S, V].
            target_positions: [N] indices into B·S of those, where known: finding them takes time.
            token_mask: [B, S], 0 on padding, where attention_mask does not say it: packed rows.
            kwargs: for the base's forward, such as inputs_embeds [B, S, D], past_key_values,
                use_cache and output_hidden_states.
        """
        state, token_mask = self.mixture.state, attention_mask if token_mask is None else token_mask
        if routing_weights is not None:
            given: Any = kwargs.get("inputs_embeds") if input_ids is None else input_ids
            self._check_routing_weights(routing_weights, given)
        head = None if labels is None or keep_logits else self._find_head()
        kwargs |= {"use_cache": kwargs.get("use_cache", False), "return_dict": True}
        linear: Any = self.base.get_output_embeddings()
        capturing = nullcontext() if head is None else capture_head_input(linear)
        with state.requesting(routing_weights, labels, token_mask) as decisions, capturing as seen:
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        routing = None
        if not state.mine.disabled:
            routing = collect_routing(self.mixture, decisions, token_mask)
        result = DyLoRAOutput.of_base(output, routing)
        if labels is None:
            return result

        hidden = None if head is None or seen is None else seen.hidden
        logits, token_losses = cross_entropy.losses_of_pass(
            output.logits, head, linear, hidden, labels, target_positions, label_smoothing
        )
        # A router has nothing to learn while there is a single expert to choose.
        learns = self.config.trains_routers and state.routed_count > 1
        statistics = routing.statistics if routing and learns else None
        loss, parts = losses.combined_loss(
            token_losses, labels, statistics, self.config, totals, self.mixture.choices
        )
        seen_losses = token_losses.detach()
        return replace(result, loss=loss, logits=logits, losses=parts, token_losses=seen_losses)

    def _find_head(self) -> LogitTransform | None:
        with self.disable_adapters():
            return self._head.find(self.base)

    def generate(self, *args: Any, routing_weights: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' generate, KV cache included; routing_weights [B, E] hold for all tokens."""
        if routing_weights is not None:
            if routing_weights.ndim != 2:
                shape = list(routing_weights.shape)
                raise ValueError(f"generate takes routing_weights of [B, E], got {shape}")
            names = ("input_ids", "inputs", "inputs_embeds")
            given = [kwargs[name] for name in names if kwargs.get(name) is not None]
            self._check_routing_weights(routing_weights, next(iter([*args, *given]), None))
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

    # Training by hand

    def observe(
        self,
        output: DyLoRAOutput | Observation,
        labels: Tensor | None = None,
        *,
        steps: int,
        step: int | None = None,
        target_tokens: float | None = None,
        rate: float = 1.0,
    ) -> None:
        """After an optimizer step: update the experts' maturity, their counts of steps, and the
        fractions of the balance losses (`carried_fractions`).

        Args:
            output, labels: of the step's pass. Of an accumulated batch: its passes'
                `output.observation(labels)`, added up, and no labels.
            steps: optimizer steps of the whole run.
            step: the number of this one, from 1; by default one more than in the last call.
            target_tokens: what the whole run trains on; by default `steps` times this step's.
            rate: the step's learning rate as a share of its peak; a low one settles no loss.

        Raises ValueError for a step outside of the run.
        """
        step = self.experts.step + 1 if step is None else step
        if not 1 <= step <= steps:
            raise ValueError(f"step is {step}, but must be from 1 to steps ({steps})")
        if isinstance(output, DyLoRAOutput):
            if labels is None:
                raise ValueError("labels are missing: give those of the pass")
            output = output.observation(labels)
        tokens = target_tokens or max(float(output.target_tokens), 1.0) * steps
        self.mixture.observe(output, progress=step / steps, run_tokens=tokens, rate=rate)
        self.experts.count_step(step, step / steps)

    def merge_and_unload(
        self, expert: int | None = None, weights: Weights | None = None, *, dequantize: bool = False
    ) -> PreTrainedModel:
        """Write one expert or a constant mixture into the base's weights and return the base.

        Args:
            weights: one an expert, [E], or one a site and expert, [N, E], as gates. Neither these
                nor an expert: the weights of router_type fixed.
            dequantize: make a quantised base whole, in float32 for the sum, then as it was loaded.

        This object is of no use after. Raises ValueError, changing nothing, where routing depends
        on the token and neither is given, and for a quantised base otherwise.
        """
        return merge.merge_and_unload(self.mixture, expert, weights, dequantize=dequantize)

    # Files

    def save_pretrained(
        self, folder: str | Path, overwrite: bool = False, push_to_hub: str | None = None
    ) -> None:
        """Write experts, routers and configuration; never a base weight.

        Layout: peft_adapters/expert_<i>/ in PEFT's format, router.safetensors, config.json,
        manifest.json, skill_library.safetensors and text_hashes.bin if it has them. With
        `overwrite` an earlier mixture in `folder` is replaced; a training checkpoint never. Raises
        FileExistsError otherwise, ValueError for a name that could not be read again. Then it is
        pushed to the repository user/name that `push_to_hub` names.
        """
        check_place(Path(folder), overwrite=overwrite, over_mixture=True)
        write_folder(Path(folder), lambda temporary: write_model(self.mixture, temporary))
        if push_to_hub is not None:
            push_folder(Path(folder), push_to_hub)

    push_to_hub = push_saved

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | Checkpoint,
        base: str | PreTrainedModel | BaseSpec | None = None,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
        **options: Unpack[LoadOptions],
    ) -> "DyLoRA_MoE":
        """A mixture from a folder written by `save_pretrained` or by training.

        Args:
            folder: or a run's (its best checkpoint), or user/name of the hub, at `revision`.
            base: the base by name or as a model; by default the one the folder names, which is not
                to be trusted: `run.py info` says which it is. No code that comes with a base is
                ever run.
            allow_other_base: take a base whose size or weights differ from what the mixture was
                trained on; without it, that is refused.
            options: as in `from_base`; quantization by default as in training.

        Raises ValueError or FileNotFoundError naming the file when the folder is not whole or
        does not fit the base.
        """
        checkpoint = Checkpoint.open(folder, revision=revision, allow_other_base=allow_other_base)
        saved, name, revision = checkpoint.description, None, None
        if isinstance(base, PreTrainedModel):
            _refuse_options(options)
        else:
            spec = base if isinstance(base, BaseSpec) else checkpoint.base_spec(base, **options)
            base, name, revision = spec.load(), spec.name, spec.revision
        model = cls(base, checkpoint.config, base_name=name, base_revision=revision, saved=saved)
        try:
            load_model(model.experts, checkpoint)
            checkpoint.check_base(model.base_fingerprint)
        except Exception:
            model.unload()  # a base that was given is as it was
            raise
        model.base_fingerprint["tokenizer"] = checkpoint.base_fingerprint.get("tokenizer")
        model.training_record = saved["training"]
        return model

    def _check_routing_weights(self, weights: Tensor, given: Tensor | None) -> None:
        if given is None:
            raise ValueError("routing_weights need input_ids or inputs_embeds beside them")
        batch, length = given.shape[:2]
        live = [row.state != "retired" for row in self.experts.table]
        check_routing_weights(weights, batch, length, len(self.mixture.blocks), live)


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what says how to load a base that is loaded already."""
    for name in options:
        raise ValueError(f"{name} is given, but the base is a model, which is loaded already")


def _settings(
    config: MoELoraConfig | None, options: dict[str, Any]
) -> tuple[MoELoraConfig, dict[str, Any]]:
    """The configuration with those of the options that are fields of it, and the others."""
    own = {item.name for item in fields(MoELoraConfig)}
    loading = set(LoadOptions.__annotations__)
    for name in options:
        if name not in own | loading:
            known = nearest(name, sorted(own | loading))
            raise ValueError(f"from_base has no option {name!r}{known}")
    changes = {name: options[name] for name in options if name in own}
    config = MoELoraConfig(**changes) if config is None else replace(config, **changes)
    return config, {name: options[name] for name in options if name in loading}
