"""`run.py export`."""

from dataclasses import dataclass
from typing import Literal

from dylora.cli.options import BaseOptions, CheckpointOptions
from dylora.config import Quantization
from dylora.fields import check_fields, option
from dylora.run_config import Precision


@dataclass(frozen=True, kw_only=True)
class ExportCommand(BaseOptions, CheckpointOptions):
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

    @property
    def form(self) -> Literal["experts", "mixture", "merged"]:
        """What is written."""
        return "mixture" if self.mixture else "merged" if self.merge else "experts"

    def __post_init__(self) -> None:
        check_fields(self)
        expert, merge = self.expert, self.merge
        given = bool(self.weights or self.text)
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
        )  # fmt: skip
        for wrong, text in refused:
            if wrong:
                raise ValueError(text)


def run(options: ExportCommand, overrides: list[str]) -> None:
    from dylora.evaluation.export import ExportOptions, run_export

    run_export(ExportOptions(**{name: getattr(options, name) for name in ExportOptions._fields}))
