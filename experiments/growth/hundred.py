"""Question: what does the hundredth skill cost, and does a prompt still find the one it is of?

Method: 100 skills that come one after another, each the tasks of one of the six families with 30 %
of its words replaced, out of 60 common ones, the same throughout the skill. Each gets an expert of
rank 8, four updates of two rows (their cost is what counts here) and a place in the library. The
base is the embedded one cut to its first two layers: costs that do not depend on the number of
skills are not asked for. At some numbers of skills: time and memory of the latest additions, errors
of single prompts and of batches of 16 (known ones, and of skills yet to come), time of a decoded
token against a mixture of one expert in alternation (the least of five), and the size of a
checkpoint.
Result: experiments/results/hundred.json and experiments/LOG.md.

    python -m experiments.growth.hundred
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dylora import DyLoRA_MoE, MoELoraConfig, NoveltyDetector, SkillLibrary
from dylora.base_models import BaseSpec
from dylora.features import Features, embed
from dylora.tasks import SKILLS, generate_tasks
from experiments.growth.methods import BASE, Recipe, Row, drawer, fit, tokenized

WORDS = """
apple river stone cloud market garden engine bridge winter summer coffee planet guitar
letter window forest doctor camera button castle dragon ticket island mirror pencil rocket
school silver spider valley violin basket candle desert empire farmer glacier hammer insect
jungle kettle ladder magnet needle orange palace quarry ribbon saddle temple umbrella velvet
wagon yellow zebra anchor barrel cotton dinner eagle
""".split()  # noqa: SIM905
LAYERS, RANK = 2, 8
REPLACED = 0.3  # of a family's words, in a skill
TRAIN, HELD_OUT, JUDGED = 24, 16, 16  # rows of a skill
AT = (1, 2, 5, 10, 25, 50, 100)
TOKENS = 32  # decoded for a timing


def synthetic(skills: int) -> list[tuple[str, list[Row], list[Row], list[Row]]]:
    """Names; rows to train on, to calibrate on and to judge by. No two share an instruction."""
    found, rng = [], random.Random(0)
    parts = {"train": TRAIN, "validation": HELD_OUT, "test": JUDGED}
    rounds = -(-skills // len(SKILLS))
    tasks = {
        (family, split): generate_tasks(family, split, count * rounds)  # type: ignore[arg-type]
        for family in SKILLS
        for split, count in parts.items()
    }
    for number in range(skills):
        family, turn = SKILLS[number % len(SKILLS)], number // len(SKILLS)
        other: dict[str, str] = {}  # of this skill
        rows = []
        for split, count in parts.items():
            texts = []
            for task in tasks[family, split][turn * count : (turn + 1) * count]:
                words = task.instruction.split(" ")
                for word in filter(str.isalpha, words):
                    if word not in other:
                        other[word] = rng.choice(WORDS) if rng.random() < REPLACED else word
                texts.append((" ".join(other.get(word, word) for word in words), "", task.answer))
            rows.append(tokenized(texts))
        found.append((f"{number} {family}", *rows))
    return found


def build() -> DyLoRA_MoE:
    config = MoELoraConfig(
        num_experts=1, top_k_experts=1, r=RANK, lora_alpha=2 * RANK, router_scope="prompt"
    )
    base: Any = BaseSpec.resolve(BASE).load()
    base.model.layers = base.model.layers[:LAYERS]
    base.config.num_hidden_layers = LAYERS
    model = DyLoRA_MoE(base, config, base_name=BASE).eval()
    SkillLibrary(model)
    return model


def timed(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def add(model: DyLoRA_MoE, name: str, rows: list[Row], held_out: list[Row]) -> dict[str, float]:
    """CPU seconds of the parts of an addition; the first expert is there already."""
    seconds, new = {}, 0
    library, experts = model.skill_library, model.experts
    if len(library):
        seconds["create"] = timed(lambda: experts.create_expert(skill=name))
        new = len(experts) - 1
    experts.activate(new)
    draw = drawer(rows, 2, name)
    seconds["train, an update"] = timed(lambda: fit(model, draw, 5e-3, Recipe(4, 2, 2))) / 4
    experts.freeze(new)
    seconds["library"] = timed(lambda: library.add(name, rows, held_out, expert=new))
    seconds["activate all"] = timed(experts.activate_all_experts)
    return seconds


def decode_ratio(model: DyLoRA_MoE, one: DyLoRA_MoE, rows: list[Row]) -> dict[str, float]:
    """CPU milliseconds of a decoded token, single prompts and batches of eight, and the ratio."""
    found, both = {}, (model, one)
    for batch in (1, 8):
        ids = torch.tensor([row["input_ids"][:24] for row in rows[:batch]])
        arguments: Any = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        arguments |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        times = [
            [timed(lambda m=m, i=ids, a=arguments: m.generate(input_ids=i, **a)) for m in both]
            for _ in range(5)
        ]
        ours, alone = (1000 * min(column) / TOKENS for column in zip(*times, strict=True))
        found |= {
            f"ms a token, batch {batch}": round(ours, 2),
            f"one expert's, {batch}": round(alone, 2),
        }
        found[f"ratio, batch {batch}"] = round(ours / alone, 3)
    return found


def errors(model: DyLoRA_MoE, judged: list[Features]) -> dict[str, float]:
    """In percent. judged: of all skills, in the order they come."""
    library: SkillLibrary = model.skill_library
    count, rule = len(library), library.prompt_rule()
    asked = torch.cat([part.prompt for part in judged[:count]])
    truth = torch.arange(count).repeat_interleave(JUDGED)
    chosen, far = rule.log_probabilities(asked).argmax(-1), rule.distances(asked).amin(-1) > 1
    detector = NoveltyDetector(library)
    verdicts = [detector.judge(part.whole) for part in judged]
    names = list(library.skills)
    known, new = verdicts[:count], verdicts[count:]
    found = {
        "prompts of the wrong skill %": (chosen != truth).double().mean(),
        "prompts to no expert %": far.double().mean(),
        "known batches called new %": sum(v.novel for v in known) / count,
        "batches' nearest skill wrong %": sum(
            v.nearest != name for v, name in zip(known, names, strict=True)
        ) / count,
    }  # fmt: skip
    if new:
        found["new batches called known %"] = sum(not v.novel for v in new) / len(new)
    return {name: round(100 * float(value), 2) for name, value in found.items()}


def sizes(model: DyLoRA_MoE) -> dict[str, float]:
    """Of a checkpoint in MB, and CPU seconds to write it."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed(lambda: model.save_pretrained(f"{folder}/checkpoint"))
        files = [(f.name, f.stat().st_size) for f in Path(folder).rglob("*") if f.is_file()]
    return {
        "checkpoint MB": round(sum(size for _, size in files) / 1e6, 2),
        "of it the library MB": round(dict(files)["skill_library.safetensors"] / 1e6, 2),
        "checkpoint s": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skills", type=int, default=AT[-1])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/hundred.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stream, model, one = synthetic(options.skills), build(), build()
    add(one, *stream[0][:3])
    judged = [embed(model.mixture, rows) for *_, rows in stream]
    print("rows are embedded", flush=True)
    table, latest = [], []
    for number, (name, rows, held_out, _) in enumerate(stream, 1):
        latest.append(add(model, name, rows, held_out))
        if number in AT:
            mean = {
                f"{part}, s": round(sum(x.get(part, 0) for x in latest) / len(latest), 4)
                for part in latest[-1]
            }
            trainable = sum(p.numel() for _, p in model.own_parameters())
            row = {
                "skills": number,
                **mean,
                "expert parameters": trainable,
                "most memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **errors(model, judged),
                **decode_ratio(model, one, stream[0][1]),
                **sizes(model),
            }
            table.append(row)
            latest = []
            print(row, flush=True)
            options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
