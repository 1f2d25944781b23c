"""The commands of run.py: for each its options, and the function that carries it out.

The modules that do the work are imported inside each command, so that help and errors come at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.config import Quantization
from dylora.config_file import COMMAND_LINE, load_run_config, split_overrides
from dylora.run_config import Precision, dump_run_config

CONFIG_USAGE = "--config FILE [--section.key VALUE ...]"


class Command(NamedTuple):
    """One command."""

    run: Callable[[Namespace, list[str]], None]  # its options, and overrides of config fields
    add_options: Callable[[ArgumentParser], None]
    description: str


# train


def _add_train(command: ArgumentParser) -> None:
    command.usage = f"run.py train {CONFIG_USAGE} [--resume_from_checkpoint latest|DIR]"
    _add_config(command)
    _add_print_config(command)
    command.add_argument(
        "--resume_from_checkpoint",
        metavar="latest|DIR",
        help="Go on from this folder, or from the latest of the run.",
    )


def _train(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.report import report_run
    from dylora.training.loop import train

    report_run(train(config, options.resume_from_checkpoint))


# evaluate


def _add_evaluate(command: ArgumentParser) -> None:
    command.usage = f"run.py evaluate {CONFIG_USAGE} --checkpoint DIR"
    _add_config(command)
    _add_print_config(command)
    _add_checkpoint(command)


def _evaluate(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.checkpoint)


# benchmark


def _add_benchmark(command: ArgumentParser) -> None:
    command.usage = f"run.py benchmark {CONFIG_USAGE} --checkpoint DIR --tasks NAMES [OPTIONS]"
    _add_config(command)
    _add_checkpoint(command)
    command.add_argument(
        "--tasks",
        required=True,
        help="mbpp, mbpp_sanitized, mbpp+, humaneval, humaneval+, skills or one of them as "
        "skills/sql; commas between.",
    )
    command.add_argument(
        "--task_files",
        default="",
        metavar="SUITE=FILE,...",
        help="Read a suite from a file in its original format instead of the hub.",
    )
    command.add_argument("--split", default="test", help="Of MBPP's published splits, or all.")
    command.add_argument(
        "--shots", type=int, default=0, help="Solved tasks before each question of MBPP: 0 or 3."
    )
    command.add_argument("--limit", type=int, help="Only the first so many tasks of each suite.")
    command.add_argument("--samples", type=int, default=1, help="Programs for each task.")
    command.add_argument("--k", default="1", help="The k of pass@k; commas between.")
    command.add_argument("--temperature", type=float, default=0.0, help="0: greedy.")
    command.add_argument("--top_p", type=float, default=1.0, help="Share of likely tokens kept.")
    command.add_argument(
        "--max_new_tokens", type=int, help="Most tokens to add; default 512, and 64 for skills."
    )
    command.add_argument("--seed", type=int, default=0, help="Of the samples and the intervals.")
    command.add_argument(
        "--include-trained",
        action="store_true",
        help="Score tasks that the checkpoint was trained on, too; the results say so.",
    )
    command.add_argument(
        "--unsafe-exec",
        action="store_true",
        help="Run the model's programs without protection. Only in a machine you can lose.",
    )
    command.add_argument("--workers", type=int, default=2, help="Programs run side by side.")
    command.add_argument(
        "--out", metavar="DIR", help="Default: benchmark/ in the folder of the config's run."
    )


def _benchmark(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    files = dict(_pair(item) for item in _items(options.task_files))
    from dylora.evaluation.benchmark import BenchmarkOptions, benchmark_checkpoint, expand_tasks

    if not all(item.isdecimal() for item in _items(options.k)):
        raise ValueError(f"--k is {options.k!r}, but must be numbers with commas between")
    chosen = BenchmarkOptions(
        tasks=expand_tasks(_items(options.tasks)),
        files=files,
        split=options.split,
        shots=options.shots,
        limit=options.limit,
        samples=options.samples,
        k=tuple(int(item) for item in _items(options.k)),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        include_trained=options.include_trained,
        unsafe=options.unsafe_exec,
        workers=options.workers,
    )
    out = options.out or Path(config.output_dir, config.name, "benchmark")
    benchmark_checkpoint(config, options.checkpoint, chosen, Path(out))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _pair(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals:
        raise ValueError(f"--task_files has {text!r}, but each item must be SUITE=FILE")
    return name, file


# generate


def _add_generate(command: ArgumentParser) -> None:
    command.usage = "run.py generate --checkpoint DIR --prompt TEXT [OPTIONS]"
    _add_checkpoint(command)
    command.add_argument("--prompt", required=True, help="The instruction, or the text itself.")
    _add_base(command)
    command.add_argument("--max_new_tokens", type=int, default=128, help="Most tokens to add.")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time."
    )
    command.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it stands, without a template."
    )
    command.add_argument(
        "--show_routing", action="store_true", help="Show which experts each token used."
    )
    command.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )


def _generate(options: Namespace, overrides: list[str]) -> None:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}, but must be at least 1")
    if not options.temperature >= 0:  # also refuses nan
        raise ValueError(f"--temperature is {options.temperature}, but must be at least 0")
    from dylora.evaluation.generate import generate_text

    generate_text(
        options.checkpoint,
        options.prompt,
        options.base,
        options.max_new_tokens,
        options.temperature,
        options.raw,
        options.show_routing,
        options.quantization,
    )


# validate


def _add_validate(command: ArgumentParser) -> None:
    command.usage = "run.py validate --checkpoint DIR [OPTIONS]"
    _add_checkpoint(command)
    _add_base(command)
    command.add_argument(
        "--device", default="auto", help="auto takes a GPU where there is one; or a torch device."
    )
    command.add_argument(
        "--dtype",
        default="float32",
        help="Precision of the base: float32, bfloat16 or float16.",
    )
    command.add_argument("--tokens", type=int, default=64, help="Length of the texts it runs on.")
    command.add_argument("--out", metavar="FILE", help="File that gets the report as JSON.")


def _validate(options: Namespace, overrides: list[str]) -> None:
    from dylora.evaluation.validate import validate_checkpoint

    report = validate_checkpoint(
        options.checkpoint,
        options.base,
        options.device,
        options.dtype,
        options.tokens,
        options.out,
    )
    if not report.passed:
        raise SystemExit(1)


# export


def _add_export(command: ArgumentParser) -> None:
    command.usage = (
        "run.py export --checkpoint DIR --out DIR [--expert all|N] [--portable] | "
        "--mixture --weights W | --merge [--expert N | --weights W]"
    )
    _add_checkpoint(command)
    command.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="Folder that gets one folder per expert, or becomes the one that is written.",
    )
    command.add_argument("--expert", help="all (without --merge the default), or a number.")
    command.add_argument(
        "--portable",
        action="store_true",
        help="Fold the scale into the tensors, for readers that ignore rslora and alpha.",
    )
    command.add_argument(
        "--mixture", action="store_true", help="Write a mixture of constant weights as one LoRA."
    )
    command.add_argument(
        "--merge",
        action="store_true",
        help="Write a plain model with an expert, or a mixture of constant weights, inside.",
    )
    command.add_argument(
        "--weights",
        metavar="W,W,...|measured",
        help="One weight an expert; measured: each site's mean gates over --text. By default those "
        "of router_type fixed.",
    )
    command.add_argument(
        "--text",
        metavar="FILE",
        help="Text (.txt, or rows with text or with instruction and output in .jsonl) on which to "
        "measure weights, and what a constant mixture loses against routing.",
    )
    command.add_argument("--text_tokens", type=int, default=16384, help="Most tokens of it.")
    _add_base(command)
    command.add_argument("--base_name", help="What adapter_config.json shall name as the base.")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *get_args(Precision)),
        help="Precision of the base that is merged or measured; auto: as it is stored.",
    )
    command.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )
    command.add_argument(
        "--dequantize", action="store_true", help="With --merge: make a quantised base whole."
    )


def _export(options: Namespace, overrides: list[str]) -> None:
    form = "mixture" if options.mixture else "merged" if options.merge else "experts"
    _check_export(options, form)
    weights = options.weights
    if weights is not None and weights != "measured":
        weights = [_number(item, "--weights") for item in _items(weights)]
    from dylora.evaluation.export import ExportOptions, run_export

    run_export(
        ExportOptions(
            checkpoint=options.checkpoint,
            out=options.out,
            form=form,
            expert=options.expert,
            weights=weights,
            text=options.text,
            text_tokens=options.text_tokens,
            portable=options.portable,
            dequantize=options.dequantize,
            base=options.base,
            base_name=options.base_name,
            dtype=options.dtype,
            quantization=options.quantization,
        )
    )


def _check_export(options: Namespace, form: str) -> None:
    """Raises ValueError for options that do not go together."""
    expert, weights = options.expert, options.weights
    if options.mixture and options.merge:
        raise ValueError("--mixture writes an adapter and --merge a model: give one of them")
    if expert is not None and expert != "all" and not expert.isdecimal():
        raise ValueError(f"--expert is {expert!r}, but must be all or an expert's number")
    if form == "experts" and (weights or options.text):
        raise ValueError("--weights and --text need --mixture or --merge")
    if form == "mixture" and expert is not None:
        raise ValueError("--mixture takes all experts: give their --weights instead of --expert")
    if form == "merged" and expert == "all":
        raise ValueError("--merge takes one --expert, or the --weights of a mixture, not all")
    if form == "merged" and options.portable:
        raise ValueError("--portable is a form of adapters, and --merge writes a model")
    if expert is not None and (weights or options.text):
        raise ValueError("--expert and --weights exclude each other, and --text belongs to weights")
    if weights == "measured" and options.text is None:
        raise ValueError("--weights measured needs a --text FILE to measure on")
    if options.dequantize and form != "merged":
        raise ValueError("--dequantize needs --merge")
    if options.base_name and form == "merged":
        raise ValueError("--base_name is a field of adapters, and --merge writes a model")
    if options.text_tokens < 2:
        raise ValueError(f"--text_tokens is {options.text_tokens}, but must be at least 2")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} has {text!r}, but each item must be a number") from None


# import


def _add_import(command: ArgumentParser) -> None:
    command.usage = (
        "run.py import --adapters DIR [DIR ...] --out DIR --base NAME "
        "[--moe.KEY VALUE ...] [OPTIONS]"
    )
    command.add_argument(
        "--adapters",
        metavar="DIR",
        nargs="+",
        required=True,
        help="Folders of PEFT LoRA adapters, or of checkpoints that hold some.",
    )
    command.add_argument("--out", metavar="DIR", required=True, help="Folder of the new mixture.")
    command.add_argument(
        "--base", help="Base model by name or folder; what the adapters name is never followed."
    )
    command.add_argument("--revision", help="Commit, tag or branch of the base on the hub.")
    command.add_argument(
        "--router_init",
        choices=("learned", "arrow"),
        default="learned",
        help="arrow: route by what each adapter changes most, without any training.",
    )
    command.add_argument(
        "--trainable",
        action="store_true",
        help="Let training change the experts, too; without it, it trains the routers alone.",
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Precision),
        default="float32",
        help="Precision in which the base is read; the experts are float32 always.",
    )
    command.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file whose section moe says how the mixture routes; --moe.KEY goes before it.",
    )


def _import(options: Namespace, overrides: list[str]) -> None:
    moe = None
    for key, _ in split_overrides(overrides):
        if not key.startswith("moe."):
            raise ValueError(f"{COMMAND_LINE}: --{key} is no setting of the mixture (--moe.KEY)")
    if options.config is not None or overrides:
        moe = load_run_config(options.config, overrides).moe
    import torch

    from dylora.imported import load_peft_experts

    out = Path(options.out).resolve()
    for folder in map(Path, options.adapters):
        if out in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--out {options.out} would replace {folder}: name another folder")
    model = load_peft_experts(
        options.base,
        options.adapters,
        moe,
        router_init=options.router_init,
        freeze=not options.trainable,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        report=lambda line: print(f"note: {line}"),
    )
    model.save_pretrained(options.out)
    print(model.experts)
    print(model.size_message(Path(options.out)))


# info


def _add_info(command: ArgumentParser) -> None:
    command.usage = f"run.py info --checkpoint DIR | {CONFIG_USAGE}"
    _add_config(command, required=False)
    command.add_argument(
        "--checkpoint", metavar="DIR", help="Folder of a checkpoint, an export or a PEFT adapter."
    )


def _info(options: Namespace, overrides: list[str]) -> None:
    if (options.checkpoint is None) == (options.config is None):
        raise ValueError("info needs either --checkpoint DIR or --config FILE")
    if options.config is not None:
        print(dump_run_config(load_run_config(options.config, overrides)), end="")
        return
    if overrides:
        raise ValueError(f"{COMMAND_LINE}: {overrides[0]} changes a config, and there is none")
    from dylora.evaluation.info import print_info

    print_info(options.checkpoint)


# Options of several commands


def _add_config(command: ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="YAML file of the run. The command line overrides its fields, in any order; an "
        "item of data.sources goes by its index or name. Relative paths in the file are "
        "relative to the working directory.",
    )


def _add_print_config(command: ArgumentParser) -> None:
    command.add_argument(
        "--print_config", action="store_true", help="Print the resolved config and stop."
    )


def _add_checkpoint(command: ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="Folder of a checkpoint."
    )


def _add_base(command: ArgumentParser) -> None:
    command.add_argument("--base", help="Base model to use instead of the checkpoint's own.")


COMMANDS = {
    "train": Command(_train, _add_train, "Train the experts that a config describes."),
    "evaluate": Command(
        _evaluate,
        _add_evaluate,
        "Loss and perplexity of a checkpoint on each of a config's data sets.",
    ),
    "benchmark": Command(
        _benchmark,
        _add_benchmark,
        "pass@k of the base and a checkpoint on published suites, and on the embedded skills.",
    ),
    "generate": Command(_generate, _add_generate, "Continue a prompt with a checkpoint."),
    "validate": Command(
        _validate,
        _add_validate,
        "Check on this machine that a checkpoint computes what it should.",
    ),
    "export": Command(
        _export,
        _add_export,
        "Write experts as PEFT adapters, a mixture as one, or a model with either inside.",
    ),
    "import": Command(_import, _add_import, "Make PEFT LoRA adapters the experts of one mixture."),
    "info": Command(
        _info, _add_info, "What a checkpoint holds, or the settings that a config amounts to."
    ),
}
