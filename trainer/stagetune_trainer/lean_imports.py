"""The code of one task, imported with no more than it needs: seconds in which a GPU waits.

Comes before the first import of torch.
"""

import gc
import importlib

from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.deferred_compiler import defer_compiler
from stagetune_trainer.large_packages import hide_large_packages

MODULES = {
    Task.PREPARE: "stagetune_trainer.data.prepare",
    Task.TRAIN: "stagetune_trainer.train",
    Task.EVALUATE: "stagetune_trainer.evaluate",
    Task.EXPORT: "stagetune_trainer.export",
}
"""Where each task is done."""


def import_lean(config: StageConfig) -> None:
    """Import what the task of `config` is done with."""
    hide_large_packages(config)
    was_enabled = gc.isenabled()
    # Imports make objects by the hundred thousand and leave none behind to be found: looking for
    # cycles among them again and again is a quarter of their time.
    gc.disable()
    try:
        # DeepSpeed has ways of its own with the compiler, and is not tested without.
        if config.engine is None:
            defer_compiler()
        importlib.import_module("stagetune_trainer.run")
        importlib.import_module(MODULES[config.task])
    finally:
        # Nor is it worth while later: what is imported stays.
        gc.freeze()
        if was_enabled:
            gc.enable()
