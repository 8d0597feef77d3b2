"""What a finished run no longer needs: checkpoints, tokenised rows, what the base said of them.

Outputs stay: with the base model they give the export again. So do reports, metrics and facts.
"""

import logging
from pathlib import Path
from shutil import rmtree

from stagetune_api.names import RunLayout
from stagetune_trainer.metrics import ProgressLog

logger = logging.getLogger(__name__)


def remove_intermediates(layout: RunLayout, log: ProgressLog) -> None:
    """Remove the checkpoints of every stage, the tokenised rows and all references to the base.

    What cannot be removed is logged and left: the result is there all the same.
    """
    stages = sorted(layout.stages.iterdir()) if layout.stages.is_dir() else []
    doomed = [layout.stage(stage.name).checkpoints for stage in stages]
    references = [layout.cache, *(layout.stage(stage.name).anchor for stage in stages)]
    removed = [_remove(directory) for directory in [*doomed, layout.data]]
    # Not worth a word of their own: they can be computed again as long as there are rows.
    for directory in references:
        _remove(directory)
    if any(removed):
        log.message("removed checkpoints and tokenised rows, which retain: Result does not keep")


def _remove(directory: Path) -> bool:
    """Remove a folder; return whether it was there, whole or left half-removed before."""
    # Renamed first: a half-removed folder must not look like a damaged one.
    aside = directory.parent / f".{directory.name}.old.tmp"
    try:
        found = aside.exists()
        if found:
            rmtree(aside)
        if directory.exists():
            found = True
            directory.rename(aside)
            rmtree(aside)
    except OSError as error:
        logger.warning("%s could not be removed: %s", directory, error)
        return False
    return found
