"""`run.py evaluate`: loss and perplexity per set, and how the routers spread."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CheckpointOptions, ConfigOptions, RoutingOptions
from dylora.run_config import RunConfig, dump_run_config

if TYPE_CHECKING:
    from dylora.storage.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RoutingOptions, CheckpointOptions, ConfigOptions):
    """Loss and perplexity of a checkpoint on each of a config's data sets."""

    ACTING: ClassVar = (
        *("model.", "data.", "train.training_subset", "eval.batch_size", "eval.eval_subset"),
    )
    """Fields of a config that have an effect; the rest a checkpoint decides, or only training."""

    print_config: bool = False
    """Print the resolved config and stop."""


def run(options: EvaluateOptions, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
    else:
        evaluate_checkpoint(config, options.source(), options.routing())


def evaluate_checkpoint(
    config: RunConfig, checkpoint: "str | Checkpoint", routing: dict[str, Any]
) -> None:
    """Score a checkpoint on the validation sets of `config`, and print a table."""
    from dylora.data.prompts import pad_token_id
    from dylora.evaluation.loading import base_of, load_checkpoint, note
    from dylora.storage.checkpoint import Checkpoint
    from dylora.training.run import fit_to_base, load_run_data
    from dylora.training.settings import data_difference
    from dylora.training.validation import overall_loss, validate

    opened = Checkpoint.open(checkpoint, note)
    tokenizer = opened.tokenizer(base_of(config.model))
    data = load_run_data(fit_to_base(config), tokenizer)
    model = load_checkpoint(opened, config.model, routing)
    trained_on = model.training_record.get("data", data.provenance)
    if data_difference(trained_on, data.provenance) is not None:
        print("note: the checkpoint was trained on other data or another split than is scored here")
    scores = validate(
        model,
        data.validation,
        batch_size=config.eval.batch_size,
        pad_token_id=pad_token_id(tokenizer),
    )
    print(f"{'set':20} {'targets':>9} {'loss':>8} {'perplexity':>11}   usage of the experts")
    for name, score in scores.items():
        shares = [] if score.usage_NE is None else score.usage_NE.mean(0).tolist()
        shown = " ".join(f"{share:.0%}" for share in shares)
        print(f"{name:20} {score.targets:9,} {score.loss:8.4f} {score.perplexity:11.3f}   {shown}")
    total = overall_loss(scores)
    print(f"{'all':20} {'':9} {total:8.4f} {math.exp(min(total, 700.0)):11.3f}")
