"""Which rows of a step share a sequence: packing, so that no padding is computed.

Pure: from the lengths of rows alone. What keeps rows of a sequence apart is `loss` and the model's
attention, and `packing_check` looks whether it does.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

_PADDING_FOR_SHORTER = 1.05
"""Computed positions that shorter sequences may cost, over the fewest: attention pays them back."""


def pack(lengths: Sequence[int], capacity: int, at_once: int) -> list[list[int]]:
    """Return places in `lengths` as sequences of at most `capacity` tokens, the longest first.

    `at_once` sequences are computed together, padded to the longest of them. There are as few such
    micro-batches as best-fit decreasing finds, and within that as many sequences, and so as short
    ones, as cost next to no padding: attention grows with their square. No row is longer than
    `capacity`.
    """
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    packed = _best_fit(longest_first, lengths, capacity)
    most = min(-(-len(packed) // at_once) * at_once, len(lengths))
    counts = range(most, len(packed) - 1, -1)
    spread = [_spread(longest_first, lengths, count) for count in counts]
    ways = [*(way for way in spread if _length(way[0], lengths) <= capacity), packed]
    costs = [_computed(way, lengths, at_once) for way in ways]
    bound = min(costs) * _PADDING_FOR_SHORTER
    return next(way for way, cost in zip(ways, costs, strict=True) if cost <= bound)


def _best_fit(longest_first: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return sequences, each row put where it leaves the least room."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for place in longest_first:
        index = bisect_left(room, (lengths[place], -1))
        if index == len(room):
            sequences.append([])
            left, sequence = capacity, len(sequences) - 1
        else:
            left, sequence = room.pop(index)
        sequences[sequence].append(place)
        insort(room, (left - lengths[place], sequence))
    return _sorted(sequences, lengths)


def _spread(longest_first: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return `count` sequences of about the same length, each row put into the shortest so far."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, index) for index in range(count)]
    for place in longest_first:
        length, index = heapq.heappop(filled)
        sequences[index].append(place)
        heapq.heappush(filled, (length + lengths[place], index))
    return _sorted(sequences, lengths)


def _sorted(sequences: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    return sorted(sequences, key=lambda sequence: -_length(sequence, lengths))


def _length(sequence: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[place] for place in sequence)


def _computed(sequences: list[list[int]], lengths: Sequence[int], at_once: int) -> int:
    """Return the positions that are computed, padding included."""
    widest = [_length(sequence, lengths) for sequence in sequences[::at_once]]
    sizes = [min(at_once, len(sequences) - start) for start in range(0, len(sequences), at_once)]
    return sum(size * width for size, width in zip(sizes, widest, strict=True))
