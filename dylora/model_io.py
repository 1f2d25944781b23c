"""A mixture's own files: experts as PEFT adapters, routers with maturity, one description.

The layout is DESIGN section 4's; `storage` knows the formats, this file knows the model.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dylora.adapters import targets
from dylora.base_models import quantization_of
from dylora.experts import ExpertManager
from dylora.fields import shown
from dylora.mixture import Mixture
from dylora.routing.maturity import UNKNOWN_AT_FIRST, fields_in, from_fields
from dylora.skills import SkillLibrary
from dylora.storage import schema
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.model_card import CARD, mixture_card
from dylora.storage.peft_config import adapter_config
from dylora.storage.peft_format import MAGNITUDE, PeftAdapter, write_adapter
from dylora.storage.tensors import fill
from dylora.storage.text_hashes import without_hashes, write_hashes


def write_model(mixture: Mixture, folder: Path) -> None:
    """The files of `save_pretrained`, without the atomic folder around them.

    Raises ValueError for what could not be loaded: while the routers are detached, and for names
    that no reader takes.
    """
    if mixture.config.is_learned and not any(True for _ in mixture.routers()):
        raise ValueError("the routers are detached: attach_router() before saving")
    for expert in mixture.live:
        name = mixture.table[expert].name
        write_adapter(folder / schema.ADAPTERS / name, expert_adapter(mixture, expert))
    tensors = {f"router.{name}": p.detach().cpu() for name, p in mixture.router_parameters()}
    tensors |= {f"maturity.{name}": v for name, v in mixture.maturity._asdict().items()}
    # A merge adds two of them up.
    tensors[schema.FIXED_WEIGHTS] = mixture.state.fixed_weights_E.cpu()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / schema.ROUTER_FILE)
    if shifts := bias_shifts(mixture):
        save_file({k: v.cpu().contiguous() for k, v in shifts.items()}, folder / schema.SHIFTS_FILE)
    if mixture.skill_library:
        mixture.skill_library.save(folder / schema.SKILLS_FILE)
    experts = [asdict(row) for row in mixture.table]
    for index, record in enumerate(experts):  # for the reader; router.safetensors is the truth
        record["maturity"] = round(float(mixture.maturity.maturity[index]), 6)
    description = {
        "format_version": schema.FORMAT_VERSION,
        "base_model_name_or_path": mixture.base_name,
        "base_revision": mixture.base_revision,
        "base_fingerprint": mixture.base_fingerprint,
        "quantization": quantization_of(mixture.base),
        "moe": mixture.config.to_dict(),
        "sites": mixture.site_names,
        "projections": list(mixture.adapters),
        "experts": experts,
        "training": without_hashes(mixture.training_record),
    }
    write_hashes(folder, mixture.training_record)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / CARD).write_text(mixture_card(description), encoding="utf-8")
    try:
        schema.read_description(folder)
    except ValueError as error:
        raise ValueError(f"this mixture could not be read again ({error})") from error


def expert_adapter(mixture: Mixture, expert: int) -> PeftAdapter:
    """One expert as PEFT keeps it; biases are the base's with the expert's shift."""
    config, row = mixture.config, mixture.table[expert]
    paths = list(mixture.adapters)
    projections = {path: mixture.base.get_submodule(path) for path in paths}
    first = mixture.adapters[paths[0]]
    own = first.peft_settings()
    if any(isinstance(module, Conv1D) for module in projections.values()):
        own["fan_in_fan_out"] = True
    settings = adapter_config(
        r=row.rank,
        lora_alpha=row.alpha,
        target_modules=targets.shortest_targets(mixture.base, paths),
        base_model_name_or_path=mixture.base_name,
        revision=mixture.base_revision,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        peft_type=first.PEFT_TYPE,
        **own,
    )
    magnitudes = {}
    for path, adapter in mixture.adapters.items():
        if (magnitude := adapter.expert_tensors(expert).get(MAGNITUDE)) is not None:
            magnitudes[path] = magnitude
    biases = {}
    for name, shift in bias_shifts(mixture).items():
        path, _, whose = name.rpartition("/")
        if whose in (row.name, "all"):
            base_bias: Tensor = mixture.base.get_submodule(path).bias  # type: ignore[assignment]
            biases[path] = base_bias.detach().float() + shift.to(base_bias.device)
    return PeftAdapter(settings, mixture.expert_weights(expert), magnitudes, biases)


def bias_shifts(mixture: Mixture) -> dict[str, Tensor]:
    """<path of a module>/<expert's name, or all> -> the trained shift of its bias [O]."""
    shifts = {}
    for path, adapter in mixture.adapters.items():
        for stack in adapter.stacks:
            if getattr(stack, "lora_bias", None) is not None:
                for place, expert in enumerate(stack.experts):
                    shifts[f"{path}/expert_{expert}"] = stack.lora_bias.detach()[place]
    for path, module in mixture.biases.items():
        shifts[f"{path}/all"] = module.shift.detach()
    return shifts


