"""Which rows a step sees, and those rows as tensors.

Comes after `prepare` and before `loop`. The rows of step n follow from the seed, the stage and n
alone, so a resumed stage sees what the unbroken one would have seen, without replaying anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind, verify_artifact
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_trainer.data.order import Purpose, batches_by_length, cut, permutation
from stagetune_trainer.data.store import DATA_DIRECTORY, RowReader, Split, StoredRow, rows_path
from stagetune_trainer.data.template import IGNORED

_PAD = 0
"""Token id of padding. Any id will do: causal attention keeps what stands on the right of a token
away from it, and padding has no labels."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one forward pass, padded on the right to the longest of them.

    There is no attention mask, and none is needed: a causal model's real tokens never see what is
    on their right, and positions count from the left.
    """

    input_ids: Tensor
    """Token ids [B, T], int64."""
    labels: Tensor
    """Token ids [B, T], int64, where they are learned, -100 elsewhere; each stands at the position
    of its own token."""
    num_tokens: int
    """Tokens, padding left out."""
    lengths: tuple[int, ...] = ()
    """Tokens of each row, padding left out."""
    rows: tuple[int, ...] = ()
    """Where each row stands in the rows that it was taken from."""
    split: Split = Split.TRAIN
    """What the rows are for, and so which file `rows` are places in."""

    @property
    def num_padding_tokens(self) -> int:
        """Positions that are computed and hold no token."""
        return self.input_ids.numel() - self.num_tokens

    @property
    def is_replay(self) -> bool:
        """Whether it is other text that is mixed into training."""
        return self.split is Split.REPLAY

    @property
    def num_answer_tokens(self) -> int:
        """Labels that a loss is computed for; the first position is predicted by nothing."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return `input_ids` and `labels` on `device`."""
        return self.input_ids.to(device), self.labels.to(device)


def collate(
    stored: Sequence[StoredRow], *, rows: Sequence[int] = (), split: Split = Split.TRAIN
) -> Batch:
    """Return `stored` as one batch; `rows` are their places in what they were taken from."""
    lengths = [len(row.input_ids) for row in stored]
    shape = (len(stored), max(lengths))
    input_ids = torch.full(shape, _PAD, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, (row, length) in enumerate(zip(stored, lengths, strict=True)):
        input_ids[index, :length] = torch.from_numpy(np.array(row.input_ids, dtype=np.int64))
        labels[index, :length] = torch.from_numpy(np.array(row.labels, dtype=np.int64))
    return Batch(
        input_ids=input_ids,
        labels=labels,
        num_tokens=sum(lengths),
        lengths=tuple(lengths),
        rows=tuple(rows),
        split=split,
    )


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
        """Return the micro-batches of step `step`, rows of like length together.

        How a batch is split changes padding and rounding, and not its gradient.
        """
        indices = _longest_first(self._rows, self.batch_indices(step))
        return [
            collate([self._rows[index] for index in part], rows=part)
            for part in _parts(indices, self._micro_batch_size)
        ]

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
    )


def open_profile_batches(config: StageConfig, batches: int) -> list[Batch]:
    """Return the micro-batches of the first `batches` batches of the training rows' shuffled order.

    Fewer where there are not so many rows. Raises ArtifactError where the rows are not sound.
    """
    rows = _open(config, Split.TRAIN)
    order = permutation(len(rows), config.training.seed, Purpose.TRAINING_ORDER)
    size = config.training.batch_size
    return [
        collate([rows[index] for index in part])
        for batch in _parts([int(index) for index in order[: batches * size]], size)
        for part in _parts(_longest_first(rows, batch), config.training.micro_batch_size)
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
    verify_artifact(directory, digest=config.data_digest, kind=ArtifactKind.DATASET)
    return RowReader(rows_path(directory, split))


def _longest_first(rows: RowReader, indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: -int(rows.lengths[index]))


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
