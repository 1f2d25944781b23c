"""`run.py evaluate`: loss and perplexity per set, and how the routers spread."""

import math

from dylora.data.prompts import pad_token_id
from dylora.evaluation.loading import base_of, load_checkpoint, note
from dylora.run_config import RunConfig
from dylora.storage.checkpoint import Checkpoint
from dylora.training.resume import dataset_identity
from dylora.training.run import load_run_data
from dylora.training.validation import SetScore, overall_loss, validate


def evaluate_checkpoint(config: RunConfig, checkpoint: str) -> dict[str, SetScore]:
    """Score a checkpoint on the validation sets of `config`, print a table, return the scores.

    Raises ValueError or FileNotFoundError for a checkpoint or data that do not load.
    """
    opened = Checkpoint.open(checkpoint, note)
    tokenizer = opened.tokenizer(base_of(config.model))
    data = load_run_data(config, tokenizer)
    model = load_checkpoint(opened, config.model)
    trained_on = model.training_record.get("data", data.stamp)
    if dataset_identity(trained_on) != dataset_identity(data.stamp):
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
    return scores
