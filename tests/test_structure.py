"""The shipped configs, the lists of dependencies, and which module may import which."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

from dylora.cli.compare import load_board
from dylora.cli.config_file import load_run_config
from dylora.run_config import RunConfig, dump_run_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dylora"
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.yaml"))
BOARDS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/compare").glob("*.yaml"))
METHODS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/methods").glob("*.yaml"))

# A module imports only from the rows above its own. Names are relative to dylora; a folder stands
# for its modules, which may import each other, but see the test of circles.
LAYERS = (
    ("fields", "sandbox"),
    ("config", "data_config", "kernels", "tasks", "train_config"),
    ("run_config", "routing", "storage.safe_io"),
    ("base_models", "base_fingerprint"),
    ("storage",),
    ("adapters", "data"),
    ("expert_table",),
    ("mixture",),
    ("outputs",),
    ("rollback",),
    ("experts", "features"),
    ("skill_statistics",),
    ("skills",),
    ("integrations.static_weights", "model_io"),
    ("integrations.merge", "integrations.base_pass", "integrations.reference"),
    ("integrations.trainer",),
    ("integrations.base_methods",),
    ("model_methods",),
    ("model",),
    ("integrations",),
    ("training",),
    ("evaluation",),
    ("serving",),
    ("compare",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_config_parses_and_is_named_after_its_file(path: Path):
    assert load_run_config(ROOT / path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_the_resolved_config_reads_back_as_the_same(path: Path, tmp_path: Path):
    config = load_run_config(ROOT / path, ["train.adam_epsilon=1e-9", "moe.lora_alpha=1e-5"])
    (tmp_path / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", [*CONFIGS, *BOARDS], ids=str)
def test_every_command_in_a_configs_comments_has_keys_that_exist(path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of methods are relative to it
    comments = " ".join(re.findall(r"^#(.*)", path.read_text(), re.M)).replace("\\", " ")
    assert f"--config {path.as_posix()}" in comments
    overrides = re.findall(r"--(\S+\.\S+) (\S+)", comments)
    load = load_board if path in BOARDS else load_run_config
    load(str(path), [f"{key}={value}" for key, value in overrides])


def test_there_are_configs_boards_and_methods():
    assert min(map(len, (CONFIGS, BOARDS, METHODS))) > 0


@pytest.mark.parametrize("path", BOARDS, ids=str)
def test_every_shipped_board_is_named_after_its_file_and_all_of_its_grids_are_as_large(
    path: Path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    board = load_board(str(path), [])
    assert board.config.name == path.stem
    assert len({len(method.grid) for method in board.methods}) == 1


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_every_shipped_method_is_in_a_board_named_after_its_file_and_says_its_source(
    path: Path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    boards = [load_board(str(board), []) for board in BOARDS]
    chosen = [zip(board.methods, board.config.methods, strict=True) for board in boards]
    names = [m.name for pairs in chosen for m, file in pairs if Path(file.config) == path]
    assert names
    assert set(names) == {path.stem}
    comment = re.match(r"((?:#.*\n)+)", path.read_text())
    assert comment
    assert re.search(r"arXiv:\d{4}\.\d{5}|Control:|Fisher 1936", comment[1])


def test_the_resolved_config_names_every_field():
    tree = yaml.safe_load(dump_run_config(RunConfig()))
    assert tree["train"]["adam_epsilon"] == 1e-8
    assert {len(tree[name]) for name in ("model", "log")} == {6, 5}
    assert list(tree)[:2] == ["name", "output_dir"]


# Packaging


def test_environment_yml_installs_what_pyproject_declares():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert environment["name"] == project["name"]
    python, pip, lines = environment["dependencies"]
    assert python.removeprefix("python=") == project["requires-python"].removeprefix(">=")
    assert pip == "pip"
    assert lines["pip"] == ["-c constraints.txt", "-e .[report]"]  # no tools of developers
    assert "dev" in project["optional-dependencies"]
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / "Makefile").read_text()


def test_constraints_pin_every_declared_dependency_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *itertools.chain.from_iterable(extras)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for line in declared:
        name, low, high = re.fullmatch(
            r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?(?:,<([\d.]+))?", line
        ).groups()
        if name == project["name"]:
            continue
        pin = [int(part) for part in pins[name].split(".")]
        assert pin >= [int(part) for part in low.split(".")], line
        assert high is None or pin < [int(part) for part in high.split(".")], line


# Imports


def modules() -> dict[str, Path]:
    """Dotted names, relative to dylora, of the package's modules; its own __init__ left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and "assets" not in parts:
            found[".".join(parts)] = path
    return found


