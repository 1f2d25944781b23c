"""`run.py benchmark`: pass@k of a base and a checkpoint on suites of tasks, side by side.

Everything lies in one folder: a JSONL of samples for each suite and model, written as they come
and read again after a kill, and results.json.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import load_tokenizer
from dylora.evaluation.loading import load_checkpoint
from dylora.evaluation.passk.estimate import compare, pass_at_k
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.published import published_lines, published_of
from dylora.evaluation.passk.sampling import Sampling, sample_to_file
from dylora.evaluation.passk.scoring import Score, score
from dylora.evaluation.passk.suites import (
    SHOTS,
    Tasks,
    data_of,
    leave_out_trained,
    read_suite,
    suite_names,
    takes_shots,
)
from dylora.evaluation.skills import SKILL_SUITES
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.sandbox.host import Sandbox
from dylora.storage.lock import lock_folder

SAMPLE_VERSION = 2
LIBRARIES = ("dylora", "torch", "transformers", "datasets", "numpy")


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
    """Use only the first so many tasks of a suite."""
    samples: int = 1
    """Programs a task and model."""
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
    """What keeps programs from files: see `Sandbox`."""
    unsafe: bool = False
    """Run programs without protection where there is none."""
    workers: int = 2
    """Sandboxes side by side."""

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


def benchmark_checkpoint(
    config: RunConfig, checkpoint: str, options: BenchmarkOptions, out: Path
) -> dict[str, Any]:
    """Generate, run, count; prints a table, writes results.json, and returns what that holds.

    A folder with samples of the same settings is continued: none is repeated, none lost. Greedy
    texts can differ with `eval.batch_size` where two tokens are nearly as likely, because left
    padding changes sums by rounding; docs/benchmark.md has how often.

    Raises:
        ValueError: Suites, files or settings that cannot be used, a folder of other settings, or
            a machine that cannot protect itself.
        FileNotFoundError: A checkpoint that does not exist.
        FileExistsError: Another process writes into the folder.
    """
    suites = read_tasks(options)
    with Sandbox(
        level=options.sandbox, unsafe=options.unsafe
    ) as sandbox:  # refuses now, not after hours of generation
        level = sandbox.level
    tokenizer = load_tokenizer(config.model.base, config.model.revision)
    model = load_checkpoint(checkpoint, config.model)
    settings = _settings(config, checkpoint, options)
    with lock_folder(out, option="--out"):
        _claim(out, settings, {name: tasks.source._asdict() for name, tasks in suites.items()})
        results: dict[str, Any] = {
            "settings": settings,
            "options": asdict(options),
            "config": asdict(config),
            "sandbox": level,
            "libraries": _versions(),
            "suites": {},
        }
        print(f"programs run under {level}")
        print(f"{'suite':17} {'model':10} {'tasks':>5} {'pass@k':>8} {'value':>7}  95 % interval")
        for name, tasks in suites.items():
            results["suites"][name] = _run_suite(
                model, tokenizer, name, tasks, options, config, out
            )
        text = json.dumps(results, indent=2, default=str) + "\n"
        temporary = out / "results.json.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / "results.json")
    print(f"wrote {out}/: results.json and the samples")
    return results


def _run_suite(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tasks: Tasks,
    options: BenchmarkOptions,
    config: RunConfig,
    out: Path,
) -> dict[str, Any]:
    """Base, checkpoint and their difference on one suite: printed, and for results.json."""
    kept, trained = leave_out_trained(tasks.problems, data_of(model.training_record))
    kept = tasks.problems if options.include_trained else kept
    if not kept:
        raise ValueError(
            f"the checkpoint was trained on all {len(trained)} tasks of {name} that were "
            "chosen; --include-trained scores them nevertheless"
        )
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens or tasks.max_new_tokens,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=config.eval.batch_size,
    )
    entry = describe(tasks, kept, trained, sampling, options.include_trained)
    scores: dict[str, Score] = {}
    for who in ("base", "checkpoint"):
        file = out / f"{name.replace('/', '.')}.{who}.jsonl"
        with model.disable_adapters() if who == "base" else nullcontext():
            programs = sample_to_file(model, tokenizer, kept, sampling, file)
        scores[who] = score(
            kept,
            programs,
            k=options.k,
            seconds=tasks.seconds,
            workers=options.workers,
            seed=options.seed,
            level=options.sandbox,
            unsafe=options.unsafe,
        )
        entry[who] = {"pass@k": scores[who].pass_at_k, "outcomes": scores[who].outcomes,
                      "passed": scores[who].passed, "samples_file": file.name}  # fmt: skip
        for k, found in scores[who].pass_at_k.items():
            print(
                f"{name:17} {who:10} {len(kept):5} {'pass@' + k:>8} {found['mean']:7.1%}  "
                f"{found['low']:.1%} to {found['high']:.1%}"
            )
        outcomes = ", ".join(f"{count} {what}" for what, count in scores[who].outcomes.items())
        print(f"{'':17} {who:10} {outcomes}")
        if who == "base" and name not in SKILL_SUITES:
            for line in published_lines(config.model.base, name):
                print(f"{'':17} {line}")
    passed = ([scores[who].passed[one.task_id] for one in kept] for who in ("base", "checkpoint"))
    difference = compare(*passed)
    entry["comparison"] = difference._asdict()
    entry["published"] = [one._asdict() for one in published_of(config.model.base, name)]
    left = f"; {len(trained)} trained tasks {entry['trained_tasks_are']}" if trained else ""
    print(
        f"{name:17} better on {difference.better} tasks, worse on {difference.worse}, "
        f"exact p = {difference.p_value:.3g}{left}"
    )
    return entry


def describe(
    tasks: Tasks,
    kept: list[Problem],
    trained: list[Problem],
    sampling: Sampling,
    include_trained: bool,
) -> dict[str, Any]:
    """What was asked of a model, for results.json."""
    return {
        "tasks": len(kept),
        "source": tasks.source._asdict(),
        "prompt": tasks.prompt,
        "shots": tasks.shots,
        "first_prompt": kept[0].prompt,
        "stops": list(kept[0].stops),
        "sampling": asdict(sampling),
        "seconds_a_program": tasks.seconds,
        "trained_tasks": len(trained),
        "trained_tasks_are": "scored" if include_trained else "left out",
    }


def _settings(config: RunConfig, checkpoint: str, options: BenchmarkOptions) -> dict[str, Any]:
    """What the samples of a folder depend on."""
    manifest = Path(checkpoint) / "manifest.json"
    read_later = ("workers", "sandbox", "unsafe", "tasks", "files", "limit", "k")
    return {
        "version": SAMPLE_VERSION,
        "base": config.model.base,
        "revision": config.model.revision,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "checkpoint": str(Path(checkpoint).resolve()),
        "checkpoint_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "batch_size": config.eval.batch_size,
        **{
            key: value
            for key, value in json.loads(json.dumps(asdict(options))).items()
            if key not in read_later
        },
    }


def _claim(out: Path, settings: dict[str, Any], sources: dict[str, Any]) -> None:
    """Makes the folder this benchmark's, or checks that it is; suites may join it later."""
    file = out / "settings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = before.get("sources", {})
    for name in sorted(known.keys() & sources.keys()):
        if known[name] != sources[name]:
            raise ValueError(f"{out} holds samples of {name} from {known[name]}; not from "
                             f"{sources[name]}; choose another --out")  # fmt: skip
    if before:
        kept = {key: value for key, value in before.items() if key != "sources"}
        for key in sorted(kept.keys() | settings.keys()):
            if kept.get(key) != settings.get(key):
                raise ValueError(
                    f"{out} holds samples made with {key} = {kept.get(key)!r}, not "
                    f"{settings.get(key)!r}; choose another --out"
                )
    temporary = file.with_suffix(".tmp")
    content = settings | {"sources": known | sources}
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            versions[name] = "not installed"
    return versions
