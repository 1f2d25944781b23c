"""What a run will take of memory, from its own step on tensors that have shapes and no values.

A base of any size is made so in seconds, from its configuration alone. The mixture is put on it,
one pass of the largest batch runs forward and backward (torch's FakeTensorMode), and what is held
at a time is added up. Sparse mixing depends on values, and routing by prompts on a library, so all
is counted as mixed densely.
"""

import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from dylora.base_models import BaseSpec, choose_device
from dylora.kernels.cross_entropy import LogitTransform
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.training.optim import make_optimizer, named_parameters, state_like
from dylora.training.run import fit_to_base

# Bytes of a weight in a linear layer; bnb-4bit has a float32 scale for each 64.
QUANTISED = {"bnb-4bit": 0.5 + 4 / 64, "bnb-8bit": 1.0, "torchao-int8": 1.0}


class Estimate(NamedTuple):
    """Bytes that a run takes at most, part by part."""

    process: int  # Python and its libraries; only where tensors lie in the same memory
    base: int
    experts: int  # and routers
    optimizer: int
    gradients: int  # of experts and routers
    activations: int  # what a pass holds at most, forward or backward
    logits: int  # of these, what the head and the loss hold at most

    @property
    def total(self) -> int:
        return sum(self) - self.logits

    def describe(self) -> str:
        """A line for each part."""
        notes = {"logits": " (in a pass's end; part of the activations)"}
        rows = [*self._asdict().items(), ("total", self.total)]
        return "\n".join(
            f"{name:12}{size / 1e9:9.3f} GB{notes.get(name, '')}" for name, size in rows
        )


def estimate(config: RunConfig) -> Estimate:
    """The memory of a run, for batches as large as data.max_length allows.

    Raises ValueError for a base whose configuration cannot be loaded or that cannot be adapted, for
    stages, whose experts come one by one, for DoRA, which needs values, and for an optimizer that
    is not installed.
    """
    if config.stages:
        raise ValueError("a run of stages makes its experts one by one: estimate one without them")
    if config.moe.use_dora:
        raise ValueError("DoRA measures the base's weights: a run with it is not estimated")
    config = fit_to_base(config)
    process = 0
    if choose_device(config.model.device).type == "cpu":
        with suppress(ImportError):  # rows are read with it: 0.1 GB of libraries
            import datasets  # noqa: F401
        process = resident_bytes()
    model = build_fake(config)
    own = [parameter for _, parameter in model.own_parameters()]
    ours = {id(parameter) for parameter in own}
    trained = [p for p in named_parameters(model).values() if p.requires_grad]
    optimizer = make_optimizer(model, config.train)
    moments = [t for p in trained for t in state_like(optimizer, p).values() if t is not None]
    assert config.data.max_length is not None
    activations, logits = pass_bytes(model, config.train.batch_size, config.data.max_length)
    return Estimate(
        process=process,
        base=base_bytes(model.base, ours, config.model.quantization),
        experts=sum(parameter.nbytes for parameter in own),
        optimizer=sum(moment.nbytes for moment in moments if moment.ndim),
        gradients=sum(parameter.nbytes for parameter in trained),
        activations=activations,
        logits=logits,
    )


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turns an error of memory in a step into a ValueError that names the settings to change, and
    what a run takes with them."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, MemoryError) as error:
        found: BaseException = error
    except RuntimeError as error:
        if "not enough memory" not in str(error):  # the words of torch's allocator of a CPU
            raise
        found = error
    line = next(iter(str(found).strip().splitlines()), type(found).__name__)[:200]
    found.__traceback__ = None  # it holds the tensors of the step
    raise ValueError(f"out of memory ({line}). {remedies(config)}") from None


def remedies(config: RunConfig) -> str:
    """What a run takes, and with which settings it takes less."""
    train, data = config.train, config.data
    changes: list[tuple[str, RunConfig]] = []
    if train.batch_size > 1:
        rows, parts = train.batch_size // 2, 2 * train.gradient_accumulation_steps
        less = replace(train, batch_size=rows, gradient_accumulation_steps=parts)
        words = f"train.batch_size {rows} with train.gradient_accumulation_steps {parts}"
        changes.append((words, replace(config, train=less)))
    if not train.gradient_checkpointing:
        less = replace(train, gradient_checkpointing=True)
        changes.append(("train.gradient_checkpointing true", replace(config, train=less)))
    if data.max_length is not None and data.max_length > 1:
        length = data.max_length // 2
        shorter = replace(config, data=replace(data, max_length=length))
        changes.append((f"data.max_length {length}", shorter))
    if config.model.quantization == "none":
        packed = replace(config, model=replace(config.model, quantization="bnb-4bit"))
        changes.append(("model.quantization bnb-4bit", packed))
    try:
        now = estimate(config).total
        told = [(words, estimate(changed).total) for words, changed in changes]
    except ValueError:  # of this run there is no estimate
        return f"The run takes less with {'; with '.join(words for words, _ in changes)}"
    told = [f"{words}: about {size / 1e9:.3g} GB" for words, size in told if size < now]
    return f"The run takes about {now / 1e9:.3g} GB; with {'; with '.join(told)}"


