"""Question: how often is a known skill called new, a new one known? Does a prompt find its skill?

Method: each row is embedded once by the embedded base. Of a number of skills (1, 3, all but one) a
library is made from their training rows and one half of their held-out rows; batches of the other
half must be known, batches of the skills left out must be novel. The six generated skills share no
literal between the two splits. Languages are those of CodeAlpaca whose instruction names exactly
one; the same again with that name struck out, where a bag of words has less to go by. Domains are
the ten of CLINC150 (Larson et al. 2019, github.com/clinc/oos-eval), of 15 intents each, whose names
are the answers; its queries out of scope are asked of the library of all ten. Margins are
distance / threshold: with the factor f they are those of the detector times 1.5 / f.
Result: experiments/results/novelty.json and experiments/LOG.md.

    python experiments/growth/novelty.py --published code_alpaca.json --intents oos-eval/data
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylora import DyLoRA_MoE, MoELoraConfig, NoveltyDetector, SkillLibrary, load_tokenizer
from dylora.data.prompts import (
    encode_answers,
    encode_prompts,
    format_prompt,
    mbpp_instruction,
)
from dylora.features import Features, embed
from dylora.skill_statistics import describe
from dylora.tasks import SKILLS, generate_tasks

LANGUAGES = {
    "python": r"python",
    "javascript": r"java\s?script",
    "java": r"java\b",
    "cpp": r"c\+\+|cpp\b",
    "bash": r"bash|shell",
    "sql": r"sql\b|mysql",
}
ROWS, LONGEST = 256, 512  # rows of a skill in each split; tokens of a row
BATCHES, SETS = 40, 12  # of each skill; of known skills, drawn where there are more
Texts = tuple[str, str, str]  # instruction, input, answer


def generated(skill: str) -> tuple[list[Texts], list[Texts], list[Texts]]:
    splits = ("train", "validation", "test")
    tasks = [generate_tasks(skill, split, ROWS) for split in splits]  # type: ignore[arg-type]
    return tuple([(t.instruction, "", t.answer) for t in part] for part in tasks)  # type: ignore


def languages(file: Path) -> dict[str, list[Texts]]:
    """Distinct rows whose instruction names one language, shuffled."""
    found: dict[str, list[Texts]] = {name: [] for name in LANGUAGES}
    seen = set()
    for row in json.loads(file.read_text(encoding="utf-8")):
        text, more = row["instruction"], row.get("input", "")
        named = [name for name, pattern in LANGUAGES.items() if re.search(pattern, text, re.I)]
        if len(named) == 1 and (text, more) not in seen:
            seen.add((text, more))
            found[named[0]].append((text, more, row["output"]))
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return found


def mbpp(file: Path) -> list[Texts]:
    """MBPP's rows, shuffled."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [(mbpp_instruction(r["text"], r["test_list"][0]), "", r["code"]) for r in rows]
    random.Random(0).shuffle(texts)
    return texts


def domains(folder: Path) -> tuple[dict[str, tuple[list[Texts], ...]], list[Texts]]:
    """CLINC150's domains, each as rows of train, val and test, shuffled; queries out of scope."""
    intents = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    found = {}
    for domain, own in intents.items():
        parts = tuple(
            [(text, "", intent) for text, intent in rows[split] if intent in own]
            for split in ("train", "val", "test")
        )
        for part in parts:
            random.Random(0).shuffle(part)
        found[domain] = parts
    return found, [(text, "", intent) for text, intent in rows["oos_test"]]


def struck_out(texts: Sequence[Texts]) -> list[Texts]:
    anything = "|".join(LANGUAGES.values())
    return [(re.sub(anything, "", a, flags=re.I), re.sub(anything, "", b, flags=re.I), c)
            for a, b, c in texts]  # fmt: skip


def features(model: DyLoRA_MoE, tokenizer: Any, texts: Sequence[Texts]) -> Features:
    prompts = encode_prompts(tokenizer, [format_prompt(a, b) for a, b, _ in texts])
    answers = encode_answers(tokenizer, [c for _, _, c in texts])
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        target = [*answer, tokenizer.eos_token_id]
        rows.append({
            "input_ids": (prompt + target)[:LONGEST],
            "labels": ([-100] * len(prompt) + target)[:LONGEST],
        })  # fmt: skip
    return embed(model.mixture, rows)


