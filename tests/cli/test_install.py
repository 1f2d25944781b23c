"""What an installed dylora is: the wheel, its command, its configs, and other systems."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from dylora.cli import main as cli
from dylora.cli.config_file import find_config, load_run_config
from dylora.cli.main import main
from dylora.data.sources import read_source
from dylora.run_config import StageConfig
from dylora.training.check import check

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"


def run_in(*command: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, unpacked as an installer does."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dylora", source / "dylora", symlinks=True, ignore=skip)
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = run_in(sys.executable, "-c", BUILD, cwd=source, path=source)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_has_the_command_and_every_config(installed):
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dylora = dylora.cli.main:main" in points.read_text()
    inside = {path.relative_to(installed / "dylora") for path in installed.rglob("*.yaml")}
    assert {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")} <= inside
    assert (installed / "dylora/assets/tiny-code-llama/model.safetensors").exists()
    assert not list(installed.glob("tests*"))


def test_what_is_installed_finds_a_config_by_its_name_in_any_folder(installed, tmp_path):
    command = (sys.executable, "-m", "dylora", "train", "--print_config", "--config", "quickstart")
    result = run_in(*command, cwd=tmp_path, path=installed)
    assert (result.returncode, result.stderr) == (0, "")
    assert yaml.safe_load(result.stdout)["name"] == "quickstart"


def test_a_shipped_config_goes_by_its_name_and_a_users_file_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_run_config(ROOT / "configs" / "quickstart.yaml")
    assert load_run_config("quickstart") == load_run_config("configs/quickstart.yaml") == shipped
    Path("quickstart").write_text("name: mine\n")
    assert load_run_config("quickstart").name == "mine"
    assert find_config("compare/skills").name == "skills.yaml"
    with pytest.raises(FileNotFoundError, match="no such file; did you mean quickstart"):
        find_config("quickstrat")


def test_version_is_one_line_and_the_packages_own(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', project, re.M)
    assert version
    assert re.fullmatch(rf"dylora {version[1]} \(torch \S+, transformers \S+, Python \S+\)\n", out)


def test_the_first_line_of_a_command_is_its_own(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(
        f"name: x\noutput_dir: {tmp_path}\nmodel: {{base: tiny-code-llama, dtype: float32}}\n"
        "moe: {num_experts: 2, r: 2}\ndata: {sources: [{name: skill/lists, rows: 9}]}\n"
        "train: {max_steps: 1}\neval: {eval_subset: 2}\n"
    )
    command = (sys.executable, "-m", "dylora", "train", "--check", "--config", str(config))
    result = run_in(*command, cwd=tmp_path, path=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("skill/lists: ")


WITHOUT_UNIX = """
import builtins, importlib, pkgutil, sys
GONE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"}
plain = builtins.__import__

def elsewhere(name, globals=None, *rest, **more):
    if (globals or {}).get("__name__", "").split(".")[0] == "dylora" and name in GONE:
        raise ModuleNotFoundError(f"{globals['__name__']} imports {name}")
    return plain(name, globals, *rest, **more)

builtins.__import__ = elsewhere
import dylora
for module in pkgutil.walk_packages(dylora.__path__, "dylora."):
    if not module.name.startswith(("dylora.sandbox.launcher", "dylora.__main__")):
        importlib.import_module(module.name)
