"""Rows of data files, one at a time, each with the place it came from.

Comes after `sources` and before `formats`. A row that cannot be read is a row with a reason, so
that one broken line neither ends the run nor goes unnoticed.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagetune_trainer.data.json_stream import NotAListError, iterate_json
from stagetune_trainer.sources import ROW_SUFFIXES, Source

_PARQUET_BATCH_ROWS = 256
_CSV_FIELD_LIMIT = 1 << 24
"""Longest CSV field in characters; the csv module's own limit of 131,072 is below a long text."""
# Metadata that lies beside the rows in hub repositories.
_NOT_ROWS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
TRAINING_WORDS = frozenset({"train", "training"})
VALIDATION_WORDS = frozenset({"validation", "valid", "val", "dev", "eval", "test"})


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a file: its columns, or why it could not be read."""

    file: str
    """Name of the file inside its source."""
    number: int
    """Line of the file on which the row begins (JSONL, CSV), or the row's number (JSON, Parquet);
    both count from 1."""
    columns: Mapping[str, Any] | None = None
    """The row's values by column; None for a row that could not be read."""
    reason: str = ""
    """Why it could not be read."""


def list_row_files(source: Source, root: Path, words: frozenset[str]) -> list[Path]:
    """Return the files with rows: `root` itself, or those in the folder `root`, sorted by name.

    Where some names of a folder hold one of `words` (`train-00000.parquet`), only those are taken:
    a hub repository has its test rows beside the training rows. Raises UserError where there is no
    file of a known kind.
    """
    if root.is_file():
        if root.suffix.lower() not in ROW_SUFFIXES:
            raise source.error(f"{root.name} is not one of {', '.join(ROW_SUFFIXES)}; convert it")
        return [root]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in ROW_SUFFIXES
        and path.name not in _NOT_ROWS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if not files:
        raise source.error(f"the folder {root} has no {', '.join(ROW_SUFFIXES)} file")
    named = [path for path in files if words & _words(path.relative_to(root))]
    return named or files


def read_rows(source: Source, root: Path, files: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of `files`, which `list_row_files` found below `root`.

    Memory is bounded by the longest row, whatever the size of the files. Raises UserError where a
    file as a whole is not what its name says.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    for path in files:
        name = path.name if root.is_file() else path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from _read_parquet(source, path, name)
        else:
            yield from readers[suffix](source, path, name)


def read_json_lines(path: Path, name: str) -> Iterator[Row]:
    """Yield the JSON objects of a file with one on each line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if content:
                yield _parse_line(content, name, number)


def _parse_line(content: bytes, name: str, number: int) -> Row:
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        reason = "is not a row: its JSON is nested too deeply"
    else:
        return _row_of(value, name, number)
    return Row(file=name, number=number, reason=reason)


def _row_of(value: object, name: str, number: int) -> Row:
    if isinstance(value, dict):
        return Row(file=name, number=number, columns=value)
    what = "null" if value is None else f"a {type(value).__name__}"
    return Row(file=name, number=number, reason=f"is {what}, not an object with columns")


def _read_jsonl(source: Source, path: Path, name: str) -> Iterator[Row]:
    return read_json_lines(path, name)


def _read_json(source: Source, path: Path, name: str) -> Iterator[Row]:
    if _holds_json_lines(path):
        yield from read_json_lines(path, name)
        return
    try:
        for number, value in enumerate(iterate_json(path), start=1):
            yield _row_of(value, name, number)
    except (NotAListError, UnicodeDecodeError) as error:
        raise source.error(
            f"{name} cannot be read as a list of rows ({error}); write [{{...}}, ...], "
            '{"data": [...]} or one object a line'
        ) from error


def _holds_json_lines(path: Path) -> bool:
    """Whether the first line is an object of its own and another one follows: JSONL by content."""
    with path.open("rb") as file:
        if not file.read(8).removeprefix(codecs.BOM_UTF8).startswith(b"{"):
            return False
        file.seek(0)
        first = file.readline(1 << 24).removeprefix(codecs.BOM_UTF8).strip()
        second = file.readline(1 << 10).strip()
    if not (first.endswith(b"}") and second.startswith(b"{")):
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _read_csv(source: Source, path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    # Bytes that are not UTF-8 become surrogates, which `formats` refuses row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, None)
        if header is None or len(set(header)) != len(header):
            raise source.error(f"{name} needs a first line with a different name for each column")
        while True:
            number = lines.line_num + 1
            try:
                values = next(lines, None)
            except csv.Error as error:
                yield Row(file=name, number=number, reason=f"is not CSV: {error}")
                continue
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(header):
                reason = f"has {len(values)} values for {len(header)} columns"
                yield Row(file=name, number=number, reason=reason)
                continue
            columns = dict(zip(header, values, strict=True))
            yield Row(file=name, number=number, columns=columns)


def _read_parquet(source: Source, path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(file=name, number=number, columns=columns)
    except pa.ArrowException as error:
        raise source.error(f"{name} cannot be read as Parquet ({error}); fetch it again") from error


def _words(path: Path) -> set[str]:
    """Return the words of a path, in lower case: `data/train-00000.parquet` has `train`."""
    return set(re.split(r"[^a-z]+", path.as_posix().lower()))
