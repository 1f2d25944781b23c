"""What a benchmark runs, and how."""

from collections.abc import Iterable
from dataclasses import dataclass

from dylora.evaluation.passk.estimate import pass_at_k
from dylora.evaluation.passk.sampling import Sampling
from dylora.evaluation.passk.skills import SKILL_SUITES
from dylora.evaluation.passk.suites import SHOTS, Tasks, read_suite, suite_names, takes_shots
from dylora.sandbox.host import Sandbox


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to run and how. Raises ValueError with the option's name."""

    tasks: tuple[str, ...]
    """Names of suites, as `expand_tasks` gives them."""
    files: dict[str, str]
    """Suites that are read from a local file instead of the hub."""
    split: str = "test"
    """Of MBPP's published splits."""
    shots: int = 0
    """Solved tasks before each of MBPP's questions: 0 or 3."""
    limit: int | None = None
    """Only the first so many tasks of a suite."""
    samples: int = 1
    """Answers per task and model."""
    k: tuple[int, ...] = (1,)
    """The k of pass@k."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    max_new_tokens: int | None = None
    """None: the suite's own bound."""
    seed: int = 0
    include_trained: bool = False
    """Keep tasks that the checkpoint was trained on; the results say so."""
    sandbox: str = "auto"
    """The `backend` of `Sandbox`."""
    unsafe: bool = False
    """Run programs without protection."""
    workers: int = 2
    """Sandboxes in parallel."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, but must be at least 1")
        if not self.tasks:
            raise ValueError(f"--tasks names no suite; there are {', '.join(suite_names())}")
        for name in self.files:
            if name not in self.tasks:
                raise ValueError(f"--task_files names {name!r}, which --tasks does not")
        if self.shots not in (0, SHOTS) or (self.shots and not any(map(takes_shots, self.tasks))):
            raise ValueError(f"--shots is {self.shots}, but must be 0, or {SHOTS} with a task mbpp")
        for k in self.k:
            pass_at_k(self.samples, 0, k)
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError("--temperature must be at least 0, and --top_p above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "--samples above 1 needs a --temperature: greedy samples are all equal"
            )

    def sampling(self, tasks: Tasks, batch_size: int) -> Sampling:
        """How the answers to a suite are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens or tasks.max_new_tokens,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=batch_size,
        )


def expand_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """The names with `skills` as the suite of each skill, none twice."""
    expanded = [one for name in names for one in (SKILL_SUITES if name == "skills" else [name])]
    return tuple(dict.fromkeys(expanded))


def read_tasks(options: BenchmarkOptions) -> dict[str, Tasks]:
    """The suites that are asked for. Raises ValueError as `read_suite` does."""
    return {
        name: read_suite(
            name,
            options.files.get(name),
            split=options.split if takes_shots(name) else "test",
            shots=options.shots if takes_shots(name) else 0,
            limit=options.limit,
            seed=options.seed,
        )
        for name in options.tasks
    }


def find_backend(suites: Iterable[Tasks], options: BenchmarkOptions) -> str:
    """What will protect the machine, found before hours of generation.

    Raises:
        ValueError: A suite runs programs, and no sandbox works on this machine.
    """
    if not any(one.checker.runs_programs for tasks in suites for one in tasks.problems):
        return "nothing: no programs are run"
    with Sandbox(backend=options.sandbox, unsafe=options.unsafe) as sandbox:
        return sandbox.backend