def build_fake(config: RunConfig) -> DyLoRA_MoE:
    """The mixture of a configuration on a base without values."""
    spec = BaseSpec.resolve(config.model.base, config.model.revision)
    options: dict[str, Any] = {"dtype": getattr(torch, config.model.dtype)}
    if config.model.attn_implementation:
        options["attn_implementation"] = config.model.attn_implementation
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = AutoModelForCausalLM.from_config(spec.config(), **options).eval()
    moe = config.moe
    if moe.trains_routers and moe.router_type != "threshold":
        moe = replace(moe, routing_mode="dense")
    model = DyLoRA_MoE(base, moe, base_name=spec.name)
    model._head = _PlainHead()  # type: ignore[assignment]
    if config.train.gradient_checkpointing:
        model.enable_checkpointing()
    return model.train()


class _PlainHead:
    """Says that logits are the head of the last hidden states: to find out takes values."""

    def find(self, base: nn.Module) -> LogitTransform:
        return LogitTransform()


def base_bytes(base: nn.Module, ours: set[int], quantization: str) -> int:
    """Bytes of the base's weights and buffers, those with ids in `ours` left out."""
    size = QUANTISED.get(quantization)
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    packed = set()
    if size is not None:  # all linear layers but the head
        for module in base.modules():
            if isinstance(module, nn.Linear) and module is not head:
                packed.add(id(module.weight))
    total = 0.0
    for parameter in base.parameters():
        if id(parameter) not in ours:
            each = size if size and id(parameter) in packed else parameter.element_size()
            total += each * parameter.numel()
    return int(total) + sum(buffer.nbytes for buffer in base.buffers())


def pass_bytes(model: DyLoRA_MoE, rows: int, length: int) -> tuple[int, int]:
    """What one training pass of `rows` x `length` tokens holds at most beside the weights, and what
    of it its head and loss hold; gradients of experts and routers count as they come."""
    ids_BS = torch.ones(rows, length, dtype=torch.long)
    mask_BS = torch.ones_like(ids_BS)
    if rows > 1:
        mask_BS[0, -1] = 0  # with padding attention is given a mask, which it keeps in each layer
    # No library says yet which expert a prompt is for: all of them mix.
    weights = torch.ones(rows, len(model.experts)) if model.config.routes_prompts else None
    linear: Any = model.base.get_output_embeddings()
    counter = LiveBytes()
    begin = linear.register_forward_pre_hook(lambda *_: counter.mark())
    try:
        with counter, warnings.catch_warnings():
            # torch looks for a gradient of every real tensor that meets one without values.
            warnings.filterwarnings("ignore", "The .grad attribute")
            output = model(
                ids_BS, mask_BS, labels=ids_BS, keep_logits=False, routing_weights=weights
            )
            logits = counter.since_mark()
            assert output.loss is not None
            output.loss.backward()
    finally:
        begin.remove()
    return counter.peak, logits


class LiveBytes(TorchDispatchMode):
    """Within this context: bytes of the tensors that operations have made and that are still held.

    What was there before does not count, nor what a kernel allocates and frees inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._marked: int | None = None
        self._since = 0
        self._known: set[int] = set()  # storages, by address of their object

    def mark(self) -> None:
        """From here on, the first time: see `since_mark`."""
        if self._marked is None:
            self._marked = self._since = self.live

    def since_mark(self) -> int:
        """How far it rose above what was held at the mark."""
        return self._since - (self._marked or 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in _storages(output):
            key, size = id(storage), storage.nbytes()
            if key not in self._known | given:
                self._known.add(key)
                self.live += size
                self.peak, self._since = max(self.peak, self.live), max(self._since, self.live)
                weakref.finalize(storage, self._release, key, size)
        return output

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
