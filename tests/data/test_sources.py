import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from dylora.data.readers import read_records
from dylora.data.sources import MAX_PROBLEMS, mbpp_split, read_source
from dylora.run_config import SourceConfig
from published import CODE_ALPACA, MBPP, needs_published_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Sets of the hub go through the cache of `datasets`: not the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def own_source(path, **settings) -> SourceConfig:
    columns = {"instruction_column": "question", "output_column": "answer"}
    return SourceConfig(
        name="own", path=path if isinstance(path, list) else str(path), **(columns | settings)
    )


def write_lines(path: Path, lines: list) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def texts(read, split: str) -> list[tuple[str, str, str]]:
    rows = read.rows.select(read.splits[split])
    return list(zip(rows["instruction"], rows["input"], rows["output"], strict=True))


# Reading


@needs_published_rows
def test_code_alpaca_has_two_empty_answers_and_6550_rows():
    read = read_source(SourceConfig(name="code_alpaca", path=CODE_ALPACA))
    assert (read.counts.read, read.counts.empty, read.counts.malformed, read.counts.duplicates) == (
        6552,
        2,
        0,
        0,
    )
    assert {split: len(rows) for split, rows in read.splits.items()} == {
        "train": 5895,
        "validation": 655,
    }
    place = read.counts.problems[0].split(": ")[0]
    file, line = place.rsplit(":", 1)
    following = Path(file).read_text().splitlines()[int(line) - 1 :]
    assert following[0] == "{"
    assert following[3] == '"output": ""'


@needs_published_rows
def test_published_mbpp_split_has_374_90_500_10():
    split = mbpp_split("published")
    assert {name: len(ids) for name, ids in split.items()} == {
        "train": 374,
        "validation": 90,
        "test": 500,
        "prompt": 10,
    }
    read = read_source(SourceConfig(name="mbpp", path=MBPP))
    assert read.counts.read == 974
    ids = read.rows["id"]
    assert [int(ids[i]) for i in read.splits["train"]] == list(range(601, 975))
    assert [int(ids[i]) for i in read.splits["validation"]] == list(range(511, 601))


@needs_published_rows
def test_mbpp_code_has_unix_line_ends_and_the_prompt_its_first_test():
    read = read_source(SourceConfig(name="mbpp", path=MBPP))
    assert not any("\r" in code for code in read.rows["output"])
    assert "\n" in read.rows[0]["output"]
    assert "assert min_cost(" in read.rows[0]["instruction"]


def test_the_70_10_20_split_covers_every_task_once():
    split = mbpp_split("70/10/20", seed=3)
    assert {name: len(ids) for name, ids in split.items()} == {
        "train": 682,
        "validation": 97,
        "test": 195,
    }
    assert sorted(itertools.chain(*split.values())) == list(range(1, 975))
    assert split == mbpp_split("70/10/20", seed=3)
    assert split != mbpp_split("70/10/20", seed=4)


@needs_published_rows
def test_mbpp_from_the_hub_gives_the_same_rows_as_from_the_file(monkeypatch):
    from datasets import Dataset, DatasetDict

    lines = Path(MBPP).read_text().split("\n")
    tasks = [json.loads(line) for line in lines if line]
    tables = DatasetDict(
        {
            name: Dataset.from_list([tasks[i - 1] for i in ids])
            for name, ids in mbpp_split("published").items()
        }
    )
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **options: asked.append((args, options)) or tables
    )
    hub = read_source(SourceConfig(name="mbpp", revision="abc", split="70/10/20"), seed=1)
    local = SourceConfig(name="mbpp", path=MBPP, split="70/10/20")
    file = read_source(local, seed=1)
    options = {"revision": "abc", "streaming": False}
    assert asked == [(("google-research-datasets/mbpp", "full"), options)]
    for split in ("train", "validation"):
        assert sorted(texts(hub, split)) == sorted(texts(file, split))


