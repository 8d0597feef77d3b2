"""The rows of benchmarks/staging.py, in the batches in which a stage of ours sees them.

    python benchmarks/staging_rows.py STAGE.json OUTPUT.json

Every other arm is given these: the same rows in the same order, tokenised and padded alike.
"""

import argparse
import json
from pathlib import Path

from stagetune_api.stage import StageConfig
from stagetune_trainer.data.batches import open_split, open_training_rows
from stagetune_trainer.data.store import Split


def main() -> None:
    """Write the batches of all steps of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    config = StageConfig.model_validate_json(options.stage.read_bytes())
    if config.stage is None:
        raise SystemExit(f"{options.stage} is not the file of a stage")
    rows = open_training_rows(config, config.stage)
    stored = open_split(config, Split.TRAIN)
    steps = []
    for number in range(config.stage.steps):
        batches = rows.micro_batches(number)
        steps.append(
            {
                "lines": [stored[row].row for batch in batches for row in batch.rows],
                "tokens": sum(batch.num_tokens for batch in batches),
                "answerTokens": sum(batch.num_answer_tokens for batch in batches),
                "paddedTokens": sum(batch.input_ids.numel() for batch in batches),
                "batches": [
                    {
                        "inputIds": batch.input_ids.tolist(),
                        "labels": batch.labels.tolist(),
                        "lengths": list(batch.lengths),
                    }
                    for batch in batches
                ],
            }
        )
    options.output.write_text(json.dumps({"steps": steps}), encoding="utf-8")


if __name__ == "__main__":
    main()
