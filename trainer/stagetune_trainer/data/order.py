"""Orders of rows: everything random about which row comes when, from keys of numbers alone.

A step's rows follow from the seed, the stage and the step, so nothing has to be replayed to know
them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LARGEST_WINDOW = 50
_FEWEST_WINDOWS = 4


class Purpose:
    """What a permutation is for, so that equal seeds give unrelated orders."""

    VALIDATION_SPLIT = 1
    TRAINING_ORDER = 2
    EPOCH = 3
    REPLAY = 4
    GENERATED_TEXT = 5
    BATCHES = 6


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return the numbers below `count` in the order that `key` (numbers below 2**32) gives.

    numpy promises the stream of RandomState for ever, and that of its newer generators not.
    """
    return np.random.RandomState(list(key)).permutation(count).astype(np.int64)


def cut(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Return `rows` in parts of `size`, the last of them perhaps smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def batches_by_length(
    shuffled: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, *, key: Sequence[int]
) -> list[NDArray[np.int64]]:
    """Return `shuffled` rows in batches of rows of like length; `lengths` are those of all rows.

    Windows of up to 50 batches, at least four in a pass where there are so many batches, are sorted
    by length and cut into batches, and the batches are put into the order that `key` gives: what
    the Trainer of transformers does with `group_by_length`. Every row is in one batch, and one of
    them may be smaller than `batch_size`.
    """
    batches_per_window = len(shuffled) // (batch_size * _FEWEST_WINDOWS)
    window_size = batch_size * min(max(batches_per_window, 1), _LARGEST_WINDOW)
    batches = []
    for window in cut(shuffled, window_size):
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        batches += cut(longest_first, batch_size)
    return [batches[index] for index in permutation(len(batches), *key)]
