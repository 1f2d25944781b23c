"""Routing by the prompt: one decision a sequence, in closed form, held for all its tokens.

The mean of what enters the first routed block over the prompt's tokens is compared with the
skills of a library by a linear discriminant (Fisher 1936); an expert's probability is that of the
skills it serves. Nothing that is adapted lies before that block, so no expert can change a
decision, and there is nothing to train. With `router_scope: running_mean` each token is routed by
the mean up to itself.

Shape letters: B batch, S sequence, E experts, K skills, D hidden width.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.config import MoELoraConfig
from dylora.kernels.common import at_least_float32
from dylora.routing.gating import RouterOutput, expand_override, top_k_mask
from dylora.routing.prompt_tokens import since_begin
from dylora.routing.router import Router, Shape
from dylora.routing.state import Pass, RoutingState, held_of


class PromptRule(NamedTuple):
    """What a library knows of prompts, as tensors of any precision."""

    weight_DK: Tensor  # of the discriminant
    bias_K: Tensor
    mean_KD: Tensor  # of each skill's prompts
    precision_KD: Tensor  # 1 / (variance · D · the distance that is far from this skill)
    experts: list[int | None]  # which serves each skill; None: none does

    def log_probabilities(self, prompts: Tensor) -> Tensor:
        """Of every skill, equally likely beforehand, [..., D] -> [..., K] in nats."""
        return self.scores(prompts).log_softmax(-1)

    def scores(self, prompts: Tensor) -> Tensor:
        """The discriminant, [..., D] -> [..., K], up to what all skills have in common."""
        # From their middle, as the sums would cancel in float32.
        middle_D = self.mean_KD.mean(0)
        return (prompts - middle_D) @ self.weight_DK + (self.bias_K + middle_D @ self.weight_DK)

    def distances(self, prompts: Tensor) -> Tensor:
        """From each skill, [..., D] -> [..., K]; above 1 it is far from that skill."""
        return ((prompts[..., None, :] - self.mean_KD) ** 2 * self.precision_KD).sum(-1)


TENSORS = ("weight_DK", "bias_K", "mean_KD", "precision_KD")


class PromptRouter(Router):
    """The rule of the model's skill library, which sets it; none of its tensors is trained."""

    def __init__(self, width: int, config: MoELoraConfig, device: torch.device | None = None):
        super().__init__(width, config, device)
        self.experts: list[int | None] = []
        for name in TENSORS:
            self.register_buffer(name, torch.zeros(0, device=device), persistent=False)

    def set_rule(self, rule: PromptRule | None) -> None:
        """Decide by this from the next prompt on; None: nothing is known."""
        self.experts = [] if rule is None else list(rule.experts)
        for name in TENSORS:
            value = torch.zeros(0) if rule is None else getattr(rule, name).float()
            setattr(self, name, value.to(getattr(self, name).device))

    @property
    def rule(self) -> PromptRule:
        """The one that is set."""
        return PromptRule(**{name: getattr(self, name) for name in TENSORS}, experts=self.experts)

    def forward(self, x: Tensor, pass_: Pass) -> RouterOutput:
        """x [B, S, D] -> gates, probabilities and their logarithms [B, S, E].

        Raises ValueError where several experts are enabled and none of them serves a known skill.
        """
        state = pass_.state
        served = [e is not None and state.active[e] and e >= state.shared for e in self.experts]
        if not any(served):
            if state.routed_count > 1:
                raise ValueError(
                    f"router_scope is {self.config.router_scope!r}, but no enabled expert "
                    "serves a skill: add skills to model.skill_library, naming their experts"
                )
            alone = state.routed_E.to(x.device, torch.float32).expand(*x.shape[:2], -1)
            used = tuple(e for e, own in enumerate(state.active) if own and e >= state.shared)
            return RouterOutput(alone, alone, alone.log(), None, used)
        used = None
        with torch.autocast(x.device.type, enabled=False):
            if self.config.router_scope == "running_mean":
                gates, chances = self._decide(running_mean(x, pass_), served, state)
            else:
                held = pass_.held
                if "gates" not in held:
                    gates, chances = self._decide(_prompt_mean(x, pass_), served, state)
                    held["gates"], held["probabilities"] = gates, chances
                    held["used"] = _used(gates)
                    if held.get("probing"):
                        raise _Decided
                gates = _for_sequence(held["gates"], x, pass_.sequences)
                chances = _for_sequence(held["probabilities"], x, pass_.sequences)
                used = held.get("used")
        mature = None if self.config.routing_mode == "dense" else [True] * state.num_experts
        return RouterOutput(gates, chances, chances.log(), mature, used)

    def _decide(
        self, prompts: Tensor, served: list[bool], state: RoutingState
    ) -> tuple[Tensor, Tensor]:
        """Gates and probabilities [..., E] for the means of prompts, [..., D].

        Skills of experts that are off do not compete; those that no expert serves do, and what
        they get is nobody's. A prompt that is far from every skill has no gate in evaluation.
        """
        device = prompts.device
        silent = [e is not None and not own for e, own in zip(self.experts, served, strict=True)]
        scores = self.rule.scores(prompts)
        scores = scores.masked_fill(torch.tensor(silent, device=device), -torch.inf)
        columns = [state.num_experts if e is None else e for e in self.experts]
        chances = prompts.new_zeros(*prompts.shape[:-1], state.num_experts + 1)
        index = torch.tensor(columns, device=device).expand_as(scores)
        chances = chances.scatter_add(-1, index, scores.softmax(-1))
        gates = chances
        if self.config.routing_mode != "dense":
            gates = chances * top_k_mask(chances, self.config.top_k_experts)
            gates = gates / gates.sum(-1, keepdim=True)
        if not self.training:
            known = self.rule.distances(prompts).amin(-1, keepdim=True) <= 1
            gates = gates * known
        return gates[..., :-1], chances[..., :-1]

    # There are no rows of experts.

    def add_expert(self, share: float, active_E: Tensor) -> dict[str, nn.Parameter]:
        return {}

    def resize(self, experts: int) -> None:
        pass

    def merge_experts(self, i: int, j: int, shares: tuple[float, float]) -> None:
        pass

    @staticmethod
    def state_spec(config: MoELoraConfig, experts: int) -> dict[str, Shape]:
        return {}


