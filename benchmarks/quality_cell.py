"""One cell of benchmarks/quality.py, in a process of its own: train, measure, print JSON lines.

python benchmarks/quality_cell.py WORK ID
"""

import argparse
import json
from pathlib import Path

from quality_arms import cells
from stagetune_trainer.large_packages import hide_large_packages


def main() -> None:
    """Do the cell that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder with the inputs; runs are made in it")
    parser.add_argument("id", help="id of a cell")
    options = parser.parse_args()
    seed = int(options.id.rpartition("_")[2])
    cell = next(cell for cell in cells((seed,)) if cell.id == options.id)
    # As in a trainer's process: before peft and transformers are imported.
    hide_large_packages()
    from quality_training import run

    for result in run(cell, options.work.resolve()):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
