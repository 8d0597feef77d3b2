"""The data report: what prepare found, used and left out, for people (docs/data.md shows one)."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from stagetune_api.base import ApiModel
from stagetune_trainer.data.mapping import ColumnMapping

MAX_LISTED_ROWS = 1000
"""Dropped rows that the report lists; all of them are counted."""


class DroppedRow(ApiModel):
    """A row that is not used."""

    file: str
    """file of the source that holds it."""
    row: int
    """row: line (JSONL, CSV) or number (JSON, Parquet) in that file, from 1."""
    reason: str
    """reason why it is not used."""

    def __str__(self) -> str:
        return f"{self.file}:{self.row} {self.reason}"


class SourceReport(ApiModel):
    """What became of the rows of one source."""

    files: list[str]
    """files that were read."""
    rows_read: int
    """rowsRead, blank lines left out."""
    rows_used: int
    """rowsUsed for training or validation."""
    rows_dropped: int
    """rowsDropped, each with a reason."""
    rows_truncated: int
    """rowsTruncated to maxLength; they are used."""
    dropped: Annotated[list[DroppedRow], Field(max_length=MAX_LISTED_ROWS)]
    """dropped lists the first rows that were dropped."""


class LengthBucket(ApiModel):
    """Rows of about one length."""

    up_to: int
    """upTo this many tokens, and more than the bucket before."""
    rows: int
    """rows in the bucket."""


class SplitReport(ApiModel):
    """Sizes of the rows of one split, in tokens, padding left out."""

    rows: int
    """rows of the split."""
    tokens: int
    """tokens of all rows."""
    answer_tokens: int
    """answerTokens: those with a loss."""
    mean_tokens: float
    """meanTokens of a row."""
    mean_answer_tokens: float
    """meanAnswerTokens of a row."""
    max_tokens: int
    """maxTokens: length of the longest row."""
    lengths: list[LengthBucket]
    """lengths of the rows; bucket borders are powers of two."""


class SamplePiece(ApiModel):
    """A part of a rendered row."""

    text: str
    """text of the part."""
    learned: bool
    """learned says whether the loss is computed on it."""


class Sample(ApiModel):
    """The first row that is used, as the model sees it."""

    file: str
    """file of the source that holds it."""
    row: int
    """row in that file."""
    pieces: list[SamplePiece]
    """pieces of the row, in order."""


class TemplateReport(ApiModel):
    """The chat template that rendered the rows."""

    digest: str
    """digest: sha256 of the template's text."""
    end_of_turn: str
    """endOfTurn is the token that ends an answer; it is learned."""


class DataReport(ApiModel):
    """The file `data-report.json`."""

    mapping: ColumnMapping | None
    """mapping of the data's columns; absent where no row could be read."""
    template: TemplateReport
    """template that rendered the rows."""
    sources: dict[str, SourceReport]
    """sources of rows: `dataset`, and `validation` where it has a source of its own."""
    splits: dict[str, SplitReport]
    """splits: train, validation and, where there is one, general. Empty where prepare failed."""
    duplicates: int
    """duplicates: validation questions that occur in the training rows too."""
    warnings: list[str]
    """warnings in words."""
    sample: Sample | None
    """sample: the first row that is used, with its loss mask."""


class SourceCounter:
    """Counts what becomes of the rows of one source."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.rows_read = 0
        self.rows_dropped = 0
        self.rows_truncated = 0
        self.dropped: list[DroppedRow] = []

    def drop(self, file: str, row: int, reason: str) -> None:
        """Count a row that is not used."""
        self.rows_dropped += 1
        if len(self.dropped) < MAX_LISTED_ROWS:
            self.dropped.append(DroppedRow(file=file, row=row, reason=reason))

    def report(self) -> SourceReport:
        """Return the counts."""
        return SourceReport(
            files=self.files,
            rows_read=self.rows_read,
            rows_used=self.rows_read - self.rows_dropped,
            rows_dropped=self.rows_dropped,
            rows_truncated=self.rows_truncated,
            dropped=self.dropped,
        )


class SplitCounter:
    """Counts the rows and tokens of one split."""

    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0
        self.answer_tokens = 0
        self.max_tokens = 0
        self._buckets: dict[int, int] = {}

    def add(self, tokens: int, answer_tokens: int) -> None:
        """Count a row of `tokens` tokens."""
        self.rows += 1
        self.tokens += tokens
        self.answer_tokens += answer_tokens
        self.max_tokens = max(self.max_tokens, tokens)
        up_to = 1 << (tokens - 1).bit_length()
        self._buckets[up_to] = self._buckets.get(up_to, 0) + 1

    def report(self) -> SplitReport:
        """Return the counts."""
        rows = max(self.rows, 1)
        return SplitReport(
            rows=self.rows,
            tokens=self.tokens,
            answer_tokens=self.answer_tokens,
            mean_tokens=round(self.tokens / rows, 2),
            mean_answer_tokens=round(self.answer_tokens / rows, 2),
            max_tokens=self.max_tokens,
            lengths=[
                LengthBucket(up_to=up_to, rows=count)
                for up_to, count in sorted(self._buckets.items())
            ],
        )