ROUTER = PromptRouter


def _used(gates_BE: Tensor) -> tuple[int, ...] | None:
    """The experts that any prompt of a batch has chosen; None where a trace cannot look."""
    if torch.compiler.is_compiling():
        return None
    return tuple((gates_BE > 0).any(0).nonzero()[:, 0].tolist())


def _prompt_mean(x: Tensor, pass_: Pass) -> Tensor:
    """[B, S, D] -> [B, D], over the tokens of the prompt; within `generate` no candidates count. Of
    packed rows one for each sequence."""
    mask = x.new_ones(x.shape[:2]) if pass_.prompt_mask is None else pass_.prompt_mask
    length = pass_.held.get("length", x.shape[1])
    x, mask = at_least_float32(x[:, :length]), mask[:, :length].to(x.device)
    if pass_.sequences is not None:
        sequence_T = pass_.sequences.flatten().to(x.device)
        weights_T = mask.flatten().to(x.dtype)
        count = int(sequence_T[-1]) + 1
        x_TD = rearrange(x, "b s d -> (b s) d") * weights_T[:, None]
        sums = x.new_zeros(count, x.shape[-1]).index_add(0, sequence_T, x_TD)
        tokens = weights_T.new_zeros(count).index_add(0, sequence_T, weights_T)
        return sums / tokens.clamp_min(1)[:, None]
    weights = (mask / mask.sum(-1, keepdim=True).clamp_min(1)).to(x.dtype)
    return torch.einsum("bsd,bs->bd", x, weights)


def running_mean(x: Tensor, pass_: Pass) -> Tensor:
    """[B, S, D] -> [B, S, D]: of each token's own text up to it, padding and BOS left out."""
    mask = x.new_ones(x.shape[:2]) if pass_.prompt_mask is None else pass_.prompt_mask
    mask_BS1 = mask.to(x.device, torch.float32)[..., None]
    own = at_least_float32(x) * mask_BS1
    total = since_begin(own.cumsum(1), own, pass_.sequences)
    count = since_begin(mask_BS1.cumsum(1), mask_BS1, pass_.sequences)
    held = pass_.held
    if "total" in held:
        total, count = total + held["total"], count + held["count"]
    held["total"], held["count"] = total[:, -1:].detach(), count[:, -1:]
    return total / count.clamp_min(1)


