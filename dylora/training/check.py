"""`dylora train --check`: all that a run needs, and one step of it, in a folder that goes."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle
from tempfile import TemporaryDirectory

from dylora.run_config import RunConfig
from dylora.training import run as runs
from dylora.training.compilation import compiled_passes
from dylora.training.distributed import ALONE
from dylora.training.environment import deterministic_algorithms, tf32_products
from dylora.training.log import memory_gb, say
from dylora.training.memory import estimate, explained
from dylora.training.signals import Interruption
from dylora.training.step import run_step
from dylora.training.stream import begin


def check(config: RunConfig) -> None:
    """Read the data, load the base, take one step on the longest rows, and say what was found.

    Writes nothing that stays. Raises what training would raise before its first step.
    """
    with TemporaryDirectory(prefix="dylora-check-") as folder:
        aside = dataclasses.replace(config, output_dir=folder)
        if config.stages:
            _check_stream(aside)
            return
        runs.check_run(config, fresh=True)  # its own folder must be free
        aside = runs.fit_to_base(aside)
        expected = None if config.moe.use_dora else estimate(aside)
        run = runs.prepare(aside, fresh=True)
        with closing(run.log):
            runs.log_summary(run)
            if expected is not None:
                say(f"memory: about {expected.total / 1e9:.3g} GB, with batches as large as may be")
            run = run._replace(sampler=longest_rows(run))  # type: ignore[arg-type]
            with (
                deterministic_algorithms(config.train.deterministic),
                tf32_products(config.train.tf32, run.model.device),
                compiled_passes(run.model, config.train.compile),
                explained(run.config),
            ):
                result = run_step(run)
                if config.train.compile and run.steps > 1:
                    result = run_step(run)  # the first one has compiled
    rate = result.tokens / max(result.seconds, 1e-9)
    say(
        f"one step on the longest rows: loss {result.loss:.4f}, {result.tokens:,} tokens in "
        f"{result.seconds:.1f} s ({rate:,.0f} tokens/s), at most {memory_gb():.2f} GB of memory"
    )
    if result.nonfinite:
        raise ValueError(
            f"the {result.nonfinite} of the first step is not finite: no run begins so"
        )
    say(f"{run.steps} steps fit; nothing was kept")


def longest_rows(run: runs.Run) -> Iterator[tuple[int, int]]:
    """In the place of a sampler: the longest training rows first, the most that a step can take."""
    rows = [
        (length, index, row)
        for index, examples in enumerate(run.data.train)
        for row, length in enumerate(examples.all_lengths.tolist())
    ]
    return cycle((index, row) for _, index, row in sorted(rows, reverse=True))


def _check_stream(config: RunConfig) -> None:
    """The base and the rows of all stages; which expert a stage trains is decided when it comes."""
    runs.open_log(config, ALONE)  # for services that are not installed; starts none
    stream = begin(config, None, Interruption())
    for stage in stream.stages:
        for report in stage.data.reports:
            say(f"stage {stage.number}: {report.describe()}")
    say("the rows of all stages fit; a stream takes no step here, and nothing was kept")
