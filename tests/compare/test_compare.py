"""A comparison of two methods on a tiny base, from its files to its report."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml

import dylora.compare.cells as cells
import dylora.compare.run as story
import dylora.compare.survey as survey
import dylora.training.loop as loop
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.cli.compare import load_board
from dylora.cli.main import main
from dylora.compare.cells import score_cell, train_cell
from dylora.compare.config import CompareConfig, Method
from dylora.compare.report import Outcome, compare_measure
from dylora.compare.rows import rows_to_choose_by, rows_to_report_on
from dylora.compare.run import compare
from dylora.compare.statistics import Choice
from dylora.data.tokenize import TokenizedSet
from dylora.evaluation.page.board import read_board
from dylora.run_config import DataConfig
from dylora.storage.lock import lock_folder
from dylora.tasks import generate_tasks
from dylora.training.validation import SetScore, active_parameters, overall_loss, validate

LORA = {"name": "lora", "moe": {"use_moe_routing": False, "r": 6}}
UNIFORM = {"name": "uniform", "moe": {"num_experts": 2, "r": 3, "router_type": "fixed"}}


@pytest.fixture
def write_board(tmp_path, base_folder, rows_file):
    """Writes a board of LoRA and uniform experts; returns its file. Changes go over its keys."""

    def write(methods=(LORA, UNIFORM), run=None, **changes) -> str:
        files = []
        for method in methods:
            files.append(tmp_path / f"{method['name']}.yaml")
            files[-1].write_text(yaml.safe_dump(method))
        common = {
            "model": {"base": str(base_folder), "dtype": "float32", "device": "cpu"},
            "data": {
                "sources": [
                    {
                        "name": "rows",
                        "path": str(rows_file),
                        "instruction_column": "question",
                        "output_column": "answer",
                    }
                ],
                "max_length": 64,
            },
            "train": {"max_steps": 3, "batch_size": 2},
            "log": {"logging_steps": 1},
        }
        board = {
            "name": "board",
            "output_dir": str(tmp_path / "boards"),
            "methods": [{"config": str(file)} for file in files],
            "rates": [1e-3, 1e-2],
            "scales": [2, 8],
            "seeds": [0, 1],
            "equal_time": False,
            "run": {**common, **(run or {})},
        }
        file = tmp_path / "board.yaml"
        file.write_text(yaml.safe_dump(board | changes))
        return str(file)

    return write


@pytest.fixture
def board(write_board):
    return load_board(write_board(), [])


def results(board, file: str) -> dict[tuple[str, str], float]:
    """The losses in the files of this name, by method and run."""
    return {
        (path.parts[-3], path.parts[-2]): json.loads(path.read_text())["loss"]
        for path in board.folder.glob(f"*/*/{file}")
    }


# From the grid to the report


def test_the_grid_is_trained_with_the_first_seed_and_the_best_cell_with_all(board, capsys):
    compare(board)
    trained = results(board, "result.json")
    grid = {f"{rate}-{scale}-seed0" for rate in ("0.001", "0.01") for scale in (2, 8)}
    for name in ("lora", "uniform"):
        own = {run: loss for (method, run), loss in trained.items() if method == name}
        best = min(grid, key=own.__getitem__)
        assert own.keys() == grid | {best.replace("seed0", "seed1")}
        scored = {run for method, run in results(board, "test.json") if method == name}
        assert scored == {best, best.replace("seed0", "seed1")}
        kept = {path.parent.name for path in board.folder.glob(f"{name}/*/checkpoint-3")}
        assert kept == scored
    printed = capsys.readouterr().out
    report = (board.folder / "report.md").read_text()
    assert report in printed
    assert "not bracketed" in report
    assert "under 3 seeds" in report
    assert "chosen by every second validation row" in report
    assert (board.folder / "curves.png").stat().st_size
    saved = json.loads((board.folder / "report.json").read_text())["methods"]
    assert [one["name"] for one in saved] == ["lora", "uniform"]
    assert len(saved[0]["grid"]) == 4


def test_the_page_of_a_comparison_has_its_report_and_the_runs_that_it_chose(
    board, tmp_path, capsys
):
    compare(board)
    assert main(["report", str(board.folder)]) == 0
    page = unescape((board.folder / "report.html").read_text("utf-8"))
    report = (board.folder / "report.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    assert lines
    for cell in {cell for line in lines for cell in line.strip("| ").split(" | ")}:
        assert f"<td>{cell}</td>" in page or f"<th>{cell}</th>" in page
    assert "<h1>board: 2 methods, 2 seeds</h1>" in page
    found = read_board(board.folder, 1000)
    assert {name: len(runs) for name, runs in found.runs.items()} == {"lora": 2, "uniform": 2}
    scored = {folder for method, folder in results(board, "test.json")}
    assert {run.folder.name for runs in found.runs.values() for run in runs} == scored
    assert "<td>moe.router_type</td>" in page  # what differs

    assert main(["report", str(board.folder), str(board.folder / "lora")]) == 2
    assert "a page of its own: give it alone" in capsys.readouterr().err
    (board.folder / "report.json").write_text('{"methods": [{"name": "../lora"}]}')
    assert main(["report", str(board.folder)]) == 2
    assert "report.json: not of run.py compare" in capsys.readouterr().err
    (board.folder / "report.json").unlink()
    assert main(["report", str(board.folder)]) == 2
    assert "has not ended: start run.py compare again" in capsys.readouterr().err


def test_uniform_experts_are_one_lora_of_their_ranks_in_number_of_parameters(board):
    first, second = compare(board)
    assert first.trainable == second.trainable
    assert second.scores[0]["active"] == second.trainable


def test_all_is_trained_and_chosen_before_any_row_to_report_on_is_looked_at(board, monkeypatch):
    def stop(*_):
        raise RuntimeError("the rows to report on")

    monkeypatch.setattr(story, "score_cell", stop)
    with pytest.raises(RuntimeError, match="the rows to report on"):
        compare(board)
    assert len(results(board, "result.json")) == 2 * (4 + 1)
    assert results(board, "test.json") == {}


def test_a_cell_is_chosen_by_the_loss_on_half_of_the_rows_and_reported_on_the_other(board):
    cell = board.cell(board.methods[0], 1e-3, 2, 0)
    chosen, reported = train_cell(cell)["loss"], score_cell(cell, board.config)["loss"]
    run = cells.train(cell, "latest")  # with all rows
    whole = validate(run.model, run.data.validation, batch_size=1, pad_token_id=run.pad_token_id)
    targets = [
        sum(len(rows) - rows.count(-100) for rows in labels)
        for labels in (
            [part[index]["labels"] for index in range(len(part))]
            for part in (
                rows_to_choose_by(run.data.validation)[0],
                rows_to_report_on(run.data.validation, run.tokenizer, cell.data, 1)[0],
            )
        )
    ]
    mean = (chosen * targets[0] + reported * targets[1]) / sum(targets)
    assert mean == pytest.approx(overall_loss(whole), abs=1e-5)
    assert abs(chosen - reported) > 1e-4


def test_rows_to_report_on_have_no_part_in_a_cell_that_routes_by_prompts(write_board, tmp_path):
    def rows(first: int, only: int | None = None) -> str:
        """80 of two kinds; with `only` every second one asks for something else."""
        asked = ["Add {} and 3, please.", "Sort the letters of the word that stands here: {}"]
        texts = [asked[n // 2 % 2].format(n) for n in range(first, first + 80)]
        texts = [f"Then {text}" if only == n % 2 else text for n, text in enumerate(texts)]
        return "".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in texts)

    training, file = tmp_path / "training.jsonl", tmp_path / "validation.jsonl"
    training.write_text(rows(0))
    method = {"name": "prompts", "train": {"prompt_clusters": 2}}
    method["moe"] = {"num_experts": 2, "r": 3, "router_scope": "prompt", "top_k_experts": 1}
    data = yaml.safe_load(Path(write_board()).read_text())["run"]["data"]
    data["sources"][0] |= {"path": str(training), "validation_path": str(file)}
    libraries, losses = [], []
    for name, only in (("one", None), ("other", 1)):
        file.write_text(rows(1000, only))
        board = load_board(write_board([LORA, method], {"data": data}, name=name), [])
        cell = board.cell(board.methods[1], 1e-3, 2, 0)
        losses.append(train_cell(cell)["loss"])
        folder = board.folder / "prompts" / cell.name / "checkpoint-3"
        libraries.append((folder / "skill_library.safetensors").read_bytes())
    assert losses[0] == losses[1]
    assert libraries[0] == libraries[1]


def test_a_restart_trains_and_scores_nothing_again(board, monkeypatch):
    before = compare(board)
    for name in ("train", "validate", "load_checkpoint"):
        monkeypatch.setattr(cells, name, None)
    assert compare(board) == before


def test_a_cell_that_was_begun_goes_on_from_its_checkpoint_with_the_same_loss(
    write_board, monkeypatch
):
    run = {"train": {"max_steps": 3, "batch_size": 2, "save_steps": 1}}
    board = load_board(write_board(run=run), [])
    cell = board.cell(board.methods[1], 1e-2, 8, 0)
    whole = train_cell(
        board._replace(config=replace(board.config, name="b")).cell(board.methods[1], 1e-2, 8, 0)
    )
    steps, run_step = [], loop.run_step

    def killed(run):
        steps.append(run.progress.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return run_step(run)

    monkeypatch.setattr(loop, "run_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_cell(cell)
    assert train_cell(cell)["loss"] == whole["loss"]
    assert steps == [0, 1, 2, 2]


def test_a_method_that_has_not_the_size_of_the_first_is_refused_by_its_name(write_board):
    larger = {"name": "larger", "moe": {"use_moe_routing": False, "r": 8}}
    board = load_board(write_board((LORA, UNIFORM, larger)), [])
    with pytest.raises(
        ValueError, match=r"of lora by more than 1%: larger has [\d,]+ \(\+33.3%\);"
    ):
        compare(board)
    assert not board.folder.exists()


def test_an_estimate_trains_nothing_and_names_the_number_of_runs(write_board, capsys):
    file = write_board()
    assert main(["compare", "--config", file, "--estimate", "--equal_time", "true"]) == 0
    printed = capsys.readouterr().out
    assert "\n12 runs, about" in printed  # 2 grids of 4, the other seed of each, 2 of equal time
    assert not (Path(file).parent / "boards").exists()


def test_a_run_of_fewer_steps_than_are_measured_is_estimated_as_well(write_board):
    file = write_board()
    assert main(["compare", "--config", file, "--estimate", "--run.train.max_steps", "1"]) == 0


def test_an_estimate_in_epochs_counts_the_steps_of_all_rows(write_board, monkeypatch):
    sources = [{"name": "skill/sql", "rows": 400}]
    run = {"data": {"sources": sources}, "train": {"epochs": 2.0, "batch_size": 1}}
    board = load_board(write_board([LORA, UNIFORM], run), [])
    rows = len(cells.load_cell(board.cell(board.methods[0], 1e-3, 2, 0)).data.train[0])
    assert rows > 2 * survey.STEPS
    steps, prepare = [], survey.prepare

    def seen(*args, **kwargs):
        steps.append(prepare(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(survey, "prepare", seen)
    survey.survey_methods(board)
    assert [run.steps for run in steps] == [2 * rows, 2 * rows]


def test_a_method_may_name_its_optimizer(write_board):
    plus = LORA | {"name": "plus", "train": {"optim": "lora_plus", "lora_plus_ratio": 4}}
    first, second = load_board(write_board([LORA, plus]), []).methods
    assert (first.run.train.optim, second.run.train.optim) == ("adamw", "lora_plus")
    assert second.run.train.lora_plus_ratio == 4


def test_results_of_other_settings_are_not_taken(board, write_board):
    cell = board.cell(board.methods[0], 1e-3, 2, 0)
    train_cell(cell)
    other = load_board(write_board(), ["run.train.weight_decay=0.5"])
    message = r"result.json was made with train.weight_decay = 0.01, the comparison has 0.5"
    with pytest.raises(ValueError, match=message):
        train_cell(other.cell(other.methods[0], 1e-3, 2, 0))


def test_a_cell_that_other_settings_began_is_not_gone_on_with(board, write_board, monkeypatch):
    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_cell(board.cell(board.methods[0], 1e-3, 2, 0))
    other = load_board(write_board(), ["run.train.max_steps=2"])
    message = r"settings.json was made with train.max_steps = 3, the comparison has 2"
    with pytest.raises(ValueError, match=message):
        train_cell(other.cell(other.methods[0], 1e-3, 2, 0))


def test_a_result_from_before_an_option_existed_is_taken_with_its_default(board, write_board):
    cell = board.cell(board.methods[0], 1e-3, 2, 0)
    trained = train_cell(cell)
    file = board.folder / "lora" / cell.name / "result.json"
    del trained["settings"]["moe"]["lora_dropout"]
    file.write_text(json.dumps(trained))
    assert train_cell(cell) == trained
    other = dataclasses.replace(cell, moe=dataclasses.replace(cell.moe, lora_dropout=0.5))
    with pytest.raises(ValueError, match=r"lora_dropout = 0\.0, the comparison has 0\.5"):
        train_cell(other)


@pytest.mark.parametrize(("most", "failure"), [(3, "rows to choose by"), (1, "1 steps in a row")])
def test_a_run_that_is_not_finite_costs_its_cell_and_not_the_board(write_board, most, failure):
    train = {"max_steps": 3, "batch_size": 2, "max_nonfinite_steps": most}
    file = write_board(rates=[1e-3, 1e30], scales=[2], seeds=[0], run={"train": train})
    board = load_board(file, [])
    first, _ = compare(board)
    assert first.grid[(1e30, 2)] == math.inf
    assert first.choice == Choice(1e-3, 2, first.grid[(1e-3, 2)], False)
    result = json.loads((board.folder / "lora" / "1e+30-2-seed0" / "result.json").read_text())
    assert (result["loss"], failure in result["failure"]) == (None, True)


def test_more_rates_go_on_from_what_is_there(board, write_board, monkeypatch):
    compare(board)
    trained = set(results(board, "result.json"))
    larger = load_board(write_board(rates=[1e-3, 1e-2, 1e-4]), [])
    compare(larger)
    assert set(results(larger, "result.json")) > trained


def test_equal_time_trains_as_many_steps_as_the_first_method_has_time_for(write_board, monkeypatch):
    seconds = {"lora": 2.0, "uniform": 3.0}
    monkeypatch.setattr(cells, "_step_seconds", lambda folder: seconds[folder.parent.name])
    board = load_board(write_board(equal_time=True, rates=[1e-3], scales=[2]), [])
    first, second = compare(board)
    assert (first.timed_steps, second.timed_steps) == (3, 2)
    assert first.timed is first.scores
    runs = {path.name for path in (board.folder / "uniform").glob("*-2steps")}
    assert runs == {"0.001-2-seed0-2steps", "0.001-2-seed1-2steps"}
    assert second.timed != second.scores


# Several processes

LONG = {"train": {"max_steps": 100_000, "batch_size": 2, "save_steps": 100_000}}


def test_processes_train_and_score_what_one_after_another_does(write_board):
    one = compare(load_board(write_board(name="one"), []))
    two = compare(load_board(write_board(name="two", processes=2), []))
    assert [(method.grid, method.choice, method.scores) for method in two] == [
        (method.grid, method.choice, method.scores) for method in one
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_every_process_and_each_run_saves_itself(write_board, number):
    file = write_board(name="long", processes=2, run=LONG)
    command = [sys.executable, "run.py", "compare", "--config", file]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=nowhere, start_new_session=True)
    board = load_board(file, [])
    begun = board.folder / "lora"
    try:
        while len(list(begun.glob("*/metrics.jsonl"))) < 2:  # both are at their steps
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=120)
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        deadline = time.monotonic() + 90
        with contextlib.suppress(ProcessLookupError):  # no process of its session is left
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        assert time.monotonic() < deadline
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list(begun.glob("*/checkpoint-*"))) >= 2
    with lock_folder(board.folder):
        pass


def test_runs_beside_each_other_are_not_timed(write_board):
    with pytest.raises(ValueError, match="processes is 2, but must be 1 with equal_time"):
        load_board(write_board(processes=2, equal_time=True), [])


# Parts


def test_a_scale_gives_every_expert_so_many_times_its_own_rank_as_alpha(board):
    moe = MoELoraConfig(num_experts=3, r=4, expert_ranks=[9, 2, 2], rank_pattern={"q_proj": 3})
    run = replace(board.methods[0].run, moe=moe)
    scaled = board.cell(Method("unequal", run, [], []), 1e-3, 16, 0).moe
    assert scaled.lora_alpha == 64
    assert scaled.expert_alphas == [144, 32, 32]
    assert scaled.alpha_pattern == {"q_proj": 48}


def test_a_seed_draws_rows_only_where_that_is_asked_for(board):
    method = board.methods[0]
    assert board.cell(method, 1e-3, 2, 7).data.seed == 0
    drawing = board._replace(
        config=replace(
            board.config,
            seed_rows=True,
            run=replace(board.config.run, data=DataConfig()),
        )
    )
    assert drawing.cell(method, 1e-3, 2, 7).data.seed == 7


def test_rows_to_choose_by_and_to_report_on_are_the_validation_rows_cut_in_two(tokenizer):
    rows = TokenizedSet("rows", "validation")
    for number in range(5):
        rows.append([1, number], [10 + number, 2])
    (chosen,), (reported,) = (
        rows_to_choose_by([rows]),
        rows_to_report_on([rows], tokenizer, DataConfig(), 3),
    )
    firsts = [[part[i]["input_ids"][1] for i in range(len(part))] for part in (chosen, reported)]
    assert firsts == [[0, 2, 4], [1, 3]]
    assert chosen[1] == rows[2]
    alone = TokenizedSet("rows", "validation")
    alone.append([1], [2])
    with pytest.raises(ValueError, match="'rows' has 1 validation row"):
        rows_to_choose_by([alone])


def test_skills_are_reported_on_tasks_of_their_test_split(tokenizer):
    validation = TokenizedSet("skill/sql", "validation")
    assert rows_to_choose_by([validation]) == [validation]
    (tests,) = rows_to_report_on([validation], tokenizer, DataConfig(max_length=4000), 3)
    texts = [tokenizer.decode(tests[index]["input_ids"]) for index in range(len(tests))]
    for text, task in zip(texts, generate_tasks("sql", "test", 3), strict=True):
        assert task.instruction in text
        assert task.answer in text


@pytest.mark.parametrize("shared", [0, 1])
def test_active_parameters_are_those_of_routers_shared_experts_and_the_chosen(llama, shared):
    config = MoELoraConfig(
        num_experts=4, r=2, shared_experts=shared, router_type="learned", top_k_experts=2
    )
    model = DyLoRA_MoE.from_base(llama(), config)
    matrices = sum(p.numel() for _, p in model.named_expert_parameters())
    routers = sum(p.numel() for _, p in model.router_parameters())
    seen = torch.tensor([2.0 + shared, 2.0 + shared])
    scores = {"rows": SetScore(1.0, 10, None, seen)}
    used = (2 + shared) / 4
    assert active_parameters(model, scores) == pytest.approx(routers + used * matrices)
    every = {"rows": SetScore(1.0, 10, None)}
    assert active_parameters(model, every) == routers + matrices


def test_differences_are_paired_by_seed():
    def outcome(name, losses):
        scores = [{"loss": loss, "passed": 1, "answers": 4} for loss in losses]
        return Outcome(name, 1, Choice(1, 1, 1.0, True), {}, 1.0, scores, None, None)

    first, one = outcome("first", [1.0, 2.0, 4.0]), outcome("one", [0.9, 1.91, 3.89])
    found = compare_measure(one, first, one.scores, first.scores, "loss")
    assert found.mean_difference == pytest.approx(-0.1)
    assert found.verdict == "better"  # though each varies by 1.5 over seeds
    passes = compare_measure(one, first, one.scores, first.scores, "passed")
    assert (passes.mean, passes.verdict) == (0.25, "no difference shown")
    failed = outcome("failed", [1.0, None, 2.0])
    found = compare_measure(failed, first, failed.scores, first.scores, "loss")
    assert (found.value, found.verdict) == (None, "a run failed")


# Files


def test_settings_are_overridden_on_the_command_line(write_board):
    board = load_board(write_board(), ["run.train.max_steps=5", "name=longer", "seeds=3, 4"])
    assert (board.folder.name, board.config.seeds) == ("longer", [3, 4])
    assert {method.run.train.max_steps for method in board.methods} == {5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {"max_steps": 9}},
            "cannot set train.max_steps, only moe and, of train, router_",
        ),
        ({"data": {"seed": 1}}, "a method cannot set data, only moe"),
        ({"moe": {"lora_alpha": 3}}, "moe.lora_alpha cannot be set here: scales says it"),
        ({"moe": {"rank": 3}}, "unknown key moe.rank; it is moe.r here"),
        ({"name": None}, "name is None, but must name the method"),
        ({"name": "lora"}, "methods are named lora, lora: names must differ"),
    ],
)
def test_a_method_that_would_not_be_comparable_is_refused(write_board, tmp_path, change, message):
    file = write_board()
    (tmp_path / "uniform.yaml").write_text(yaml.safe_dump({**UNIFORM, **change}))
    with pytest.raises(ValueError, match=message):
        load_board(file, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.eval.load_best_at_end=true", "run.eval.load_best_at_end does not fit a comparison"),
        ("run.train.early_stopping_patience=1", "early_stopping_patience does not fit"),
        ("run.train.lr_scheduler_type=greedy", "lr_scheduler_type greedy does not fit"),
        ("run.train.learning_rate=1", "run.train.learning_rate cannot be set here: rates says it"),
        ("scales=2, 2", r"scales of methods\[0\] are \[2, 2\], but must be different"),
        ("seeds=", r"seeds is \[\], but must be different numbers"),
        ("grid_seeds=3", r"grid_seeds is 3, but must be at most the number of seeds \(2\)"),
        ("seed_rows=true", "seed_rows is True, but must be false with rows: rows that one seed"),
        ("ratess=1", "unknown key ratess; did you mean rates"),
    ],
)
def test_settings_that_would_make_a_comparison_unfair_are_refused(write_board, override, message):
    with pytest.raises(ValueError, match=message):
        load_board(write_board(), [override])


def test_a_comparison_needs_two_methods_and_for_equal_time_a_number_of_steps():
    with pytest.raises(ValueError, match="methods is 0, but must be a list of two or more"):
        CompareConfig(equal_time=False)
