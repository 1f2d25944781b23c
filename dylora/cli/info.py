"""`run.py info`."""

from dataclasses import dataclass

from dylora.cli.config_file import COMMAND_LINE, load_run_config
from dylora.fields import option
from dylora.run_config import dump_run_config


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """What a checkpoint holds, or the settings that a config amounts to."""

    config: str | None = option(None, metavar="FILE")
    """YAML file of a run; its settings are printed as the command line overrides them."""
    estimate: bool = False
    """With --config: print the memory that the run will take instead, part by part."""
    checkpoint: str | None = option(None, metavar="DIR")
    """Folder of a checkpoint, an export or a PEFT adapter; or of the hub, user/name."""
    checkpoint_revision: str | None = None
    """Commit, tag or branch of a checkpoint on the hub."""


def run(options: InfoOptions, overrides: list[str]) -> None:
    if (options.checkpoint is None) == (options.config is None):
        raise ValueError("info needs either --checkpoint DIR or --config FILE")
    if options.config is not None and options.checkpoint_revision is not None:
        raise ValueError("--checkpoint_revision is of a --checkpoint: leave it out with --config")
    if options.config is not None and options.estimate:
        from dylora.training.memory import estimate

        print(estimate(load_run_config(options.config, overrides)).describe())
        return
    if options.config is not None:
        print(dump_run_config(load_run_config(options.config, overrides)), end="")
        return
    if options.estimate:
        raise ValueError("--estimate is of a run: give --config FILE instead of --checkpoint")
    if overrides:
        key = overrides[0].partition("=")[0]
        raise ValueError(f"{COMMAND_LINE}: --{key} changes a config, and info shows a checkpoint")
    from dylora.evaluation.info import print_info

    assert options.checkpoint is not None
    print_info(options.checkpoint, options.checkpoint_revision)
