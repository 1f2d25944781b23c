"""Question: what does a program cost in the sandbox, what is left after many, does it judge right?

Method, on each backend that the machine has: 400 times a program of one line with one test, the
backends in turn; then 2,000 runs, every second of which is a violation; then MBPP's 974 references
and 974 programs with one thing changed (`mutant` of tests/evaluation/test_suites.py). A mutant that
passes is run once more by plain Python, with program and tests in one process.
Decision: at most 60 ms a program (median); no process, mount, file or open descriptor left; every
reference passes, and every mutant that passes is right in plain Python, too.

    PYTHONPATH=.:tests:tests/evaluation python experiments/sandbox/measure.py \
        --mbpp ../shared/data/mbpp.jsonl --results experiments/results/sandbox.json
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from test_suites import judge, mutant, plain

from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.suites import read_suite
from dylora.sandbox.host import BACKENDS, Limits, Sandbox, run_all
from sandboxes import processes, survivors

HONEST = ("def f(x): return 2 * x\nopen('a', 'w').close()", "assert f(2) == 4")
FORBIDDEN = ("import os\nos.kill(1, 0)", HONEST[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mbpp", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2000)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "invalid escape sequence")  # MBPP's programs
    problems = read_suite("mbpp", options.mbpp, split="all")
    backends = [backend for backend in BACKENDS if works(backend)]
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"}
    results["cost"] = cost(backends)
    for backend in backends:
        results[backend] = {"left": left(backend, options.runs), "mbpp": mbpp(backend, problems)}
        print(backend, results[backend])
    results["decision"] = "passed" if passed(results, backends) else "failed"
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(results["cost"], results["decision"])
    sys.exit(results["decision"] != "passed")


def works(backend: str) -> bool:
    with contextlib.suppress(ValueError), Sandbox(backend=backend):
        return True
    return False


def cost(backends: list[str], rounds: int = 400) -> dict[str, dict[str, float]]:
    """Milliseconds of wall-clock time a program, its tests included."""
    taken: dict[str, list[float]] = {backend: [] for backend in backends}
    with contextlib.ExitStack() as stack:
        boxes = {backend: stack.enter_context(Sandbox(backend=backend)) for backend in backends}
        for _ in range(rounds):
            for backend, box in boxes.items():
                begin = time.perf_counter()
                assert box.run_tests(*HONEST, entry_points=["f"]).outcome == "passed"
                taken[backend].append(1000 * (time.perf_counter() - begin))
    return {
        backend: {
            "least": round(min(each), 1),
            "median": round(statistics.median(each), 1),
            "95th percentile": round(statistics.quantiles(each, n=20)[-1], 1),
        }
        for backend, each in taken.items()
    }


def left(backend: str, runs: int) -> dict[str, int]:
    """How much more of each kind of thing there is after the runs than before."""

    def count(launcher: int) -> dict[str, int]:
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "the launcher's descriptors": len(os.listdir(f"/proc/{launcher}/fd")),
            "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
            "files in shared memory": len(os.listdir("/dev/shm")),
        }

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o711)  # nobody has to pass
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = folder
        box = stack.enter_context(Sandbox(backend=backend))
        launcher = box._process.pid
        residents, before = processes(launcher), count(launcher)
        for run in range(runs):
            result = box.run_tests(*(HONEST, FORBIDDEN)[run % 2], entry_points=["f"])
            assert result.outcome == ("passed", "violation")[run % 2], result
        after = count(launcher)
        alive = len(survivors(launcher, residents))
        box.close()
        files = len(os.listdir(folder))
    return {
        "runs": runs,
        **{name: after[name] - before[name] for name in before},
        "processes": alive,
        "processes after close": len(survivors(launcher, set())),
        "files": files,
    }


def mbpp(backend: str, problems: list[Problem]) -> dict[str, Any]:
    references = [(problem, problem.reference) for problem in problems]
    patient = Limits(seconds=30, wall_seconds=120)
    found = list(run_all(references, judge, workers=2, limits=patient, backend=backend))
    failed = [job[0].task_id for job, one in zip(references, found, strict=True) if one != "passed"]
    mutants = [(problem, mutant(problem)) for problem in problems]
    short = Limits(seconds=1, wall_seconds=10)
    found = list(run_all(mutants, judge, workers=2, limits=short, backend=backend))
    right = [job for job, one in zip(mutants, found, strict=True) if one == "passed"]
    return {
        "references": len(references),
        "references that do not pass": failed,
        "mutants": dict(sorted(Counter(found).items())),
        "mutants that pass": [problem.task_id for problem, _ in right],
        "of them wrong in plain Python": [one[0].task_id for one in right if not plain(*one)],
    }


def passed(results: dict[str, Any], backends: list[str]) -> bool:
    return all(
        results["cost"][backend]["median"] <= 60
        and not any(count for name, count in results[backend]["left"].items() if name != "runs")
        and not results[backend]["mbpp"]["references that do not pass"]
        and not results[backend]["mbpp"]["of them wrong in plain Python"]
        for backend in backends
    )


if __name__ == "__main__":
    main()
