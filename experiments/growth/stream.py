"""Question: what do ways to learn skills one after another keep, and how far from joint training?

Method: the six skills of the package, --updates of 2 rows a stage on the embedded base; all methods
have as many trainable parameters (a library's numbers count) and see as many rows. After a stage
the scores that the measures need are taken: of its own skill, of the next before it is learned,
after the last stage of all; greedy answers to --tasks test tasks a skill, and the loss on
validation rows. With --published the languages of CodeAlpaca and MBPP as a second stream, whose
losses alone are taken. Seeds draw initial values and the order of rows; the rows are the same.
Rates and scales are those that rates.py found by validation rows of seed 0, the ones of the losses
here among them, and a shared expert has the experts', as growing with token routers has; those of
the dense mixture are of a feasibility study. Cells (method, rate, scale, seed, order) that are in
the result already are not run again.
Result: experiments/results/continual.json and experiments/LOG.md.

    python -m experiments.growth.stream --methods experts,sequential,joint --seeds 0,1,2
    python -m experiments.growth.stream --summary
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from dylora.evaluation.forgetting import Transfer, format_methods, measure
from dylora.tasks import SKILLS, Task, generate_tasks
from experiments.growth import novelty
from experiments.growth.methods import (
    Grow,
    Joint,
    JointLora,
    Method,
    Orthogonal,
    Recipe,
    Stage,
    tokenized,
)
from experiments.growth.prompted import Experts, Shared
from experiments.growth.scores import loss_of, passed_of

HELD_OUT, LOSS_ROWS = 64, 16  # rows of a skill; the last ones calibrate a library
LIBRARY = "32,24"  # of cells that do not say
REPLAY_RATE = 1.5e-4  # by rates.py, with 32 rows kept
METHODS: dict[str, Any] = {
    "experts": Experts,
    "experts-known": lambda **k: Experts(from_known=True, **k),
    "shared": Shared,
    "shared-3": lambda **k: Shared(first=3, **k),
    "sequential": Method,
    "joint": Joint,
    "joint-lora": JointLora,
    "replay-32": lambda **k: Method(kept=32, **({"rate": REPLAY_RATE} | k)),
    "o-lora": Orthogonal,
    "grow": Grow,
    "replay-8": lambda **k: Method(kept=8, **({"rate": REPLAY_RATE} | k)),
    "replay-128": lambda **k: Method(kept=128, **({"rate": REPLAY_RATE} | k)),
    "grow-replay-32": lambda **k: Grow(kept=32, **k),
}


def skill_stages(count: int) -> list[Stage]:
    stages = []
    for skill in SKILLS:
        parts = (
            generate_tasks(skill, "train", count),
            generate_tasks(skill, "validation", HELD_OUT),
        )
        rows = [tokenized([(t.instruction, "", t.answer) for t in part]) for part in parts]
        stages.append(Stage(skill, *rows))
    return stages


def language_stages(folder: Path, most: int) -> list[Stage]:
    """CodeAlpaca's languages by the one name in the instruction, and MBPP."""
    texts = novelty.languages(folder / "code_alpaca.json")
    texts["mbpp"] = novelty.mbpp(folder / "mbpp.jsonl")
    return [
        Stage(
            name, tokenized(rows[HELD_OUT : HELD_OUT + most], 256), tokenized(rows[:HELD_OUT], 256)
        )
        for name, rows in texts.items()
    ]


