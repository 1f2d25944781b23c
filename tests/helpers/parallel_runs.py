"""Runs in several processes: what a test lets each of them do, and what it sees of them."""

import hashlib
import os
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from dylora import DyLoRA_MoE
from dylora.base_models import stored_bytes
from dylora.evaluation.passk import sampling
from dylora.evaluation.passk.callback import Benchmark
from dylora.run_config import RunConfig
from dylora.training.callbacks import Callback
from dylora.training.distributed import Processes
from dylora.training.loop import train
from dylora.training.optim import named_parameters, state_by_name
from dylora.training.step import run_step
from runs import asked_of_the_device


class Ended(NamedTuple):
    """What a process knows at the end of a run."""

    losses: list[float]  # of each step
    digest: str  # of all that decides how it would go on
    maturity: list[float]
    validation: list[float]
    step: int
    skipped: int
    experts: int
    layer_bytes: int  # of the weights of the base's layers that lie in this process


class Notes(Callback):
    """The loss of every step, and of every validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validation: list[float] = []

    def after_step(self, run, result):
        self.losses.append(result.loss)

    def on_evaluate(self, run, scores):
        self.validation += [score.loss for score in scores.values()]


class Grow(Callback):
    """Freezes an expert after the third step and adds one after the fifth."""

    def after_step(self, run, result):
        if run.progress.step == 3:
            run.model.experts.freeze(0)
        if run.progress.step == 5:
            run.model.experts.create_expert(rank=3, share=0.2)


class Break(Callback):
    """In the second process the loss of the second step is NaN."""

    def on_start(self, run):
        if run.processes.rank == 1:
            real = run.model.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                output = real(*args, **kwargs)
                if run.model.training and run.progress.step == 1:
                    output.loss = output.loss * float("nan")
                return output

            run.model.forward = forward


class Signal(Callback):
    """In the last process SIGTERM comes after its third step."""

    def after_step(self, run, result):
        if run.progress.step == 3 and run.processes.rank == run.processes.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Hang(Callback):
    """The second process stops for a long time after its second step."""

    def after_step(self, run, result):
        if run.progress.step == 2 and run.processes.rank == 1:
            time.sleep(20)


def digest(run) -> str:
    """SHA-256 of weights, moments, maturity, fractions and random state."""
    hashed = hashlib.sha256()
    tensors = {**named_parameters(run.model), **run.model.maturity._asdict()}
    for name, state in state_by_name(run.optimizer, run.model).items():
        tensors |= {f"{name} {key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {f"f {name}": value for name, value in (run.model.mixture.fractions or {}).items()}
    tensors["random"] = torch.get_rng_state()
    for name, tensor in tensors.items():
        hashed.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def train_here(config: RunConfig, resume: str | None = None, callbacks: tuple = ()) -> Ended:
    """A run, with callbacks of these classes."""
    notes = Notes()
    run = train(config, resume, callbacks=[notes, *(made() for made in callbacks)])
    own = {id(parameter) for _, parameter in run.model.own_parameters()}
    layers: Any = run.model.base.get_submodule("model.layers")
    stored = sum(stored_bytes(p) for p in layers.parameters() if id(p) not in own)
    return Ended(
        notes.losses,
        digest(run),
        run.model.maturity.maturity.tolist(),
        notes.validation,
        run.progress.step,
        run.progress.skipped_steps,
        len(run.model.experts),
        stored,
    )


def train_by_trainer(
    folder: str, rows_per_device: int, resume: str | None, settings: dict[str, Any]
) -> tuple[list[float], bytes]:
    """The losses of four steps of transformers' Trainer, and all that its mixture is then."""
    torch.manual_seed(0)
    model = DyLoRA_MoE.from_base("tiny-code-llama", num_experts=3, r=2, **settings)
    ids = torch.randint(3, 200, (32, 24), generator=torch.Generator().manual_seed(1))
    taken: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    taken |= {"learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model.base,
        TrainingArguments(folder, per_device_train_batch_size=rows_per_device, **taken),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )
    trainer.train(resume_from_checkpoint=resume)
    base: Any = model.base
    tensors = base.save_pretrained.__self__.state_dict()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def train_apart(config: RunConfig) -> Ended:
    """A run whose processes add up gradients, and nothing else."""
    Processes.add_up = lambda self, tensors: tensors
    return train_here(config)


def train_on_a_full_disk(config: RunConfig) -> Ended:
    """A run before which no space is left."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=0)
    return train_here(config)


class Count(Callback):
    """Counts what the third step sends."""

    def __init__(self) -> None:
        self.gradients: list[int] = []
        self.others: list[int] = []

    def on_start(self, run):
        real = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if run.progress.step == 2:
                self.others.append(tensor.nbytes)
            return real(tensor, *args, **kwargs)

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            if run.progress.step == 2:
                self.gradients.append(bucket.buffer().nbytes)
            sent = real(bucket.buffer().div_(run.processes.size), async_op=True)
            return sent.get_future().then(lambda done: done.value()[0])

        dist.all_reduce = all_reduce
        run.replicas.module().register_comm_hook(None, hook)
        self.trainable = run.model.count_parameters()[0]


def count_here(config: RunConfig) -> tuple[list[int], list[int], int]:
    """Of the third step: bytes of each gradient bucket, of each other all-reduce; and how many
    parameters are trained."""
    count = Count()
    train(config, callbacks=[count])
    return count.gradients, count.others, count.trainable


class Ask(Callback):
    """Takes a second step, and sees what it asks the device for."""

    def after_step(self, run, result):
        self.asked = asked_of_the_device(run, lambda: run_step(run))


def ask_here(config: RunConfig) -> list[tuple[str, str]]:
    """What the second of two steps asks the device for."""
    ask = Ask()
    train(config, callbacks=[ask])
    return ask.asked


def benchmark_here(config: RunConfig) -> list[str]:
    """The tasks that this process answers in a run with a benchmark."""
    answered, real = [], sampling.generate

    def generate(model: Any, tokenizer: Any, problems: Any, **settings: Any) -> list[str]:
        answered.extend(problem.task_id for problem in problems)
        return real(model, tokenizer, problems, **settings)

    sampling.generate = generate
    train(config, callbacks=[Benchmark()])
    return answered
