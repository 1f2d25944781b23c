"""A stream of skills on a tiny random Llama: decisions, experts, clocks, resumes, refusals."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dylora.data.templates import PLAIN, recorded_template
from dylora.evaluation.stream_report import experts_table
from dylora.run_config import SourceConfig, StageConfig, dump_run_config
from dylora.storage.checkpoint import Checkpoint
from dylora.training import curriculum, loop, start, stream
from dylora.training.curriculum import train_stream
from dylora.training.stages import StageRecord, past_of, records_of
from dylora.training.validation import loss_of_rows, overall_loss, validate
from updates import delta_weight

ROOT = Path(__file__).parents[2]
SKILLS = {
    "sums": lambda n: (f"Add {n} and {n + 1}.", f"{2 * n + 1}"),
    "words": lambda n: (f"write the word {'abcdefgh'[n % 8] * (2 + n % 5)}{n} twice", "twice"),
    "lists": lambda n: (f"[[[{n}], [{n + 2}]]]", f"[{n}]"),
}
MOE = {"num_experts": 1, "router_scope": "prompt", "expert_dropout": 0.0}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A source of 200 rows of a skill, of which 20 are held out; `begin` is the first number."""
    folder = tmp_path_factory.mktemp("skills")

    def make(skill: str, begin: int = 0, count: int = 200) -> SourceConfig:
        file = folder / f"{skill}-{begin}-{count}.jsonl"
        pairs = map(SKILLS[skill], range(begin, begin + count))
        rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
        file.write_text("".join(rows))
        columns = {"instruction_column": "question", "output_column": "answer"}
        return SourceConfig(name=f"{skill}_{begin}", path=str(file), **columns)

    return make


@pytest.fixture
def make_stream(make_config, source):
    """A stream of two skills, four steps each, with dropout; sections take changes by name."""

    def make(name: str = "a", stages=None, **changes):
        moe = MOE | changes.pop("moe", {})
        config = make_config(name, moe=moe, **{"max_steps": 4, "save_steps": 2} | changes)
        if stages is None:
            stages = [
                StageConfig(name=skill, sources=[source(skill)]) for skill in list(SKILLS)[:2]
            ]
        data = dataclasses.replace(config.data, sources=[])
        return dataclasses.replace(config, data=data, stages=stages)

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a mixture's folder."""
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found = load_file(file).items()
        tensors |= {f"{file.relative_to(folder)}: {key}": value for key, value in found}
    return tensors


def same_tensors(one: Path, other: Path) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_end(one: Path, other: Path, stage: int = 2) -> bool:
    """Whether two streams have come to the same mixture, by the same decisions and scores."""
    name, found = f"checkpoint-{stage}", []
    for folder in (one, other):
        description = Checkpoint.open(folder / name).description
        records = [record.to_dict() for record in records_of(description["training"])]
        found.append((records, description["experts"]))
    return found[0] == found[1] and same_tensors(one / name, other / name)


@pytest.fixture
def whole(make_stream):
    return train_stream(make_stream("whole"))


# What a stream makes


def test_each_stage_gets_a_frozen_mature_expert_that_serves_its_skill(whole):
    table, library = whole.model.experts.table, whole.model.skill_library
    assert [(row.state, row.skill, row.steps) for row in table] == [
        ("frozen", "sums", 4),
        ("frozen", "words", 4),
    ]
    assert whole.model.maturity.maturity.tolist() == [1.0, 1.0]
    assert {name: library.expert_of(name) for name in library.skills} == {"sums": 0, "words": 1}
    assert all(row.enabled for row in table)


def test_the_mixture_after_a_stage_has_its_card_and_the_tokenizer_beside_it(whole):
    folder = whole.folder / "checkpoint-1"
    assert (folder / "tokenizer.json").exists()
    assert "## Experts" in (folder / "README.md").read_text()


