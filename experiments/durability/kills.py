"""Question: does a run survive being killed, or finding the disk full, at any call of a save?

Method: a shim (shim.c, LD_PRELOAD) counts the calls that change the disk. For each of them a forked
process saves and is killed before the call, or in the middle of it, or finds no space from there
on. A kill has passed when the run, resumed from what it left (or begun anew where the very first
save was hit), ends bit-identical to one that was never killed. A full disk has passed when the
older checkpoints are untouched, byte for byte, the error names the last of them, nothing half
remains, and the next save succeeds. Decision: 100 % of the points, or it is broken.

Scenarios: the first save of a run; one that also deletes an older checkpoint, beside the best; one
just after an expert was added; one that replaces a checkpoint of the same step.

    PYTHONPATH=. python experiments/durability/kills.py --work /tmp/kills
"""

import ctypes
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

MODES = {"killed before": 1, "killed within": 2, "disk full": 3}


def main() -> None:
    from common import arguments

    parser = arguments(__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every n-th call only")
    options = parser.parse_args()
    if "DYLORA_SHIM" not in os.environ:
        restart_under_shim(options.work)
    counts = campaign(options.work, options.base, options.every)
    print(json.dumps(counts, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(counts, indent=2) + "\n")
    sys.exit(any(count["failed"] for count in counts.values()))


def restart_under_shim(work: Path) -> None:
    """Build the shim and run this script again with it, single-threaded: it forks."""
    work.mkdir(parents=True, exist_ok=True)
    shim = work.resolve() / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(command, check=True)
    environment = {"DYLORA_SHIM": str(shim), "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


def campaign(work: Path, base: str, every: int) -> dict[str, dict[str, int]]:
    """'scenario, mode' -> how many calls a save has, how many points were tried, which failed."""
    import torch
    from common import make_config

    from dylora.training.run import prepare

    torch.set_num_threads(1)
    settings = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2}
    fresh = prepare(make_config(work, base, "fresh", **settings), fresh=True)
    before = prepare(make_config(work, base, "before", **settings), fresh=True)

    counts = {}
    out = work / "counts.json"
    for scenario in SCENARIOS:
        ready = work / "ready" / scenario
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir(parents=True)
        # A fork each, so that one scenario's experts and steps do not reach the next.
        code = in_child(partial(try_points, before, fresh, ready, scenario, every, out))
        assert code == 0, scenario
        counts |= json.loads(out.read_text())
    return counts


def try_points(before, fresh, ready, scenario, every, out) -> None:
    """All modes and points of one scenario."""
    shim = ctypes.CDLL(os.environ["DYLORA_SHIM"])
    from dylora.training.random_state import random_state

    begun = random_state()
    run = before._replace(folder=ready, log=quiet_log(ready))
    SCENARIOS[scenario](run)
    templates = folder_digests(ready)
    work = ready.with_name(f"{scenario} tried")

    def restart() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(ready, work)

    restart()
    marks = work.with_name("marks")
    expected = digest_in_child(lambda: finish(run, work), marks)
    assert expected is not None, "the run that was never killed failed"
    restart()
    shim.shim_disarm.restype = ctypes.c_long

    def count_calls() -> None:
        shim.shim_arm(0, 0)
        save_in(run, work)
        marks.write_text(str(shim.shim_disarm()))

    in_child(count_calls)
    total = int(marks.read_text())
    counts = {}
    for mode, number in MODES.items():
        began = time.perf_counter()
        tried, failed = 0, []
        for point in range(1, total + 1, every):
            restart()
            if number == 3:
                problem = try_full_disk(run, shim, work, point, templates, marks)
            else:
                problem = try_kill(run, fresh, shim, work, number, point, begun, expected, marks)
            tried += 1
            if problem:
                failed.append(point)
                print(f"{scenario}, {mode} call {point}: {problem}", flush=True)
        key = f"{scenario}, {mode}"
        counts[key] = {"calls": total, "tried": tried, "failed": len(failed)}
        print(key, counts[key], f"{time.perf_counter() - began:.0f} s", flush=True)
    out.write_text(json.dumps(counts))


def try_kill(run, fresh, shim, work, mode, point, begun, expected, marks) -> str | None:
    """Save, killed at a point; resume; the end must be the expected one."""

    def save_and_die() -> None:
        shim.shim_arm(mode, point)
        save_in(run, work)

    code = in_child(save_and_die)
    if code not in (0, 137):
        return f"the save ended with {code}"
    if code == 0:
        return "the point was never reached"
    found = digest_in_child(lambda: resume_and_finish(fresh, work, begun), marks)
    if found is None:
        return "the resumed run failed"
    return None if found == expected else "the resumed run came to another end"


def try_full_disk(run, shim, work, point, templates, marks) -> str | None:
    """Save on a disk that is full from a point on: an error that names what is left, no harm."""
    marks.unlink(missing_ok=True)

    def save_on_full_disk() -> None:
        shim.shim_arm(3, point)
        try:
            save_in(run, work)
            text = "saved"
        except ValueError as error:
            text = str(error)
        shim.shim_disarm()
        left = folder_digests(work)
        name = f"checkpoint-{run.progress.step}"
        harmed = [key for key in templates if left.get(key) != templates[key]]
        if text != "saved" and harmed:
            text = f"harmed {harmed}"
        elif text != "saved" and [p for p in work.iterdir() if p.name.endswith(".writing")]:
            text = "left a half"
        elif text != "saved" and templates and f"{work}/checkpoint-" not in text:
            text = f"names no checkpoint: {text}"
        else:
            save_in(run, work)  # there is space again
            text = "" if name in folder_digests(work) else "the next save failed"
        marks.write_text(text)

    code = in_child(save_on_full_disk)
    return f"ended with {code}" if code or not marks.exists() else marks.read_text() or None


# The run


def take_steps(run, until: int) -> None:
    """Train up to a step, saving and logging nothing."""
    from dylora.training.step import run_step

    while run.progress.step < until:
        run_step(run)


def first_save(run) -> None:
    take_steps(run, 3)


def save_with_retention(run) -> None:
    """Three checkpoints lie there, the oldest the best: the save deletes the one between."""
    from dylora.training.resume import save

    run.progress.best_step, run.progress.best_loss = 0, 1e-6
    for step in (0, 1, 2):
        take_steps(run, step)
        save(run)
    take_steps(run, 3)


def save_of_a_grown_pool(run) -> None:
    """An expert was added after the checkpoint that lies there, and trained for a step."""
    from dylora.training.resume import save

    take_steps(run, 2)
    save(run)
    (run.folder / "grown").touch()
    run.model.experts.create_expert(share=0.2)
    take_steps(run, 3)


def save_over_another(run) -> None:
    """A checkpoint of the same step lies there: as the same run would write it again."""
    from dylora.training.resume import save

    take_steps(run, 3)
    save(run)


SCENARIOS: dict[str, Callable] = {
    "first save": first_save,
    "save with retention": save_with_retention,
    "save of a grown pool": save_of_a_grown_pool,
    "save over another": save_over_another,
}


def quiet_log(folder: Path):
    from dylora.run_config import LogConfig
    from dylora.training.log import RunLog

    class Quiet(RunLog):
        def info(self, text: str) -> None:
            pass

    return Quiet(folder, LogConfig(), "run", {})


def save_in(run, folder: Path) -> None:
    from dylora.training.resume import save

    save(run._replace(folder=folder, log=quiet_log(folder)))


def finish(run, folder: Path):
    """The run that was never killed: save, and go on to the end."""
    from dylora.training.loop import run_steps

    run = run._replace(folder=folder, log=quiet_log(folder))
    save_in(run, folder)
    run_steps(run)
    return run


def resume_and_finish(fresh, folder: Path, begun):
    """What a new process does: settle leftovers, take the newest that verifies, go on."""
    from dylora.storage.folders import checkpoints, recover
    from dylora.training.loop import run_steps
    from dylora.training.random_state import restore_random_state
    from dylora.training.resume import resume

    run = fresh._replace(folder=folder, log=quiet_log(folder))
    recover(folder)
    if checkpoints(folder):
        resume(run, "latest")
        if (folder / "grown").exists() and len(run.model.experts) == 3:
            run.model.experts.create_expert(share=0.2)  # the growth came after that checkpoint
    else:
        restore_random_state(begun)  # as prepare() seeds a process of its own
    run_steps(run)
    return run


# Processes and files


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its exit code."""
    sys.stdout.flush()
    generator = random.getstate()
    child = os.fork()
    if child == 0:
        random.setstate(generator)  # Python seeds it anew in a forked process
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest_in_child(work: Callable, marks: Path) -> str | None:
    """The digest of the run that `work` returns, from a forked process; None if it fails."""
    from common import digest

    marks.unlink(missing_ok=True)
    code = in_child(lambda: marks.write_text(digest(work())) and None)
    return marks.read_text() if code == 0 else None


def folder_digests(folder: Path) -> dict[str, str]:
    """Name of each checkpoint -> SHA-256 of all its files."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        hashed = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            hashed.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
        found[path.name] = hashed.hexdigest()
    return found


if __name__ == "__main__":
    main()
