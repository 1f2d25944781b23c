"""`run.py info`: what a checkpoint is."""

from pathlib import Path

from dylora.config import MoELoraConfig
from dylora.storage.checkpoint import folder_bytes, read_description


def print_info(checkpoint: str) -> None:
    """Verify a checkpoint and print base, experts, sizes and what it was trained on.

    Raises ValueError naming the file when it is not whole.
    """
    folder = Path(checkpoint)
    description = read_description(folder)
    moe, training = MoELoraConfig().to_dict() | description["moe"], description["training"]
    print(f"{folder}: whole, {folder_bytes(folder) / 1e6:.1f} MB, every file as written")
    revision = description["base_revision"] or "any revision"
    print(f"base        {description['base_model_name_or_path']} ({revision})")
    print(
        f"routing     {moe['router_type']}, top {moe['top_k_experts']} of "
        f"{len(description['experts'])}, "
        f"{len(description['sites'])} sites, {len(description['projections'])} projections"
    )
    for expert in description["experts"]:
        size = folder_bytes(folder / "peft_adapters" / expert["name"])
        print(
            f"{expert['name']:11} {expert['state']}, rank {expert['rank']}, "
            f"alpha {expert['alpha']:g}, maturity {expert['maturity']:.3f}, "
            f"trained {expert['steps']} steps, {size / 1e6:.2f} MB"
            + (f", skill {expert['skill']}" if expert["skill"] else "")
        )
    if {"step", "targets", "seed"} <= training.keys():
        print(
            f"trained     {training['step']} steps, {training['targets']:,} target tokens, "
            f"seed {training['seed']}"
        )
    for source in training.get("data", {}).get("sources", []):
        scheme, rows = source.get("split_scheme") or "generated", source.get("training_rows", "?")
        print(f"data        {source['name']}: {rows} rows, split {scheme}")