def test_a_hub_set_is_read_from_its_train_split_alone(monkeypatch):
    from datasets import Dataset, DatasetDict

    tables = {
        "test": rows_of(3),
        "train": [{**row, "more": 1} for row in rows_of(20)],
    }
    tables = DatasetDict({name: Dataset.from_list(rows) for name, rows in tables.items()})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: tables)
    read = read_source(own_source("someone/something"))
    assert read.counts.read == 20
    assert read.path == "someone/something"


@pytest.mark.parametrize("kind", ["json", "jsonl", "lines.json", "parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, kind):
    from datasets import Dataset

    file, rows = tmp_path / f"rows.{kind}", rows_of(30)
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(file, rows)
    read = read_source(own_source(file))
    found = texts(read, "train") + texts(read, "validation")
    assert sorted(found) == sorted((row["question"], "", row["answer"]) for row in rows)
    assert (len(read.splits["train"]), len(read.splits["validation"])) == (27, 3)


def test_broken_lines_are_reported_with_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in rows_of(10)]
    bad = {
        3: (b'{"question": "x", "answer"', "not JSON"),
        5: (b'{"question": "x", "answer": [4]}', "'answer' is of type list, not text"),
        6: (b'["x", "y"]', "of type list, not an object"),
        7: (b'{"question": "x"}', "no 'answer'"),
        9: (b'{"question": "\xff", "answer": "y"}', "not UTF-8"),
        10: (b'{"question": "\\ud800", "answer": "y"}', "surrogate"),
        11: (b'{"question": null, "answer": "y"}', "'question' is of type NoneType"),
        12: (b"[" * 100_000, "not JSON"),
        13: (b'{"question": " \\n", "answer": "y"}', "the instruction is empty"),
        14: (b'{"question": "x", "answer": "  "}', "the answer is empty"),
    }
    lines, rest = [], iter(good)
    for number in range(1, 16):
        lines.append(bad[number][0] if number in bad else b"" if number == 4 else next(rest))
    file.write_bytes(b"\n".join(lines))
    read = read_source(own_source(file))
    assert len(read.counts.problems) == len(bad)
    for problem, (number, (_, why)) in zip(read.counts.problems, bad.items(), strict=True):
        assert problem.startswith(f"{file}:{number}: ")
        assert why in problem
    assert (read.counts.malformed, read.counts.empty) == (8, 2)
    assert read.counts.read == 14  # a blank line is no row
    assert len(read.rows) == 4


def test_rows_of_an_array_are_reported_with_their_true_line(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(
        '[\n{"question": "a\\nb", "answer": "b"},\n\n {"question":\n 1, "answer": "c"}, 7,\n'
        '{"question": "d", "answer": "e"}]\n'
    )
    read = read_source(own_source(file))
    assert read.counts.problems == (
        f"{file}:4: 'question' is of type int, not text",
        f"{file}:5: of type int, not an object",
    )


@pytest.mark.parametrize("end", ['\n{"question": "x" ', " {}]", "]]"])
def test_an_array_that_breaks_off_is_an_error_with_its_line(tmp_path, end):
    file = tmp_path / "rows.json"
    file.write_text('[{"question": "a", "answer": "b"}\n' + end)
    with pytest.raises(ValueError, match=r"rows\.json:\d: not JSON"):
        read_source(own_source(file))


def test_a_byte_order_mark_is_no_problem(tmp_path):
    for name in ("rows.json", "rows.jsonl"):
        lines = json.dumps(rows_of(4)) if name == "rows.json" else ""
        lines = lines or "\n".join(json.dumps(row) for row in rows_of(4))
        (tmp_path / name).write_text(lines, encoding="utf-8-sig")
        assert read_source(own_source(tmp_path / name)).counts.malformed == 0


def test_parquet_rows_are_reported_with_their_row(tmp_path):
    from datasets import Dataset

    file = tmp_path / "rows.parquet"
    rows = [*rows_of(3), {"question": None, "answer": "b"}, {"question": "c", "answer": " "}]
    Dataset.from_list(rows).to_parquet(str(file))
    read = read_source(own_source(file))
    assert read.counts.problems == (
        f"{file}:4: 'question' is of type NoneType, not text",
        f"{file}:5: the answer is empty",
    )


def test_parquet_columns_of_lists_structs_and_repeated_texts_are_read_as_they_were_written(
    tmp_path,
):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = [
        {
            "question": f"question {row % 7}",
            "answer": None if row % 5 == 0 else "é" * row,
            "tests": ["a", f"{row}", None][: row % 4],
            "more": {"name": str(row % 3), "number": row / 2, "flag": bool(row % 2)},
            "number": row,
        }
        for row in range(3000)
    ]
    file = tmp_path / "rows.parquet"
    write_table(pa.Table.from_pylist(rows), file, row_group_size=700)
    columns = ["tests", "question", "more", "answer", "number"]
    read = list(read_records(str(file), None, columns=columns))
    assert [record.fields for record in read] == rows
    assert [list(record.fields) for record in read] == [columns] * 3000
    assert read[2999].location == f"{file}:3000"


def test_a_text_of_more_than_a_line_may_have_costs_its_parquet_row_alone(tmp_path):
    from datasets import Dataset

    file = tmp_path / "rows.parquet"
    vast = {"question": random.Random(0).randbytes(9 << 20).hex(), "answer": "b"}
    rows = [*rows_of(2), vast, *rows_of(40)[2:], vast, vast, vast]
    Dataset.from_list(rows).to_parquet(str(file))
    read = read_source(own_source(file))
    assert (read.counts.read, read.counts.malformed, len(read.rows)) == (44, 4, 40)
    assert read.counts.problems[0] == f"{file}:3: longer than 16,777,216 bytes"


def test_the_list_of_problems_is_short_and_the_count_is_true(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [*rows_of(5), *["{"] * 100])
    read = read_source(own_source(file))
    assert read.counts.malformed == 100
    assert len(read.counts.problems) == MAX_PROBLEMS


def test_a_null_or_missing_input_is_an_empty_one(tmp_path):
    rows = [{**row, "more": None} for row in rows_of(5)] + [
        {"question": "q", "answer": "a"},
        {"question": "r", "answer": "a", "more": "m"},
    ]
    read = read_source(own_source(write_lines(tmp_path / "r.jsonl", rows), input_column="more"))
    assert read.counts.malformed == 0
    assert read.rows["input"][5:] == ["", "m"]


def test_duplicates_count_once(tmp_path):
    rows = [
        *rows_of(10),
        {"question": " What is 3 + 1?\r\n", "answer": "4\n"},
        *rows_of(2),
    ]
    read = read_source(own_source(write_lines(tmp_path / "rows.jsonl", rows)))
    assert read.counts.duplicates == 3
    assert len(read.rows) == 10


# Splits


def test_answers_to_one_question_lie_on_the_same_side(tmp_path):
    rows = [
        {"question": row["question"], "answer": f"{row['answer']} by way {way}"}
        for row in rows_of(50)
        for way in range(3)
    ]
    read = read_source(own_source(write_lines(tmp_path / "rows.jsonl", rows)))
    train, validation = ({text[0] for text in texts(read, s)} for s in ("train", "validation"))
    assert (len(train), len(validation)) == (45, 5)
    assert not train & validation


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    rows = rows_of(200)
    first = read_source(own_source(write_lines(tmp_path / "a.jsonl", rows)), seed=1)
    random.Random(0).shuffle(rows)
    shuffled = read_source(own_source(write_lines(tmp_path / "b.jsonl", rows)), seed=1)
    other = read_source(own_source(tmp_path / "b.jsonl"), seed=2)
    assert set(texts(first, "validation")) == set(texts(shuffled, "validation"))
    assert set(texts(first, "validation")) != set(texts(other, "validation"))
    assert len(texts(other, "validation")) == 20


# Skills


@pytest.fixture
def stub_tasks(monkeypatch):
    asked = []

    def generate_tasks(skill, split, count, seed=0):
        asked.append((skill, split, count, seed))
        return [
            SimpleNamespace(instruction=f"{skill} {split} {i}", answer=f"{seed}")
            for i in range(count)
        ]

    monkeypatch.setattr("dylora.tasks.generate_tasks", generate_tasks)
    return asked


def test_a_skill_trains_on_its_train_split_and_validates_on_its_validation_split(stub_tasks):
    read = read_source(SourceConfig(name="skill/sql"), seed=7)
    assert stub_tasks == [("sql", "train", 2000, 7), ("sql", "validation", 200, 7)]
    for split, count in (("train", 2000), ("validation", 200)):
        assert texts(read, split) == [(f"sql {split} {i}", "", "7") for i in range(count)]


def test_a_skill_makes_as_many_rows_as_asked(stub_tasks):
    read = read_source(SourceConfig(name="skill/sql", rows=30), skill_validation_rows=12)
    assert {split: len(rows) for split, rows in read.splits.items()} == {
        "train": 30,
        "validation": 12,
    }


def test_an_unknown_skill_names_the_nearest():
    with pytest.raises(ValueError, match="'strings'"):
        read_source(SourceConfig(name="skill/string"))


# Errors


def test_errors_of_paths_say_what_to_do(tmp_path):
    (tmp_path / "rows.doc").write_text("a,b\n")
    for path, message in [
        (tmp_path / "none.jsonl", "does not exist"),
        (
            tmp_path / "rows.doc",
            r"unknown type; known are \.json, \.jsonl, \.csv, \.tsv, \.txt, \.parq",
        ),
        (tmp_path, "is a folder without a file that can be read"),
        (str(tmp_path / "*.jsonl"), "fits no file"),
        ([], "list of paths is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_source(own_source(path))


def test_a_hub_set_that_cannot_be_loaded_is_one_clear_error(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"'sahil2801/CodeAlpaca-20k' .* no route.* local file"):
        read_source(SourceConfig(name="code_alpaca"))


def test_a_broken_parquet_file_is_a_clear_error(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_source(own_source(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_column_names_the_nearest(tmp_path, kind):
    from datasets import Dataset

    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows_of(3)).to_parquet(str(file))
    else:
        write_lines(file, rows_of(3))
    with pytest.raises(ValueError, match=r"no column 'answers'; did you mean 'answer'"):
        read_source(own_source(file, output_column="answers"))
    with pytest.raises(ValueError, match="no column 'more'"):
        read_source(own_source(file, input_column="more"))


def test_a_file_without_a_usable_row_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no usable row: 2 read, 2 malformed(.|\n)*:1: not JSON"):
        read_source(own_source(write_lines(tmp_path / "bad.jsonl", ["{", "{"])))
    with pytest.raises(ValueError, match="no usable row: 0 read"):
        read_source(own_source(write_lines(tmp_path / "none.jsonl", [])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "code_alpca"}, "did you mean 'code_alpaca'"),
        ({"name": "code_alpaca", "split": "published"}, "must be two shares such as 90/10"),
        ({"name": "mbpp", "split": "90/10"}, "mbpp has published and 70/10/20"),
        ({"name": "mbpp", "output_column": "code"}, "output_column does not apply"),
        ({"name": "skill/sql", "path": "x.jsonl"}, "path does not apply"),
        ({"name": "mbpp", "rows": 5}, "rows does not apply"),
    ],
)
def test_settings_that_mean_nothing_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        read_source(SourceConfig(**settings))


def test_mbpp_rows_without_a_task_id_or_a_test_are_malformed(tmp_path):
    good = {"task_id": 700, "text": "Add", "code": "x", "test_list": ["assert x"]}
    bad = [{"task_id": 975}, {"task_id": True}, {"task_id": "7"}, {"test_list": []}]
    file = write_lines(tmp_path / "mbpp.jsonl", [good, *({**good, **other} for other in bad)])
    read = read_source(SourceConfig(name="mbpp", path=str(file)))
    assert read.counts.malformed == 4
    assert len(read.rows) == 1


@pytest.mark.parametrize("name", ["", "a\u00a0b", "a\u3000b", "a\u200cb", "a\nb", "a" * 513])
def test_a_name_that_no_checkpoint_takes_is_refused(name):
    with pytest.raises(ValueError, match=r"name is .*, but must be 1 to 512 printable characters"):
        SourceConfig(name=name)