def test_what_is_asked_during_a_stream_is_put_into_its_template(make_stream, source, monkeypatch):
    asked, scores = [], curriculum.scores

    def watched(stream, stage):
        asked.append(recorded_template(stream.model.training_record, stream.tokenizer).text)
        return scores(stream, stage)

    monkeypatch.setattr(curriculum, "scores", watched)
    sources = [source("sums"), source("sums", 90)]
    stages = [
        StageConfig(name=name, sources=[one]) for name, one in zip("ab", sources, strict=True)
    ]
    config = make_stream("plain", stages, max_steps=1)
    data = dataclasses.replace(config.data, template="plain")
    stream = train_stream(dataclasses.replace(config, data=data))
    assert stream.records[1].action == "skip"
    assert set(asked) == {PLAIN}


def test_an_expert_is_bit_equal_from_its_stage_to_the_end(whole):
    kept = Path("peft_adapters") / "expert_0"
    first, last = (whole.folder / f"checkpoint-{stage}" / kept for stage in (1, 2))
    assert same_tensors(first, last)
    trained = load_file(last / "adapter_model.safetensors")
    assert any(value.count_nonzero() for key, value in trained.items() if "lora_B" in key)


def test_the_decision_the_margin_and_the_scores_are_in_stage_json(whole):
    first, second = whole.records
    assert (first.action, first.nearest, first.margin) == ("new", None, None)
    assert (second.action, second.nearest, second.experts) == ("new", "sums", [1])
    assert second.margin is not None
    assert second.margin > 1
    assert list(second.losses or {}) == ["sums", "words"]
    file = whole.folder / "stage-2-words" / "stage.json"
    assert json.loads(file.read_text()) == second.to_dict()


def test_losses_are_those_of_each_prompts_own_expert(whole):
    """Routed over a mixed library; the oracle is the lone expert, which nothing is routed for."""
    alone = {}
    for number, stage in enumerate(whole.stages):
        whole.model.experts.activate(number)
        alone[stage.name] = curriculum.scores(whole, stage).loss
    whole.model.experts.activate_all_experts()
    assert whole.records[-1].losses == pytest.approx(alone, rel=1e-5)


def test_an_expert_has_the_rank_and_alpha_of_its_stage(make_stream, source):
    stages = [
        StageConfig(name="sums", sources=[source("sums")], rank=3),
        StageConfig(name="words", sources=[source("words")], rank=4, alpha=5.0),
    ]
    table = train_stream(make_stream(stages=stages, max_steps=1)).model.experts.table
    assert [(row.rank, row.alpha) for row in table] == [(3, 3 * 32 / 2), (4, 5.0)]


def test_a_stage_has_a_clock_of_its_own(make_stream):
    """Of maturity, rate and warm-up: the second stage's rows say what the first one's do."""
    moe = {"maturity_mode": "schedule", "maturity_schedule": [0.0, 1.0], "maturity_threshold": 1.0}
    stages = train_stream(make_stream(moe=moe)).folder.glob("stage-*/metrics.jsonl")
    clocks = []
    for expert, file in enumerate(sorted(stages)):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        steps = [row for row in rows if "train/lr" in row]
        maturity = f"expert/{expert}/maturity"
        clocks.append([(row["step"], row["train/lr"], row[maturity]) for row in steps])
    assert clocks[0] == clocks[1]
    assert [row[2] for row in clocks[0]] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_what_a_stage_sets_goes_before_the_section_train(make_stream, source):
    stage = StageConfig(name="sums", sources=[source("sums")], epochs=0.1, learning_rate=1e-3)
    common = make_stream(stages=[stage]).train
    found = stage.settings(common)
    assert (found.max_steps, found.epochs, found.learning_rate) == (None, 0.1, 1e-3)
    assert (found.batch_size, found.warmup_steps) == (common.batch_size, common.warmup_steps)


ON_KNOWN = {
    "skip": ("skip", [0], ["sums", "words"], [4, 4]),
    "continue": ("continue", [0], ["sums", "words"], [8, 4]),
    "new": ("new", [2], ["sums", "words", "more"], [4, 4, 4]),
}


