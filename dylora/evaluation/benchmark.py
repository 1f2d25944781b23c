"""`run.py benchmark`: pass@k of a base and a checkpoint on published suites, side by side.

Everything lies in one folder: a JSONL of samples for each suite and model, written as they come
and read again after a kill, and results.json.
"""

import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.bases import choose_device, load_tokenizer
from dylora.evaluation.passk import bootstrap, compare, pass_at_k
from dylora.evaluation.sandbox import Result, Sandbox, run_all
from dylora.evaluation.skills import pad_left
from dylora.evaluation.suites import (
    SUITES,
    Problem,
    data_of,
    leave_out_trained,
    program_of,
    read_suite,
)
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.training.prompts import encode_prompts, pad_token_id
from dylora.training.sources import derived_seed

SAMPLE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to run and how. Raises ValueError with the option's name."""

    tasks: tuple[str, ...]
    """Names of suites."""
    files: dict[str, str]
    """Suites that are read from a local file instead of the hub."""
    split: str = "test"
    """Of MBPP's published splits."""
    limit: int | None = None
    """Use only the first so many tasks of a suite."""
    samples: int = 1
    """Programs a task and model."""
    k: tuple[int, ...] = (1,)
    """The k of pass@k."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    include_trained: bool = False
    """Keep tasks that the checkpoint was trained on; the results say so."""
    unsafe: bool = False
    """Run programs without protection where there is none."""
    workers: int = 2
    """Sandboxes side by side."""

    def __post_init__(self) -> None:
        for name in (
            "samples",
            "max_new_tokens",
            "workers",
            *(["limit"] if self.limit is not None else []),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not self.tasks:
            raise ValueError(f"--tasks names no suite; there are {', '.join(SUITES)}")
        for name in self.files:
            if name not in self.tasks:
                raise ValueError(f"--task_files names {name!r}, which --tasks does not")
        for k in self.k:
            pass_at_k(self.samples, 0, k)
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError("--temperature must be at least 0, and --top_p above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "--samples above 1 needs a --temperature: greedy samples are all equal"
            )


def benchmark_checkpoint(
    config: RunConfig, checkpoint: str, options: BenchmarkOptions, out: Path
) -> dict[str, Any]:
    """Generate, run, count; prints a table, writes results.json, and returns what that holds.

    A folder with samples of the same settings is continued: none is repeated, none lost. Greedy
    answers can differ with `eval.batch_size` where two tokens are nearly as likely, because left
    padding changes sums by rounding; samples are drawn a task at a time, each from its own seed.

    Raises:
        ValueError: Suites, files or settings that cannot be used, a folder of other settings, or
            a machine that cannot protect itself.
        FileNotFoundError: A checkpoint that does not exist.
    """
    suites = {
        name: read_suite(name, options.files.get(name), split=options.split if "mbpp" in name
                         else "test")[: options.limit]
        for name in options.tasks
    }  # fmt: skip
    with Sandbox(unsafe=options.unsafe) as sandbox:  # refuses now, not after hours of generation
        level = sandbox.level
    tokenizer = load_tokenizer(config.model.base, config.model.revision)
    model = DyLoRA_MoE.from_pretrained(
        checkpoint,
        config.model.base,
        dtype=getattr(torch, config.model.dtype),
        device=choose_device(config.model.device),
        attn_implementation=config.model.attn_implementation,
        quantization=config.model.quantization,
    ).eval()
    settings = {
        "version": SAMPLE_VERSION,
        "base": config.model.base,
        "revision": config.model.revision,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "checkpoint": str(Path(checkpoint).resolve()),
        "batch_size": config.eval.batch_size,
        **{
            key: value
            for key, value in json.loads(json.dumps(asdict(options))).items()
            if key not in ("workers", "unsafe", "tasks", "files", "limit", "k")
        },
    }
    _claim(out, settings)
    results: dict[str, Any] = {
        "settings": settings,
        "options": asdict(options),
        "sandbox": level,
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "suites": {},
    }
    if not options.unsafe:
        print(f"programs run under {level}")
    print(
        f"note: before a gain of {config.model.base} is believed, check the base's score against a "
        "published one: prompts and stops differ between harnesses (codegemma-2b on HumanEval is "
        "reported as 7.8 and as 31.1, bigcode-evaluation-harness#261)"
    )
    print(f"{'suite':16} {'model':10} {'tasks':>5} {'pass@k':>8} {'value':>7}  95 % interval")
    for name, problems in suites.items():
        kept, trained = leave_out_trained(problems, data_of(model.training_record))
        kept = problems if options.include_trained else kept
        if not kept:
            raise ValueError(
                f"the checkpoint was trained on all {len(problems)} tasks of {name} that were "
                "chosen; --include-trained scores them nevertheless"
            )
        entry: dict[str, Any] = {
            "tasks": len(kept),
            "prompt": SUITES[name].prompt,
            "trained_tasks": len(trained),
            "trained_tasks_are": "scored" if options.include_trained else "left out",
        }
        counts = {}
        for who in ("base", "checkpoint"):
            file = out / f"{name}.{who}.jsonl"
            adapters = model.disable_adapters() if who == "base" else nullcontext()
            samples = _sample(model, tokenizer, kept, options, config, file, adapters)
            entry[who], counts[who] = _score(kept, samples, options)
            for k, found in entry[who]["pass@k"].items():
                print(
                    f"{name:16} {who:10} {len(kept):5} {'pass@' + k:>8} {found['mean']:7.1%}  "
                    f"{found['low']:.1%} to {found['high']:.1%}"
                )
        difference = compare(counts["base"], counts["checkpoint"])
        entry["comparison"] = difference._asdict()
        left = f"; {len(trained)} trained tasks {entry['trained_tasks_are']}" if trained else ""
        print(
            f"{name:16} better on {difference.better} tasks, worse on {difference.worse}, "
            f"exact p = {difference.p_value:.3g}{left}"
        )
        results["suites"][name] = entry
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {out}/: results.json and the samples")
    return results


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder this benchmark's, or checks that it is."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        temporary.replace(file)
        return
    before = json.loads(file.read_text())
    for key in sorted(before.keys() | settings.keys()):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{out} holds samples made with {key} = {before.get(key)!r}, not "
                f"{settings.get(key)!r}; choose another --out"
            )


def _sample(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    options: BenchmarkOptions,
    config: RunConfig,
    file: Path,
    adapters: AbstractContextManager[None],
) -> dict[str, list[str]]:
    """Programs of each task: those of the file, and the missing ones, which are added to it."""
    wanted = {problem.task_id: problem for problem in problems}
    programs = read_samples(file)
    missing = [one for one in problems if len(programs.get(one.task_id, [])) < options.samples]
    batches = _batches(tokenizer, missing, options, config.eval.batch_size)
    bar = tqdm(total=len(missing), desc=file.stem, disable=None)
    with adapters, bar, file.open("a") as stream:
        for batch in batches:
            # A kill may have left some of a task's samples. Its seed gives the same ones again.
            kept = Counter({one.task_id: len(programs.get(one.task_id, [])) for one in batch})
            for problem, solution in _generate(model, tokenizer, batch, options):
                kept[problem.task_id] -= 1
                if kept[problem.task_id] >= 0:
                    continue
                row = {"task_id": problem.task_id, "solution": solution}
                stream.write(json.dumps(row) + "\n")
                programs.setdefault(problem.task_id, []).append(solution)
            stream.flush()
            os.fsync(stream.fileno())
            bar.update(len({problem.task_id for problem in batch}))
    return {task_id: programs[task_id][: options.samples] for task_id in wanted}


def read_samples(file: Path) -> dict[str, list[str]]:
    """Programs by task of a JSONL of samples; a last line that a kill cut off is cut from the file.

    Raises:
        ValueError: Another line that is no sample.
    """
    programs: dict[str, list[str]] = {}
    if not file.exists():
        return programs
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            programs.setdefault(row["task_id"], []).append(row["solution"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: no sample; remove the file") from None
    return programs


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    options: BenchmarkOptions,
    size: int,
) -> Iterator[list[Problem]]:
    """Tasks of similar length together when greedy; else each alone, as often as it is sampled."""
    if options.temperature > 0:
        yield from ([problem] * options.samples for problem in problems)
        return
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [one.prompt for one in problems])]
    order = sorted(range(len(problems)), key=lambda index: lengths[index])
    for begin in range(0, len(order), size):
        yield [problems[index] for index in order[begin : begin + size]]


@torch.no_grad()
def _generate(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    options: BenchmarkOptions,
) -> Iterator[tuple[Problem, str]]:
    """A program for each of the problems, which may be one problem repeated."""
    prompts = encode_prompts(tokenizer, [problem.prompt for problem in problems])
    ids, mask = pad_left(prompts, pad_token_id(tokenizer))
    device = model.injection.state.maturity_E.device
    drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed("benchmark", options.seed, problems[0].task_id))
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            **(drawn if options.temperature > 0 else {}),
        )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    for problem, text in zip(problems, texts, strict=True):
        yield problem, program_of(problem, text)


def _score(
    problems: Sequence[Problem], programs: dict[str, list[str]], options: BenchmarkOptions
) -> tuple[dict[str, Any], list[int]]:
    """What goes into results.json, and how many samples of each task passed."""
    jobs = [(problem, source) for problem in problems for source in programs[problem.task_id]]
    found = list(run_all(jobs, _judge, workers=options.workers, unsafe=options.unsafe))
    passed: Counter[str] = Counter()
    for (problem, _), result in zip(jobs, found, strict=True):
        passed[problem.task_id] += result.outcome == "passed"
    counts = [passed[problem.task_id] for problem in problems]
    intervals = {
        str(k): bootstrap(
            [pass_at_k(options.samples, count, k) for count in counts], seed=options.seed
        )._asdict()
        for k in options.k
    }
    outcomes = Counter(result.outcome for result in found)
    return {"pass@k": intervals, "outcomes": dict(sorted(outcomes.items()))}, counts


def _judge(sandbox: Sandbox, job: tuple[Problem, str]) -> Result:
    problem, source = job
    return sandbox.run_tests(
        source, problem.tests, setup=problem.setup, entry_points=problem.entry_points
    )
