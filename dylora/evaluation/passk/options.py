"""What a benchmark runs, and how. Importing it is cheap: the command line is built from it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dylora.fields import check_fields, option, require
from dylora.tasks import SKILLS


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    samples: int = 1  # of each task
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8  # rows: tasks when greedy, samples of one task otherwise


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to run and how. Raises ValueError with the option's name."""

    tasks: tuple[str, ...] = option(metavar="SUITE,...")
    """mbpp, mbpp_sanitized, mbpp+, humaneval, humaneval+, skills or one of them as skills/sql;
    commas between."""
    files: dict[str, str] = option({}, flag="task_files", metavar="SUITE=FILE,...")
    """Read a suite from a file in its original format instead of the hub."""
    split: str = "test"
    """Of MBPP's published splits, or all."""
    shots: Literal[0, 3] = 0
    """Solved tasks before each question of MBPP."""
    limit: int | None = option(None, least=1)
    """Only the first so many tasks of each suite."""
    samples: int = option(1, least=1)
    """Answers per task and model."""
    k: tuple[int, ...] = option((1,), least=1, metavar="K,...")
    """The k of pass@k; commas between."""
    temperature: float = option(0.0, least=0)
    """0: greedy."""
    top_p: float = option(1.0, above=0, most=1)
    """Share of likely tokens kept."""
    max_new_tokens: int | None = option(None, least=1)
    """Most tokens to add; none: the suite's own bound."""
    seed: int = 0
    """Of the samples and the intervals."""
    include_trained: bool = False
    """Score tasks that the checkpoint was trained on, too; the results say so."""
    sandbox: Literal["auto", "landlock", "bubblewrap"] = "auto"
    """What keeps programs from files; auto takes the first that works here."""
    unsafe: bool = option(False, flag="unsafe_exec")
    """Run the model's programs without protection. Only in a machine you can lose."""
    workers: int = option(2, least=1)
    """Programs run side by side."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "tasks", expand_tasks(self.tasks))
        require(bool(self.tasks), "tasks", self.tasks, "the names of suites")
        for name in self.files:
            if name not in self.tasks:
                raise ValueError(f"--task_files names {name!r}, which --tasks does not")
        for k in self.k:
            if k > self.samples:
                raise ValueError(f"pass@{k} needs at least {k} samples a task; there are "
                                 f"{self.samples}")  # fmt: skip
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "--samples above 1 needs a --temperature: greedy samples are all equal"
            )
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("--top_p needs a --temperature: at 0 nothing is drawn")

    def sampling(self, default_tokens: int, batch_size: int) -> Sampling:
        """How the answers to a suite are drawn; default_tokens: its own bound."""
        shared = {key: getattr(self, key) for key in ("samples", "temperature", "top_p", "seed")}
        most = self.max_new_tokens or default_tokens
        return Sampling(max_new_tokens=most, batch_size=batch_size, **shared)


def expand_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """The names with `skills` as the suite of each skill, none twice."""
    skills = [f"skills/{skill}" for skill in SKILLS]
    expanded = [one for name in names for one in (skills if name == "skills" else [name])]
    return tuple(dict.fromkeys(expanded))