class Scores:
    """What one method scores on every skill after every stage; NaN where it was not taken."""

    def __init__(self, method: Method, stages: list[Stage], tasks: dict[str, list[Task]]):
        self.method, self.stages, self.tasks = method, stages, tasks
        self.loss: list[list[float]] = []  # a row a stage
        self.passed: list[list[float]] = []
        self.oracle_loss: list[float] = []  # of the expert that was trained for a skill, alone
        self.oracle_passed: list[float] = []
        self.answered: dict[Any, float] = {}  # by what the answers depend on

    def take(self, losses: set[int], answers: set[int]) -> None:
        """A row of both tables, of the skills (by their place) that are asked for."""
        model, places = self.method.model, range(len(self.stages))
        self.loss.append([
            loss_of(model, self.stages[place].held_out[:LOSS_ROWS]) if place in losses else math.nan
            for place in places
        ])  # fmt: skip
        self.passed.append([
            self._passed(self.tasks[self.stages[place].name])
            if place in answers and self.tasks else math.nan
            for place in places
        ])  # fmt: skip

    def take_oracle(self, stage: Stage) -> None:
        """Before the new expert is among others."""
        model = self.method.model
        self.oracle_loss.append(loss_of(model, stage.held_out[:LOSS_ROWS]))
        if self.tasks:
            self.oracle_passed.append(passed_of(model, self.tasks[stage.name]))

    def _passed(self, tasks: list[Task]) -> float:
        """Of one skill; what is certain to be as before is not answered again."""
        key = self.method.decisions(tasks)
        if key is None:
            return passed_of(self.method.model, tasks)
        if key not in self.answered:
            self.answered[key] = passed_of(self.method.model, tasks)
        return self.answered[key]


def run(method: Method, stages: list[Stage], tasks: dict[str, list[Task]]) -> dict[str, Any]:
    """One stream: the tables, costs, and whether what was frozen is the same bit by bit."""
    scores, seconds, frozen = Scores(method, stages, tasks), [], {}
    everything = set(range(len(stages)))
    learned = [0] * len(stages) if method.JOINT else method.learned(len(stages))
    with method.model.disable_adapters():
        before = [loss_of(method.model, stage.held_out[:LOSS_ROWS]) for stage in stages]
    for place, stage in enumerate(stages[:1] if method.JOINT else stages):
        begin = time.process_time()
        if method.JOINT:
            method.learn_all(stages)  # type: ignore[attr-defined]
        else:
            method.learn(stage)
        seconds.append(round(time.process_time() - begin, 1))
        print("  stage", stage.name, seconds[-1], "s", time.strftime("%H:%M:%S"), flush=True)
        if method.ORACLE:
            scores.take_oracle(stage)
        method.admit(stage)
        for name, tensor in method.frozen().items():
            frozen.setdefault(name, tensor)
        own = {j for j in everything if learned[j] == place}
        ahead = {j for j in everything if learned[j] == place + 1}
        last = method.JOINT or place == len(stages) - 1
        scores.take(everything if last else own | ahead, everything if last else own)
    now, routing = method.frozen(), {}
    for name, questions in tasks.items():
        if (decided := method.decisions(questions)) is not None:
            own = method.expert_of([s.name for s in stages].index(name))  # type: ignore[attr-defined]
            routing[name] = {
                "own expert": decided[1].count(own) / len(questions),
                "no expert": decided[1].count(-1) / len(questions),
            }
    return {
        "parameters": method.parameters(),
        "rate": method.rate,
        "scale": method.scale,
        "rows an update": method.recipe.batch,
        "learned": learned,
        "loss before": before,
        "loss": scores.loss,
        "passed": scores.passed,
        "oracle loss": scores.oracle_loss,
        "oracle passed": scores.oracle_passed,
        "prompts": routing,
        "frozen bit-equal": all(torch.equal(now[name], frozen[name]) for name in frozen),
        "frozen tensors": len(frozen),
        "training cpu s": seconds,
    }


