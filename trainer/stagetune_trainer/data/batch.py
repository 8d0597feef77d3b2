"""Rows as tensors: what one forward pass is given.

A sequence of a batch holds one row, or several that are packed one behind the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stagetune_trainer.data.store import Split, StoredRow
from stagetune_trainer.data.template import IGNORED

_PAD = 0
"""Token id of padding. Any id will do: causal attention keeps what stands on the right of a token
away from it, and padding has no labels."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one forward pass in B sequences, padded on the right to the longest, T.

    There is no attention mask, and none is needed: a causal model's real tokens never see what is
    on their right, and positions count from the left of each row. Where they begin anew inside of a
    sequence, transformers keeps its rows apart.
    """

    input_ids: Tensor
    """Token ids [B, T], int64."""
    labels: Tensor
    """Token ids [B, T], int64, where they are learned, -100 elsewhere; each stands at the position
    of its own token. The first token of a row is predicted by nothing."""
    position_ids: Tensor | None = None
    """Positions [B, T], int64, in their row; padding has its own. None where each sequence holds
    one row: the model then counts itself, and the fastest attention kernels apply."""
    num_tokens: int
    """Tokens, padding left out."""
    lengths: tuple[int, ...] = ()
    """Tokens of each row, in the order of sequences and from left to right."""
    places: tuple[tuple[int, int], ...] = ()
    """Where each row begins: its sequence, and its first position there."""
    rows: tuple[int, ...] = ()
    """Where each row stands in the rows that it was taken from."""
    split: Split = Split.TRAIN
    """What the rows are for, and so which file `rows` are places in."""
    states: Tensor | None = None
    """Hidden states [B, T, hidden] that the pass begins with, where they were read ahead."""

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
        """Labels that a loss is computed for."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield the sequence and the positions of each row."""
        for (sequence, start), length in zip(self.places, self.lengths, strict=True):
            yield sequence, slice(start, start + length)

    def is_token(self, device: torch.device) -> Tensor:
        """Return where there are tokens and no padding, [B, T] bool; in the order of `rows`."""
        ends = torch.zeros(len(self.input_ids), dtype=torch.int64)
        for sequence, span in self.spans():
            ends[sequence] = span.stop
        positions = torch.arange(self.input_ids.shape[1], device=device)
        return positions < ends.to(device).unsqueeze(1)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `input_ids`, `labels` and `position_ids` on `device`."""
        positions = self.position_ids
        if positions is not None:
            positions = positions.to(device, non_blocking=True)
        tokens = self.input_ids.to(device, non_blocking=True)
        return tokens, self.labels.to(device, non_blocking=True), positions

    def pinned(self) -> "Batch":
        """Return the same in page-locked memory: a copy to a GPU then waits for nothing."""

        def pin(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            position_ids=pin(self.position_ids),
            states=pin(self.states),
        )


def collate(
    stored: Sequence[StoredRow],
    *,
    counts: Sequence[int] | None = None,
    rows: Sequence[int] = (),
    split: Split = Split.TRAIN,
) -> Batch:
    """Return `stored` as one batch; `rows` are their places in what they were taken from.

    `counts` says how many of them each sequence holds, one after the other; left out, one each.
    """
    counts = [1] * len(stored) if counts is None else counts
    lengths = [len(row.input_ids) for row in stored]
    places = list(_places(lengths, counts))
    width = max(start + length for (_, start), length in zip(places, lengths, strict=True))
    shape = (len(counts), width)
    input_ids = torch.full(shape, _PAD, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(counts), 1)
    for row, (sequence, start), length in zip(stored, places, lengths, strict=True):
        end = start + length
        input_ids[sequence, start:end] = torch.from_numpy(np.array(row.input_ids, dtype=np.int64))
        labels[sequence, start:end] = torch.from_numpy(np.array(row.labels, dtype=np.int64))
        labels[sequence, start] = IGNORED
        # What stands on the right begins anew, be it the next row or padding.
        position_ids[sequence, start:] = torch.arange(width - start)
        position_ids[sequence, end:] = torch.arange(width - end)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids if max(counts) > 1 else None,
        num_tokens=sum(lengths),
        lengths=tuple(lengths),
        places=tuple(places),
        rows=tuple(rows),
        split=split,
    )


def _places(lengths: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the sequence and the first position of each row."""
    remaining = iter(lengths)
    for sequence, count in enumerate(counts):
        start = 0
        for _ in range(count):
            yield sequence, start
            start += next(remaining)
