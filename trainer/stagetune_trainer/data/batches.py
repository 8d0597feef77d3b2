"""Which rows a step sees, in which micro-batches.

Comes after `prepare` and before `loop`. The rows of step n follow from the seed, the stage and n
alone, so a resumed stage sees what the unbroken one would have seen, without replaying anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind, verify_artifact
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.order import Purpose, batches_by_length, cut, permutation
from stagetune_trainer.data.packing import pack
from stagetune_trainer.data.store import DATA_DIRECTORY, RowReader, Split, rows_path

_verified: dict[tuple[Path, str | None], list[tuple[str, int, int, int, int]]] = {}
"""By folder and digest, what the files were when their bytes were checked."""


def micro_batches(
    rows: RowReader,
    indices: Sequence[int],
    *,
    size: int,
    packing: bool = False,
    num_processes: int = 1,
    split: Split = Split.TRAIN,
) -> list[Batch]:
    """Return the rows of a step in micro-batches of `size` sequences, the longest ones first.

    A sequence holds one row, or with `packing` several, up to the length of the longest of all
    `rows`, and no fewer sequences than keep `num_processes` busy. How a step is split changes
    padding and rounding, and not its gradient.
    """
    ordered = _longest_first(rows, indices)
    sequences: Sequence[Sequence[int]] = [[index] for index in ordered]
    if packing:
        lengths = [int(rows.lengths[index]) for index in ordered]
        packed = pack(lengths, capacity=int(rows.lengths.max()), at_once=size * num_processes)
        sequences = [[ordered[place] for place in sequence] for sequence in packed]
    batches = []
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        chosen = [index for sequence in part for index in sequence]
        batches.append(
            collate(
                [rows[index] for index in chosen],
                counts=[len(sequence) for sequence in part],
                rows=chosen,
                split=split,
            )
        )
    return batches


class TrainingRows:
    """A stage's rows in the order in which it sees them."""

    def __init__(
        self,
        rows: RowReader,
        *,
        stage: PlannedStage,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        group_by_length: bool = False,
        packing: bool = False,
        num_processes: int = 1,
    ) -> None:
        """Take the stage's part of `rows`: its range of the training set's one shuffled order.

        Raises ValueError where the range reaches beyond the rows.
        """
        if stage.rows.end > len(rows):
            raise ValueError(
                f"{stage.name} wants rows up to {stage.rows.end}, there are {len(rows)}"
            )
        order = permutation(len(rows), seed, Purpose.TRAINING_ORDER)
        self._rows = rows
        self._indices = order[stage.rows.start : stage.rows.end]
        self._seed = seed
        self._stage_index = stage.index
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._group_by_length = group_by_length
        self._packing = packing
        self._num_processes = num_processes
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass; one of them may have fewer rows, so that no row is dropped."""
        return -(-len(self._indices) // self._batch_size)

    def all_indices(self) -> list[int]:
        """Return every row that the stage sees, as positions in the training set."""
        return [int(index) for index in self._indices]

    def batch_indices(self, step: int) -> list[int]:
        """Return the rows of step `step`, from 0, as positions in the training set."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches_of(epoch))
        return [int(index) for index in self._epoch[1][position]]

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of step `step`."""
        indices = self.batch_indices(step)
        return micro_batches(
            self._rows,
            indices,
            size=self._micro_batch_size,
            packing=self._packing,
            num_processes=self._num_processes,
        )

    def _batches_of(self, epoch: int) -> list[NDArray[np.int64]]:
        key = (self._stage_index, epoch)
        order = permutation(len(self._indices), self._seed, Purpose.EPOCH, *key)
        shuffled = self._indices[order]
        if not self._group_by_length:
            return cut(shuffled, self._batch_size)
        batches_key = (self._seed, Purpose.BATCHES, *key)
        return batches_by_length(shuffled, self._rows.lengths, self._batch_size, key=batches_key)


class FixedRows:
    """Rows that are all seen once and in a fixed order: validation and general text."""

    def __init__(self, rows: RowReader, *, micro_batch_size: int, split: Split) -> None:
        self._rows = rows
        self._micro_batch_size = micro_batch_size
        self._split = split

    def batches(self) -> Iterator[Batch]:
        """Yield all rows in batches, the longest first, so that memory is at its peak at once."""
        indices = _longest_first(self._rows, range(len(self._rows)))
        for part in _parts(indices, self._micro_batch_size):
            yield collate([self._rows[index] for index in part], rows=part, split=self._split)


@dataclass(frozen=True, kw_only=True)
class ValidationQuestion:
    """A validation row as a question to be answered."""

    question: str
    """Text of the last user turn."""
    reference: str
    """Text of the last answer in the data."""
    prompt_ids: list[int]
    """Token ids of everything before that answer, generation prompt included."""


def open_training_rows(config: StageConfig, stage: PlannedStage) -> TrainingRows:
    """Return the rows of `stage`; raises ArtifactError where the tokenised rows are not sound."""
    return TrainingRows(
        _open(config, Split.TRAIN),
        stage=stage,
        seed=config.training.seed,
        batch_size=config.training.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        group_by_length=config.training.group_by_length,
        packing=config.training.packing,
        num_processes=config.engine.num_processes if config.engine is not None else 1,
    )


def open_profile_batches(config: StageConfig, batches: int) -> list[Batch]:
    """Return the micro-batches of the first `batches` batches of the training rows' shuffled order.

    Fewer where there are not so many rows. Raises ArtifactError where the rows are not sound.
    """
    rows = _open(config, Split.TRAIN)
    order = permutation(len(rows), config.training.seed, Purpose.TRAINING_ORDER)
    size = config.training.batch_size
    return [
        micro_batch
        for batch in _parts([int(index) for index in order[: batches * size]], size)
        for micro_batch in micro_batches(rows, batch, size=config.training.micro_batch_size)
    ]


def open_validation_rows(config: StageConfig) -> FixedRows:
    """Return all validation rows; raises ArtifactError where they are not sound."""
    return _open_fixed(config, Split.VALIDATION)


def open_general_rows(config: StageConfig) -> FixedRows:
    """Return the general text in chunks; raises ArtifactError where it is not sound."""
    return _open_fixed(config, Split.GENERAL)


def open_validation_questions(config: StageConfig) -> list[ValidationQuestion]:
    """Return the validation rows as questions, in the order of the data.

    Raises ArtifactError where they are not sound.
    """
    return [
        ValidationQuestion(
            question=row.question,
            reference=row.reference,
            prompt_ids=[int(token) for token in row.prompt_ids],
        )
        for row in _open(config, Split.VALIDATION)
    ]


def open_split(config: StageConfig, split: Split) -> RowReader:
    """Return the rows of `split`; raises ArtifactError where they are not sound."""
    return _open(config, split)


def _open_fixed(config: StageConfig, split: Split) -> FixedRows:
    rows = _open(config, split)
    return FixedRows(rows, micro_batch_size=config.training.micro_batch_size, split=split)


def _open(config: StageConfig, split: Split) -> RowReader:
    directory = names.RunLayout(Path(config.run_directory)).prepare / DATA_DIRECTORY
    _verify(directory, config.data_digest)
    return RowReader(rows_path(directory, split))


def _verify(directory: Path, digest: str | None) -> None:
    """Check every byte of the rows, unless this process did and no file was touched since.

    A stage opens them many times, and they may be as large as a model.
    """
    marks = [
        (str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for path in sorted(directory.rglob("*"))
        for found in [path.stat()]
    ]
    if _verified.get((directory, digest)) != marks:
        verify_artifact(directory, digest=digest, kind=ArtifactKind.DATASET)
        _verified[directory, digest] = marks


def _longest_first(rows: RowReader, indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: -int(rows.lengths[index]))


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