@torch.no_grad()
def load_model(experts: ExpertManager, checkpoint: Checkpoint) -> None:
    """Fill experts, routers and maturity from a checkpoint.

    Raises ValueError, naming file and tensor, where the folder does not fit the mixture.
    """
    folder, mixture = checkpoint.path, experts.mixture
    followed = [checkpoint.description["sites"][0], mixture.site_names[0]]
    one_leads = mixture.config.is_learned and mixture.config.router_scope != "site"
    if one_leads and followed[0] != followed[1]:
        raise ValueError(
            f"{checkpoint.file}: its blocks follow the router at {followed[0]}, but {followed[1]} "
            "runs before it and decides in what is built now: it answers and is exported as it is, "
            "and cannot be trained further"
        )
    try:
        experts.load_state_dict(checkpoint.experts)
    except ValueError as error:
        raise ValueError(f"{checkpoint.file}: {error}") from None
    for expert in mixture.live:
        source = folder / schema.ADAPTERS / mixture.table[expert].name
        fill_expert(mixture, expert, checkpoint.adapter(expert), source)
    if shifts := bias_shifts(mixture):
        file, tensors = folder / schema.SHIFTS_FILE, checkpoint.bias_shifts()
        _check_same_keys(file, set(tensors), set(shifts))
        fill(shifts, tensors, f"{file}: ")
    _load_routers(mixture, folder / schema.ROUTER_FILE, checkpoint.router_tensors())
    mixture.skill_library = None
    if (folder / schema.SKILLS_FILE).exists():
        SkillLibrary.read(folder / schema.SKILLS_FILE, mixture)


def fill_expert(mixture: Mixture, expert: int, files: PeftAdapter, source: Path) -> None:
    """Give an expert the tensors of an adapter, but for biases.

    Raises ValueError, naming the folder `source`, where they are not of its form.
    """
    _check_same_keys(source, set(files.weights), set(mixture.adapters))
    for path, adapter in mixture.adapters.items():
        if files.type != adapter.PEFT_TYPE:
            raise ValueError(f"{source} is a {files.type}, config.json has {adapter.PEFT_TYPE}")
        row = mixture.table[expert]
        found, own = files.scale(path), adapter.scaling(row.rank, row.alpha)
        if abs(found - own) > 1e-6 * own:  # the buffer is float32
            raise ValueError(f"{source}: {path} has the scale {found}, config.json {own}")
        try:
            adapter.load_expert(expert, files.tensors(path))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _load_routers(mixture: Mixture, file: Path, tensors: dict[str, Tensor]) -> None:
    weights_E = mixture.state.fixed_weights_E
    targets: dict[str, Tensor] = {f"router.{name}": p for name, p in mixture.router_parameters()}
    fields = fields_in(tensors)
    maturity = {f"maturity.{name}" for name in fields}
    _check_same_keys(file, set(tensors), {*targets, *maturity, schema.FIXED_WEIGHTS})
    fill(targets | {schema.FIXED_WEIGHTS: weights_E}, tensors, f"{file}: ")
    if bool((weights_E < 0).any()):
        raise ValueError(
            f"{file}: {schema.FIXED_WEIGHTS} is {shown(weights_E.tolist())}, but must be at least 0"
        )
    state = {name: tensors[f"maturity.{name}"] for name in fields}
    shares = ("maturity", "born", "start_progress")
    for name, value in state.items():  # of that shape, as config.json was held against it
        if value.dtype != torch.float64:
            raise ValueError(f"{file}: maturity.{name} is {value.dtype}, expected torch.float64")
        most = 1.0 if name in shares else math.inf
        unseen = value.isnan() if name in UNKNOWN_AT_FIRST else False
        if not bool((unseen | ((value >= 0) & (value <= most) & ~value.isinf())).all()):
            raise ValueError(
                f"{file}: maturity.{name} is {shown(value.tolist())}, but must be in [0, {most:g}]"
            )
    mixture.set_maturity(from_fields(state))


def _check_same_keys(source: Path, found: set[str], expected: set[str]) -> None:
    for name in sorted(expected - found):
        raise ValueError(f"{source}: {name} is missing")
    for name in sorted(found - expected):
        raise ValueError(f"{source}: {name} fits nothing in this model")
