"""A stage whose batches are made when they are needed, for benchmarks/batching.py.

    python benchmarks/batching_in_turn.py STAGE.json

The trainer makes those of the next step while a step computes; this is the same task without.
"""

import sys

from stagetune_trainer import train
from stagetune_trainer.__main__ import main
from stagetune_trainer.data.ahead import BatchesAhead, Made


class BatchesInTurn(BatchesAhead):
    """Makes the batches of a step when it is asked for them."""

    def of(self, step: int) -> Made:
        """See `BatchesAhead`."""
        return self._make(step)


if __name__ == "__main__":
    train.BatchesAhead = BatchesInTurn  # type: ignore[misc]
    sys.exit(main())
