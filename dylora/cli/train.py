"""`run.py train`."""

from dataclasses import dataclass
from typing import ClassVar

from dylora.cli.config_file import load_run_config
from dylora.cli.hints import OLD_FLAGS
from dylora.cli.options import ConfigOptions
from dylora.fields import option
from dylora.run_config import RunConfig, dump_run_config


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ConfigOptions):
    """Train the experts that a config describes."""

    OLD_FLAGS: ClassVar = OLD_FLAGS

    print_config: bool = False
    """Print the resolved config and stop."""
    check: bool = False
    """Read the data, load the base, estimate the memory and take one step; keep nothing."""
    resume_from_checkpoint: str | None = option(None, metavar="latest|auto|DIR")
    """Go on from this folder, or from the latest of the run; auto: the latest if there is one."""


def run(options: TrainOptions, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    if options.check:
        if options.resume_from_checkpoint is not None:
            raise ValueError("--check is of a run that begins: leave out --resume_from_checkpoint")
        from dylora.training.check import check

        check(config)
        return
    if config.stages:
        train_stages(config, options.resume_from_checkpoint)
        return
    from dylora.evaluation.passk.callback import Benchmark
    from dylora.evaluation.report import report_run
    from dylora.training.loop import train

    ended = train(config, options.resume_from_checkpoint, callbacks=[Benchmark()])
    if config.train.parallel == "fsdp2":
        ended.log.info("no report: the base lies in parts; run.py evaluate loads it whole")
    elif ended.processes.is_first:
        report_run(ended)


def train_stages(config: RunConfig, resume_from_checkpoint: str | None) -> None:
    """Learn the stages of a config, and report on all of them."""
    from dylora.evaluation.stream_report import pass_rate_of, report_stream
    from dylora.training.curriculum import train_stream

    if resume_from_checkpoint == "auto":
        resume_from_checkpoint = "latest"  # of a stream without a stage: its beginning
    pass_rate = pass_rate_of(config.eval.skill_answers)
    report_stream(train_stream(config, resume_from_checkpoint, pass_rate=pass_rate))
