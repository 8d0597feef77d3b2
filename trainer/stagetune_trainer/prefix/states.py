"""Hidden states at the border for the batches of a stage: computed, or read from the volume.

Both give the same numbers. On a CPU a row's states are computed from that row alone: kernels round
by the shape of what they are given, so states that were computed among other rows would differ in
the last bit from those of the next epoch, in which the row has other neighbours. On a GPU, where
one row at a time would leave most of it idle, they differ by that rounding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.store import Split
from stagetune_trainer.model import Numerics
from stagetune_trainer.prefix.window import LayerWindow
from stagetune_trainer.tensor_file import RowTensors

HIDDEN = "hidden"
"""Name of the states in a file."""


class PrefixStates(Protocol):
    """The hidden states that a stage's passes begin with."""

    window: LayerWindow
    first: int
    """The stage's lowest layer, above whose lower border the passes run."""

    def of(self, batch: Batch) -> Tensor:
        """Return the hidden states [B, T, hidden] of `batch`, on the device; zeros at padding."""

    def read_ahead(self, batch: Batch) -> Batch:
        """Return `batch` with those of its states that only have to be read; in any thread."""


class ComputedStates:
    """States that are computed for every batch anew, row by row: on a CPU."""

    def __init__(self, window: LayerWindow, first: int, numerics: Numerics) -> None:
        self.window = window
        self.first = first
        self._numerics = numerics

    def of(self, batch: Batch) -> Tensor:
        """Return the hidden states of `batch`."""
        rows = [
            self._run(batch.input_ids[sequence : sequence + 1, span])[0]
            for sequence, span in batch.spans()
        ]
        return padded(rows, batch)

    def read_ahead(self, batch: Batch) -> Batch:
        """Return `batch`: there is nothing to be read."""
        return batch

    def _run(self, input_ids: Tensor) -> Tensor:
        with self._numerics.autocast():
            return self.window.run(input_ids.to(self._numerics.device), stop=self.first)


class CachedStates:
    """States that are read from the volume."""

    def __init__(
        self,
        window: LayerWindow,
        first: int,
        files: Mapping[Split, RowTensors],
        device: torch.device,
    ) -> None:
        self.window = window
        self.first = first
        self._files = files
        self._device = device

    def close(self) -> None:
        """Let go of the files: a network file system keeps those that are open."""
        self._files = {}

    def of(self, batch: Batch) -> Tensor:
        """Return the hidden states of `batch`."""
        states = self._read(batch) if batch.states is None else batch.states
        return states.to(self._device, non_blocking=True)

    def read_ahead(self, batch: Batch) -> Batch:
        """Return `batch` with its states."""
        return replace(batch, states=self._read(batch))

    def _read(self, batch: Batch) -> Tensor:
        states = self._files[batch.split].rows(HIDDEN, batch.rows)
        return padded(list(torch.split(states, list(batch.lengths))), batch)


def rows_at_once(device: torch.device, micro_batch_size: int) -> int:
    """Return how many rows' states are computed together."""
    return 1 if device.type == "cpu" else micro_batch_size


def padded(rows: list[Tensor], batch: Batch) -> Tensor:
    """Return states of rows, each [length, hidden], as [B, T, hidden] with zeros at padding."""
    states = rows[0].new_zeros(*batch.input_ids.shape, rows[0].shape[-1])
    for row, (sequence, span) in zip(rows, batch.spans(), strict=True):
        states[sequence, span] = row
    return states
