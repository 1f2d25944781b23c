"""Question: without named sources, what besides clusters of prompts says which expert a row trains?

Method: the cell of 6e-4 and 32 of configs/compare/clusters_100x8.yaml, three seeds, on the rows to
choose by. `hard` sends a prompt to the likeliest expert, as the file does; `soft` mixes all routed
experts by their probabilities; `reassigned` gives each cluster, after 30 and after 60 steps, to the
expert with the lowest loss on its training rows. 24 and 48 clusters, six experts.
Result: experiments/results/unnamed.json and experiments/LOG.md; 25 minutes of one core.

    python -m experiments.routing.unnamed
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylora.cli.compare import load_board
from dylora.compare.cells import drop_checkpoints
from dylora.compare.rows import rows_to_choose_by
from dylora.data.batching import collate
from dylora.features import embed
from dylora.kernels.cross_entropy import count_targets
from dylora.training.callbacks import Callback
from dylora.training.loop import train
from dylora.training.prompt_skills import evenly
from dylora.training.run import Run
from dylora.training.step import StepResult
from dylora.training.validation import overall_loss, validate

OUT = Path("experiments/results/unnamed.json")
RATE, SCALE, SEEDS = 6e-4, 32, (0, 1, 2)
REASSIGNED_AT, ROWS = (30, 60), 8  # steps; training rows of a cluster
FORMS: dict[str, tuple[int, str, bool]] = {  # clusters, routing mode, reassigned
    "hard, 24 clusters": (24, "sparse", False),
    "soft, 24 clusters": (24, "dense", False),
    "reassigned, 24 clusters": (24, "sparse", True),
    "hard, 48 clusters": (48, "sparse", False),
    "reassigned, 48 clusters": (48, "sparse", True),
}
BOARD = load_board(
    "configs/compare/clusters_100x8.yaml", ["output_dir=runs/unnamed", "run.eval.eval_steps=100"]
)
METHOD = next(method for method in BOARD.methods if method.name == "prompt_clusters")


class Reassign(Callback):
    """Each cluster to the expert that explains its rows best, whoever else that one serves."""

    def __init__(self) -> None:
        self.moved: list[int] = []  # clusters, each time

    def after_step(self, run: Run, result: StepResult) -> None:
        if run.progress.step not in REASSIGNED_AT:
            return
        library, shared = run.model.skill_library, run.model.config.shared_experts
        assert library is not None
        rows = evenly(run.data.train, 1500)
        cluster_B = library.log_probabilities(embed(run.model.mixture, rows).prompt).argmax(-1)
        moved = 0
        for number, skill in enumerate(list(library.skills.values())):
            own = [rows[place] for place in (cluster_B == number).nonzero()[:ROWS, 0].tolist()]
            if not own:
                continue
            losses = [loss_of(run, own, expert) for expert in range(shared, len(run.model.experts))]
            best = shared + losses.index(min(losses))
            moved += best != skill.expert
            library.skills[skill.name] = dataclasses.replace(skill, expert=best)
        library.update_router()
        self.moved.append(moved)


@torch.no_grad()
def loss_of(run: Run, rows: list[dict[str, list[int]]], expert: int) -> float:
    """Nats per target with one routed expert beside the shared ones."""
    gates_E = torch.zeros(len(run.model.experts))
    gates_E[: run.model.config.shared_experts] = gates_E[expert] = 1
    batch: dict[str, Tensor] = collate(rows, run.pad_token_id)
    out = run.model(**batch, keep_logits=False, routing_weights=gates_E.expand(len(rows), -1))
    assert out.token_losses is not None
    return out.token_losses.double().sum().item() / int(count_targets(batch["labels"]))


def trained(name: str, seed: int) -> dict[str, Any]:
    """One run of a form: its loss on the rows to choose by, and the clusters that were moved."""
    clusters, mode, reassigned = FORMS[name]
    config = BOARD.cell(METHOD, RATE, SCALE, seed)
    config = dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, routing_mode=mode),
        train=dataclasses.replace(config.train, prompt_clusters=clusters),
        output_dir=f"{config.output_dir}/{name.replace(', ', '-').replace(' ', '-')}",
    )
    callback = Reassign()
    run = train(config, None, callbacks=[callback] if reassigned else [])
    scores = validate(
        run.model,
        rows_to_choose_by(run.data.validation),
        batch_size=config.eval.batch_size,
        pad_token_id=run.pad_token_id,
    )
    drop_checkpoints(config)
    return {"loss": overall_loss(scores), "moved": callback.moved}


def main() -> None:
    found: dict[str, Any] = {}
    for name in FORMS:
        runs = [trained(name, seed) for seed in SEEDS]
        losses = [run["loss"] for run in runs]
        found[name] = {"losses": losses, "moved": [run["moved"] for run in runs]}
        found[name] |= {"mean": statistics.fmean(losses), "sd": statistics.stdev(losses)}
        OUT.write_text(json.dumps({"seeds": SEEDS, "forms": found}, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
