"""Tokenised rows on the volume: written once by prepare, memory-mapped by every later task.

The files are Arrow streams: any Arrow library opens them, `datasets.Dataset.from_file` too. Equal
rows give equal bytes (fixed batches, no time stamps), so the artifact's digest stands for the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

DATA_DIRECTORY = "data"
"""Folder of the tokenised rows below `<run>/prepare`."""
ROWS_FILE = "rows.arrow"
_ROWS_PER_BATCH = 256

Tokens = NDArray[np.int32]


class Split(StrEnum):
    """What rows are for; the name of their folder."""

    TRAIN = "train"
    VALIDATION = "validation"
    GENERAL = "general"
    REPLAY = "replay"


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One tokenised row."""

    input_ids: Sequence[int] | Tokens
    """Token ids."""
    labels: Sequence[int] | Tokens
    """The token's id where it is learned, -100 elsewhere."""
    file: str
    """File of the source that the row comes from."""
    row: int
    """Its line or number in that file, from 1."""
    prompt_ids: Sequence[int] | Tokens = field(default_factory=list)
    """Token ids before the last answer; for validation."""
    question: str = ""
    """Text of the last user turn; for validation."""
    reference: str = ""
    """Text of the last answer; for validation."""


_TOKENS = pa.list_(pa.int32())
_FIELDS: Mapping[str, Any] = {
    "input_ids": _TOKENS,
    "labels": _TOKENS,
    "file": pa.string(),
    "row": pa.int64(),
}
_QUESTION_FIELDS: Mapping[str, Any] = {
    "prompt_ids": _TOKENS,
    "question": pa.string(),
    "reference": pa.string(),
}
_TOKEN_COLUMNS = frozenset({"input_ids", "labels", "prompt_ids"})


def rows_path(directory: Path, split: Split) -> Path:
    """Return where the rows of `split` lie in the artifact's folder."""
    return directory / split.value / ROWS_FILE


class RowWriter:
    """Writes rows to an Arrow file, a batch at a time; a context manager."""

    def __init__(self, path: Path, *, with_questions: bool) -> None:
        """`with_questions` says whether `prompt_ids`, `question` and `reference` are kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {**_FIELDS, **(_QUESTION_FIELDS if with_questions else {})}
        self._schema = pa.schema(list(fields.items()))
        self._names = list(fields)
        self._waiting: list[StoredRow] = []
        self._writer = pa.ipc.new_stream(str(path), self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def write(self, row: StoredRow) -> None:
        """Append `row`."""
        self._waiting.append(row)
        if len(self._waiting) == _ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            columns = [self._column(name) for name in self._names]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
            self._waiting = []

    def _column(self, name: str) -> Any:
        values = [getattr(row, name) for row in self._waiting]
        if name in _TOKEN_COLUMNS:
            return _token_lists(values)
        return pa.array(values, self._schema.field(name).type)


class RowReader(Sequence[StoredRow]):
    """The rows of one file by index, read from the disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            self._batches = [_Batch(batch) for batch in stream]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        lengths = [np.diff(batch.tokens["input_ids"].offsets) for batch in self._batches]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[StoredRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """Return the row at `index`; its token arrays are views of the file."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        return batch.row(index - (int(self._ends[number]) - batch.num_rows))


class _TokenColumn:
    """A column of token lists as numpy arrays.

    Made from Arrow's buffers, since Arrow's own conversion imports pandas, at 1.5 s a process.
    """

    def __init__(self, column: Any) -> None:
        self.offsets = np.frombuffer(column.buffers()[1], np.int32)[: len(column) + 1]
        """Where each row begins in `values`, and where the last one ends."""
        data = column.values.buffers()[1]
        self.values: Tokens = np.frombuffer(data, np.int32) if data else np.zeros(0, np.int32)

    def row(self, position: int) -> Tokens:
        return self.values[self.offsets[position] : self.offsets[position + 1]]


class _Batch:
    """Rows that were written together."""

    def __init__(self, batch: Any) -> None:
        self.num_rows: int = batch.num_rows
        self.tokens: dict[str, _TokenColumn] = {}
        self._others: dict[str, Any] = {}
        for name in batch.schema.names:
            if name in _TOKEN_COLUMNS:
                self.tokens[name] = _TokenColumn(batch.column(name))
            else:
                self._others[name] = batch.column(name)

    def row(self, position: int) -> StoredRow:
        values: dict[str, Any] = {
            name: column[position].as_py() for name, column in self._others.items()
        }
        values |= {name: column.row(position) for name, column in self.tokens.items()}
        return StoredRow(**values)


def _token_lists(lists: Sequence[Sequence[int] | Tokens]) -> Any:
    """Return `lists` as an Arrow array of int32 lists."""
    values = np.concatenate([np.asarray(tokens, np.int32) for tokens in lists])
    ends = np.cumsum([len(tokens) for tokens in lists])
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(_int32_array(offsets), _int32_array(values))


def _int32_array(values: NDArray[np.int32]) -> Any:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
