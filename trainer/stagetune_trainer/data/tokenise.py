"""From the rows of all sources to the tokenised splits in one folder, counting on the way.

`prepare` makes a DataWriter, lets it fill the folder that is then published, and reads the counts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stagetune_api.problems import ProblemReason
from stagetune_api.spec import DatasetSpec, TooLongPolicy
from stagetune_trainer.data.formats import BadRowError, read_turns
from stagetune_trainer.data.general import read_general_rows
from stagetune_trainer.data.mapping import ColumnMapping, find_mapping
from stagetune_trainer.data.order import Purpose, permutation
from stagetune_trainer.data.replay_text import ReplayText
from stagetune_trainer.data.report import (
    DataReport,
    Sample,
    SamplePiece,
    SourceCounter,
    SplitCounter,
    TemplateReport,
)
from stagetune_trainer.data.rows import Row, read_rows
from stagetune_trainer.data.store import RowReader, RowWriter, Split, StoredRow, Tokens, rows_path
from stagetune_trainer.data.template import IGNORED, ChatTemplate, EncodedRow, Turn
from stagetune_trainer.errors import UserError
from stagetune_trainer.sources import Source

_ROWS_FOR_MAPPING = 20
_LISTED_IN_ERROR = 20
_SHORTEST_REPLAY = 16
"""Replayed rows may always have so many tokens, however short those of the dataset are."""


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """A source with the local files that it stands for."""

    source: Source
    root: Path
    """Folder or file that the source resolved to."""
    files: Sequence[Path]
    """Files that are read, in order."""

    @property
    def names(self) -> list[str]:
        """Names of the files inside the source."""
        return [
            path.name if self.root.is_file() else path.relative_to(self.root).as_posix()
            for path in self.files
        ]


@dataclass(frozen=True, kw_only=True)
class DataInputs:
    """All that the tokenised data is made of."""

    dataset: DataFiles
    validation: DataFiles | None
    """Validation rows of their own; None where they are a fraction of the dataset."""
    general: DataFiles | None
    """Text on which forgetting is measured."""
    general_max_tokens: int
    replay: ReplayText | None = None
    """Other text that is mixed into training."""


@dataclass(kw_only=True)
class DataWriter:
    """Tokenises the inputs into a folder; the report is sound after success and failure alike."""

    inputs: DataInputs
    spec: DatasetSpec
    seed: int
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    counters: dict[str, SourceCounter] = field(default_factory=dict)
    splits: dict[Split, SplitCounter] = field(default_factory=dict)
    mapping: ColumnMapping | None = None
    sample: Sample | None = None
    training_questions: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    warnings: list[str] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Fill `directory` with one Arrow file a split.

        Raises UserError that lists the rows which cannot be used, where they are more than the
        manifest allows or nothing is left.
        """
        everything = directory / "all.arrow"
        self.mapping = self._find_mapping()
        self._write_source(self.inputs.dataset, "dataset", everything)
        rows = RowReader(everything)
        if self.inputs.validation is None:
            held_out = self._held_out(len(rows))
            train = np.setdiff1d(np.arange(len(rows)), held_out)
            self._copy(rows, train, directory, Split.TRAIN)
            self._copy(rows, held_out, directory, Split.VALIDATION)
        else:
            self._copy(rows, np.arange(len(rows)), directory, Split.TRAIN)
            self._write_source(self.inputs.validation, "validation", everything)
            validation = RowReader(everything)
            self._copy(validation, np.arange(len(validation)), directory, Split.VALIDATION)
        everything.unlink()
        self._warn_of_duplicates()
        if self.inputs.general is not None:
            self._write_general(self.inputs.general, directory)
        if self.inputs.replay is not None:
            self._write_replay(self.inputs.replay, directory)

    def report(self) -> DataReport:
        """Return what was found, used and left out so far."""
        return DataReport(
            mapping=self.mapping,
            template=TemplateReport(
                digest=self.template.digest, end_of_turn=self.template.end_of_turn
            ),
            sources={name: counter.report() for name, counter in self.counters.items()},
            splits={split.value: counter.report() for split, counter in self.splits.items()},
            duplicates=self.duplicates,
            warnings=self.warnings,
            sample=self.sample,
        )

    def _find_mapping(self) -> ColumnMapping:
        data = self.inputs.dataset
        readable = (
            row.columns
            for row in read_rows(data.source, data.root, data.files)
            if row.columns is not None
        )
        first = list(islice(readable, _ROWS_FOR_MAPPING))
        if first:
            return find_mapping(first, self.spec.format, self.spec.columns)
        counter = self.counters["dataset"] = SourceCounter(data.names)
        for row in read_rows(data.source, data.root, data.files):
            counter.rows_read += 1
            counter.drop(row.file, row.number, row.reason)
        raise _too_many_dropped(data.source, counter, "no row can be read")

    def _write_source(self, data: DataFiles, name: str, path: Path) -> None:
        """Tokenise all rows of a source into one file and check how many had to be dropped."""
        counter = self.counters[name] = SourceCounter(data.names)
        path.unlink(missing_ok=True)
        with RowWriter(path, with_questions=True) as writer:
            for row in self._encoded(data, counter):
                writer.write(row)
        if counter.rows_dropped == counter.rows_read:
            raise _too_many_dropped(data.source, counter, "no row can be used")
        if counter.rows_dropped > self.spec.max_invalid_ratio * counter.rows_read:
            allowed = f"maxInvalidRatio is {self.spec.max_invalid_ratio:g}"
            raise _too_many_dropped(data.source, counter, allowed)

    def _encoded(self, data: DataFiles, counter: SourceCounter) -> Iterator[StoredRow]:
        for row in read_rows(data.source, data.root, data.files):
            counter.rows_read += 1
            try:
                yield self._encode(row, counter)
            except BadRowError as error:
                counter.drop(row.file, row.number, str(error))

    def _encode(self, row: Row, counter: SourceCounter) -> StoredRow:
        if row.columns is None or self.mapping is None:
            raise BadRowError(row.reason)
        turns = read_turns(row.columns, self.mapping)
        encoded = self.template.encode(turns)
        if isinstance(encoded, str):
            raise BadRowError(encoded)
        encoded = self._fitted(encoded, counter)
        if self.sample is None:
            self.sample = self._sample(row, encoded)
        return _stored(row, turns, encoded)

    def _fitted(self, row: EncodedRow, counter: SourceCounter) -> EncodedRow:
        """Return `row` within maxLength; raises BadRowError where that cannot be."""
        length, limit = len(row.input_ids), self.spec.max_length
        if length <= limit:
            return row
        if self.spec.too_long is TooLongPolicy.REJECT:
            raise BadRowError(f"has {length} tokens, maxLength is {limit}")
        cut = row.cut(limit)
        if cut.num_answer_tokens == 0:
            raise BadRowError(f"has no answer token within maxLength {limit} (of {length} tokens)")
        counter.rows_truncated += 1
        return cut

    def _sample(self, row: Row, encoded: EncodedRow) -> Sample:
        pieces = [
            SamplePiece(text=piece.text, learned=piece.learned)
            for piece in self.template.describe(encoded)
        ]
        return Sample(file=row.file, row=row.number, pieces=pieces)

    def _held_out(self, count: int) -> NDArray[np.int64]:
        """Return the positions of the rows that are kept for validation, ascending."""
        fraction = self.spec.validation.fraction or 0.0
        size = max(1, round(count * fraction))
        if size >= count:
            raise UserError.at(
                "spec.dataset.validation.fraction",
                f"{fraction:g} of {count} row(s) leaves none for training; give more rows, a "
                "smaller fraction or a source of validation rows",
                ProblemReason.DOES_NOT_FIT,
            )
        return np.sort(permutation(count, self.seed, Purpose.VALIDATION_SPLIT)[:size])

    def _copy(
        self, rows: RowReader, indices: NDArray[np.int64], directory: Path, split: Split
    ) -> None:
        counter = self.splits[split] = SplitCounter()
        with_questions = split is Split.VALIDATION
        with RowWriter(rows_path(directory, split), with_questions=with_questions) as writer:
            for index in indices:
                row = rows[int(index)]
                question = _fingerprint(row.prompt_ids)
                if split is Split.TRAIN:
                    self.training_questions.add(question)
                else:
                    self.duplicates += question in self.training_questions
                _write_counted(writer, row, counter)

    def _warn_of_duplicates(self) -> None:
        if self.duplicates:
            self.warnings.append(
                f"{self.duplicates} of the validation questions occur in the training rows too; "
                "the validation loss flatters the model there"
            )

    def _write_general(self, general: DataFiles, directory: Path) -> None:
        counter = self.splits[Split.GENERAL] = SplitCounter()
        rows = read_general_rows(
            general.source,
            general.files,
            self.tokenizer,
            max_length=self.spec.max_length,
            max_tokens=self.inputs.general_max_tokens,
        )
        with RowWriter(rows_path(directory, Split.GENERAL), with_questions=False) as writer:
            for row in rows:
                _write_counted(writer, row, counter)

    def _write_replay(self, replay: ReplayText, directory: Path) -> None:
        # No row of it may need more memory than those that the plan has seen.
        longest = max(self.splits[Split.TRAIN].max_tokens, _SHORTEST_REPLAY)
        counter = self.splits[Split.REPLAY] = SplitCounter()
        with RowWriter(rows_path(directory, Split.REPLAY), with_questions=False) as writer:
            for row in replay.rows(self.tokenizer, max_length=longest):
                _write_counted(writer, row, counter)


