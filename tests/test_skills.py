"""What a skill library knows: novelty of batches, the skill of a prompt, and its file."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import harm
from dylora import DyLoRA_MoE, MoELoraConfig, NoveltyDetector, SkillLibrary, load_tokenizer
from dylora.data.prompts import encode_answers, encode_prompts, format_prompt
from dylora.features import Features, embed
from dylora.skill_statistics import FAR, SHRINKAGE, describe, gamma_quantile
from dylora.skills import LEAST_ROWS
from dylora.tasks import SKILLS, generate_tasks
from families import FAMILIES
from published import CODE_ALPACA, needs_published_rows

FILE = "skill_library.safetensors"


def encoded(tokenizer, pairs):
    """Rows of (instruction, answer), as a data set has them."""
    prompts = encode_prompts(tokenizer, [format_prompt(text) for text, _ in pairs])
    answers = encode_answers(tokenizer, [answer for _, answer in pairs])
    return [
        {"input_ids": (p + a)[:512], "labels": ([-100] * len(p) + a)[:512]}
        for p, a in zip(prompts, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def model():
    return DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(num_experts=2, r=2))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-code-llama")


@pytest.fixture(scope="module")
def rows(tokenizer):
    """By skill: 40 rows for training; of validation 24 to calibrate with and 32 to judge."""
    found = {}
    for skill in SKILLS:
        parts = [generate_tasks(skill, "train", 40), generate_tasks(skill, "validation", 56)]
        train, held_out = (
            encoded(tokenizer, [(t.instruction, t.answer) for t in p]) for p in parts
        )
        found[skill] = train, held_out[:24], held_out[24:]
    return found


@pytest.fixture(scope="module")
def described(model, rows):
    return {skill: tuple(embed(model.mixture, part) for part in rows[skill]) for skill in SKILLS}


def library_of(model, described, known) -> SkillLibrary:
    model.skill_library = None
    library = SkillLibrary(model)
    for name in known:
        train, calibrate, _ = described[name]
        skill, scatter = describe(name, None, train, calibrate)
        library.prompt_scatter = library.prompt_scatter[: len(scatter), : len(scatter)]
        library.put(skill, scatter)
    return library


def drawn(seed: int, count: int, shift: float = 0.0, width: int = 16) -> Features:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.double)
    draw = torch.randn(2, count, width, generator=generator, dtype=torch.double) @ mix + shift
    return Features(*draw)


def small(mixture, *, skills: int = 2) -> SkillLibrary:
    """Skills of token ids on a tiny base: each of its own range of ids."""
    library = SkillLibrary(mixture(fresh=True))
    generator = torch.Generator().manual_seed(0)
    for number in range(skills):
        low = 3 + 8 * number
        ids = torch.randint(low, low + 8, (40, 9), generator=generator).tolist()
        library.add(f"skill {number}", ids[:20], ids[20:], expert=number)
    return library


# Novelty


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("batch", [16, 32])
def test_known_skills_are_known_and_new_ones_new_from_one_known_on(model, described, count, batch):
    for first in range(len(SKILLS)):
        known = [SKILLS[(first + step) % len(SKILLS)] for step in range(count)]
        library = library_of(model, described, known)
        for skill in SKILLS:
            verdict = NoveltyDetector(library).judge(described[skill][2].whole[:batch])
            assert verdict.novel == (skill not in known), (skill, known, verdict)
            assert verdict.margin == verdict.distance / verdict.threshold
            if skill in known:
                assert verdict.nearest == skill
                assert verdict.margin < 0.9
                assert verdict.far_share < 0.35
            else:
                assert verdict.margin > 1.5


def test_a_threshold_of_the_training_rows_alone_would_call_known_batches_new(model, described):
    """So the held-out rows are needed: their means lie apart by more than chance."""
    over = 0
    for name, (train, _, judged) in described.items():
        library = library_of(model, described, [name])
        skill, _ = describe(name, None, train, Features(*(part[::2] for part in train)))
        honest = NoveltyDetector(library, factor=1)
        naive = copy.copy(library)
        naive.skills = {name: skill}
        distance = honest.distances(judged.whole)
        over += float(distance) > float(NoveltyDetector(naive, factor=1).thresholds(32))
        assert float(distance) < float(NoveltyDetector(library).thresholds(32))
    assert over >= 2


def test_half_a_batch_of_a_new_skill_shows_in_the_share_of_far_rows(model, described):
    library = library_of(model, described, ["lists", "sql"])
    known, new = described["sql"][2].whole, described["regex"][2].whole
    shares = [
        NoveltyDetector(library).judge(torch.cat([known[: 32 - n], new[:n]])).far_share
        for n in (0, 16, 32)
    ]
    assert shares[0] < 0.35 < shares[1] < 0.75 < shares[2]


def test_the_library_judges_rows_and_prompts_as_they_are(model, rows):
    model.skill_library = None
    library = SkillLibrary(model)
    for number, name in enumerate(("lists", "sql")):
        library.add(name, *(part[:16] for part in rows[name][:2]), expert=number)
    assert library.judge(rows["sql"][2][:16])[:2] == (False, "sql")
    assert library.judge(rows["json"][2][:16]).novel
    for name in ("lists", "sql"):
        row = rows[name][2][0]
        prompt = [i for i, label in zip(*row.values(), strict=True) if label == -100]
        choice = library.which(prompt)
        assert choice == library.which(torch.tensor([prompt])) == library.which(row)
        assert choice.skill == name
        assert sum(map(math.exp, choice.log_probabilities.values())) == pytest.approx(1)
    assert [library.expert_of(name) for name in ("lists", "sql")] == [0, 1]


def test_a_prompt_finds_its_skill_among_six(model, described):
    library = library_of(model, described, SKILLS)
    right = [
        library.log_probabilities(described[skill][2].prompt).argmax(-1) == place
        for place, skill in enumerate(SKILLS)
    ]
    assert float(torch.cat(right).double().mean()) >= 0.995


@needs_published_rows
def test_three_languages_of_published_rows_are_told_apart(model, tokenizer):
    patterns = {"python": "python", "javascript": r"java\s?script", "sql": r"sql\b"}
    found = {name: [] for name in patterns}
    for row in json.loads(Path(CODE_ALPACA).read_text()):
        named = [name for name, p in patterns.items() if re.search(p, row["instruction"], re.I)]
        if len(named) == 1 and not row["input"] and len(row["output"]) < 150:
            found[named[0]].append((row["instruction"], row["output"]))
    described = {}
    for name, pairs in found.items():
        parts = encoded(tokenizer, pairs[:40]), encoded(tokenizer, pairs[40:64])
        parts = *parts, encoded(tokenizer, pairs[64:88])
        described[name] = tuple(embed(model.mixture, part) for part in parts)
    for new in patterns:
        library = library_of(model, described, [name for name in patterns if name != new])
        for name in patterns:
            verdict = NoveltyDetector(library).judge(described[name][2].whole)
            assert verdict.novel == (name == new), (name, new, verdict)
    library = library_of(model, described, patterns)
    right = [
        library.log_probabilities(described[name][2].prompt).argmax(-1) == place
        for place, name in enumerate(patterns)
    ]
    assert float(torch.cat(right).double().mean()) >= 0.93


# Against a slow version of numpy


def test_distances_thresholds_and_far_rows_are_those_of_plain_numpy(model):
    train = [drawn(1, 40), drawn(2, 30, 0.5)]
    held_out = [drawn(3, 25, 0.1), drawn(4, 25, 0.6)]
    batch = drawn(5, 20, 0.2).whole.numpy()
    library = library_of(model, {i: (train[i], held_out[i], None) for i in (0, 1)}, [0, 1])
    detector, wholes = NoveltyDetector(library), [t.whole.numpy() for t in train]
    pooled = sum(((w - w.mean(0)) ** 2).sum(0) for w in wholes) / (39 + 29)
    far = np.ones(20, dtype=bool)
    for place, w in enumerate(wholes):
        total = 0.0
        for j in range(16):
            total += (batch[:, j].mean() - w[:, j].mean()) ** 2 / pooled[j]
        expected = total / 16 / (1 / 20 + 1 / len(w))
        others = held_out[place].whole.numpy()
        distances = detector.distances(torch.from_numpy(batch))
        np.testing.assert_allclose(distances[place], expected, rtol=1e-12)
        own = ((w - w.mean(0)) ** 2).sum(0) / (len(w) - 1)
        level = np.quantile(((others - w.mean(0)) ** 2 / own).mean(1), FAR)
        far &= ((batch - w.mean(0)) ** 2 / own).mean(1) > level
        # The moments of the distance, with the correlation's spread for the covariance's.
        correlation = np.corrcoef(w.T)
        dimensions = np.trace(correlation) ** 2 / (correlation**2).sum()
        shift = (((others.mean(0) - w.mean(0)) ** 2) / pooled).sum()
        spread = (others.var(0, ddof=1) / pooled).sum() / 20
        unit = 1 / (1 / 20 + 1 / len(w)) / 16
        variance = (2 * spread**2 + 4 * shift * spread) / dimensions
        quantile = gamma_quantile(unit * (shift + spread), unit**2 * variance, 0.995)
        np.testing.assert_allclose(detector.thresholds(20)[place], 1.5 * quantile, rtol=1e-10)
    assert detector.judge(torch.from_numpy(batch)).far_share == far.mean()


def test_the_quantile_is_that_of_drawn_batches(model):
    """Batches of rows without end, of one normal distribution with few large directions."""
    library = library_of(model, {"a": (drawn(1, 200), drawn(2, 200), None)}, ["a"])
    detector = NoveltyDetector(library, factor=1)
    found = [float(detector.distances(drawn(100 + n, 32).whole)) for n in range(2000)]
    above = np.mean(np.array(found) > float(detector.thresholds(32)))
    assert 0 < above < 0.02


def test_the_discriminant_is_that_of_plain_numpy(model):
    parts = [drawn(1, 40), drawn(2, 30, 0.5), drawn(3, 20, 1)]
    library = library_of(model, {i: (p, drawn(9, 20), None) for i, p in enumerate(parts)}, range(3))
    prompts = [p.prompt.numpy() for p in parts]
    within = sum((p - p.mean(0)).T @ (p - p.mean(0)) for p in prompts) / (90 - 3)
    shrunk = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / 16 * np.eye(16)
    new = drawn(7, 10, 0.4).prompt.numpy()
    logits = np.empty((10, 3))
    for n, row in enumerate(new):
        for k, p in enumerate(prompts):
            logits[n, k] = -0.5 * (row - p.mean(0)) @ np.linalg.inv(shrunk) @ (row - p.mean(0))
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(
        library.log_probabilities(torch.from_numpy(new)), expected, atol=1e-9
    )


def test_the_gamma_quantile_is_that_of_drawn_numbers():
    values = np.random.default_rng(0).gamma(3.0, 2.0, 1_000_000)
    assert gamma_quantile(6.0, 12.0, 0.995) == pytest.approx(np.quantile(values, 0.995), rel=0.01)


# What a row is


def test_a_row_is_the_mean_over_its_tokens_without_bos_and_padding(mixture):
    model = mixture()
    base = model.base.config
    rows = [[base.bos_token_id, 5, 6, 7, 8], [9, 10, 11]]
    labels = [[-100, -100, -100, 7, 8], [-100, -100, 11]]
    mapped = [{"input_ids": i, "labels": x} for i, x in zip(rows, labels, strict=True)]
    found = embed(model.mixture, mapped)
    for number, (ids, begin, prompt) in enumerate(zip(rows, (1, 0), (3, 2), strict=True)):
        with torch.no_grad(), model.disable_adapters():
            states = model.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found.whole[number].float(), states[-1][0, begin:].mean(0))
        layer = model.base.model.layers[0]
        entering = layer.input_layernorm(states[0])[0, begin:prompt]
        torch.testing.assert_close(found.prompt[number].float(), entering.mean(0))
    padded = [{"input_ids": [*rows[1], 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    torch.testing.assert_close(
        embed(model.mixture, padded).whole[0].float(), found.whole[1].float()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_every_family_are_the_same_alone_and_in_a_batch(name, random_base, mixture):
    family = FAMILIES[name]
    model = mixture(random_base(family.config_class, **family.sizes), fresh=True)
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    found = embed(model.mixture, rows)
    for number, row in enumerate(rows):
        for together, alone in zip(found, embed(model.mixture, [row]), strict=True):
            torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=1e-4)


def test_experts_training_mode_and_dropout_change_nothing_of_a_row(mixture, llama):
    model = mixture(llama(attention_dropout=0.5))
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    before = embed(model.mixture, rows)
    model.train()
    modes = [module.training for module in model.base.modules()]
    with torch.no_grad():
        for _, parameter in model.own_parameters():
            parameter.add_(1)
    after = embed(model.mixture, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [module.training for module in model.base.modules()] == modes
    assert not model.mixture.state.mine.disabled


def test_adding_a_skill_leaves_the_sums_of_the_others_bit_for_bit(mixture):
    library = small(mixture)
    before = copy.deepcopy(library.skills)
    ids = torch.randint(20, 30, (40, 9)).tolist()
    library.add("late", ids[:20], ids[20:])
    for name, skill in before.items():
        for field, value in vars(skill).items():
            now = getattr(library.skills[name], field)
            assert torch.equal(now, value) if torch.is_tensor(value) else now == value


# Refusals


def test_what_cannot_be_judged_or_added_is_refused_with_the_reason(mixture):
    library = SkillLibrary(mixture(fresh=True))
    ids = torch.randint(3, 40, (60, 9)).tolist()
    for call, words in (
        (lambda: library.judge(ids[:20]), "library is empty: add a skill first"),
        (lambda: library.which(ids[0]), "library is empty"),
        (lambda: library.add("a\nb", ids[:20], ids[20:40]), "is no name of a skill"),
        (lambda: library.add("a", ids[:15], ids[20:40]), "rows has 15 rows of 'a', but at least"),
        (lambda: library.add("a", ids[:20], ids[20:35]), "held_out has 15 rows"),
        (lambda: library.add("a", ids[:20], ids[19:40]), "1 held-out rows of 'a' are among"),
        (lambda: library.add("a", ids[:20], ids[20:40], expert=3), "no expert 3 to serve 'a'"),
        (lambda: library.add("a", ids[:20], ids[20:40], expert=True), "no expert True"),
        (lambda: library.add("a", [[7, 8]] * 20, ids[:20]), "are all alike"),
        (lambda: library.add("a", [*ids[:19], []], ids[20:40]), "row 19 has no token"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            call()
        assert "\n" not in str(error.value)
    assert len(library) == 0
    library.add("a", ids[:20], ids[20:40])
    with pytest.raises(ValueError, match="15 rows is too small to judge: at least 16"):
        library.judge(ids[40 : 40 + LEAST_ROWS - 1])
    with pytest.raises(ValueError, match="has a skill 'a' already"):
        library.add("a", ids[:20], ids[20:40])
    with pytest.raises(ValueError, match="no skill 'b'"):
        library.expert_of("b")
    with pytest.raises(ValueError, match=r"use model\.skill_library"):
        SkillLibrary(library.mixture)


# Files


def test_a_library_is_saved_with_its_mixture_and_read_back_bit_for_bit(mixture, llama, tmp_path):
    library = small(mixture)
    prompt = [5, 6, 7]
    before = library.which(prompt)
    library.save(tmp_path / FILE)
    other = SkillLibrary.read(tmp_path / FILE, mixture(fresh=True))
    assert other.which(prompt) == before
    assert {name: s.expert for name, s in other.skills.items()} == {"skill 0": 0, "skill 1": 1}
    assert torch.equal(other.prompt_scatter, library.prompt_scatter)
    for name, skill in library.skills.items():
        for field, value in vars(skill).items():
            now = getattr(other.skills[name], field)
            assert torch.equal(now, value) if torch.is_tensor(value) else now == value
    assert library.mixture.skill_library is library


@pytest.fixture(scope="module")
def saved(mixture, llama, tmp_path_factory) -> Path:
    model = mixture(fresh=True)
    model.save_pretrained(tmp_path_factory.mktemp("plain") / "m")
    library = SkillLibrary(model)
    ids = torch.randint(3, 40, (80, 9), generator=torch.Generator().manual_seed(0)).tolist()
    library.add("a", ids[:20], ids[20:40], expert=0)
    library.add("b", ids[40:60], ids[60:], expert=1)
    folder = tmp_path_factory.mktemp("with") / "m"
    model.save_pretrained(folder)
    return folder


def test_from_pretrained_brings_the_library_and_saves_it_again(saved, llama, tmp_path):
    model = DyLoRA_MoE.from_pretrained(saved, base=llama())
    assert list(model.skill_library.skills) == ["a", "b"]
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (saved / FILE).read_bytes()


def test_a_mixture_without_a_library_or_with_an_empty_one_writes_none(mixture, llama, tmp_path):
    model = mixture(fresh=True)
    SkillLibrary(model)
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / FILE).exists()
    assert DyLoRA_MoE.from_pretrained(tmp_path / "m", base=llama()).skill_library is None


def test_a_library_that_has_changed_is_refused(saved, llama, tmp_path):
    file = harm_copy(saved, tmp_path) / FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"skill_library\.safetensors has changed"):
        DyLoRA_MoE.from_pretrained(file.parent, base=llama())


def test_a_library_that_no_manifest_lists_is_refused(saved, mixture, llama, tmp_path):
    mixture(fresh=True).save_pretrained(tmp_path / "m")
    shutil.copy(saved / FILE, tmp_path / "m")
    with pytest.raises(ValueError, match=r"skill_library\.safetensors is not in manifest"):
        DyLoRA_MoE.from_pretrained(tmp_path / "m", base=llama())


def harm_copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


def table(change):
    """Change the table in the header; the tensors stay."""

    def damage(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        rows = json.loads(header["__metadata__"]["skills"])
        rows = change(rows) or rows
        text = rows if isinstance(rows, str) else json.dumps(rows)
        header["__metadata__"]["skills"] = text
        new = json.dumps(header).encode()
        file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return damage


def tensors(change):
    """Change the tensors; the table stays."""

    def damage(file: Path) -> None:
        found = {name: value.clone() for name, value in load_file(file).items()}
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        change(found)
        save_file(found, file, metadata=header["__metadata__"])

    return damage


def put(name, value):
    return tensors(lambda t: t[name].view(-1).__setitem__(0, value))


HOSTILE = [
    (table(lambda rows: rows[0].update(name="b")), "the skill 'b' appears twice"),
    (table(lambda rows: rows[0].update(name="\x1b[2J")), "skills[0].name is '\\x1b[2J'"),
    (table(lambda rows: rows[0].update(name="x" * 600)), "skills[0].name is"),
    (table(lambda rows: rows[0].update(expert=99)), "skills[0].expert is 99, but there are 3"),
    (table(lambda rows: rows[0].update(expert=True)), "skills[0].expert is True"),
    (table(lambda rows: rows[0].update(rows=3)), "skills[0].rows is 3"),
    (table(lambda rows: rows[0].update(rows=10**30)), "skills[0].rows is 1000"),
    (table(lambda rows: rows[0].update(held_out=0)), "skills[0].held_out is 0"),
    (table(lambda rows: rows[0].update(dimensions=0)), "skills[0].dimensions is 0"),
    (table(lambda rows: rows[0].update(far_level="1")), "skills[0].far_level is '1'"),
    (table(lambda rows: rows[0].update(text="a row")), "skills[0].'text' is not known"),
    (table(lambda rows: rows[0].pop("rows") and None), "skills[0].rows is missing"),
    (table(lambda rows: rows.pop() and None), "must be F64 [1, "),
    (table(lambda rows: '{"a": 1}'), "not a list of 1 to"),
    (table(lambda rows: "[" * 1000), "not valid JSON"),
    (table(lambda rows: "[NaN]"), "NaN is no number"),
    (table(lambda rows: rows.clear() or "[]"), "not a list of 1 to"),
    (harm.in_header(lambda header: None), "not valid JSON"),
    (tensors(lambda t: t.pop("whole_sum")), "whole_sum is missing"),
    (tensors(lambda t: t.update(evil=torch.ones(2))), "'evil' belongs to no skill library"),
    (tensors(lambda t: t.update(whole_sum=t["whole_sum"].float())), "must be F64"),
    (tensors(lambda t: t.update(prompt_scatter=torch.eye(5).double())), "must be F64"),
    (put("whole_sum", math.nan), "not finite"),
    (put("prompt_sum", 1e200), "above 1e100"),
    (put("whole_squares", -1.0), "whole_squares holds no sums of squares"),
    (put("prompt_scatter", -1e6), "prompt_scatter is no scatter"),
    (tensors(lambda t: t["prompt_scatter"][0].fill_(7)), "prompt_scatter is no scatter"),
    (harm.header_text(b"{}", 1 << 63), "header"),
    (harm.sparse(harm.GIB), "not a readable safetensors file"),
    (harm.pipe, "is no file"),
    (harm.moved_out, "out of its folder"),
]


@pytest.mark.parametrize(("damage", "words"), HOSTILE, ids=[words for _, words in HOSTILE])
def test_a_hostile_library_is_refused_in_one_line(damage, words, saved, llama, tmp_path):
    base, folder = llama(), harm_copy(saved, tmp_path)
    (tmp_path / "secret").write_text(harm.SECRET)
    damage(folder / FILE)
    harm.seal(folder)
    message = harm.refusal(lambda: DyLoRA_MoE.from_pretrained(folder, base=base), tmp_path)
    assert words in message
    assert FILE in message
    assert "\n" not in message


def test_an_older_layouts_library_is_refused_with_the_reason(mixture, tmp_path):
    file = tmp_path / "skill_library.pt"
    torch.save({"embeddings": torch.ones(2, 3)}, file)
    with pytest.raises(
        ValueError, match=r"skill_library\.pt is of an older layout.*add the skills"
    ):
        SkillLibrary.read(file, mixture(fresh=True))


def test_a_library_of_another_width_is_refused(saved, mixture, llama):
    wider = mixture(llama(hidden_size=48), fresh=True)
    with pytest.raises(ValueError, match=r"must be F64 \[2, 48\]"):
        SkillLibrary.read(saved / FILE, wider)
    assert wider.skill_library is None
