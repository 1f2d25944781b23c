"""What a pass over text runs, and on which tensors.

Names say little of a base: a tower for images has a q_proj as well, a kernel may read a weight past
its projection, and an indexer's queries and keys give numbers of tokens. So a few tokens go through
the base once, before anything is added to it.

Shape letters: B batch, S sequence, D input width, O output width, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylora.base_models import quantization_of
from dylora.kernels.common import evaluation_mode

BATCH, LENGTH = 2, 3  # unlike, so that [S, B, D] is not taken for [B, S, D]
EVERY_TOKEN = ((BATCH, LENGTH), (BATCH * LENGTH,))  # leading axes of what holds every token


class Trace(NamedTuple):
    """What one pass ran, by the paths of modules."""

    widths: dict[str, int]  # block -> D of the hidden states that enter it, in the pass's order
    maps_tokens: dict[str, bool]  # projection that ran -> whether it maps each token, and no more
    outputs: set[str]  # projections whose output is their block's
    choosers: set[str]  # blocks that give numbers of tokens and nothing else: indexers


def is_projection(module: nn.Module) -> bool:
    """nn.Linear, its quantised subclasses, and GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def projection_sizes(module: Any) -> tuple[int, int]:
    """Input and output width; never from weight.shape, which quantised layers pack."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def device_of(base: nn.Module, path: str) -> torch.device:
    """Where a module with weights is computed.

    Raises ValueError for weights on the meta device that nothing brings to another.
    """
    module: Any = base.get_submodule(path)
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate's, which loads offloaded weights
    if getattr(hook, "execution_device", None) is None:
        raise ValueError(f"{path} has no weights (device meta): load the base before injecting")
    return torch.device(hook.execution_device)


def decoder_of(base: PreTrainedModel, blocks: list[str]) -> PreTrainedModel:
    """The innermost model that holds all blocks, which callers use without the head."""
    return [
        module
        for path, module in base.named_modules()
        if isinstance(module, PreTrainedModel)
        and all(block.startswith(f"{path}." if path else "") for block in blocks)
    ][-1]


def trace_base(base: PreTrainedModel) -> Trace:
    """Run six tokens through the base in evaluation mode; nothing of it changes.

    Raises ValueError for a base that cannot be adapted whatever its projections are: one that is
    no plain causal LM, has no weights, or cannot compute text alone.
    """
    _check_kind(base)
    projections = {path: module for path, module in base.named_modules() if is_projection(module)}
    for path in projections:
        device_of(base, path)
    recorder, handles = _Recorder(), []
    for path, module in projections.items():
        handles.append(module.register_forward_hook(partial(recorder.of_projection, path)))
    for path in dict.fromkeys(path.rpartition(".")[0] for path in projections):
        block = base.get_submodule(path)
        before, after = partial(recorder.before, path), partial(recorder.after, path)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        ids_BS = _tokens(base)
        devices = [ids_BS.device] if ids_BS.is_cuda else []
        with torch.inference_mode(False), evaluation_mode(base), torch.random.fork_rng(devices):
            logits_BSV = base(input_ids=ids_BS, use_cache=False).logits
    except Exception as error:  # whatever a model raises that wants more than text
        line = next(iter(str(error).strip().splitlines()), "")[:200]
        raise ValueError(
            f"{type(base).__name__} cannot compute {BATCH} x {LENGTH} tokens of text: "
            f"{type(error).__name__}: {line}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    _check_causal(base, logits_BSV)
    return recorder.trace()


def _check_kind(base: PreTrainedModel) -> None:
    """Raises ValueError for a base whose loss or layers are not what they seem."""
    if base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is an encoder and a decoder: give a causal LM")
    for path, module in base.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"{path or 'the base'} is a layer of PEFT: give the model without its adapters "
                "(unload() or merge_and_unload()), and import those (run.py import)"
            )
    if getattr(base.config, "slow_but_exact", False) and base.config.pretraining_tp > 1:
        raise ValueError(
            "with slow_but_exact BLOOM reads weights past its projections, so their updates would "
            "be lost: load the base with slow_but_exact=False"
        )


def _check_causal(base: PreTrainedModel, logits_BSV: Tensor) -> None:
    """The two rows begin with the same token, so that their first logits are equal.

    Raises ValueError where they are not, by more than rounding.
    """
    if isinstance(logits_BSV, FakeTensor):  # shapes alone: nothing to compare
        return
    first_V, other_V = logits_BSV[:, 0].float()
    tolerance = max(1e-4, 4 * torch.finfo(logits_BSV.dtype).eps)
    if quantization_of(base) == "bnb-8bit":  # its rounding depends on the whole batch
        tolerance = 0.1
    if (first_V - other_V).abs().max() > tolerance * first_V.abs().max():
        raise ValueError(
            f"{type(base).__name__} is not causal: the logits of a token depend on those after it. "
            "Load it as a decoder (is_decoder=True in its configuration), or give another base"
        )


class _Recorder:
    """Forward hooks that note what modules get and give."""

    def __init__(self) -> None:
        self._widths: dict[str, int] = {}
        self._mapped: dict[str, Tensor] = {}  # the latest output of a projection
        self._maps_tokens: dict[str, bool] = {}
        self._given: dict[str, list[Tensor]] = {}  # the latest outputs of a block

    def of_projection(
        self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        width, width_out = projection_sizes(module)
        x = args[0] if args else None
        self._maps_tokens[path] = (
            self._maps_tokens.get(path, True)
            and isinstance(x, Tensor)
            and isinstance(output, Tensor)
            and x.shape[:-1] in EVERY_TOKEN
            and x.shape[-1] == width
            and output.shape == (*x.shape[:-1], width_out)
        )
        if isinstance(output, Tensor):
            self._mapped[path] = output

    def before(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[:-1] in EVERY_TOKEN:
            self._widths.setdefault(path, x.shape[-1])

    def after(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._given[path] = list(_tensors(output))

    def trace(self) -> Trace:
        outputs = {
            path
            for path, y in self._mapped.items()
            for given in self._given.get(path.rpartition(".")[0], [])
            if _place(y) == _place(given) and y.numel() == given.numel()
        }
        choosers = {
            path
            for path, given in self._given.items()
            if given and not any(tensor.is_floating_point() for tensor in given)
        }
        return Trace(self._widths, self._maps_tokens, outputs, choosers)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies; also of one without values."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _tokens(base: PreTrainedModel) -> Tensor:
    """Ids [B, S] of tokens that stand for text: two rows that differ after the first."""
    embedding: Any = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embedding)
    special = set(_special_ids(base.config.to_dict()))
    count = len(embedding.weight)
    ordinary = [token for token in range(count // 2, count) if token not in special][:LENGTH]
    first, one, other = (ordinary * LENGTH or [0] * LENGTH)[:LENGTH]
    rows = [[first, one, one], [first, other, other]]
    return torch.tensor(rows, device=device_of(base, path))


def _special_ids(config: Any) -> Iterator[int]:
    """Ids that a configuration, or one in it, gives a meaning of their own."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index")) and value is not None:
            yield from value if isinstance(value, list) else [value]