@pytest.mark.parametrize("on_known", ON_KNOWN)
def test_rows_of_a_known_skill(make_stream, source, whole, on_known):
    more = StageConfig(name="more", sources=[source("sums", 90)], on_known=on_known)
    before = whole.model.skill_library.skills["sums"].rows
    config = make_stream("whole", [*make_stream().stages, more])
    found = train_stream(config, "latest")
    record, library = found.records[-1], found.model.skill_library
    action, experts, skills, steps = ON_KNOWN[on_known]
    assert (record.action, record.experts, record.nearest) == (action, experts, "sums")
    assert record.margin is not None
    assert record.margin < 1
    assert list(library.skills) == skills
    assert [row.steps for row in found.model.experts.table] == steps
    assert {row.state for row in found.model.experts.table} == {"frozen"}
    assert (library.skills["sums"].rows > before) == (on_known == "continue")
    kept = Path("peft_adapters") / "expert_0"
    first, last = (found.folder / f"checkpoint-{stage}" / kept for stage in (1, 3))
    assert same_tensors(first, last) == (on_known != "continue")


def test_shared_experts_are_learned_first_and_stay_as_they_are(make_stream, source):
    stages = [StageConfig(name="all", sources=[source("lists")], shared=True, rank=4)]
    stages += make_stream().stages
    moe = {"shared_experts": 1, "num_experts": 2}
    found = train_stream(make_stream(stages=stages, moe=moe))
    assert [record.action for record in found.records] == ["shared", "new", "new"]
    assert [row.rank for row in found.model.experts.table] == [4, 2, 2]
    assert list(found.model.skill_library.skills) == ["sums", "words"]
    kept = Path("peft_adapters") / "expert_0"
    first, last = (found.folder / f"checkpoint-{stage}" / kept for stage in (1, 3))
    assert same_tensors(first, last)


@pytest.fixture
def begun(make_stream, source, monkeypatch):
    """The first update of the last stage's expert, by path, and what became of the stage, of a
    stream that learns sums and then other rows."""

    def run(skill: str, begin: int, **changes):
        updates: dict[str, torch.Tensor] = {}
        original = curriculum.train

        def look(config, resumed, *, parts, **rest):
            number = len(parts.model.experts.table) - 1
            for path, adapter in parts.model.mixture.adapters.items():
                updates[path] = delta_weight(adapter, number).clone()
            return original(config, resumed, parts=parts, **rest)

        monkeypatch.setattr(curriculum, "train", look)
        last = StageConfig(name="last", sources=[source(skill, begin)], on_known="new", **changes)
        config = make_stream(skill, [*make_stream().stages[:1], last], learning_rate=0.05)
        found = train_stream(config)
        return found, updates

    return run


def test_an_expert_starts_at_the_share_of_the_known_one_that_explains_its_rows_best(begun):
    found, updates = begun("sums", 90)
    record = found.records[-1]
    assert (record.copied, record.share) == (0, 1.0)  # the same skill
    for path, adapter in found.model.mixture.adapters.items():
        torch.testing.assert_close(updates[path], record.share * delta_weight(adapter, 0))
        assert not torch.equal(updates[path], delta_weight(adapter, 1))  # it has learned since
    assert "from 1 of expert 0" in experts_table(found)


@pytest.mark.parametrize(
    "changes", [{"start": "fresh"}, {"rank": 3, "alpha": 6.0}, {"alpha": 6.0}], ids=str
)
def test_an_expert_that_is_told_to_or_of_another_size_starts_without_an_update(begun, changes):
    found, updates = begun("sums", 90, **changes)
    assert found.records[-1].copied is None
    assert not any(update.any() for update in updates.values())


