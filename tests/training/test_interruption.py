"""A run that is killed, stopped, refused or starved goes on exactly, or says why not."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dylora.storage import folders, manifest
from dylora.storage.lock import LOCK_FILE, lock_folder
from dylora.storage.manifest import verify, write_manifest
from dylora.training import loop
from dylora.training.loop import train
from dylora.training.resume import preflight_save, resume
from dylora.training.run import prepare
from runs import STEPS, all_tensors, rows_of

ROOT = Path(__file__).parents[2]


def same_end(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs hold the same bits."""
    a, b = (all_tensors(folder / f"checkpoint-{STEPS}") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Signals


@pytest.fixture
def send_at(monkeypatch):
    """Sends this process a signal when `owner.name` is called for the n-th time."""

    def install(owner, name: str, number: signal.Signals, nth: int) -> None:
        original, calls = getattr(owner, name), 0

        def sending(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, sending)

    return install


STOPS = {
    "in training": (loop, "run_step", 3, 3),
    "in evaluation": (loop, "validate", 1, 4),
    "in saving": (loop, "save", 2, 5),
    "in the last step": (loop, "run_step", STEPS, STEPS),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", STOPS)
def test_a_signal_saves_ends_the_run_and_loses_nothing(
    make_config, send_at, monkeypatch, when, number
):
    options = {"save_steps": 5, "eval_steps": 4}
    whole = train(make_config("whole", **options))
    with monkeypatch.context():
        owner, name, nth, step = STOPS[when]
        send_at(owner, name, number, nth)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            train(make_config("parts", **options))
        monkeypatch.undo()
    assert stopped.type is (SystemExit if number == signal.SIGTERM else KeyboardInterrupt)
    assert getattr(stopped.value, "code", 143) == 143
    verify(whole.folder.parent / "parts" / f"checkpoint-{step}")
    resumed = train(make_config("parts", **options), "latest")
    assert same_end(whole.folder, resumed.folder)
    assert rows_of(whole.folder) == rows_of(resumed.folder)


def test_handlers_are_put_back(make_config):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(make_config(max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigint_does_not_wait_for_the_step_to_end(make_config, monkeypatch):
    def stuck(run):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(loop, "run_step", stuck)
    with pytest.raises(KeyboardInterrupt):
        train(make_config())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_with_the_signals_exit_code(make_config, tmp_path, number, code):
    from dylora.run_config import dump_run_config

    config = tmp_path / "config.yaml"
    config.write_text(dump_run_config(make_config(max_steps=100_000)))
    command = [sys.executable, "run.py", "train", "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        while b"step 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(30) == code  # experiments/LOG.md has the times
    (found,) = (tmp_path / "runs" / "a").glob("checkpoint-*")
    verify(found)


# One trainer a folder


def test_a_second_trainer_is_refused_and_told_who_holds_the_folder(make_config, tmp_path):
    with (
        lock_folder(tmp_path / "runs" / "a"),
        pytest.raises(FileExistsError, match=rf"process {os.getpid()} on .*another --name"),
    ):
        train(make_config())


def test_a_killed_trainer_holds_nothing(tmp_path):
    script = (
        "import os, sys, pathlib\nfrom dylora.storage.lock import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    assert (tmp_path / LOCK_FILE).exists()
    with lock_folder(tmp_path):
        pass


def test_a_lock_whose_file_was_taken_away_keeps_nobody_out_twice(tmp_path):
    """Two processes with a lock each on files of one name would both train."""
    with lock_folder(tmp_path), pytest.raises(FileExistsError), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_refused_run_leaves_no_folder(make_config, tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs"):
        train(make_config(lr_scheduler_kwargs={"cycles": 3}))
    train(make_config("b", max_steps=1))
    assert not list((tmp_path / "runs").glob("*/" + LOCK_FILE))


# Before the first step


def test_two_checkpoints_that_do_not_fit_are_refused_before_the_first_step(
    make_config, monkeypatch, tmp_path
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(loop, "run_step", lambda run: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"0\.0 MB are free .*two do not fit"):
        train(make_config())
    assert not list((tmp_path / "runs" / "a").glob("*checkpoint*"))


def test_a_rehearsal_that_fails_leaves_nothing(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, "MAX_JSON", 1000)  # what config.json is above
    for _ in range(2):
        with pytest.raises(ValueError, match=r"config.json has [\d,]+ bytes, but may have 1,000"):
            train(make_config())
    assert not list((tmp_path / "runs" / "a").glob("*checkpoint*"))


def test_a_base_whose_name_no_reader_takes_is_refused_before_the_first_step(
    make_config, base_folder, monkeypatch, tmp_path
):
    odd = tmp_path / "a\u00a0base"
    shutil.copytree(base_folder, odd)
    monkeypatch.setattr(loop, "run_step", lambda run: pytest.fail("trained"))
    config = make_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, base=str(odd)))
    with pytest.raises(ValueError, match=r"base_model_name_or_path is .*which is invalid"):
        train(config)
    assert not list((tmp_path / "runs" / "a").glob("*checkpoint*"))


def test_a_state_that_no_run_could_go_on_from_is_refused_before_the_first_step(make_config):
    run = prepare(make_config(), fresh=True)
    run.sampler.seed = -1
    with pytest.raises(ValueError, match=r"trainer_state.json: sampler.seed is -1"):
        preflight_save(run)
    assert not list(run.folder.glob("*checkpoint*"))


def test_what_a_rehearsal_has_left_is_taken_away(make_config):
    run = prepare(make_config(), fresh=True)
    for name in ("checkpoint-rehearsal", "checkpoint-rehearsal.damaged", "checkpoint-2.damaged"):
        (run.folder / name).mkdir()
    folders.recover(run.folder)
    assert [path.name for path in run.folder.glob("*checkpoint*")] == ["checkpoint-2.damaged"]


def test_the_save_before_the_first_step_has_the_full_size(make_config, monkeypatch):
    sizes = []
    original = folders.folder_bytes

    def measuring(folder):
        sizes.append(original(folder))
        return sizes[-1]

    monkeypatch.setattr(folders, "folder_bytes", measuring)
    run = train(make_config(max_steps=1))
    saved = original(run.folder / "checkpoint-1")
    assert 0.97 * saved < sizes[0] < 1.03 * saved


def test_a_full_disk_is_one_line_that_names_the_last_good_checkpoint(make_config, monkeypatch):
    calls = 0
    original = loop.save.__globals__["write_model"]

    def full(model, folder):
        nonlocal calls
        calls += 1
        if calls == 3:  # the rehearsal, step 4, step 8
            raise OSError(28, "No space left on device")
        original(model, folder)

    monkeypatch.setitem(loop.save.__globals__, "write_model", full)
    with pytest.raises(ValueError, match=r"checkpoint-8 could not.*No space.*is .*checkpoint-4\."):
        train(make_config(save_steps=4))


# What a resumed run finds


def test_a_damaged_checkpoint_of_a_later_step_is_set_aside(make_config, capsys):
    run = train(make_config(save_steps=5))
    before = all_tensors(run.folder / "checkpoint-10")
    (run.folder / "checkpoint-10" / "manifest.json").unlink()
    train(make_config(save_steps=5), "latest")
    assert (run.folder / "checkpoint-10.damaged").is_dir()
    after = all_tensors(run.folder / "checkpoint-10")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert "set aside" in capsys.readouterr().out


def test_a_resume_hashes_no_file_of_a_damaged_checkpoint_twice(make_config, monkeypatch):
    run = train(make_config(save_steps=5))
    file = run.folder / "checkpoint-10" / "trainer_state.json"
    file.write_bytes(file.read_bytes()[:-1] + b" ")  # of the same size, so that all are hashed
    hashed: Counter[Path] = Counter()
    original = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashed.update([path]) or original(path))
    again = prepare(make_config(save_steps=5), fresh=False)
    resume(again, "latest")
    assert again.progress.step == 5
    assert (run.folder / "checkpoint-10.damaged").is_dir()
    assert file in hashed
    assert set(hashed.values()) == {1}


def test_going_back_sets_the_abandoned_future_aside(make_config):
    """Else retention counts it as newer than what is saved now, and `latest` goes on with it."""
    run = train(make_config(save_steps=2, save_total_limit=4))
    options = {"save_steps": 2, "save_total_limit": 2}
    train(make_config(**options), str(run.folder / "checkpoint-4"))
    found = sorted(path.name for path in run.folder.glob("checkpoint-*") if path.is_dir())
    expected = ["checkpoint-10", "checkpoint-10.superseded", "checkpoint-6.superseded"]
    assert found == sorted([*expected, "checkpoint-8", "checkpoint-8.superseded"])


def test_a_run_that_stopped_early_does_not_go_on_when_resumed(make_config, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("dylora.training.loop.overall_loss", lambda scores: next(losses))
    options = {"eval_steps": 1, "early_stopping_patience": 2}
    assert train(make_config(**options)).progress.step == 3
    assert train(make_config(**options), "latest").progress.step == 3


def without(file: Path, *keys: str) -> None:
    """Take one piece of state out of a file, and write the manifest as if it had never been."""
    state = json.loads(file.read_text()) if file.suffix == ".json" else torch.load(file)
    inner = state
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    file.write_text(json.dumps(state)) if file.suffix == ".json" else torch.save(state, file)
    (file.parent / "manifest.json").unlink()
    write_manifest(file.parent)


PIECES = {
    "trainer_state.json": [
        *(("step",), ("targets",), ("best_loss",), ("best_step",), ("fractions",), ("sampler",)),
        *(("evaluations_without_gain",), ("skipped_in_a_row",), ("evaluation_due",), ("steps",)),
        *(("sampler", "position"), ("sampler", "epoch"), ("sampler", "seed")),
    ],
    "rng_state.pt": [("torch",), ("cuda",), ("python",), ("numpy",)],
    "scheduler.pt": [("scheduler",), ("scaler",), ("scheduler", "last_epoch")],
}


@pytest.fixture(scope="session")
def one_step(tmp_path_factory):
    return tmp_path_factory.mktemp("one")


@pytest.mark.parametrize(
    ("file", "keys"), [(file, keys) for file, all_keys in PIECES.items() for keys in all_keys]
)
def test_each_piece_of_state_that_is_missing_is_an_error_that_names_it(
    make_config, one_step, file, keys
):
    folder = one_step / "a" / "checkpoint-1"
    if not folder.exists():
        shutil.copytree(train(make_config(max_steps=1)).folder, one_step / "a")
    shutil.rmtree(one_step / "tried", ignore_errors=True)
    tried = Path(shutil.copytree(folder, one_step / "tried"))
    without(tried / file, *keys)
    with pytest.raises(ValueError, match=keys[-1]):
        train(make_config(max_steps=2), str(tried))


def test_moments_that_are_missing_are_an_error_that_names_the_parameter(make_config):
    folder = train(make_config(max_steps=1)).folder / "checkpoint-1"
    name = next(iter(torch.load(folder / "optimizer.pt")))
    without(folder / "optimizer.pt", name, "exp_avg_sq")
    with pytest.raises(ValueError, match=f"{name} has exp_avg, step"):
        train(make_config(max_steps=2), str(folder))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/dylora-was-here",))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pt"])
@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Evil(), protocol=2), b"", b"PK\x03\x04 no archive"],
    ids=["code", "empty", "torn"],
)
def test_a_state_file_that_is_no_plain_tensors_is_refused_and_not_run(make_config, file, content):
    folder = train(make_config(max_steps=1)).folder / "checkpoint-1"
    (folder / file).write_bytes(content)
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match=rf"{file}: not a readable file"):
        train(make_config(max_steps=2), str(folder))
    assert not Path("/tmp/dylora-was-here").exists()


# Kills and full disks at the calls of a save


@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler")
def test_a_save_killed_or_without_space_at_any_call_loses_nothing(base_folder, tmp_path):
    """A sample of the calls; experiments/LOG.md has the count of all."""
    script = ROOT / "experiments" / "durability" / "kills.py"
    out = tmp_path / "counts.json"
    options = ["--work", tmp_path / "work", "--base", base_folder, "--out", out, "--every", "45"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = json.loads(out.read_text())
    assert len(counts) == 12
    assert min(count["calls"] for count in counts.values()) > 50
    assert sum(count["failed"] for count in counts.values()) == 0
