"""Replay: other text that is trained on beside every batch, so that it is not forgotten.

The rows come on top of the batch's own: every training row is seen as often as without replay, and
a stage takes as many steps. Which rows a step replays follows from the seed, the stage and the step
alone, as with the batch's own rows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.training_spec import ReplaySpec
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import TrainingRows, micro_batches, open_split
from stagetune_trainer.data.order import Purpose, permutation
from stagetune_trainer.data.store import RowReader, Split


class ReplayRows:
    """The replayed rows in the order in which a stage sees them, pass after pass."""

    def __init__(
        self,
        rows: RowReader,
        *,
        key: Sequence[int],
        per_step: int,
        micro_batch_size: int,
        packing: bool = False,
    ) -> None:
        """`key` (numbers below 2**32) decides the order of the rows."""
        self._rows = rows
        self._key = (*key, Purpose.REPLAY)
        self._per_step = per_step
        self._micro_batch_size = micro_batch_size
        self._packing = packing
        self._pass: tuple[int, NDArray[np.int64]] | None = None

    def step_indices(self, step: int) -> list[int]:
        """Return the rows of step `step`, from 0."""
        first = step * self._per_step
        return [self._row_at(position) for position in range(first, first + self._per_step)]

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of step `step`."""
        # A row may come twice where there are fewer than a step takes.
        return micro_batches(
            self._rows,
            self.step_indices(step),
            size=self._micro_batch_size,
            packing=self._packing,
            split=Split.REPLAY,
        )

    def _row_at(self, position: int) -> int:
        number, place = divmod(position, len(self._rows))
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, permutation(len(self._rows), *self._key, number))
        return int(self._pass[1][place])


class RowsWithReplay:
    """The micro-batches of a step: its own rows, then those that are replayed."""

    def __init__(self, rows: TrainingRows, replay: ReplayRows) -> None:
        self._rows = rows
        self._replay = replay

    def micro_batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of step `step`, from 0."""
        return [*self._rows.micro_batches(step), *self._replay.micro_batches(step)]


def open_replay_rows(config: StageConfig, stage: PlannedStage, spec: ReplaySpec) -> ReplayRows:
    """Return the replayed rows of `stage`; raises ArtifactError where they are not sound."""
    return ReplayRows(
        open_split(config, Split.REPLAY),
        key=(config.training.seed, stage.index),
        # The file's sizes are the stage's own, or smaller ones after a lack of memory.
        per_step=spec.rows_per_step(config.training.batch_size),
        micro_batch_size=config.training.micro_batch_size,
        packing=config.training.packing,
    )