LOSSES = {  # of the new expert as it is; at a half of each; at other shares of the best
    "another share of the best": ([2.0, 1.5, 1.9, 1.4, 1.6, 1.8], (0, 0.25)),
    "half of the best": ([2.0, 1.9, 1.5, 1.7, 1.6, 1.8], (1, 0.5)),
    "none is better than none": ([2.0, 2.1, 2.2, 2.05, 2.1, 2.5], None),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_lowest_loss_decides_where_an_expert_starts(whole, monkeypatch, case):
    losses, wanted = LOSSES[case]
    model, told = whole.model, iter(losses)
    own = model.experts.create_expert(model.experts[0].rank, model.experts[0].alpha)
    fresh, rows = start.update_of(model, own), whole.stages[0].rows("train", 32)
    assert model.skill_library.by_distance(rows) == ["sums", "words"]
    monkeypatch.setattr(start, "loss_of_rows", lambda *rest: next(told))
    found = start.start_expert(model, own, rows, 8, 0)
    assert list(told) == []
    assert (found and (found.expert, found.share)) == wanted
    for path, adapter in model.mixture.adapters.items():
        tensors = adapter.expert_tensors(own)
        if found is None:
            assert all(torch.equal(tensors[name], fresh[path][name]) for name in tensors)
        else:
            source = adapter.expert_tensors(found.expert)
            assert torch.equal(tensors["lora_A"], source["lora_A"])
            assert torch.equal(tensors["lora_B"], found.share * source["lora_B"])
    assert [row.enabled for row in model.experts.table] == [False, False, True]


def test_only_experts_of_the_nearest_skills_are_compared(whole, monkeypatch):
    model = whole.model
    own = model.experts.create_expert(model.experts[0].rank, model.experts[0].alpha)
    monkeypatch.setattr(start, "COMPARED", 1)
    losses = iter([2.0, 1.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(start, "loss_of_rows", lambda *rest: next(losses))
    [words] = [stage for stage in whole.stages if stage.name == "words"]
    found = start.start_expert(model, own, words.rows("train", 32), 8, 0)
    assert (found, list(losses)) == ((1, 0.5, 1.0, 2.0), [])


KINDS = [
    *({"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "orthogonal"}),
    {"adapter_type": "loha"},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_share_of_an_expert_of_any_kind_is_taken(make_stream, changes):
    config = make_stream(stages=make_stream().stages[:1], moe=changes, learning_rate=0.05)
    model = train_stream(config).model
    own = model.experts.create_expert(model.experts[0].rank, model.experts[0].alpha)
    fresh = start.update_of(model, own)
    start.load_share(model, own, fresh, 0, 0.5)
    for adapter in model.mixture.adapters.values():
        whole = delta_weight(adapter, 0)
        assert whole.any()
        torch.testing.assert_close(delta_weight(adapter, own), 0.5 * whole)
    start.load_share(model, own, fresh, own, 0.0)
    for path, adapter in model.mixture.adapters.items():
        tensors = adapter.expert_tensors(own)
        assert all(torch.equal(tensors[name], fresh[path][name]) for name in tensors)


def test_the_loss_of_rows_is_that_of_their_set(whole):
    stage = whole.stages[0]
    rows = [stage.data.train[0][index] for index in range(len(stage.data.train[0]))]
    scored = validate(whole.model, stage.data.train, batch_size=7, pad_token_id=0)
    loss = loss_of_rows(whole.model, rows, 3, 0)
    assert loss == pytest.approx(overall_loss(scored), abs=1e-5)


# Resume


def test_a_mixture_kept_in_memory_goes_on_as_one_that_was_read_back(make_stream, source):
    third = StageConfig(name="lists", sources=[source("lists")])
    stages = make_stream().stages
    one = train_stream(make_stream("one", [*stages, third]))
    two = train_stream(make_stream("two", stages))
    two = train_stream(make_stream("two", [*stages, third]), "latest")
    assert same_end(one.folder, two.folder, 3)


def in_child(work) -> int:
    """Run in a forked process, as if it were one of its own; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(owner, name: str, nth: int, after: bool) -> None:
    """Let this process die at the n-th call of a function, before it or after it."""
    original, calls = getattr(owner, name), 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            os._exit(137)
        found = original(*args, **kwargs)
        if calls == nth:
            os._exit(137)
        return found

    setattr(owner, name, dying)


KILLS = {
    "before the first decision": (curriculum, "decide", 1, False),
    "within the first stage, before its first save": (loop, "run_step", 2, False),
    "within the first stage, after a save": (loop, "run_step", 3, False),
    "after the first stage's steps": (curriculum, "keep", 1, False),
    "after its expert was frozen": (curriculum, "keep", 1, True),
    "in its evaluation": (curriculum, "evaluate_so_far", 1, True),
    "between its checkpoint and stage.json": (stream, "write_record", 1, False),
    "between two stages": (stream, "write_record", 1, True),
    "after growth, before the new expert's first step": (loop, "run_step", 5, False),
    "within the second stage": (loop, "run_step", 8, False),
    "after the last stage's steps": (curriculum, "keep", 2, True),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_stream_killed_anywhere_ends_as_one_that_was_not(make_stream, whole, point):
    config = make_stream("killed")

    def die() -> None:
        kill_at(*KILLS[point])
        train_stream(config)

    assert in_child(die) == 137
    found = train_stream(config, "latest")
    assert same_end(whole.folder, found.folder)
    assert (found.folder / "stage-1-sums" / "stage.json").exists()
    names = sorted(path.name for path in found.folder.rglob("*") if ".writing" in path.name)
    assert names == []


STOPS = {
    "in training": (loop, "run_step", 6),
    "in a stage's validation": (loop, "validate", 2),
    "in the evaluation between stages": (curriculum, "scores", 3),
    "in saving the mixture": (curriculum, "save", 1),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", STOPS)
def test_a_stream_stopped_by_a_signal_goes_on_exactly(
    make_stream, whole, monkeypatch, when, number
):
    owner, name, nth = STOPS[when]
    original, calls = getattr(owner, name), 0

    def sending(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    config = make_stream("stopped")
    monkeypatch.setattr(owner, name, sending)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        train_stream(config)
    assert stopped.type is (SystemExit if number == signal.SIGTERM else KeyboardInterrupt)
    assert getattr(stopped.value, "code", 143) == 143
    assert same_end(whole.folder, train_stream(config, "latest").folder)


STARTS = {  # what is called once more after the signal, if anything
    "while starts are compared": (start, "load_share", 1),
    "before the stage's run is built": (curriculum, "train", 2),
    "while the stage's run is built": (loop, "preflight_save", 2),
}


@pytest.mark.parametrize("when", STARTS)
def test_a_signal_while_a_stage_starts_is_granted_before_its_second_step(
    make_stream, whole, monkeypatch, when
):
    owner, name, nth = STARTS[when]
    original, step, calls, later = getattr(owner, name), loop.run_step, [], []

    def sending(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    def counting(run):
        later.extend(["step"] if len(calls) >= nth else [])
        return step(run)

    config = make_stream("stopped")
    monkeypatch.setattr(owner, name, sending)
    monkeypatch.setattr(loop, "run_step", counting)
    handlers = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        train_stream(config)
    assert signal.getsignal(signal.SIGTERM) is handlers
    assert len(calls) == nth
    assert len(later) == (owner is not start)
    assert same_end(whole.folder, train_stream(config, "latest").folder)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_command_killed_in_the_second_stage_ends_as_one_that_was_not(
    make_stream, tmp_path, threads
):
    """Real processes, a real SIGKILL, with one thread and with two."""
    command = [sys.executable, "run.py", "train", "--config"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}

    def start(name: str, *options: str) -> subprocess.Popen[bytes]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_run_config(make_stream(name, max_steps=8)))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, str(file), *options], cwd=ROOT, env=environment, **pipes)

    undisturbed, killed = start("undisturbed"), start("killed")
    assert killed.stdout is not None
    seen = 0
    while seen < 2:
        line = killed.stdout.readline()
        assert line
        seen += b"step 3/" in line
    killed.kill()
    assert undisturbed.communicate()
    assert killed.communicate()
    resumed = start("killed", "--resume_from_checkpoint", "latest")
    assert resumed.communicate()
    assert (undisturbed.returncode, killed.returncode, resumed.returncode) == (0, -9, 0)
    assert same_end(tmp_path / "runs" / "undisturbed", tmp_path / "runs" / "killed")


def test_a_damaged_checkpoint_is_set_aside_and_its_stage_done_again(make_stream, whole, capsys):
    folder = whole.folder.with_name("copy")
    shutil.copytree(whole.folder, folder)
    file = folder / "checkpoint-2" / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    train_stream(make_stream("copy"), "latest")
    assert (folder / "checkpoint-2.damaged").is_dir()
    assert same_end(whole.folder, folder)
    assert "1 of 2 stages are done" in capsys.readouterr().out


def test_save_total_limit_keeps_the_newest_stages_and_no_finished_run(make_stream, source):
    stages = [*make_stream().stages, StageConfig(name="lists", sources=[source("lists")])]
    found = train_stream(make_stream(stages=stages, save_total_limit=2))
    names = sorted(
        str(path.relative_to(found.folder)) for path in found.folder.rglob("checkpoint-*")
    )
    assert names == ["checkpoint-2", "checkpoint-3"]


# Refused


def test_stages_that_a_resumed_stream_has_done_stay_as_they_were(make_stream, source, whole):
    first, second = make_stream().stages
    with pytest.raises(ValueError, match="stage 1 was 'sums', this stream has 'words'"):
        train_stream(make_stream("whole", [second, first]), "latest")
    other = dataclasses.replace(first, sources=[source("sums", 300)])
    with pytest.raises(ValueError, match="stage 1, sums, was trained on other data"):
        train_stream(make_stream("whole", [other, second]), "latest")
    with pytest.raises(ValueError, match=r"stage 2 has no|2 stages, this stream"):
        train_stream(make_stream("whole", [first]), "latest")
    with pytest.raises(ValueError, match=r"moe\.r = 2, this run has 4"):
        train_stream(make_stream("whole", moe={"r": 4, "lora_alpha": 64}), "latest")


def test_a_fresh_stream_does_not_write_over_another(make_stream, whole):
    with pytest.raises(FileExistsError, match="already holds a stream"):
        train_stream(make_stream("whole"))


def test_a_checkpoint_of_a_stage_is_not_resumed_by_name(make_stream):
    with pytest.raises(ValueError, match="give latest instead of runs/a"):
        train_stream(make_stream(), "runs/a")


def test_rows_too_few_to_judge_are_refused_before_anything_is_trained(
    make_stream, source, tmp_path
):
    stages = [make_stream().stages[0], StageConfig(name="few", sources=[source("words", 0, 150)])]
    with pytest.raises(ValueError, match=r"stage 'few' has 15 rows for validation, .* at least 16"):
        train_stream(make_stream(stages=stages))
    assert not list((tmp_path / "runs").rglob("*"))


def stage(name: str = "x", **changes) -> StageConfig:
    return StageConfig(**{"name": name, "sources": [SourceConfig(name="skill/sql")]} | changes)


@pytest.mark.parametrize(
    ("stages", "moe", "message"),
    [
        ([stage(), stage()], {}, r"stages is \['x', 'x'\], but must be of different names"),
        ([stage()], {"router_scope": "site", "num_experts": 2}, "moe.router_scope is 'site'"),
        (
            [stage(), stage("y", shared=True)],
            {"shared_experts": 1, "num_experts": 2},
            "shared first",
        ),
        ([stage(shared=True)], {}, r"moe\.shared_experts is 0, but must be above 0"),
        ([stage()], {"shared_experts": 1}, r"moe\.shared_experts is 1, but must be .* else 0"),
    ],
)
def test_what_is_no_stream_is_refused_in_one_line(make_stream, stages, moe, message):
    with pytest.raises(ValueError, match=message):
        make_stream(stages=stages, moe=moe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources is .*at least one source"),
        ({"on_known": "forget"}, "on_known is 'forget', but must be one of skip, continue, new"),
        ({"name": "a/b"}, "name is 'a/b', but must be the name of a folder"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)


def test_what_a_stage_sets_beside_the_section_train_is_refused_before_it_comes(make_stream):
    stages = [stage(), stage("y", lr_scheduler_type="constant")]
    with pytest.raises(
        ValueError, match=r"stages\[1\]\.warmup_steps is 2, but must be 0 with lr_s"
    ):
        train_stream(make_stream(stages=stages, warmup_steps=2))
    make_stream(stages=[stage("y", lr_scheduler_type="constant", warmup_steps=0)]).check_acts()


def test_a_stream_begins_with_one_expert(make_stream):
    with pytest.raises(ValueError, match=r"moe\.num_experts is 3, but a stream begins with 1"):
        train_stream(make_stream(moe={"num_experts": 3}))


def test_train_says_who_trains_stages(make_stream):
    with pytest.raises(ValueError, match="train_stream"):
        loop.train(make_stream())


# One more skill


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def learn(whole, tmp_path, monkeypatch):
    """`run.py learn` on the stream of two skills, with rows of a third; the folder it wrote."""
    from dylora.cli.main import main

    def run(rows: SourceConfig, *options: str) -> Path:
        monkeypatch.chdir(tmp_path)
        columns = ["--instruction_column", "question", "--output_column", "answer"]
        argv = ["learn", "--checkpoint", str(whole.folder), "--source", str(rows.path), *columns]
        assert main([*argv, "--name", "third", *options]) == 0
        return tmp_path / "runs" / "third"

    return run


def test_learn_adds_a_skill_and_leaves_what_it_began_with(learn, whole, source):
    before = digests(whole.folder)
    folder = learn(source("lists"))
    assert digests(whole.folder) == before
    found = Checkpoint.open(folder)
    assert found.path == folder / "checkpoint-3"
    records = records_of(found.description["training"])
    assert [record.name for record in records] == ["sums", "words", "third"]
    assert [row["skill"] for row in found.experts] == ["sums", "words", "third"]
    assert (records[-1].number, records[-1].action, records[-1].experts) == (3, "new", [2])
    for expert in ("expert_0", "expert_1"):
        kept = Path("peft_adapters") / expert
        assert same_tensors(whole.folder / "checkpoint-2" / kept, found.path / kept)


def test_learn_trains_as_the_checkpoint_was_trained(learn, source):
    folder = learn(source("lists"), "--train.max_steps", "2")
    training = Checkpoint.open(folder).description["training"]
    assert training["settings"]["train"]["learning_rate"] == 1e-2
    assert training["settings"]["data"]["max_length"] == 64
    assert training["step"] == 2


def test_learn_says_which_expert_knows_the_skill(learn, source, capsys):
    folder = learn(source("sums", 60))
    assert "third: known, " in (printed := capsys.readouterr().out)
    assert "from sums; expert 0 serves it, nothing is learned" in printed
    assert not list(folder.rglob("adapter_model.safetensors"))[3:]


def test_learn_refuses_a_mixture_that_its_prompts_do_not_route(make_config, source, capsys):
    from dylora.cli.main import main

    folder = loop.train(make_config(max_steps=1)).folder
    argv = ["learn", "--checkpoint", str(folder), "--source", str(source("sums").path)]
    assert main(argv) == 2
    assert "moe.router_scope is 'site', but must be prompt with stages" in capsys.readouterr().err


def test_learn_refuses_a_name_that_is_known(learn, source, capsys):
    from dylora.cli.main import main

    with pytest.raises(AssertionError):
        learn(source("lists"), "--name", "sums")
    assert "'sums': the checkpoint knows a skill of this name already" in capsys.readouterr().err
    assert main(["learn"]) == 2


# What a checkpoint and a run tell


def test_info_lists_stages_and_skills(whole, capsys):
    from dylora.cli.main import main

    capsys.readouterr()
    assert main(["info", "--checkpoint", str(whole.folder / "checkpoint-2")]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = [line for line in lines if line.startswith("stage ")]
    found = [line.split()[1:4] for line in stages]
    assert found == [["1,", "sums:", "new,"], ["2,", "words:", "new,"]]
    skills = [line for line in lines if line.startswith("skill ")]
    assert [line.split()[1] for line in skills] == ["sums:", "words:"]
    assert "expert 1, 180 rows, 20 held out" in skills[1]


def test_the_report_has_the_matrices_who_learned_what_and_the_plots(whole):
    from dylora.evaluation.stream_report import report_stream

    results = report_stream(whole)
    found = json.loads((whole.folder / "results.json").read_text())
    assert found["losses"] == results["losses"]
    matrix, (first, second) = found["losses"]["matrix"], whole.records
    assert matrix[1] == [second.losses["sums"], second.losses["words"]]
    assert matrix[0] == [first.losses["sums"], second.before[0]]  # what words were worth before
    assert found["losses"]["backward"] == pytest.approx(matrix[0][0] - matrix[1][0], abs=1e-12)
    table = (whole.folder / "experts.md").read_text().splitlines()
    cells = [cell.strip() for cell in table[-1].split("|")]
    assert cells[1:4] == ["1", "words", "2"]
    assert cells[5].startswith("2, 32")
    assert cells[6] == "4"
    assert cells[7].startswith("words_0: 180 rows, sha256 ")
    for name in ("forgetting.png", "similarity.png", "report.html"):
        assert (whole.folder / name).stat().st_size > 5000
    texts = json.loads((whole.folder / "routing.json").read_text())["texts"]
    assert {text["set"] for text in texts} == {"sums_0", "words_0"}


@pytest.fixture
def with_rows_apart(make_stream, source):
    """A stream of skills with thirty held-out rows each, of which ten are kept apart."""
    stages = [StageConfig(name=s, sources=[source(s, count=300)]) for s in list(SKILLS)[:2]]
    return train_stream(make_stream("apart", stages=stages, max_steps=1))


def test_margins_are_of_rows_that_no_threshold_is_calibrated_on(with_rows_apart):
    from dylora.evaluation.stream_report import novelty_margins

    margins = novelty_margins(with_rows_apart)
    assert max(max(found) for found in margins.known.values()) < 1
    assert min(min(found) for found in margins.novel.values()) > 1
    assert set(margins.batch.values()) == {8}
    for stage in with_rows_apart.stages:
        held_out, apart = stage.held_out()
        assert (len(held_out), len(apart)) == (20, 10)
        assert with_rows_apart.model.skill_library.skills[stage.name].held_out == 20
        ids = [tuple(row["input_ids"]) for row in held_out]
        assert not set(ids) & {tuple(row["input_ids"]) for row in apart}


def test_no_row_is_kept_apart_where_the_threshold_needs_all(whole):
    from dylora.evaluation.stream_report import novelty_margins

    assert [tuple(map(len, stage.held_out())) for stage in whole.stages] == [(20, 0)] * 2
    assert novelty_margins(whole).known == {}


def test_the_distance_of_skills_is_that_of_their_means_in_units_of_their_spread(whole):
    from dylora.evaluation.stream_report import skill_distances
    from dylora.features import embed

    found = skill_distances(whole.model.skill_library)
    means, squares, rows = [], 0.0, 0
    for one in whole.stages:
        whole_BD = embed(whole.model.mixture, one.rows("train", 256)).whole
        means.append(whole_BD.mean(0))
        squares = squares + ((whole_BD - means[-1]) ** 2).sum(0)
        rows += len(whole_BD) - 1
    expected = ((means[0] - means[1]) ** 2 / (squares / rows)).mean().sqrt()
    assert float(found[0, 1]) == pytest.approx(float(expected), rel=1e-6)
    assert found.diagonal().tolist() == [0.0, 0.0]


def test_a_record_of_an_untrusted_file_is_read_strictly():
    record = {"number": 1, "name": "x", "sources": [{"name": "skill/sql"}], "action": "new"}
    record |= {"experts": [0], "rank": 2, "alpha": 4.0}
    assert isinstance(records_of({"stage": record})[0], StageRecord)
    with pytest.raises(ValueError, match=r"here: training\.stage\.experts is 'all'"):
        records_of({"stage": record | {"experts": "all"}}, "here")
    with pytest.raises(ValueError, match=r"here: training\.stage\.unknown field 'code'"):
        records_of({"stage": record | {"code": "x"}}, "here")


def test_a_stream_knows_all_stages_behind_a_joint_run_that_went_on_from_one(
    make_stream, make_config, whole, source
):
    begin = {"max_steps": 1, "train_experts": True}
    joint = make_config("joint", moe=MOE, init_from=str(whole.folder / "checkpoint-2"), **begin)
    between = loop.train(joint).folder / "checkpoint-1"
    third = StageConfig(name="lists", sources=[source("lists")])
    config = make_stream("after", [third], init_from=str(between), max_steps=1)
    found = train_stream(config)
    assert [record.name for record in found.records] == ["sums", "words", "lists"]
    assert [one.number for one in found.stages] == [1, 2, 3]
    runs = past_of(found.model.training_record)
    assert ["stage" in run for run in runs] == [True, True, False, True]
    assert not any("earlier" in run for run in runs)
    assert train_stream(config, "latest").records == found.records


def test_records_that_hold_those_before_them_are_told_one_after_the_other():
    one, two = {"seed": 1}, {"seed": 2, "earlier": [{"seed": 1}]}
    assert past_of({"seed": 3, "earlier": [two]}) == [one, {"seed": 2}, {"seed": 3}]
    assert past_of({"earlier": [two]}) == [one, {"seed": 2}]
    assert past_of({}) == []
