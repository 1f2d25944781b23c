"""`run.py benchmark`: pass@k of a base and a checkpoint on suites of tasks, side by side."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import PROMPT_WITH_INPUT
from dylora.data.templates import recorded_template
from dylora.evaluation.loading import base_of, load_checkpoint, note
from dylora.evaluation.passk.estimate import compare
from dylora.evaluation.passk.generation import prompt_ids
from dylora.evaluation.passk.options import BenchmarkOptions
from dylora.evaluation.passk.published import published_lines, published_of
from dylora.evaluation.passk.sampling import sample_to_file
from dylora.evaluation.passk.scoring import Selection, score, select_tasks
from dylora.evaluation.passk.skills import SKILL_SUITES
from dylora.evaluation.passk.suites import Tasks, read_suite, takes_shots
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.sandbox.host import Sandbox
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import write_file
from dylora.storage.lock import lock_folder

SAMPLE_VERSION = 2
LIBRARIES = ("dylora", "torch", "transformers", "datasets", "numpy")


def read_tasks(options: BenchmarkOptions) -> dict[str, Tasks]:
    """The suites that are asked for. Raises ValueError as `read_suite` does."""
    if options.shots and not any(map(takes_shots, options.tasks)):
        raise ValueError(f"--shots is {options.shots}, but must be 0, or go with a task mbpp")
    if options.split != "test" and not any(map(takes_shots, options.tasks)):
        raise ValueError(f"--split is {options.split!r}, but must be test, or go with a task mbpp")
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

    Raises ValueError where a suite runs programs and no sandbox works on this machine.
    """
    if not any(one.checker.runs_programs for tasks in suites for one in tasks.problems):
        return "nothing: no programs are run"
    with Sandbox(backend=options.sandbox, unsafe=options.unsafe) as sandbox:
        return sandbox.backend


def benchmark_checkpoint(
    config: RunConfig,
    checkpoint: str | Checkpoint,
    options: BenchmarkOptions,
    out: Path,
    routing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generates, runs and counts; prints a table, writes and returns results.json.

    `out` gets a JSONL of samples for each suite and model, written as they come; a folder with
    samples of the same settings is continued. Raises ValueError for suites, files or settings that
    cannot be used, a folder of other settings, or no sandbox that works on this machine;
    FileNotFoundError for no checkpoint; FileExistsError where another process writes into `out`.
    """
    suites = read_tasks(options)
    backend = find_backend(suites.values(), options)
    opened = Checkpoint.open(checkpoint, note)
    tokenizer = opened.tokenizer(base_of(config.model))
    model = load_checkpoint(opened, config.model, routing)
    settings = _settings(config, opened, options) | ({"routing": routing} if routing else {})
    found = {name: [*importlib.metadata.distributions(name=name)] for name in LIBRARIES}
    versions = {name: each[0].version if each else "not installed" for name, each in found.items()}
    with lock_folder(out, option="--out"):
        _claim(out, settings, {name: tasks.source._asdict() for name, tasks in suites.items()})
        results: dict[str, Any] = {
            "settings": settings,
            "options": asdict(options),
            "config": asdict(config),
            "sandbox": backend,
            "libraries": {"python": platform.python_version(), **versions},
            "suites": {},
        }
        print(f"programs run under {backend}")
        print(f"{'suite':17} {'model':10} {'tasks':>5} {'pass@k':>8} {'value':>7}  95 % interval")
        for name, tasks in suites.items():
            record, include = model.training_record, options.include_trained
            selection = select_tasks(name, tasks, record, include)
            results["suites"][name] = _run_suite(
                model, tokenizer, name, selection, options, config, out
            )
        write_file(out / "results.json", json.dumps(results, indent=2, default=str) + "\n")
    print(f"wrote {out}/: results.json and the samples")
    return results


def _run_suite(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    selection: Selection,
    options: BenchmarkOptions,
    config: RunConfig,
    out: Path,
) -> dict[str, Any]:
    """Base, checkpoint and their difference on one suite, printed and for results.json."""
    tasks, problems = selection.tasks, selection.problems
    sampling = options.sampling(tasks.max_new_tokens, config.eval.batch_size)
    entry = selection.describe(sampling)
    template = recorded_template(model.training_record, tokenizer)
    if problems[0].instruction and template.text != PROMPT_WITH_INPUT:
        [first] = prompt_ids(model, tokenizer, problems[:1])
        entry |= {"template": template.name, "first_prompt": tokenizer.decode(first)}
    passed = []
    for who in ("base", "checkpoint"):
        file = out / f"{name.replace('/', '.')}.{who}.jsonl"
        with model.disable_adapters() if who == "base" else nullcontext():
            answers = sample_to_file(model, tokenizer, problems, sampling, file)
        found = score(problems, answers, options, tasks.limits)
        scores = found._asdict()
        entry[who] = {"pass@k": scores.pop("pass_at_k"), **scores, "samples_file": file.name}
        passed.append([found.passed[one.task_id] for one in problems])
        for k, interval in found.pass_at_k.items():
            print(
                f"{name:17} {who:10} {len(problems):5} {'pass@' + k:>8} "
                f"{interval['mean']:7.1%}  {interval['low']:.1%} to {interval['high']:.1%}"
            )
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.items())
        print(f"{'':17} {who:10} {outcomes}")
        if who == "base" and name not in SKILL_SUITES:
            for line in published_lines(config.model.base, name):
                print(f"{'':17} {line}")
    difference = compare(*passed)
    entry["comparison"] = difference._asdict()
    entry["published"] = [one._asdict() for one in published_of(config.model.base, name)]
    trained = len(selection.trained)
    left = f"; {trained} trained tasks {entry['trained_tasks_are']}" if trained else ""
    print(
        f"{name:17} better on {difference.better} tasks, worse on {difference.worse}, "
        f"exact p = {difference.p_value:.3g}{left}"
    )
    return entry


def _settings(
    config: RunConfig, checkpoint: Checkpoint, options: BenchmarkOptions
) -> dict[str, Any]:
    """What the samples of a folder depend on."""
    chosen = json.loads(json.dumps(asdict(options)))
    of_the_base = ("base", "revision", "dtype", "quantization")
    read_later = ("workers", "sandbox", "unsafe", "tasks", "files", "limit", "k")
    return {
        "version": SAMPLE_VERSION,
        **{key: getattr(config.model, key) for key in of_the_base},
        "checkpoint": str(checkpoint.path.resolve()),
        "checkpoint_sha256": checkpoint.identity,
        "batch_size": config.eval.batch_size,
        **{key: value for key, value in chosen.items() if key not in read_later},
    }


def _claim(out: Path, settings: dict[str, Any], sources: dict[str, Any]) -> None:
    """Records the settings in the folder, or compares them with those recorded there.

    More suites may be added later.
    """
    file = out / "settings.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings.copy()
    known = before.pop("sources", {})
    for name in sorted(known.keys() & sources.keys()):
        if known[name] != sources[name]:
            raise ValueError(
                f"{out} holds samples of {name} from {known[name]}, not from {sources[name]}; "
                "choose another --out"
            )
    for key in sorted(before.keys() | settings.keys()):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{out} holds samples made with {key} = {before.get(key)!r}, not "
                f"{settings.get(key)!r}; choose another --out"
            )
    content = settings | {"sources": known | sources}
    write_file(file, json.dumps(content, indent=2) + "\n")
