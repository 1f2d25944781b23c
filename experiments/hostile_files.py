"""What becomes of the hostile files of tests/helpers/hostile.py: refused, accepted, or worse?

    PYTHONPATH=. python experiments/hostile_files.py
    git worktree add ../before a96a8c8 && PYTHONPATH=../before python experiments/hostile_files.py

The second line asks the loaders of another commit. Each case runs in a child of its own, for 20
seconds and in 4 GiB at most; the words of an error are not looked at.
"""

import copy
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import harm
import hostile
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.cli.config_file import load_run_config
from dylora.data.sources import read_source
from dylora.run_config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from dylora.storage.peft_format import read_adapter
from dylora.training.loop import train
from dylora.training.resume import resume
from dylora.training.run import prepare
from families import FAMILIES

SECONDS, BYTES = 20, 4 << 30


def source(file: Path) -> SourceConfig:
    return SourceConfig(
        name="mine", path=str(file), instruction_column="question", output_column="answer"
    )


def main() -> None:
    work = Path(tempfile.mkdtemp())
    name, sizes = FAMILIES["llama"][1:3]
    base: Any = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**sizes)
    ).eval()
    model = DyLoRA_MoE.from_base(
        copy.deepcopy(base), MoELoraConfig(r=3, lora_alpha=5, num_experts=2)
    )
    model.training_record = {"step": 7, "targets": 100, "seed": 0}
    model.save_pretrained(work / "saved" / "checkpoint")
    lines = "".join(f'{{"question": "q {n}", "answer": "a {n}"}}\n' for n in range(30))
    (work / "rows.jsonl").write_text(lines)
    config = RunConfig(
        output_dir=str(work / "runs"),
        model=ModelConfig(base="tiny-code-llama", dtype="float32", device="cpu"),
        moe=MoELoraConfig(r=2, num_experts=2),
        data=DataConfig(sources=[source(work / "rows.jsonl")], max_length=64),
        train=TrainConfig(max_steps=1),
    )
    shutil.copytree(train(config).folder / "checkpoint-1", work / "run" / "checkpoint")
    run = prepare(config, fresh=False)
    for tree in ("saved", "run"):
        (work / tree / "secret").write_text(harm.SECRET)

    def load(file: Path, tree: Path) -> None:
        DyLoRA_MoE.from_pretrained(tree / "checkpoint", base=base)

    adapter = "checkpoint/peft_adapters/expert_1/"
    groups: list[tuple[list[hostile.Case], str, str, bool, Callable[[Path, Path], Any]]] = [
        (hostile.ADAPTER, "saved", adapter, False, lambda file, tree: read_adapter(file.parent)),
        (hostile.CHECKPOINT, "saved", "checkpoint/", True, load),
        (hostile.MANIFESTS, "saved", "checkpoint/", False, load),
        (
            *(hostile.RUN, "run", "checkpoint/", True),
            lambda file, tree: resume(run, str(tree / "checkpoint")),
        ),
        (hostile.DATA, "", "", False, lambda file, tree: read_source(source(file))),
        (hostile.CONFIGS, "", "", False, lambda file, tree: load_run_config(file)),
    ]
    outcomes: defaultdict[str, list[str]] = defaultdict(list)
    for cases, good, folder, sealed, call in groups:
        for case in cases:
            tree = Path(tempfile.mkdtemp())
            if good:
                shutil.copytree(work / good, tree, dirs_exist_ok=True)
            file = tree / (folder + case.file)
            if not good:
                file.touch()
            case.damage(file)
            if sealed:
                harm.seal(tree / "checkpoint")
            outcomes[outcome(call, file, tree)].append(f"{case.file}: {case.name}")
            shutil.rmtree(tree)
    for what, names in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(len(names), what, "" if what == "refused" else f"({'; '.join(names)})")
    shutil.rmtree(work)


def outcome(call: Callable[[Path, Path], Any], file: Path, tree: Path) -> str:
    """What one call ends with, in a child that may hang or die."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        begun = time.process_time()
        try:
            call(file, tree)
            said = "accepted"
        except (ValueError, FileNotFoundError):
            slow = time.process_time() - begun > harm.SECONDS
            said = "refused, but late" if slow else "refused"
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 200).decode()
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if said:
        return said
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return f"hangs for {SECONDS} s" if ended == signal.SIGALRM else f"dies of signal {ended}"


if __name__ == "__main__":
    main()
