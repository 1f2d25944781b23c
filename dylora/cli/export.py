"""`run.py export`: experts, a frozen mixture of them, or the base with either inside."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dylora.cli.options import BaseOptions, CheckpointOptions
from dylora.config import Quantization
from dylora.fields import option
from dylora.run_config import Precision

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from dylora.integrations.compatibility import Incompatibility
    from dylora.model import DyLoRA_MoE
    from dylora.storage.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportOptions(BaseOptions, CheckpointOptions):
    """Write experts as PEFT adapters, a mixture as one, or a model with either inside."""

    out: str = option(metavar="DIR")
    """Folder that gets one folder per expert, or becomes the one that is written."""
    expert: str | None = option(None, metavar="all|N")
    """all (without --merge the default), or a number."""
    portable: bool = False
    """Fold the scale into the tensors, for readers that ignore rslora and alpha."""
    mixture: bool = False
    """Write a mixture of constant weights as one LoRA."""
    merge: bool = False
    """Write a plain model with an expert, or a mixture of constant weights, inside."""
    weights: list[float] | Literal["measured"] | None = option(None, metavar="W,W,...|measured")
    """One weight an expert; measured: each site's mean gates over --text. By default those of
    router_type fixed."""
    text: str | None = option(None, metavar="FILE")
    """Text (.txt, or rows with text or with instruction and output in .jsonl) on which to measure
    weights, and what a constant mixture loses against routing."""
    text_tokens: int = option(16384, least=2)
    """Most tokens of it."""
    base_name: str | None = None
    """What adapter_config.json shall name as the base."""
    dtype: Precision | Literal["auto"] = "auto"
    """Precision of the base that is merged or measured; auto: as it is stored."""
    quantization: Quantization | None = None
    """How the base is stored, by default as in training: see model.quantization."""
    dequantize: bool = False
    """With --merge: make a quantised base whole."""
    overwrite: bool = False
    """Replace an earlier export in --out."""

    @property
    def form(self) -> Literal["experts", "mixture", "merged"]:
        """What is written."""
        return "mixture" if self.mixture else "merged" if self.merge else "experts"

    @property
    def loads_base(self) -> bool:
        """Whether more is needed than the files of the experts."""
        measures = self.text is not None or not isinstance(self.weights, list)
        return self.merge or (self.mixture and measures)

    def __post_init__(self) -> None:
        expert, merge = self.expert, self.merge
        given = bool(self.weights or self.text)
        of_base = [] if self.loads_base else ["base", "dtype", "quantization"]
        unused = [name for name in of_base if getattr(self, name) != getattr(ExportOptions, name)]
        if expert is not None and expert != "all" and not expert.isdecimal():
            raise ValueError(f"--expert is {expert!r}, but must be all or an expert's number")
        refused = (
            (self.mixture and merge, "--mixture writes an adapter and --merge a model: give one"),
            (given and self.form == "experts", "--weights and --text need --mixture or --merge"),
            (self.mixture and expert is not None, "--mixture takes all experts: give their "
             "--weights instead of --expert"),
            (merge and expert == "all", "--merge takes one --expert, or the --weights of a "
             "mixture, not all"),
            (merge and self.portable, "--portable is a form of adapters, and --merge writes a "
             "model"),
            (given and expert is not None, "--expert and --weights exclude each other, and --text "
             "belongs to weights"),
            (self.weights == "measured" and self.text is None, "--weights measured needs a --text "
             "FILE to measure on"),
            (self.dequantize and not merge, "--dequantize needs --merge"),
            (merge and self.base_name, "--base_name is a field of adapters, and --merge writes a "
             "model"),
            (self.mixture and self.portable, "--portable is a form of single experts, and "
             "--mixture writes one LoRA of all: leave it out"),
            (self.text is None and self.text_tokens != ExportOptions.text_tokens, "--text_tokens "
             "is of a --text FILE"),
            (bool(unused), f"--{', --'.join(unused)}: these experts are written from their files, "
             "without a base: leave it out"),
        )  # fmt: skip
        for wrong, text in refused:
            if wrong:
                raise ValueError(text)


def run(options: ExportOptions, overrides: list[str]) -> None:
    """Write what was asked for, print the folders and what readers will say."""
    from dylora.evaluation.loading import note
    from dylora.integrations.peft_export import export_peft
    from dylora.storage.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(options.source(), note)
    if options.form == "experts":
        expert, name = options.expert or "all", options.base_name
        form = (expert, options.portable, name, options.overwrite)
        folders = export_peft(checkpoint, options.out, *form)
    else:
        _check(checkpoint, options)
        write = _export_mixture if options.form == "mixture" else _export_merged
        folders = [write(checkpoint, options)]
    for folder in folders:
        print(folder)
    if options.form != "merged":
        _print_readers(folders)


def _print_readers(folders: list[Path]) -> None:
    """What each reader refuses, misreads or needs of these adapters, and of the base's name."""
    from dylora.base_models import EMBEDDED_BASES
    from dylora.integrations.compatibility import READERS, find_incompatibilities
    from dylora.storage.peft_config import CONFIG_FILE
    from dylora.storage.peft_format import WEIGHTS_FILE
    from dylora.storage.safe_io import read_json
    from dylora.storage.tensors import read_tensors

    found: dict[Incompatibility, list[str]] = {}
    settings: dict[str, Any] = {}
    for folder in folders:
        settings = read_json(folder / CONFIG_FILE)
        for complaint in find_incompatibilities(settings, read_tensors(folder / WEIGHTS_FILE)):
            found.setdefault(complaint, []).append(folder.name)
    for (reader, kind, what), names in found.items():
        print(reader, kind, what + (f" ({', '.join(names)})" if len(names) < len(folders) else ""))
    silent = [name for name in READERS if not any(complaint.reader == name for complaint in found)]
    if silent:
        print(f"no complaint of {', '.join(silent)}")
    name = settings.get("base_model_name_or_path")
    if name is None:
        print("no base is named: give the base to the reader, or --base_name here")
    if name in EMBEDDED_BASES:
        print(
            f"peft does not know the base {name!r} by name: give it the model, as in "
            f"PeftModel.from_pretrained(dylora.base_models.load_base({name!r}), "
            f"{str(folders[0])!r}), or export with --base_name {EMBEDDED_BASES[name]}"
        )