class Pool:
    """The features of some skills: training rows, rows to calibrate on, rows to judge."""

    def __init__(self, model: DyLoRA_MoE):
        self.model = model
        self.train: dict[str, Features] = {}
        self.calibrate: dict[str, Features] = {}
        self.judged: dict[str, Features] = {}

    def put(self, name: str, train: Features, held_out: Features) -> None:
        self.train[name] = train
        self.calibrate[name] = Features(*(part[::2] for part in held_out))
        self.judged[name] = Features(*(part[1::2] for part in held_out))

    def library(self, known: Sequence[str], rows: int | None = None) -> SkillLibrary:
        self.model.skill_library = None
        library = SkillLibrary(self.model)
        for name in known:
            part = Features(*(values[:rows] for values in self.train[name]))
            library.put(*describe(name, None, part, self.calibrate[name]))
        return library

    def novelty(self, count: int, batch: int) -> dict[str, Any]:
        """Errors in percent and quantiles of the margins, of so many known skills."""
        names, rng = list(self.train), random.Random(f"{count}/{batch}")
        sets = list(itertools.combinations(names, count))
        sets = rng.sample(sets, SETS) if len(sets) > SETS else sets
        known, novel, far, right = [], [], [], []
        for chosen in sets:
            detector = NoveltyDetector(self.library(chosen))
            for name, values in self.judged.items():
                for _ in range(BATCHES):
                    picked = rng.sample(range(len(values.whole)), min(batch, len(values.whole)))
                    verdict = detector.judge(values.whole[picked])
                    (known if name in chosen else novel).append(verdict.margin * detector.factor)
                    if name in chosen:
                        far.append(verdict.far_share)
                        right.append(verdict.nearest == name)
        known_, novel_ = torch.tensor(known), torch.tensor(novel)
        return {
            "known skills": count,
            "batch": batch,
            "batches": [len(known), len(novel)],
            **{f"known called novel %, factor {f}": percent(known_ > f) for f in (1.5, 2)},
            **{f"novel called known %, factor {f}": percent(novel_ <= f) for f in (1.5, 2)},
            "known distance / quantile: 50 %, 99.5 %, most": spread(known_, (0.5, 0.995, 1)),
            "novel distance / quantile: least, 0.5 %, 50 %": spread(novel_, (0, 0.005, 0.5)),
            "known batches with the right skill %": percent(torch.tensor(right)),
            "far rows of known batches %": round(100 * sum(far) / len(far), 1),
        }

    def far_prompts(self) -> dict[str, Any]:
        """Single prompts, in percent, that go to no expert: of known skills, of one left out."""
        known, novel = [], []
        for left_out in self.train:
            rule = self.library([name for name in self.train if name != left_out]).prompt_rule()
            for name, values in self.judged.items():
                far = rule.distances(values.prompt).amin(-1) > 1
                (novel if name == left_out else known).append(percent(far))
        mean = {"known, mean %": sum(known) / len(known), "novel, mean %": sum(novel) / len(novel)}
        worst = {"known, most %": max(known), "novel, least %": min(novel)}
        return {name: round(value, 2) for name, value in (mean | worst).items()}

    def prompts(self, rows: int | None, test: dict[str, Tensor]) -> dict[str, Any]:
        """Accuracy in percent of single prompts that the library has not seen."""
        library, found = self.library(list(self.train), rows), {}
        for place, name in enumerate(self.train):
            chances = library.log_probabilities(test[name])
            found[name] = percent(chances.argmax(-1) == place)
        mean = sum(found.values()) / len(found)
        return {"rows a skill": rows or "all", "mean %": round(mean, 2), **found}


def percent(truths: Tensor) -> float:
    return round(100 * float(truths.double().mean()), 2)


def spread(values: Tensor, quantiles: Sequence[float]) -> list[float]:
    return [round(float(values.quantile(q)), 2) for q in quantiles]


def study(name: str, pool: Pool, test: dict[str, Tensor]) -> dict[str, Any]:
    counts = (1, 3, len(pool.train) - 1)
    tables = {
        "novelty": [pool.novelty(count, batch) for count in counts for batch in (64, 32, 16)],
        "prompts": [pool.prompts(rows, test) for rows in (32, 128, None)],
        "prompts sent to no expert": [pool.far_prompts()],
    }
    for row in itertools.chain(*tables.values()):
        print(name, row, flush=True)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, help="code_alpaca.json; none: skills alone")
    parser.add_argument("--intents", type=Path, help="folder of CLINC150's data_full.json")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/novelty.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(num_experts=2))
    tokenizer = load_tokenizer("tiny-code-llama")
    skills, both, results, test, all_test = Pool(model), Pool(model), {}, {}, {}
    for skill in SKILLS:
        train, held_out, new = (features(model, tokenizer, part) for part in generated(skill))
        skills.put(skill, train, held_out)
        both.put(skill, train, held_out)
        test[skill] = torch.cat([held_out.prompt, new.prompt])
    results["skills"] = study("skills", skills, test)
    if options.published:
        rows = languages(options.published)
        for name, change in (("languages", list), ("languages, names struck out", struck_out)):
            pool, all_test = Pool(model), {}
            for language, texts in rows.items():
                half = min(200, len(texts) // 2)
                train = features(model, tokenizer, change(texts[:half]))
                held_out = features(model, tokenizer, change(texts[half : 2 * half]))
                pool.put(language, train, held_out)
                all_test[language] = held_out.prompt
                if change is list:
                    both.put(f"{language} (CodeAlpaca)", train, held_out)
                    test[f"{language} (CodeAlpaca)"] = held_out.prompt
            results[name] = study(name, pool, all_test)
        results["both"] = study("both", both, test)
    if options.intents:
        pool, all_test = Pool(model), {}
        named, out_of_scope = domains(options.intents)
        for domain, parts in named.items():
            rows_of = (part[:most] for part, most in zip(parts, (ROWS, 300, 450), strict=True))
            train, held_out, new = (features(model, tokenizer, part) for part in rows_of)
            pool.put(domain, train, held_out)
            all_test[domain] = new.prompt
        results["domains"] = study("domains", pool, all_test)
        asked = features(model, tokenizer, out_of_scope[:ROWS]).prompt
        distances = pool.library(list(named)).prompt_rule().distances(asked).amin(-1)
        results["domains"]["out of scope, sent to no expert %"] = percent(distances > 1)
        print(results["domains"]["out of scope, sent to no expert %"])
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