"""


def test_every_module_but_the_sandboxs_own_is_imported_without_the_modules_of_unix():
    result = run_in(sys.executable, "-c", WITHOUT_UNIX, cwd=ROOT, path=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


# dylora init


def written_config(tmp_path, *rows: str, base: str = "tiny-code-llama"):
    data, out = tmp_path / "my rows.jsonl", tmp_path / "mine.yaml"
    data.write_text("".join(row + "\n" for row in rows))
    assert main(["init", "--data", str(data), "--base", base, "--out", str(out)]) == 0
    return out


def test_init_writes_a_config_that_reads_back_with_the_columns_of_the_file(tmp_path, capsys):
    file = written_config(tmp_path, '{"Question": "1+1?", "input": "", "Answer": "2"}')
    (source,) = load_run_config(file).data.sources
    assert source.path == str(tmp_path / "my rows.jsonl")
    columns = (source.instruction_column, source.input_column, source.output_column)
    assert columns == ("Question", "input", "Answer")
    assert f"--config {file} --check" in capsys.readouterr().out


def test_init_lists_the_columns_that_it_does_not_know(tmp_path):
    file = written_config(tmp_path, '{"q": "1+1?", "a": "2"}', base="google/gemma-3-270m")
    assert '# its columns: "q", "a"' in file.read_text()
    config = load_run_config(file)
    assert (config.model.base, config.model.dtype) == ("google/gemma-3-270m", "bfloat16")
    assert config.data.sources[0].instruction_column is None


MBPP = '{"task_id": %d, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f"]}'


@pytest.mark.parametrize("published", [True, False])
def test_init_of_a_file_called_mbpp_writes_what_train_reads(tmp_path, published):
    rows = [MBPP % n if published else json.dumps({"text": f"row {n}"}) for n in range(500, 650)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(rows))
    out = tmp_path / "x.yaml"
    assert main(["init", "--data", str(tmp_path / "mbpp.jsonl"), "--out", str(out)]) == 0
    (source,) = load_run_config(out).data.sources
    assert source.name == ("mbpp" if published else "mbpp_rows")
    assert read_source(source).format == ("instruction" if published else "text")


def test_init_writes_names_beyond_the_basic_plane(tmp_path):
    data, out = tmp_path / "r\U0001f600 \u2028.jsonl", tmp_path / "x.yaml"
    data.write_text('{"\U0001f600question": "1+1?", "question": "1", "answer": "2"}\n')
    assert main(["init", "--data", str(data), "--out", str(out)]) == 0
    (source,) = load_run_config(out).data.sources
    assert (source.path, source.name) == (str(data), "r\U0001f600 _")


def test_init_replaces_no_file(tmp_path, capsys):
    file = written_config(tmp_path, '{"question": "1+1?", "answer": "2"}')
    before = file.read_text()
    argv = ["init", "--data", str(tmp_path / "my rows.jsonl"), "--out", str(file)]
    assert main(argv) == 2
    assert "exists: give another --out" in capsys.readouterr().err
    assert file.read_text() == before


# dylora train --check


def test_check_takes_a_step_and_leaves_nothing(make_config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = make_config()
    before = sorted(tmp_path.rglob("*"))
    check(config)
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert re.search(r"^memory: about \S+ GB, with batches as large as may be$", out, re.M)
    assert re.search(r"^one step on the longest rows: loss \d.*of memory$", out, re.M)
    assert "10 steps fit" in out


def test_check_steps_on_the_longest_rows(make_config, monkeypatch):
    seen = []
    from dylora.training import check as module

    step = module.run_step

    def spy(run):
        result = step(run)
        seen.append(result.tokens)
        seen.append(sum(sorted(run.data.train[0].all_lengths.tolist(), reverse=True)[:4]))
        return result

    monkeypatch.setattr(module, "run_step", spy)
    check(make_config())
    assert seen[0] == seen[1]


def test_check_refuses_the_folder_of_another_run(make_config, tmp_path):
    (tmp_path / "runs" / "a" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already holds checkpoints"):
        check(make_config())


def test_check_is_of_a_run_that_begins(refusal):
    argv = ("--config", "quickstart", "--check", "--resume_from_checkpoint", "latest")
    assert "leave out --resume_from_checkpoint" in refusal("train", *argv)


def test_check_reads_every_stage_of_a_stream(make_config, capsys, tmp_path):
    config = make_config(moe={"router_scope": "prompt", "expert_dropout": 0.0, "num_experts": 1})
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(f'{{"question": "Add {n}.", "answer": "{n}"}}\n' for n in range(300)))
    source = dataclasses.replace(config.data.sources[0], path=str(rows))
    stages = [StageConfig(name=name, sources=[source]) for name in ("one", "two")]
    data = dataclasses.replace(config.data, sources=[])
    check(dataclasses.replace(config, data=data, stages=stages))
    out = capsys.readouterr().out
    assert "stage 1: rows: " in out
    assert "stage 2: rows: " in out


def test_the_commands_help_calls_it_by_its_name(capsys):
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dylora train ")
    assert cli.OPENING.startswith("usage: dylora ")
