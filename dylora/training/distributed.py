"""Several processes that train one model, on PyTorch's own engine.

torchrun starts them. All draw the same rows of a step and cut them into the same micro-batches, of
which each computes its share. DistributedDataParallel adds up the gradients of experts and routers
while backward runs, and one all-reduce more adds up what else a step measures. So all processes
hold the same numbers, bit for bit, and decide alike, and a run in another number of processes is
the same run up to the order of its sums. The first process writes all files.

With `ddp` each process holds the base. With `fsdp2` each holds a part of every weight of it, and a
layer is gathered when it runs; experts and routers are whole in each.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dylora.base_models import choose_device
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # for what the first process does alone and takes long
LAYER = re.compile(r".*?\.\d+(?=\.|$)")  # the path of a layer, at the beginning of a block's


class Processes:
    """All processes of a run, seen from one of them. A single one talks to nobody.

    Every method but `share` is called by all of them, at the same place of the run.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.replicas: list[Replicas] = []  # that are let go before the processes part
        self._patient: Any = None  # a group of processes that wait for long
        self._failed = False  # and all know it

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, parts: int) -> list[int]:
        """Which of a step's micro-batches, sorted by length, are computed here: as many as in each
        process, and about as many tokens."""
        period = 2 * self.size
        mine = (self.rank, period - 1 - self.rank)
        return [part for part in range(parts) if part % period in mine]

    def add_up(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all processes, by one all-reduce."""
        if self.size == 1:
            return tensors
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        parts = together.split([tensor.numel() for tensor in tensors])
        return [p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

    def together(self, work: Callable[[], T], *, patiently: bool = False) -> T:
        """What `work` gives here, once it has ended well in all processes.

        Where it failed in some, the first of these raises the error, and the others leave with
        SystemExit (2). patiently: it may take longer than train.process_timeout.
        """
        if self.size == 1:
            return work()
        if patiently and self._patient is None:
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            if self._failed:  # in a call within this one
                raise
            error = raised
        failed: list[Any] = [None] * self.size
        dist.all_gather_object(failed, error is not None, self._patient if patiently else None)
        self._failed = any(failed)
        if self._failed:
            if error is not None and failed.index(True) == self.rank:
                raise error
            raise SystemExit(2)
        return result

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, in all of them. See `together`; patiently."""
        found: list[Any] = [self.together(work, patiently=True)] * self.size
        if self.size > 1:
            dist.all_gather_object(found, found[0])
        return found

    def from_first(self, work: Callable[[], T], *, patiently: bool = False) -> T:
        """What `work` gives in the first process, which alone does it. See `together`."""
        result = [self.together(lambda: work() if self.is_first else None, patiently=patiently)]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]


ALONE = Processes()


@contextmanager
def join_processes(config: RunConfig) -> Iterator[Processes]:
    """All processes of a run, for as long as it lasts. Those beside the first are silent.

    Raises ValueError where train.parallel does not fit the way in which this process was started.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    check_parallel(config, size)
    if config.train.parallel == "none":
        yield ALONE
        return
    device = choose_device(config.model.device)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=config.train.process_timeout)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts processes again: in it are the addresses of the last.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    processes = Processes(rank, size)
    try:
        with open(os.devnull, "w") as nowhere:
            silent = nullcontext() if processes.is_first else redirect_stdout(nowhere)
            with silent:
                yield processes
    except Exception:
        raise  # the others may be gone: there is nobody to say goodbye to
    except BaseException:
        _part(processes)
        raise
    else:
        _part(processes)


def _part(processes: Processes) -> None:
    """End the group of processes.

    A reducer of DistributedDataParallel that is freed later frees the group with it, while it holds
    Python's lock, and then gloo's threads and it wait for each other for ever.
    """
    for replicas in processes.replicas:
        replicas.release()
    gc.collect()  # the wrapper is in a cycle with its hooks
    dist.destroy_process_group()


def check_parallel(config: RunConfig, size: int) -> None:
    """Raises ValueError where a run cannot be done in this number of processes."""
    train, parallel = config.train, config.train.parallel
    if parallel == "none":
        if size > 1:
            raise ValueError(
                f"{size} processes were started, but train.parallel is none, so that each would "
                "train a model of its own: set train.parallel ddp or fsdp2"
            )
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"train.parallel is {parallel}, which torchrun starts: torchrun --nproc-per-node 2 "
            "run.py train …"
        )
    if train.gradient_accumulation_steps % size and not config.data.packing:
        raise ValueError(
            f"train.gradient_accumulation_steps is {train.gradient_accumulation_steps}, but {size} "
            f"processes share the forward passes of a step: make it a multiple of {size} (with a "
            "smaller train.batch_size a step has the same rows)"
        )
    if ":" in config.model.device:
        raise ValueError(
            f"model.device is {config.model.device!r}, but each process takes a device of its own: "
            "leave the number out"
        )
    unfit = {
        "model.quantization": config.model.quantization != "none",
        "moe.use_dora": config.moe.use_dora,
        "eval.benchmark_strategy": config.eval.benchmark_strategy != "none",
    }
    for name in [name for name, used in unfit.items() if used and parallel == "fsdp2"]:
        raise ValueError(
            f"{name} needs whole weights of the base, but train.parallel is fsdp2: "
            "set train.parallel ddp"
        )


def shard_base(model: DyLoRA_MoE) -> None:
    """Leave each process its part of the base's weights (FSDP2), gathered layer by layer as they
    are used."""
    from torch.distributed.fsdp import fully_shard

    own = {parameter for _, parameter in model.own_parameters()}
    for name in layers_of(model):
        fully_shard(model.base.get_submodule(name), ignored_params=own)
    fully_shard(model.base, ignored_params=own)


def layers_of(model: DyLoRA_MoE) -> list[str]:
    """The base's layers that have experts, by the paths of their modules."""
    return sorted({match[0] for name in model.site_names if (match := LAYER.match(name))})


class Replicas:
    """A model in several processes, whose gradients after a step's last pass are those of the
    passes of all."""

    def __init__(self, model: DyLoRA_MoE, processes: Processes) -> None:
        self._model, self._processes = model, processes
        self._wrapped: DistributedDataParallel | None = None
        self._form: tuple[Any, ...] = ()  # of the model, when it was wrapped
        if processes.size > 1:
            processes.replicas.append(self)

    def release(self) -> None:
        """Let go of what talks to the other processes."""
        self._wrapped, self._form = None, ()

    def module(self) -> nn.Module:
        """What computes the passes of a step; made anew where experts have come or gone, were
        frozen or switched off. Its gradients must be unset."""
        if self._processes.size == 1:
            return self._model
        model = self._model
        trained = [p for _, p in model.own_parameters() if p.requires_grad]
        # A prompt leaves experts out, and so does switching them off.
        partly = model.config.routes_prompts or not model.mixture.state.all_active
        form = (partly, *map(id, trained))
        if self._wrapped is None or form != self._form:
            own = {id(parameter) for _, parameter in model.own_parameters()}
            others = [name for name, p in model.named_parameters() if id(p) not in own]
            others += [name for name, _ in model.named_buffers()]  # equal in all, as computed alike
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
            self._wrapped = DistributedDataParallel(model, find_unused_parameters=partly)
            self._form = form
        return self._wrapped

    def passing(self, *, last: bool) -> AbstractContextManager[Any]:
        """For one pass of `module`, forward and backward; gradients are added up in the last."""
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()