def summary(cells: list[dict[str, Any]]) -> str:
    """Tables by stream and order: a line a method and form."""
    lines = []
    keys = ("stream", "order", "updates", "rows", "tasks")
    for stream in dict.fromkeys(tuple(cell[key] for key in keys) for cell in cells):
        own = [cell for cell in cells if tuple(cell[key] for key in keys) == stream]
        for kind in ("passed", "loss"):
            found: dict[str, list[Transfer]] = {}
            for cell in own:
                rows = [[math.nan if v is None else v for v in row] for row in cell[kind]]
                if any(map(math.isnan, rows[-1])):
                    continue
                before = cell["loss before"] if kind == "loss" else None
                name = cell["method"]
                if (library := cell.get("library", LIBRARY)) != LIBRARY:
                    name += f", library of {library}"
                rates = {(c["rate"], c.get("scale")) for c in own if c["method"] == cell["method"]}
                if len(rates) > 1:
                    name += f", rate {cell['rate']:g}, scale {cell.get('scale')}"
                turned = {"learned": cell["learned"], "smaller_is_better": kind == "loss"}
                found.setdefault(name, []).append(measure(rows, before, **turned))
                if oracle := cell[f"oracle {kind}"]:
                    alone = measure([oracle], learned=[0] * len(oracle))
                    found.setdefault(f"{name}, oracle", []).append(alone)
            if found:
                lines += ["\n{}, {}, {} updates, {} rows, {} tasks: {}".format(*stream, kind)]
                lines += [format_methods(found, percent=kind == "passed")]
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """NaN as null, floats with six digits."""
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def not_run(cells: list[dict[str, Any]]) -> list[str]:
    """What is left of the whole grid: both streams, both orders, three seeds, of full length."""
    seen = {
        (c["stream"], c["order"], c["method"], c["seed"])
        for c in cells
        if c["updates"] == 320 and c["tasks"] == (100 if c["stream"] == "skills" else 0)
    }
    return [
        f"{stream}, {order}: {method}, seeds {', '.join(map(str, left))}"
        for stream in ("skills", "languages")
        for order in ("forward", "reversed")
        for method in METHODS
        if (left := [s for s in range(3) if (stream, order, method, s) not in seen])
        and not (METHODS[method] in (Joint, JointLora) and order == "reversed")
    ]


def write(out: Path, cells: list[dict[str, Any]], left: list[str] | None = None) -> None:
    part = out.with_suffix(".part")
    lines = ",\n".join(json.dumps(plain(cell)) for cell in cells)
    rest = "" if left is None else f',\n"not run": {json.dumps(left, indent=1)}'
    part.write_text(f'{{"cells": [\n{lines}\n]{rest}}}\n', encoding="utf-8")
    os.replace(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", default="forward", help="forward, reversed or both by a comma")
    parser.add_argument("--published", type=Path, help="folder: the stream of languages instead")
    parser.add_argument("--updates", type=int, default=320, help="a stage")
    parser.add_argument("--rows", type=int, default=640, help="of a skill, at most")
    parser.add_argument("--tasks", type=int, default=100, help="for testing, a skill")
    parser.add_argument(
        "--library", default=LIBRARY, help="rows of a skill that it is fitted to, and calibrated on"
    )
    parser.add_argument("--work", type=Path, help="folder in which trained experts are kept")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/continual.json"))
    parser.add_argument("--summary", action="store_true", help="print the tables of the result")
    options = parser.parse_args()
    fitted, calibrated = map(int, options.library.split(","))
    if calibrated > HELD_OUT - LOSS_ROWS:
        parser.error(f"--library: at most {HELD_OUT - LOSS_ROWS} rows are left to calibrate on")
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text())["cells"] if options.out.exists() else []
    if options.summary:
        print(summary(cells))
        return
    stream = "languages" if options.published else "skills"
    rows = options.rows
    stages = language_stages(options.published, rows) if options.published else skill_stages(rows)
    tasks = (
        {} if options.published else {s: generate_tasks(s, "test", options.tasks) for s in SKILLS}
    )
    for seed in options.seeds.split(","):
        for order in options.orders.split(","):
            for name in options.methods.split(","):
                key: dict[str, Any] = {"stream": stream, "method": name, "seed": int(seed)}
                key |= {"order": order, "updates": options.updates}
                key |= {"tasks": 0 if options.published else options.tasks}
                key["rows"] = rows
                if name.startswith(("experts", "shared")):
                    key["library"] = options.library
                recipe = Recipe(updates=options.updates, library=(fitted, calibrated))
                work = options.work and options.work / f"{stream}-{rows}"
                given: dict[str, Any] = {"seed": int(seed), "recipe": recipe, "work": work}
                if METHODS[name] is Orthogonal:
                    given["count"] = len(stages)
                method = METHODS[name](**given)
                key |= {"rate": method.rate, "scale": method.scale}
                if any(key.items() <= ({"library": LIBRARY} | cell).items() for cell in cells):
                    continue
                print(key, time.strftime("%H:%M:%S"), flush=True)
                ordered = stages if order == "forward" else stages[::-1]
                cells.append(key | {"skills": [s.name for s in ordered]})
                cells[-1] |= run(method, ordered, tasks)
                write(options.out, cells, not_run(cells))


if __name__ == "__main__":
    main()