def _stored(row: Row, turns: Sequence[Turn], encoded: EncodedRow) -> StoredRow:
    return StoredRow(
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        file=row.file,
        row=row.number,
        prompt_ids=encoded.prompt_ids,
        question=turns[-2].content,
        reference=turns[-1].content,
    )


def _fingerprint(prompt_ids: Sequence[int] | Tokens) -> bytes:
    """Return 16 bytes that stand for all that comes before an answer."""
    return hashlib.blake2b(np.asarray(prompt_ids, np.int32).tobytes(), digest_size=16).digest()


def _write_counted(writer: RowWriter, row: StoredRow, counter: SplitCounter) -> None:
    writer.write(row)
    counter.add(len(row.input_ids), int((np.asarray(row.labels) != IGNORED).sum()))


def _too_many_dropped(source: Source, counter: SourceCounter, what: str) -> UserError:
    if counter.rows_read == 0:
        return source.error(f"{', '.join(counter.files)} holds no rows", ProblemReason.INVALID)
    listed = counter.dropped[:_LISTED_IN_ERROR]
    more = counter.rows_dropped - len(listed)
    lines = [f"\n  {row}" for row in listed] + ([f"\n  and {more} more"] if more else [])
    return source.error(
        f"{counter.rows_dropped} of {counter.rows_read} rows cannot be used ({what}). Mend or "
        "remove them, raise spec.dataset.maxInvalidRatio, or, where rows are too long, raise "
        f"maxLength or set tooLong: Truncate.{''.join(lines)}",
        ProblemReason.INVALID,
    )
