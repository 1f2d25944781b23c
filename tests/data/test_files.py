"""Files of every kind give the same rows, and every bad row its file and line."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

import harm
from dylora.data.readers import read_records
from dylora.data.sources import read_source
from dylora.data.text_file import PART
from dylora.data_config import SourceConfig
from dylora.fields import FieldError

ROWS = [
    {"instruction": f"Say, “{n}”", "input": "", "output": f'one "quoted"\n{n}'} for n in range(20)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jsonl(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows=ROWS, delimiter=",") -> bytes:
    import csv

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8-sig")


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def source(path, **settings) -> SourceConfig:
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return SourceConfig(name="own", path=path, **settings)


def found(path, **settings) -> list[tuple[str, str]]:
    rows = read_source(source(path, **settings)).rows
    return list(zip(rows["instruction"], rows["output"], strict=True))


def saved(folder: Path, splits: bool = False) -> Path:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    (DatasetDict(train=rows, test=rows.select(range(3))) if splits else rows).save_to_disk(folder)
    return folder


FILES = {
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.jsonl": jsonl(),
    "rows.jsonl.gz": gzip.compress(jsonl()),
    "rows.jsonl.zst": zstd(jsonl()[:500]) + zstd(jsonl()[500:]),
    "rows.csv": table(),
    "rows.csv.zst": zstd(table()),
    "ROWS.TSV": table(delimiter="\t"),
}


@pytest.mark.parametrize("name", [*FILES, "rows.parquet", "saved", "splits"])
def test_every_kind_of_file_gives_the_same_rows_with_columns_that_are_found(name, tmp_path):
    file = tmp_path / name
    if name == "rows.parquet":
        write_table(pa.Table.from_pylist(ROWS), file)
    elif name in ("saved", "splits"):
        saved(file, splits=name == "splits")
    else:
        file.write_bytes(FILES[name])
    assert found(file) == [(row["instruction"], row["output"]) for row in ROWS]


def test_a_folder_a_pattern_and_a_list_stand_for_their_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.csv").write_bytes(table(ROWS[5:8]))
    (tmp_path / "1.jsonl").write_bytes(jsonl(ROWS[:5]))
    (tmp_path / "README.md").write_text("not read")
    expected = [(row["instruction"], row["output"]) for row in ROWS]
    assert found(tmp_path) == expected[:8]
    assert found(str(tmp_path / "**" / "*.csv")) == expected[5:8]
    assert found([tmp_path / "b" / "2.csv", tmp_path / "1.jsonl"]) == [
        *expected[5:8],
        *expected[:5],
    ]


def test_a_split_of_a_saved_folder_is_named(tmp_path):
    folder = saved(tmp_path / "sets", splits=True)
    assert read_source(source(folder, hub_split="test")).counts.read == 3
    with pytest.raises(ValueError, match="no split 'tets'; did you mean 'test'"):
        read_source(source(folder, hub_split="tets"))
    with pytest.raises(ValueError, match="hub_split does not apply to it; leave it out"):
        read_source(source(saved(tmp_path / "one"), hub_split="test"))


def test_every_split_of_a_saved_mbpp_is_read(tmp_path):
    from datasets import Dataset, DatasetDict, concatenate_datasets

    def tasks(ids):
        more = {"text": "Add.", "code": "x", "test_list": ["assert x"]}
        return Dataset.from_list([{"task_id": n, **more, "text": f"Add {n}."} for n in ids])

    splits = {"train": tasks(range(601, 605)), "validation": tasks(range(511, 514))}
    splits["test"] = tasks(range(11, 13))
    DatasetDict(splits).save_to_disk(tmp_path / "sets")
    concatenate_datasets(list(splits.values())).save_to_disk(tmp_path / "one")
    for name in ("sets", "one"):
        read = read_source(SourceConfig(name="mbpp", path=str(tmp_path / name)))
        assert read.counts.read == len(read.rows) == 9
        assert {name: len(rows) for name, rows in read.splits.items()} == {
            "train": 4,
            "validation": 3,
        }


def test_a_hub_set_is_asked_for_its_configuration_and_split(monkeypatch):
    from datasets import Dataset, DatasetDict

    asked = []
    tables = DatasetDict(sft=Dataset.from_list(ROWS), gen=Dataset.from_list(ROWS[:2]))
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **options: asked.append(args) or tables
    )
    assert read_source(source("a/b", hub_config="all", hub_split="sft")).counts.read == 20
    assert set(asked) == {("a/b", "all")}
    with pytest.raises(ValueError, match="no split train, but sft, gen"):
        read_source(source("a/b", hub_split="train"))


def test_hub_settings_of_local_files_are_refused(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl())
    for name in ("hub_config", "hub_split"):
        with pytest.raises(ValueError, match=f"{name} does not apply"):
            read_source(source(tmp_path / "r.jsonl", **{name: "x"}))


# Bad rows


def test_bad_rows_of_a_table_are_reported_with_their_line(tmp_path):
    file = tmp_path / "r.csv"
    lines = [b"question,answer", b'"two', b'lines",1', b"a,b,c", b'"x"y,1', b"\xff,1", b"", b"q,"]
    file.write_bytes(b"\n".join([*lines, b"last,7"]))
    read = read_source(source(file))
    assert list(read.rows["instruction"]) == ["two\nlines", "last"]
    assert [problem.removeprefix(f"{file}:") for problem in read.counts.problems] == [
        "4: has 3 fields, and there are 2 names",
        "5: not CSV: ',' expected after '\"'",
        "6: 'question' holds half a surrogate pair, which is no text",
        "8: the answer is empty",
    ]
    assert read.rows["location"][1] == f"{file}:9"


@pytest.mark.parametrize("head", [b"", b"a,a\n1,2\n"])
def test_a_table_without_names_is_refused(head, tmp_path):
    (tmp_path / "r.csv").write_bytes(head)
    with pytest.raises(ValueError, match=r"r\.csv:1: the first line has to name"):
        read_source(source(tmp_path / "r.csv"))


def test_a_long_text_is_cut_at_empty_lines_and_a_bad_part_costs_itself(tmp_path):
    file = tmp_path / "book.txt"
    chapter = b"word " * 15 + b"\n"
    chapters = [chapter * 1000 + b"\n", chapter * 900 + b"\xff\n\n", chapter * 3]
    file.write_bytes(b"".join(chapters))
    records = list(read_records(str(file), columns=["text"]))
    assert [record.location for record in records] == [f"{file}:{n}" for n in (1, 1902, 1904)]
    assert [record.problem for record in records] == ["", "not UTF-8", ""]
    assert records[0].fields["text"].encode() == chapters[0]
    file.write_bytes(chapter * 4000)  # no empty line
    parts = [record.fields["text"] for record in read_records(str(file), columns=["text"])]
    assert "".join(parts).encode() == chapter * 4000
    assert max(map(len, parts)) < 2 * PART + 100


def test_numbers_are_text_in_answers_alone(tmp_path):
    rows = [
        {"question": "a", "answer": 4},
        {"question": "b", "answer": 0.5},
        {"question": "e", "answer": float("nan")},
        {"question": "c", "answer": True},
        {"question": 5, "answer": "d"},
    ]
    (tmp_path / "r.jsonl").write_bytes(jsonl(rows))
    read = read_source(source(tmp_path / "r.jsonl"))
    assert list(read.rows["output"]) == ["4", "0.5"]
    assert [p.partition(": ")[2] for p in read.counts.problems] == [
        "'answer' is nan, which is no number",
        "'answer' is of type bool, not text",
        "'question' is of type int, not text",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_number_is_taken_as_the_file_writes_it(kind, tmp_path):
    written = ["1.50", "1e3", "-0.0", "0.10", "12", "1E-2", "0.1000000000000000055511151231257827"]
    rows = [f'{{"question": "q{n}", "answer": {number}}}' for n, number in enumerate(written)]
    text = "\n".join(rows) if kind == "jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / f"r.{kind}").write_text(text)
    assert list(read_source(source(tmp_path / f"r.{kind}")).rows["output"]) == written


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"question": "a"}\n'.encode("utf-16"), r"r\.jsonl:1: not UTF-8 at byte 1"),
        (b'{\n  "question": "a"\n}\n', r"r\.jsonl:1: not JSON: Expecting property name"),
        (b"", "no usable row: 0 read"),
        (b"[1]\n", r"r\.jsonl:1: of type list, not an object"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_and_not_that_it_lacks_columns(content, why, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_source(source(tmp_path / "r.jsonl"))


# Columns


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "a", "context": "c", "response": "b"}, "instruction"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a"}, "text"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "chat"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "chat"),
    ],
)
def test_the_columns_tell_the_format(row, kind, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl([row | {"more": 1}]))
    read = read_source(source(tmp_path / "r.jsonl"))
    assert read.format == kind
    assert read.counts.malformed == read.counts.empty == 0
    if kind == "instruction":
        assert read.rows["input"][0] == "c"


def test_columns_that_tell_nothing_are_named(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl([{"q": "a", "a": "b"}]))
    with pytest.raises(ValueError, match=r"has the columns a, q, which .* instruction_column and"):
        read_source(source(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match="output_column is missing"):
        read_source(source(tmp_path / "r.jsonl", instruction_column="q"))
    with pytest.raises(ValueError, match="messages_column does not apply to rows of text"):
        read_source(
            source(tmp_path / "r.jsonl", text_column="q", format="text", messages_column="a")
        )
    assert found(tmp_path / "r.jsonl", instruction_column="q", output_column="a") == [("a", "b")]


# Splits


def test_a_share_of_the_rows_is_held_out(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl())
    read = read_source(source(tmp_path / "r.jsonl", split="75/25"))
    assert {name: len(rows) for name, rows in read.splits.items()} == {"train": 15, "validation": 5}
    for split in ("0/100", "90", "a/b", "90/-10"):
        with pytest.raises(FieldError, match="two shares such as 95/5"):
            source("x", split=split)


def test_validation_rows_of_their_own_are_never_trained_on(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl())
    (tmp_path / "v.csv").write_bytes(table(ROWS[3:6]))
    read = read_source(source(tmp_path / "r.jsonl", validation_path=str(tmp_path / "v.csv")))
    texts = {name: set(read.rows.select(rows)["instruction"]) for name, rows in read.splits.items()}
    assert texts["validation"] == {row["instruction"] for row in ROWS[3:6]}
    assert texts["train"] == {row["instruction"] for row in [*ROWS[:3], *ROWS[6:]]}
    assert (read.counts.duplicates, read.split_scheme) == (3, "validation_path")


# Untrusted files


def _dictionary(file: Path, **options) -> None:
    texts = pa.array(["a" * 2**20])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), texts)
    rows = pa.table({"question": column, "answer": column})
    with pa.ipc.new_stream(
        str(file), rows.schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as out:
        out.write_table(rows)


def _vast(file: Path) -> None:
    rows = pa.table({"question": ["a" * 2**28], "answer": ["b"]})
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(file), rows.schema, options=packed) as out:
        out.write_table(rows)


def _broken_offsets(file: Path) -> None:
    data = bytearray(file.read_bytes())
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1].to_pybytes()[:12]
    place = bytes(data).index(offsets)
    data[place + 4 : place + 8] = (2**30).to_bytes(4, "little")
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_vast, "its batches are compressed"),
        (lambda file: _dictionary(file, compression="zstd"), "its batches are compressed"),
        (_dictionary, "expands to more than"),
        (_broken_offsets, "cannot be read as Arrow"),
        (lambda file: file.write_bytes(b"\xff" * 1000), "cannot be read as Arrow"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cannot be read as Arrow"),
        (harm.pipe, "pipe"),
        (harm.link("/dev/zero"), "out of its folder"),
    ],
)
def test_an_untrusted_saved_folder_is_refused(damage, words, tmp_path):
    from datasets import Dataset

    folder = tmp_path / "set"
    Dataset.from_list([{"question": "a", "answer": "b"}] * 2).save_to_disk(folder)
    read_source(source(folder))  # imports what takes a second
    damage(next(folder.glob("*.arrow")))
    message = harm.refusal(lambda: read_source(source(folder)), tmp_path)
    assert words in message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", 3])
def test_a_saved_folder_names_files_of_its_own_alone(name, tmp_path):
    (tmp_path / "set").mkdir()
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="is none of this folder"):
        read_source(source(tmp_path / "set"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("r.jsonl.zst", b"nonsense" * 9, "cannot be decompressed"),
        ("r.jsonl.zst", zstd(jsonl())[:-9], "cannot be decompressed"),
        ("r.csv.gz", b"nonsense" * 9, "cannot be decompressed"),
        ("r.csv", b"a,b\n" + b"x" * (17 << 20), "a line of more than"),
        ("r.json.zst", zstd(b"[" + b" " * (300 << 20)), "an array of more than"),
        ("r.parquet.gz", b"PAR1", "unknown type"),
    ],
)
def test_untrusted_compressed_and_vast_files_are_refused(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    message = harm.refusal(lambda: read_source(source(tmp_path / name)), tmp_path)
    assert words in message


def test_what_a_zstd_file_expands_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("dylora.data.unpacked.MAX_UNPACKED", 10**5)
    (tmp_path / "r.jsonl.zst").write_bytes(zstd(jsonl(ROWS * 200)))
    with pytest.raises(ValueError, match="more than 100,000 bytes once decompressed"):
        read_source(source(tmp_path / "r.jsonl.zst"))
