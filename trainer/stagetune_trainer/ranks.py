"""The processes of one stage: which of them this is, and what they have to agree on.

A stage may be done by several processes, each on a device of its own. All walk through the same
code in step: every decision that a process takes alone would leave the others waiting in a
collective for ever. Numbers that decide are therefore summed over all processes, or taken from the
first. They go over gloo in host memory; gradients are the engine's business.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stagetune_trainer.launch import RANK_VARIABLE

_TIMEOUT = timedelta(hours=24)
"""The first process may fill a cache for hours. A process that dies is noticed at once: its
connections close, and the launcher ends the others."""


_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of its stage; by default it is alone, and nothing is exchanged."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1
    """Processes of the stage, on all nodes."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes to the volume and reports."""
        return self.rank == 0

    def deal(self, items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
        """Yield this process's share of `items`, and whether each counts.

        All processes get equally many. Where the items do not come out even, some get one once more
        that is another's: it has to be computed, for the sake of the collectives, and not counted.
        """
        remaining = iter(items)
        while hand := tuple(islice(remaining, self.count)):
            is_own = self.rank < len(hand)
            yield hand[self.rank if is_own else 0], is_own

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        return self._reduced([float(flag)], dist.ReduceOp.MAX)[0] > 0 if self.count > 1 else flag

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each of `values` summed over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sums_by_name(self, values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
        """Return the sums of those of `names` that any process has, in the order of `names`."""
        if self.count == 1:
            return dict(values)
        names = list(names)
        totals = self.sums([values.get(name, 0.0) for name in names])
        there = self.sums([float(name in values) for name in names])
        return {name: total for name, total, n in zip(names, totals, there, strict=True) if n}

    def highest(self, value: int) -> int:
        """Return the highest `value` of all processes."""
        return int(self._reduced([value], dist.ReduceOp.MAX)[0])

    def of_first(self, values: Sequence[float]) -> list[float]:
        """Return the first process's `values`."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        self.broadcast(tensor)
        return [float(value) for value in tensor.tolist()]

    def text_of_first(self, text: str) -> str:
        """Return the first process's `text`."""
        if self.count == 1:
            return text
        data = text.encode()
        (length,) = self.of_first([len(data)])
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first and data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.broadcast(buffer)
        return bytes(buffer.tolist()).decode()

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor`, in host memory, with the first process's."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self.sums([0.0])

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let the first process do the context's work before the others do theirs.

        What it puts onto the volume there, they find.
        """
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def seed_step(self, *key: int) -> None:
        """Give this process random numbers of its own that follow from `key` alone.

        So that another number of processes can go on. One process alone keeps its stream.
        """
        if self.count > 1:
            mixed = 0
            for part in (*key, self.rank, self.count):
                mixed = (mixed * 1_000_003 + part) % (2**63 - 25)
            torch.manual_seed(mixed)

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor.tolist()]


ALONE = Ranks()
"""One process that does everything."""


def is_first() -> bool:
    """Whether this process is the first of those that its launcher has started."""
    return os.environ.get(RANK_VARIABLE, "0") == "0"


def join_ranks() -> Ranks:
    """Join the processes of this stage, as torchrun's variables name them.

    Raises RuntimeError where they cannot be reached.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size())


def leave_ranks() -> None:
    """Close the connections to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
