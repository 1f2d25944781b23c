"""A model's own files: experts as PEFT adapters, routers with maturity, one description.

The layout is DESIGN section 4's; `storage` knows the formats, this file knows the model.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dylora import injection
from dylora.maturity import ExpertMaturity
from dylora.storage.checkpoint import FORMAT_VERSION
from dylora.storage.peft_format import (
    PeftAdapter,
    adapter_config,
    read_adapter,
    read_tensors,
    scaling_of,
    write_adapter,
)

if TYPE_CHECKING:
    from dylora.model import DyLoRA_MoE


def write_model(model: "DyLoRA_MoE", folder: Path) -> None:
    """The files of `save_pretrained`, without the atomic folder around them.

    Raises ValueError while the routers are detached: the files could not be loaded.
    """
    learns = model.config.use_moe_routing and model.config.router_type != "fixed"
    if learns and not any(True for _ in model.router_parameters()):
        raise ValueError("the routers are detached: attach_router() before saving")
    targets = injection.shortest_targets(model.base, list(model.injection.adapters))
    conv = any(isinstance(model.base.get_submodule(p), Conv1D) for p in model.injection.adapters)
    for expert in range(model.config.expert_count):
        config = adapter_config(
            r=model.config.r,
            lora_alpha=model.config.lora_alpha,
            target_modules=targets,
            base_model=model.base_name,
            revision=model.base_revision,
            lora_dropout=model.config.lora_dropout,
            use_rslora=model.config.use_rslora,
            fan_in_fan_out=conv,
        )
        adapter = PeftAdapter(config, model.expert_weights(expert))
        write_adapter(folder / "peft_adapters" / f"expert_{expert}", adapter)
    tensors = {f"router.{name}": p.detach().cpu() for name, p in model.router_parameters()}
    tensors |= {f"maturity.{name}": v for name, v in model.maturity._asdict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "router.safetensors")
    description = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": model.base_name,
        "base_revision": model.base_revision,
        "moe": model.config.to_dict(),
        "sites": model.site_names,
        "projections": list(model.injection.adapters),
        "experts": [
            {
                "name": f"expert_{expert}",
                "state": "active",
                "rank": model.config.r,
                "alpha": model.config.lora_alpha,
                "maturity": round(float(model.maturity.maturity[expert]), 6),
                "skill": None,
            }
            for expert in range(model.config.expert_count)
        ],
        "training": model.training_record,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


@torch.no_grad()
def load_model(model: "DyLoRA_MoE", folder: Path) -> None:
    """Fill experts, routers and maturity from a folder.

    Raises ValueError, naming file and tensor, where the folder does not fit the model.
    """
    for expert in range(model.config.expert_count):
        source = folder / "peft_adapters" / f"expert_{expert}"
        config, weights = read_adapter(source)
        if scaling_of(config) != model.config.scaling:
            raise ValueError(
                f"{source} has the scale {scaling_of(config)}, but the checkpoint's config.json "
                f"{model.config.scaling}"
            )
        _check_same_keys(source, set(weights), set(model.injection.adapters))
        for path, adapter in model.injection.adapters.items():
            A, B = weights[path]
            _copy(adapter.lora_A[expert], A, f"{source}: {path}.lora_A")
            _copy(adapter.lora_B[expert], B.T, f"{source}: {path}.lora_B")
    file = folder / "router.safetensors"
    tensors = read_tensors(file)
    routers = {f"router.{name}": p for name, p in model.router_parameters()}
    maturity = {f"maturity.{name}": v for name, v in model.maturity._asdict().items()}
    _check_same_keys(file, set(tensors), {*routers, *maturity})
    for name, parameter in routers.items():
        _copy(parameter, tensors[name], f"{file}: {name}")
        if not parameter.isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite")
    for name, value in maturity.items():  # fast and slow may be NaN: before the first token
        if tensors[name].shape != value.shape:
            raise ValueError(f"{file}: {name} has shape {list(tensors[name].shape)}")
    share = tensors["maturity.maturity"]
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"{file}: maturity.maturity is {share.tolist()}, but must be in [0, 1]")
    model.set_maturity(
        ExpertMaturity(**{name.partition(".")[2]: tensors[name] for name in maturity})
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
