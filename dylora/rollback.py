"""How experts are changed: without autograd, and wholly or not at all.

What a change replaces (stacks, rows of routers, moments) is kept by reference until it is done;
only small tensors are copied.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dylora.kernels.common import float32_defaults
from dylora.mixture import Mixture

Method = TypeVar("Method", bound=Callable[..., Any])


def without_autograd(method: Method) -> Method:
    """No graph is made; nor are parameters of inference mode, which training could not use, or of
    another default precision."""
    return float32_defaults()(torch.inference_mode(False)(torch.no_grad()(method)))


def all_or_nothing(method: Method) -> Method:
    """A change by an ExpertManager, without autograd; one that raises has changed nothing."""

    @functools.wraps(method)
    def change(manager: Any, *args: Any, **settings: Any) -> Any:
        before, paused = Snapshot(manager.mixture, manager.optimizer), list(manager.paused)
        try:
            return method(manager, *args, **settings)
        except BaseException:
            before.restore()
            manager.paused = paused
            raise

    return without_autograd(change)  # type: ignore[return-value]


@contextmanager
def restoring_values(mixture: Mixture, experts: Collection[int]) -> Iterator[None]:
    """Values are written to these experts within; after an error all have those of before.

    Raises ValueError where what all share has changed and some were not written: they are to stay.
    """
    before = [(p, p.detach().clone()) for _, p in mixture.named_expert_parameters()]
    try:
        yield
        if not set(mixture.live) <= set(experts):
            _check_shared_values(mixture, {id(parameter): values for parameter, values in before})
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise
    finally:
        mixture.state.forget_kept()


def _check_shared_values(mixture: Mixture, before: dict[int, Tensor]) -> None:
    for path, adapter in mixture.adapters.items():
        for name, parameter in adapter.named_parameters(recurse=False):
            if not torch.equal(parameter, before[id(parameter)]):
                raise ValueError(
                    f"{path}: {name} would change for experts that are not given, as with share_A "
                    "all have one: load every expert together, or keep it"
                )


class Snapshot:
    """Experts, routers, maturity and optimizer as they are now.

    Values of parameters are not kept: a change has to write in place last, or to new tensors.
    """

    def __init__(self, mixture: Mixture, optimizer: Optimizer | None):
        self._mixture, self._optimizer = mixture, optimizer
        self._kept = mixture.maturity, mixture.fractions
        self._skills = dict(mixture.skill_library.skills) if mixture.skill_library else {}
        self._rows = [(row, vars(row) | {"history": list(row.history)}) for row in mixture.table]
        roots = [mixture.state, *mixture.adapters.values()]
        roots += [router for _, router in mixture.routers()]
        self._modules = [(m, _parts(m)) for root in roots for m in root.modules()]
        self._buffers = [(b, b.clone()) for b in mixture.state.buffers()]
        self._parameters = [(p, p.requires_grad, p.grad) for _, p in mixture.own_parameters()]
        groups = [] if optimizer is None else optimizer.param_groups
        self._groups = [list(group["params"]) for group in groups]
        self._moments = {} if optimizer is None else dict(optimizer.state)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo everything since."""
        mixture, optimizer = self._mixture, self._optimizer
        mixture.maturity, mixture.fractions = self._kept
        mixture.table[:] = [row for row, _ in self._rows]
        for row, values in self._rows:
            vars(row).update(values)
        for module, parts in self._modules:
            vars(module).update(parts)
        for buffer, values in self._buffers:
            buffer.copy_(values)
        for parameter, trains, gradient in self._parameters:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        if optimizer is not None:
            for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
                group["params"] = parameters
            optimizer.state.clear()
            optimizer.state.update(self._moments)
        if mixture.skill_library:
            mixture.skill_library.skills = self._skills
            mixture.skill_library.update_router()
        mixture.state.forget_kept()


def _parts(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, its dictionaries of tensors and submodules copied."""
    own = ("_parameters", "_buffers", "_modules")
    return vars(module) | {name: dict(vars(module)[name]) for name in own}
