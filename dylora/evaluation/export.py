"""`run.py export`: experts, a frozen mixture of them, or the base with either inside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from dylora.base_models import (
    EMBEDDED_BASES,
    choose_device,
    load_tokenizer,
    quantization_of,
    resolve_base,
)
from dylora.config import MoELoraConfig, Quantization
from dylora.evaluation.static_mixture import Comparison, compare, measured_weights, read_text
from dylora.integrations.compatibility import READERS, Incompatibility, find_incompatibilities
from dylora.integrations.folder_export import (
    EXPORT_FILE,
    check_no_checkpoint,
    check_outside,
    export_checkpoint,
    export_checkpoint_mixture,
)
from dylora.integrations.peft_export import export_mixture
from dylora.integrations.site_weights import site_weights
from dylora.integrations.static_weights import TOKEN_DEPENDENT, static_weights
from dylora.model import DyLoRA_MoE
from dylora.storage.checkpoint import read_description
from dylora.storage.folders import check_place, write_folder
from dylora.storage.peft_format import CONFIG_FILE, WEIGHTS_FILE
from dylora.storage.safe_io import read_json
from dylora.storage.tensors import read_tensors

MEASURED = "measured"


class ExportOptions(NamedTuple):
    """What the command was asked for."""

    checkpoint: str
    out: str
    form: Literal["experts", "mixture", "merged"] = "experts"
    expert: str | None = None  # all or a number; None: all, or with merged none
    weights: list[float] | Literal["measured"] | None = None
    text: str | None = None  # file to measure on
    text_tokens: int = 16384
    portable: bool = False
    dequantize: bool = False
    base: str | None = None  # to load instead of the checkpoint's own
    base_name: str | None = None  # to write into adapter_config.json
    dtype: str = "auto"
    quantization: Quantization | None = None


def run_export(options: ExportOptions) -> list[Path]:
    """Write what was asked for, print the folders and what readers will say; the folders."""
    if options.form == "experts":
        folders = export_checkpoint(
            options.checkpoint,
            options.out,
            options.expert or "all",
            options.portable,
            options.base_name,
        )
    elif options.form == "mixture":
        folders = [_export_mixture(options)]
    else:
        folders = [_export_merged(options)]
    for folder in folders:
        print(folder)
    if options.form != "merged":
        for line in [*reader_lines(folders), *base_lines(folders[0])]:
            print(line)
    return folders


def reader_lines(folders: Sequence[Path]) -> list[str]:
    """What each reader refuses, misreads or needs of these adapters."""
    found: dict[Incompatibility, list[str]] = {}
    for folder in folders:
        said = find_incompatibilities(
            read_json(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)
        )
        for complaint in said:
            found.setdefault(complaint, []).append(folder.name)
    lines = [
        f"{reader} {kind} {what}" + (f" ({', '.join(names)})" if len(names) < len(folders) else "")
        for (reader, kind, what), names in found.items()
    ]
    silent = [name for name in READERS if not any(complaint.reader == name for complaint in found)]
    return [*lines, f"no complaint of {', '.join(silent)}"] if silent else lines


def base_lines(folder: Path) -> list[str]:
    """Where an adapter names a base that other readers could not find by that name."""
    name = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if name is None:
        return ["no base is named: give the base to the reader, or --base_name here"]
    if name in EMBEDDED_BASES:
        return [
            f"peft does not know the base {name!r} by name: give it the model, as in "
            f"PeftModel.from_pretrained(dylora.base_models.load_base({name!r}), "
            f"{str(folder)!r}), or "
            f"export with --base_name {resolve_base(name)}"
        ]
    return []


def _export_mixture(options: ExportOptions) -> Path:
    _check(options)
    if options.text is None and isinstance(options.weights, list):  # files are enough
        return export_checkpoint_mixture(
            options.checkpoint, options.out, options.weights, options.base_name
        )
    model = _load(options)
    weights_NE, record = _resolve_weights(model, options)
    return export_mixture(
        model, options.out, weights_NE, options.base_name, checkpoint=options.checkpoint, **record
    )


def _export_merged(options: ExportOptions) -> Path:
    _check(options)
    name, revision = _base_of(options)
    tokenizer = load_tokenizer(name, revision)  # before the long part
    model = _load(options)
    dtype, quantised = model.base.dtype, quantization_of(model.base) != "none"
    record: dict[str, Any] = {"kind": "merged", "checkpoint": options.checkpoint, "base": name}
    if options.expert is not None:
        weights_NE = static_weights(model, int(options.expert))
        record["expert"] = int(options.expert)
    else:
        weights_NE, measured = _resolve_weights(model, options)
        record |= {"weights": dict(zip(model.site_names, weights_NE.tolist(), strict=True))}
        record |= measured
    merged = model.merge_and_unload(weights=weights_NE, dequantize=options.dequantize)
    if quantised:
        print(f"the quantised base is dequantised, in {str(dtype).removeprefix('torch.')}")

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / EXPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

    out = Path(options.out)
    write_folder(out, write)
    return out


def _check(options: ExportOptions) -> None:
    """Refuse a bad --out, and weights that cannot be right, before a base is loaded."""
    description = read_description(Path(options.checkpoint))
    check_outside(Path(options.checkpoint), Path(options.out))
    check_no_checkpoint(Path(options.out))
    check_place(Path(options.out))
    if isinstance(options.weights, list):
        live = [entry["state"] != "retired" for entry in description["experts"]]
        site_weights(options.weights, len(description["sites"]), live)
        if abs(sum(options.weights) - 1) > 1e-6:
            total = f"{sum(options.weights):g}"
            print(f"note: the weights add up to {total}, not 1, and are used as they are")
    learned = MoELoraConfig.from_dict(description["moe"]).is_learned
    if options.weights is None and options.expert is None and learned:
        raise ValueError(TOKEN_DEPENDENT)


def _base_of(options: ExportOptions) -> tuple[str, str | None]:
    """Name and revision of the base to load. Raises ValueError where nothing names one."""
    description = read_description(Path(options.checkpoint))
    kept = description["base_model_name_or_path"]
    name = options.base or kept
    if name is None:
        raise ValueError(f"{options.checkpoint}/config.json names no base model: give --base")
    return name, description["base_revision"] if name == kept else None


def _load(options: ExportOptions) -> DyLoRA_MoE:
    name, revision = _base_of(options)
    dtype: Any
    if options.dtype == "auto":
        try:
            config = AutoConfig.from_pretrained(resolve_base(name), revision=revision or "main")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the base {name!r}: {error}") from error
        dtype = config.get_text_config().dtype or torch.float32
    else:
        dtype = getattr(torch, options.dtype)
    return DyLoRA_MoE.from_pretrained(
        options.checkpoint,
        name,
        dtype=dtype,
        device=choose_device("auto"),
        quantization=options.quantization,
    ).eval()


def _resolve_weights(model: DyLoRA_MoE, options: ExportOptions) -> tuple[Tensor, dict[str, Any]]:
    """The weights [N, E], and what a text says of them, printed and for the record."""
    if options.text is None:
        assert options.weights != MEASURED  # the command asks for a text then
        return static_weights(model, weights=options.weights), {}
    tokenizer = load_tokenizer(*_base_of(options))
    longest = getattr(model.base.config.get_text_config(), "max_position_embeddings", 512)
    text = read_text(options.text, tokenizer, options.text_tokens, min(512, longest or 512))
    if options.weights == MEASURED:
        weights_NE = static_weights(model, weights=measured_weights(model, text))
        print(f"mean gates over {text.tokens:,} tokens of {text.source}, by site:")
        for site, row in zip(model.site_names, weights_NE.tolist(), strict=True):
            print(f"  {site:30} {' '.join(f'{value:.3f}' for value in row)}")
    else:
        weights_NE = static_weights(model, weights=options.weights)
    found = compare(model, weights_NE, text)
    print(comparison_line(found))
    return weights_NE, {"text": {"file": text.source, **found._asdict()}}


def comparison_line(found: Comparison) -> str:
    """What freezing costs."""
    return (
        f"static against routed: KL {found.kl:.5f} nats a token, loss {found.static_loss:.4f} "
        f"against {found.routed_loss:.4f} ({found.static_loss - found.routed_loss:+.4f}), mean of "
        f"{found.tokens:,} predicted tokens"
    )
