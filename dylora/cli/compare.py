"""`run.py compare`: the settings of a comparison and of its methods, read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dylora.cli.config_file import COMMAND_LINE, build_config, read_tree
from dylora.cli.options import ConfigOptions
from dylora.compare.config import Board, CompareConfig, Method
from dylora.fields import shown
from dylora.run_config import RunConfig

OF_METHODS = (  # of the section train
    *("router_learning_rate", "freeze_routers", "prompt_clusters", "weight_decay", "optim"),
    "lora_plus_ratio",
)
# What the comparison itself sets, and by which of its settings.
OWNED = {
    "name": "the name of the comparison",
    "output_dir": "the comparison's output_dir",
    "moe.lora_alpha": "scales",
    "moe.expert_alphas": "scales",
    "moe.alpha_pattern": "scales",
    "train.learning_rate": "rates",
    "train.seed": "seeds",
    "eval.skill_answers": "test_answers",
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ConfigOptions):
    """Compare methods at equal trainable parameters, each tuned, over seeds (docs/compare.md)."""

    CONFIG: ClassVar = CompareConfig

    estimate: bool = False
    """Build every method, compare their sizes, print what all of it will take, and stop."""


def run(options: CompareOptions, overrides: list[str]) -> None:
    board = load_board(options.config, overrides)
    from dylora.compare.run import compare

    compare(board, estimate=options.estimate)


def load_board(path: str, overrides: list[str]) -> Board:
    """The comparison that a YAML file describes, with the files of its methods.

    Raises ValueError in one line for everything that is wrong with either, and FileNotFoundError
    for a file that is not there.
    """
    in_file, tree = read_tree(CompareConfig, path, overrides)

    def origin(key: str) -> str:
        top = key.replace("[", ".").split(".")[0]
        return path if tree.get(top) is in_file.get(top) else COMMAND_LINE

    config = build_config(CompareConfig, tree, origin)
    common = tree.get("run") or {}
    _refuse_owned(common, path, "run.")
    _refuse_choices_by_validation(config.run, path)
    methods = []
    for number, chosen in enumerate(config.methods):
        _, own = read_tree(RunConfig, chosen.config)
        run = build_config(RunConfig, _laid_over(common, own, chosen.config), _of(chosen.config))
        rates, scales = chosen.rates or config.rates, chosen.scales or config.scales
        for name, values in (("rates", rates), ("scales", scales)):
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{path}: {name} of methods[{number}] are {values}, but must be different "
                    "numbers, one at least: give them there or for all methods"
                )
        methods.append(Method(run.name, run, rates, scales))
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: methods are named {', '.join(names)}: names must differ")
    return Board(config, methods)


def _laid_over(common: dict[str, Any], own: dict[str, Any], file: str) -> dict[str, Any]:
    """The raw settings of a method over those of all. Raises ValueError for what would give it
    other rows, or more or fewer of them."""
    if not isinstance(own.get("name"), str):
        raise ValueError(f"{file}: name is {shown(own.get('name'))}, but must name the method")
    _refuse_owned({key: value for key, value in own.items() if key != "name"}, file)
    train = own.get("train") or {}
    keys = [key for key in own if key not in ("name", "moe", "train")]
    keys += [f"train.{key}" for key in train if key not in OF_METHODS]
    if keys:
        raise ValueError(
            f"{file}: a method cannot set {keys[0]}, only moe and, of train, "
            f"{', '.join(OF_METHODS)}: what is compared has all else in common"
        )
    sections = {
        key: {**(common.get(key) or {}), **(own.get(key) or {})} for key in ("moe", "train")
    }
    return {**common, **sections, "name": own["name"]}


def _refuse_owned(tree: dict[str, Any], file: str, path: str = "") -> None:
    for key, setting in OWNED.items():
        section, _, name = key.rpartition(".")
        part = tree.get(section) if section else tree
        if isinstance(part, dict) and name in part:
            raise ValueError(f"{file}: {path}{key} cannot be set here: {setting} says it")


def _refuse_choices_by_validation(run: RunConfig, file: str) -> None:
    """What trains or selects by validation rows, on half of which a comparison may report."""
    from dylora.training.schedule import FOLLOWS_VALIDATION

    schedule = run.train.lr_scheduler_type
    found = {
        "eval.load_best_at_end": run.eval.load_best_at_end,
        "train.early_stopping_patience": run.train.early_stopping_patience is not None,
        f"train.lr_scheduler_type {schedule}": schedule in FOLLOWS_VALIDATION,
        "eval.benchmark_strategy": run.eval.benchmark_strategy != "none",
    }
    for setting, is_set in found.items():
        if is_set:
            raise ValueError(
                f"{file}: run.{setting} does not fit a comparison, which scores the weights of the "
                "last step on rows that nothing was chosen by"
            )


def _of(file: str) -> Callable[[str], str]:
    return lambda key: file
