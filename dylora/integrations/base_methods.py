"""What an injected base does otherwise where transformers' own method would be wrong.

`save_pretrained` writes the mixture, never a base weight, with a model.safetensors beside it from
which `load_state_dict` (and so a Trainer that resumes) restores it exactly. Checkpointing of
activations is never reentrant, and recomputes a pass with its own inputs.
"""

import importlib
import importlib.util
import json
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.experts import ExpertManager
from dylora.integrations.base_pass import BasePass
from dylora.integrations.reference import EXPERTS
from dylora.model_io import write_model
from dylora.routing.maturity import ExpertMaturity
from dylora.storage.folders import write_into_folder

WEIGHTS_FILE = "model.safetensors"  # the name by which trainers find what they resume
OWN = "dylora"  # is in the name of every parameter and buffer that was added to a base
TABLE = "dylora.experts"  # bytes of JSON
OVERRIDDEN = ("save_pretrained", "gradient_checkpointing_enable", "activation_checkpointing_enable")
ATTRIBUTES = (EXPERTS, "dylora_pass", *OVERRIDDEN)
CALLBACKS = "transformers.trainer_callback"  # takes a second to import, and whoever trains does


def prepare_base(experts: ExpertManager) -> None:
    """Make an injected base fit for trainers."""
    base: Any = experts.mixture.base
    base.dylora_pass = BasePass(experts.mixture)
    setattr(base, EXPERTS, experts)
    BaseMethods(experts)
    if CALLBACKS in sys.modules:
        _install()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _install() -> None:
    importlib.import_module("dylora.integrations.trainer").install()


class _WhenImported(MetaPathFinder):
    """Calls `_install` once somebody has imported transformers' callbacks."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != CALLBACKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_install(module: Any) -> None:
                execute(module)
                _install()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


class BaseMethods:
    """Methods that stand on the instance of a base, and its hooks for a state dict."""

    def __init__(self, experts: ExpertManager):
        self.experts = experts
        self.loaded: dict[str, Tensor] | None = None  # of the state dict that is being loaded
        base: Any = experts.mixture.base
        base.save_pretrained = self.save_pretrained
        base.gradient_checkpointing_enable = self.enable_checkpointing
        base.activation_checkpointing_enable = self.enable_checkpointing
        experts.mixture.handles += [
            base.register_load_state_dict_pre_hook(self.before_load),
            base.register_load_state_dict_post_hook(self.after_load),
            self,
        ]

    def remove(self) -> None:
        """Give the base its own methods back; as a handle of the mixture."""
        for name in ATTRIBUTES:
            vars(self.experts.mixture.base).pop(name, None)

    # Files

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the mixture, as a Trainer asks a base to; files of others in the folder stay.

        state_dict is not read: a base's has the frozen weights, which are never written.
        Raises ValueError for push_to_hub, and FileExistsError where a run's checkpoint lies there.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: save first, and push the mixture with the model's own")

        def write_files(folder: Path) -> None:
            write_model(self.experts.mixture, folder)
            save_file(self.state_dict(), folder / WEIGHTS_FILE, metadata={"format": "pt"})

        if is_main_process:
            write_into_folder(Path(save_directory), write_files)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the mixture as tensors, by their names in the base's state dict, and what
        that has not: maturity in float64, fractions of the balance losses, the table of experts."""
        mixture = self.experts.mixture
        state = {name: v for name, v in mixture.base.state_dict().items() if OWN in name}
        state |= {f"{OWN}.maturity.{name}": v for name, v in mixture.maturity._asdict().items()}
        state |= {f"{OWN}.fractions.{name}": v for name, v in (mixture.fractions or {}).items()}
        table = json.dumps(self.experts.state_dict()).encode()
        state[TABLE] = torch.frombuffer(bytearray(table), dtype=torch.uint8)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def before_load(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Before the base loads a state dict: make the experts that it has tensors of.

        Raises ValueError where its table of experts cannot be read.
        """
        base: Any = self.experts.mixture.base
        if base.dylora_pass.observer is not None:
            base.dylora_pass.observer.before_pass()
        names = [name for name in state_dict if name.startswith(f"{prefix}{OWN}.")]
        self.loaded = None
        if f"{prefix}{TABLE}" not in names:
            return
        self.loaded = {name.removeprefix(prefix): state_dict.pop(name) for name in names}
        self.experts.load_state_dict(json.loads(bytes(self.loaded.pop(TABLE).tolist())))

    def after_load(self, module: nn.Module, keys: Any) -> None:
        """After it: the rest of the mixture, without a base weight being missed.

        Raises ValueError where the experts are of another form than this mixture's.
        """
        if self.loaded is None:
            self._follow_state()
            return
        loaded, self.loaded, mixture = self.loaded, None, self.experts.mixture
        wrong = [name for name in (*keys.missing_keys, *keys.unexpected_keys) if OWN in name]
        if wrong:
            raise ValueError(
                f"the saved mixture does not fit this one ({wrong[0]} and {len(wrong) - 1} more): "
                "build it with the configuration that it was trained with"
            )
        keys.missing_keys.clear()  # the base's own: they are never written
        fields = {name: loaded[f"{OWN}.maturity.{name}"] for name in ExpertMaturity._fields}
        mixture.set_maturity(ExpertMaturity(**fields))
        start = f"{OWN}.fractions."
        fractions = {n.removeprefix(start): v for n, v in loaded.items() if n.startswith(start)}
        mixture.fractions = fractions or None

    def _follow_state(self) -> None:
        """Take over what a state dict without a table says of maturity and of who is enabled."""
        mixture, state = self.experts.mixture, self.experts.mixture.state
        maturity_E = state.maturity_E.cpu().double()
        if not torch.equal(maturity_E.float(), mixture.maturity.maturity.float()):
            mixture.set_maturity(mixture.maturity._replace(maturity=maturity_E))
        enabled = [expert for expert in mixture.live if state.active[expert]]
        if enabled and enabled != [e for e in mixture.live if mixture.table[e].enabled]:
            self.experts.activate(*enabled, shared=False)

    # Activations

    def enable_checkpointing(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Arguments as of transformers' method. Raises ValueError for reentrant checkpointing, in
        which the routers would get no gradient, and for another context_fn.
        """
        settings = dict(gradient_checkpointing_kwargs or activation_checkpointing_kwargs or {})
        if settings.get("use_reentrant") or "context_fn" in settings:
            raise ValueError(
                f"activations of a mixture cannot be checkpointed with {settings}: leave out "
                "use_reentrant=True, which gives routers no gradient, and context_fn"
            )
        contexts = self.experts.mixture.state.checkpoint_contexts
        settings |= {"use_reentrant": False, "context_fn": contexts}
        base: Any = self.experts.mixture.base
        # transformers 5.23 renamed the method; 5.17 has the old name only.
        enable = getattr(base, "_activation_checkpointing_enable", None)
        if enable is None:
            PreTrainedModel.gradient_checkpointing_enable(base, settings, *args, **kwargs)
        else:
            enable(settings, *args, **{"every_n_layers": 1, "offload": False} | kwargs)
        # transformers asks for gradients of the embeddings here, as reentrant checkpointing needs.
        # Ours does not, and they would cost a backward pass below the first adapted layer.
        base.disable_input_require_grads()