def _export_mixture(checkpoint: "Checkpoint", options: ExportOptions) -> Path:
    from dylora.integrations.peft_export import export_mixture

    if not options.loads_base:
        assert isinstance(options.weights, list)
        form = (options.weights, options.base_name, options.overwrite)
        return export_mixture(checkpoint, options.out, *form)
    model, tokenizer = _load(checkpoint, options)
    weights_NE, record = _resolve_weights(model, tokenizer, options)
    form = (weights_NE, options.base_name, options.overwrite)
    return export_mixture(model, options.out, *form, checkpoint=str(checkpoint.path), **record)


def _export_merged(checkpoint: "Checkpoint", options: ExportOptions) -> Path:
    from dylora.base_models import quantization_of
    from dylora.integrations.static_weights import static_weights
    from dylora.storage.folders import write_folder
    from dylora.storage.model_card import CARD, merged_card
    from dylora.storage.schema import EXPORT_FILE

    model, tokenizer = _load(checkpoint, options)
    assert tokenizer is not None
    dtype, quantised = model.base.dtype, quantization_of(model.base) != "none"
    record = {"kind": "merged", "checkpoint": str(checkpoint.path), "base": model.base_name}
    if options.expert is not None:
        weights_NE = static_weights(model.mixture, int(options.expert))
        record["expert"] = int(options.expert)
    else:
        weights_NE, measured = _resolve_weights(model, tokenizer, options)
        record["weights"] = dict(zip(model.site_names, weights_NE.tolist(), strict=True))
        record |= measured
    merged = model.merge_and_unload(weights=weights_NE, dequantize=options.dequantize)
    if quantised:
        print(f"the quantised base is dequantised, in {str(dtype).removeprefix('torch.')}")

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / EXPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")
        (folder / CARD).write_text(merged_card(record), encoding="utf-8")

    out = Path(options.out)
    write_folder(out, write)
    return out


def _check(checkpoint: "Checkpoint", options: ExportOptions) -> None:
    """Refuse a bad --out, and weights that cannot be right, before a base is loaded."""
    from dylora.integrations.static_weights import TOKEN_DEPENDENT, site_weights
    from dylora.storage.folders import check_place

    check_place(Path(options.out), overwrite=options.overwrite)
    if isinstance(options.weights, list):
        site_weights(options.weights, len(checkpoint.description["sites"]), checkpoint.live)
        if abs(sum(options.weights) - 1) > 1e-6:
            total = sum(options.weights)
            print(f"note: the weights add up to {total:g}, not 1, and are used as they are")
    if options.weights is None and options.expert is None and checkpoint.config.is_learned:
        raise ValueError(TOKEN_DEPENDENT)


def _load(
    checkpoint: "Checkpoint", options: ExportOptions
) -> "tuple[DyLoRA_MoE, PreTrainedTokenizerBase | None]":
    """The mixture on its base, and the tokenizer where one is needed."""
    import torch

    from dylora.base_models import choose_device
    from dylora.model import DyLoRA_MoE

    spec = checkpoint.base_spec(
        options.base,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        device=choose_device("auto"),
        quantization=options.quantization,
    )
    needed = options.form == "merged" or options.text is not None
    tokenizer = checkpoint.tokenizer(spec) if needed else None  # before the long part
    return DyLoRA_MoE.from_pretrained(checkpoint, spec).eval(), tokenizer


def _resolve_weights(
    model: "DyLoRA_MoE", tokenizer: "PreTrainedTokenizerBase | None", options: ExportOptions
) -> "tuple[Tensor, dict[str, Any]]":
    """The weights [N, E], and what a text says of them, printed and for the record."""
    from dylora.base_models import max_positions
    from dylora.data.templates import recorded_template
    from dylora.evaluation.static_mixture import compare, measured_weights, read_text
    from dylora.integrations.static_weights import static_weights

    if options.text is None or tokenizer is None:
        assert options.weights != "measured"  # the command asks for a text then
        return static_weights(model.mixture, weights=options.weights), {}
    longest = min(512, max_positions(model.base.config) or 512)
    template = recorded_template(model.training_record, tokenizer)
    text = read_text(options.text, template, options.text_tokens, longest)
    if options.weights == "measured":
        weights_NE = static_weights(model.mixture, weights=measured_weights(model, text))
        print(f"mean gates over {text.tokens:,} tokens of {text.source}, by site:")
        for site, row in zip(model.site_names, weights_NE.tolist(), strict=True):
            print(f"  {site:30} {' '.join(f'{value:.3f}' for value in row)}")
    else:
        weights_NE = static_weights(model.mixture, weights=options.weights)
    found = compare(model, weights_NE, text)
    print(
        f"static against routed: KL {found.kl:.5f} nats a token, loss {found.static_loss:.4f} "
        f"against {found.routed_loss:.4f} ({found.static_loss - found.routed_loss:+.4f}), mean of "
        f"{found.tokens:,} predicted tokens"
    )
    return weights_NE, {"text": {"file": text.source, **found._asdict()}}
