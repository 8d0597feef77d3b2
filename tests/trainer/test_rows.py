"""Reading rows: every format, and what is wrong said with file and line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stagetune_trainer.data import json_stream
from stagetune_trainer.data.rows import (
    TRAINING_WORDS,
    VALIDATION_WORDS,
    Row,
    list_row_files,
    read_rows,
)
from stagetune_trainer.errors import UserError
from stagetune_trainer.sources import Source, SourceKind

SOURCE = Source(uri="file://./rows", path="spec.dataset.source", kind=SourceKind.ROWS)
ROWS = [{"question": f"Q{index}", "answer": f"A{index}"} for index in range(5)]


def _read(path: Path) -> list[Row]:
    return list(read_rows(SOURCE, path, list_row_files(SOURCE, path, TRAINING_WORDS)))


def _columns(path: Path) -> list[Any]:
    return [row.columns for row in _read(path)]


def _write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def _write_json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


def _write_json_data(path: Path) -> None:
    path.write_text(json.dumps({"version": [1, {"a": "]"}], "data": ROWS, "more": 1}))


def _write_csv(path: Path) -> None:
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def _write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "first_number"),
    [
        ("rows.jsonl", _write_jsonl, 1),
        ("rows.json", _write_json_list, 1),
        ("rows.json", _write_json_data, 1),
        # Named .json and written as JSONL, as many published files are.
        ("rows.json", _write_jsonl, 1),
        ("rows.csv", _write_csv, 2),
        ("rows.parquet", _write_parquet, 1),
    ],
)
def test_every_format_gives_the_same_rows_with_their_numbers(
    name: str, write: Callable[[Path], None], first_number: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    assert _columns(path) == ROWS
    assert [row.number for row in _read(path)] == list(range(first_number, first_number + 5))
    assert {row.file for row in _read(path)} == {name}


def test_broken_lines_are_rows_with_a_reason_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"\n\n" + b'{"question": \n' + b"[1]\n" + b'{"q": "\xff"}\n' + good
    )
    rows = _read(path)
    assert [(row.number, row.reason) for row in rows] == [
        (1, ""),
        (3, "is not JSON: Expecting value at column 13"),
        (4, "is a list, not an object with columns"),
        (5, "is not UTF-8 (byte 7 of the line)"),
        (6, ""),
    ]


def test_deeply_nested_json_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "\n" + json.dumps(ROWS[0]) + "\n")
    first, second = _read(path)
    assert first.columns is None
    assert second.columns == ROWS[0]


def test_csv_rows_are_numbered_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"two\nlines",A\nonly one\nQ,"say ""hi"""\n')
    rows = _read(path)
    assert [row.number for row in rows] == [2, 4, 5]
    assert rows[0].columns == {"question": "two\nlines", "answer": "A"}
    assert rows[1].reason == "has 1 values for 2 columns"
    assert rows[2].columns == {"question": "Q", "answer": 'say "hi"'}


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer\n{'x' * 200_000},A\n")
    (row,) = _read(path)
    assert row.columns is not None
    assert len(row.columns["question"]) == 200_000


@pytest.mark.parametrize(
    "text", ["", "{}", '{"data": 1}', "[1, 2", '[{"a": 1} {"b": 2}]', "nonsense", '{"data": [1,]}']
)
def test_json_that_is_no_list_of_rows_is_refused_with_the_cure(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json cannot be read as a list of rows") as caught:
        _read(path)
    assert caught.value.problems[0].path == "spec.dataset.source"


def test_json_list_is_read_across_chunk_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"n": 1234567, "text": 'äß東京\\"', "more": [True, None, -1.5e3]}] * 20
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for size in range(1, 40):
        monkeypatch.setattr(json_stream, "_CHUNK_CHARACTERS", size)
        assert list(json_stream.iterate_json(path)) == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"question": f"{index}" + "x" * 2000, "answer": "A"} for index in range(10_000)]
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            lines = [f"{row['question']},{row['answer']}\n" for row in rows]
            path.write_text("question,answer\n" + "".join(lines))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    del rows
    tracemalloc.start()
    count = sum(1 for _ in read_rows(SOURCE, path, [path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 8 << 20  # the file has 20 MB


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        _read(path)


def test_folder_is_read_in_order_of_names_without_metadata(tmp_path: Path) -> None:
    _write_csv(tmp_path / "b.csv")
    _write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    files = list_row_files(SOURCE, tmp_path, TRAINING_WORDS)
    assert [path.name for path in files] == ["a.jsonl", "b.csv"]
    assert len(_read(tmp_path)) == 10


def test_folder_with_splits_gives_the_one_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"):
        _write_parquet(tmp_path / "data" / f"{name}.parquet")
    train = list_row_files(SOURCE, tmp_path, TRAINING_WORDS)
    assert [path.name for path in train] == ["train-00000-of-00001.parquet"]
    held_out = list_row_files(SOURCE, tmp_path, VALIDATION_WORDS)
    assert [path.stem.partition("-")[0] for path in held_out] == ["test", "validation"]


def test_folder_or_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no"):
        list_row_files(SOURCE, tmp_path, TRAINING_WORDS)
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"rows\.xlsx is not one of \.jsonl"):
        list_row_files(SOURCE, tmp_path / "rows.xlsx", TRAINING_WORDS)