def imports_of(source: str, known: set[str], *, module: str, is_folder: bool = False) -> set[str]:
    """The modules of dylora that a source names in an import, wherever it stands.

    Imports inside functions and for type checkers count, and so does a string that is the name of
    a module (`importlib.import_module("dylora.model")`).
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["dylora", *module.split(".")]
                above = parts[: len(parts) - node.level + is_folder]
                base = ".".join([*above, base] if base else above)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_ours(node.value):
            names |= {node.value} & {f"dylora.{name}" for name in known}
    inside = {name.removeprefix("dylora").removeprefix(".") for name in names if is_ours(name)}
    # `from dylora.routing.gating import top_k_mask` is cut to the module.
    return {
        name if name in known or "." not in name else name.rsplit(".", maxsplit=1)[0]
        for name in inside
    }


def is_ours(name: str) -> bool:
    return name == "dylora" or name.startswith("dylora.")


def place_of(name: str) -> str:
    """The row of LAYERS that a module stands in: its own, or that of its folder."""
    return name if name in RANKS else name.split(".")[0]


def violation(importer: str, imported: str) -> str | None:
    """What is wrong with an import between two modules of dylora, if anything."""
    top, target = place_of(importer), place_of(imported)
    if target not in RANKS:
        return f"{importer} imports dylora itself, or a module without a place: {imported!r}"
    same_folder = importer.split(".")[0] == imported.split(".")[0] and "." in imported
    if RANKS[target] < RANKS[top] or same_folder:
        return None
    return f"{importer} imports {imported}, which does not stand below it"


def import_graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: imports_of(
            path.read_text(encoding="utf-8"),
            set(known),
            module=name,
            is_folder=path.name == "__init__.py",
        )
        for name, path in known.items()
    }


def test_every_module_has_a_place_in_the_table():
    assert [name for name in modules() if name.split(".")[0] not in RANKS] == []


def test_imports_inside_the_package_point_down_only():
    graph = import_graph()
    found = [violation(name, target) for name, targets in graph.items() for target in targets]
    assert sorted(text for text in found if text) == []


def test_no_module_imports_itself_through_others():
    graph = import_graph()

    def reachable(name: str) -> set[str]:
        seen, queue = set(), list(graph[name])
        while queue:
            target = queue.pop()
            if target not in seen:
                seen.add(target)
                queue.extend(graph.get(target, ()))
        return seen

    assert [name for name in graph if name in reachable(name)] == []


def test_every_file_that_the_package_names_in_backticks_is_there():
    found = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
    files = [f"/{path.relative_to(ROOT).as_posix()}" for path in found]
    named = {
        (name, path.name)
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8"))
    }
    assert [pair for pair in named if not any(file.endswith(f"/{pair[0]}") for file in files)] == []


# Sizes

MOST_LINES = {"file": 350, "function": 60}


def too_long() -> set[str]:
    """Files and functions of the package that are longer than MOST_LINES."""
    found = set()
    for name, path in modules().items():
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) > MOST_LINES["file"]:
            found.add(name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES["function"]:
                    found.add(f"{name}.{node.name}")
    return found


def test_files_and_functions_are_short():
    assert sorted(too_long()) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("config", "from dylora.routing import gating"),
        ("experts", "from dylora import model"),
        ("experts", "from . import model"),
        ("routing.router", "def f():\n    import dylora.model"),
        ("experts", "from .model import DyLoRA_MoE"),
        ("storage.checkpoint", "from dylora.adapters import inject"),
        ("storage.checkpoint", "from ..adapters.inject import Mixture"),
        ("training.loop", "from dylora.cli import main"),
        ("model", "from dylora import DyLoRA_MoE"),
        ("experts", "if TYPE_CHECKING:\n    from dylora.model import DyLoRA_MoE"),
        ("training.loop", "import_module('dylora.evaluation.report')"),
    ],
)
def test_an_import_that_points_up_is_seen(importer: str, source: str):
    known = {"model", "adapters", "routing", "cli", "training", "storage", "evaluation.report"}
    targets = imports_of(source, known, module=importer)
    assert any(violation(importer, target) for target in targets)


IMPORT_CORE = """
import builtins
import sys

ALLOWED = {"dylora", "torch", "transformers", "safetensors", "einops", *sys.stdlib_module_names}
plain_import = builtins.__import__

def watched_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer, top = (globals or {}).get("__name__", ""), name.split(".")[0]
    if importer.split(".")[0] == "dylora" and level == 0 and top not in ALLOWED:
        raise ModuleNotFoundError(f"{importer} imports {name}")
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = watched_import
import dylora
for name in dylora.__all__:
    getattr(dylora, name)
"""


def test_import_dylora_needs_torch_transformers_safetensors_and_einops_alone():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_CORE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]


def doubled_on_a_device(source: str) -> list[str]:
    """What a module casts to float64, or makes in it, before it is on the CPU."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {key.arg: ast.unparse(key.value) for key in node.keywords}
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        doubled = of is not None and ast.unparse(node.func).endswith(".double")
        if doubled and not ast.unparse(of).endswith(".cpu()"):
            found.append(ast.unparse(node))
        if given.get("dtype") == "torch.float64" and "device" in given:
            found.append(ast.unparse(node))
    return found


def test_float64_is_of_the_cpu_alone_as_mps_has_none():
    # What is read from a file, or made by `features`, is on the CPU already.
    known = {"B.T.double()", "prompts.double()", "(rows.min(0).values > 1).double()"}
    found = {
        f"{path.relative_to(ROOT)}: {call}"
        for path in PACKAGE.rglob("*.py")
        for call in doubled_on_a_device(path.read_text(encoding="utf-8"))
        if call not in known
    }
    assert found == set()
    assert doubled_on_a_device("x.double().cpu()") == ["x.double()"]
    assert doubled_on_a_device("zeros(3, dtype=torch.float64, device=d)") != []


def print_graph() -> None:
    """Each folder (or file of its own): its lines, and what else it imports."""
    lines, imported = Counter(), defaultdict(set)
    for name, targets in import_graph().items():
        folder = name.split(".")[0]
        lines[folder] += len(modules()[name].read_text(encoding="utf-8").splitlines())
        imported[folder] |= {target.split(".")[0] for target in targets} - {folder}
    for folder in sorted(lines, key=lambda folder: (RANKS.get(folder, 0), folder)):
        print(f"{folder:16} {lines[folder]:6}  {' '.join(sorted(imported[folder]))}")
    print(f"{'all':16} {lines.total():6}")


if __name__ == "__main__":
    print_graph()
