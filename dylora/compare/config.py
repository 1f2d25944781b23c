"""The settings of a comparison, and the runs that they come to."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dylora.fields import check_fields, option, require
from dylora.run_config import MAX_NAME, RunConfig, require_folder_name


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One method of a comparison."""

    config: str
    """YAML file of the method: its name, and what it sets otherwise than `run`."""
    rates: list[float] | None = option(None, above=0)
    """Learning rates to try; none: those of the comparison."""
    scales: list[float] | None = option(None, above=0)
    """Scales to try, lora_alpha over the rank; none: those of the comparison."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A comparison: everything it writes lies under <output_dir>/<name>/."""

    name: str = "compare"
    """Name of the comparison and of its folder."""
    output_dir: str = "runs/compare"
    """Folder of all comparisons."""
    methods: list[MethodConfig] = field(default_factory=list)
    """The methods; differences are to the first one, and its parameters are the measure."""
    rates: list[float] = option([], above=0)
    """Values of train.learning_rate to try with each method."""
    scales: list[float] = option([], above=0)
    """Values of lora_alpha / r to try with each method: every expert's alpha is so many times its
    own rank."""
    seeds: list[int] = option([0, 1, 2, 3, 4], least=0, most=2**32 - 1)
    """Values of train.seed that the best cell of each method is trained with."""
    grid_seeds: int = option(1, least=1)
    """So many of them, the first ones, are trained in every cell to choose the best by."""
    seed_rows: bool = False
    """A seed is also data.seed, so that it draws rows and their order; of embedded skills alone."""
    test_rows: int = option(40, least=1)
    """Rows of the test split of each embedded skill that the loss is reported on."""
    test_answers: int = option(50, least=0)
    """Answers to test tasks of each embedded skill that are generated and checked."""
    equal_time: bool = True
    """Train the best cells once more, for as many steps as take as long as those of the first
    method."""
    processes: int = option(1, least=1, most=1024)
    """Runs that are trained at once, in processes that share the threads; with equal_time one."""
    run: RunConfig = field(default_factory=RunConfig)
    """What all methods have in common."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_folder_name(self.name, MAX_NAME)
        require(len(self.methods) > 1, "methods", len(self.methods), "a list of two or more")
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        require(distinct, "seeds", self.seeds, "different numbers, one at least")
        rule = f"at most the number of seeds ({len(self.seeds)})"
        require(self.grid_seeds <= len(self.seeds), "grid_seeds", self.grid_seeds, rule)
        timed = not self.equal_time or self.run.train.max_steps is not None
        require(timed, "equal_time", True, "false, or run.train.max_steps a number of steps")
        if self.equal_time:
            rule = "1 with equal_time: runs beside each other cannot be timed"
            require(self.processes == 1, "processes", self.processes, rule)
        names = [source.name for source in self.run.data.sources if not is_skill(source.name)]
        rule = f"false with {', '.join(names)}: rows that one seed reports on would be among those "
        rule += "that another one chooses by"
        require(not (self.seed_rows and names), "seed_rows", self.seed_rows, rule)


class Method(NamedTuple):
    """A method with its grid."""

    name: str
    run: RunConfig  # with the method's settings; rate, scale and seed are those of a cell
    rates: list[float]
    scales: list[float]

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Every rate with every scale."""
        return [(rate, scale) for rate in self.rates for scale in self.scales]


class Board(NamedTuple):
    """A comparison with its methods read."""

    config: CompareConfig
    methods: list[Method]

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return Path(self.config.output_dir) / self.config.name

    def cell(
        self, method: Method, rate: float, scale: float, seed: int, steps: int | None = None
    ) -> RunConfig:
        """The run of one cell; steps: another number than the comparison's."""
        run, moe = method.run, method.run.moe
        ranks = moe.expert_ranks
        scaled = dataclasses.replace(
            moe,
            lora_alpha=scale * moe.r,
            expert_alphas=None if ranks is None else [scale * rank for rank in ranks],
            alpha_pattern={path: scale * rank for path, rank in moe.rank_pattern.items()},
        )
        train = dataclasses.replace(run.train, learning_rate=rate, seed=seed)
        data = dataclasses.replace(run.data, seed=seed) if self.config.seed_rows else run.data
        name = f"{rate:g}-{scale:g}-seed{seed}"
        if steps is not None:
            train, name = dataclasses.replace(train, max_steps=steps), f"{name}-{steps}steps"
        return dataclasses.replace(
            run,
            name=name,
            output_dir=str(self.folder / method.name),
            moe=scaled,
            train=train,
            data=data,
        )


def is_skill(source: str) -> bool:
    """Whether a source is an embedded skill, which has a test split and checkers."""
    return source.startswith("skill/")