def normed_running_mean(x: Tensor, pass_: Pass) -> Tensor:
    """The running mean of x [B, S, D], each token's brought to mean 0 and variance 1."""
    mean = running_mean(x, pass_)
    return F.layer_norm(mean, mean.shape[-1:], eps=1e-10)  # 1e-5 is much for raw embeddings


def _for_sequence(held_BE: Tensor, x: Tensor, sequences: Tensor | None) -> Tensor:
    """A decision [B, E], of packed rows one a sequence, for every token of x [B, S, D], [B, S, E].

    Raises ValueError where the sequences are not those that it was made for.
    """
    if sequences is not None:
        return held_BE.to(x.device)[sequences[:, -x.shape[1] :].to(x.device)]
    if len(x) % len(held_BE):
        raise ValueError(
            f"this cache holds the routing of {len(held_BE)} prompts, but {len(x)} sequences go on "
            "with it: begin with the prompts of all of them"
        )
    return expand_override(held_BE.to(x.device), 0, len(x), x.shape[1])


class _Decided(Exception):
    """Ends a pass that was only to decide."""


class PromptedGenerate:
    """`generate` of a base whose tokens are routed by their text: says where the prompts end.

    So tokens that assisted decoding guesses do not count as the prompt's, and a prompt that comes
    in pieces (`prefill_chunk_size`) is read as a whole before the first of them.
    """

    def __init__(self, base: PreTrainedModel, state: RoutingState, *, running: bool):
        self.base, self.state, self.running = base, state, running

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate."""
        base_class: Any = type(self.base)
        mine, before = self.state.mine, self.state.mine.generation
        mine.generation = {}
        try:
            mine.generation = self._prompts(inputs, args, kwargs)
            return base_class.generate(self.base, inputs, *args, **kwargs)
        finally:
            mine.generation = before

    def _prompts(
        self, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What all passes of one call hold; None: nothing, as each reads the text from its
        beginning. Raises ValueError for what cannot be followed."""
        settings: Any = args[0] if args else kwargs.get("generation_config")

        def asked(name: str) -> Any:
            given = kwargs.get(name, getattr(settings, name, None))
            return getattr(self.base.generation_config, name, None) if given is None else given

        guesses = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        guessed = kwargs.get("assistant_model") or any(map(asked, guesses))
        if self.running and (guessed or (asked("num_beams") or 1) > 1):
            raise ValueError(
                "routing by the running mean cannot follow beams or assisted decoding, which take "
                "tokens back: decode without, or train with another router_scope"
            )
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        ids = next((value for value in (inputs, *given) if value is not None), None)
        cache, mask, prompts = kwargs.get("past_key_values"), kwargs.get("attention_mask"), {}
        # With such a cache the base gets no mask of tokens.
        fixed = getattr(cache, "is_compileable", None) or asked("cache_implementation")
        fixed = fixed not in (None, False, "dynamic", "offloaded", "quantized")
        if self.running and fixed and (mask is None or not bool(mask.all())):
            raise ValueError(
                "routing by the running mean cannot tell padding with a static cache: give texts "
                "of one length and an attention_mask of ones, or leave the cache out"
            )
        begun = cache is not None and int(cache.get_seq_length()) > 0
        if begun and cache is not None and (held := held_of(cache)) is not None:
            return held
        if ids is None or self.running:
            return None if self.running and asked("use_cache") is False else prompts
        prompts["length"] = ids.shape[1]
        if begun or fixed or asked("prefill_chunk_size"):
            self._decide(ids, mask, prompts)
        return prompts

    @torch.no_grad()
    def _decide(self, ids: Tensor, mask: Tensor | None, prompts: dict[str, Any]) -> None:
        """Read whole prompts, as far as the first routed block."""
        name = "input_ids" if ids.ndim == 2 else "inputs_embeds"
        self.state.mine.generation = prompts
        prompts["probing"] = True
        with contextlib.suppress(_Decided):
            self.base(**{name: ids}, attention_mask=mask, use_cache=False)
        del prompts["probing"]
