"""Large packages that others import wherever they find them, hidden until a task needs them.

transformers and peft look for these when they are imported themselves and import what is there,
used or not. That takes about as long as torch, in every process, while a GPU waits for the next
stage. Comes before the first import of either; `reveal` comes before our own import of a package.
"""

import sys

from stagetune_api.stage import StageConfig, Task
from stagetune_api.training_spec import MethodType

_PACKAGES = ("bitsandbytes", "deepspeed", "torchao")
_OF_ADAPTERS = ("accelerate", "peft")
"""What adapters are made with, and what that needs."""
_WITHOUT_ADAPTERS = (MethodType.FULL, MethodType.EXPAND)


def hide_large_packages(config: StageConfig | None = None) -> None:
    """Let the packages that nobody has imported yet look as if they were not installed.

    With `config` those too that its task has no use for. None in `sys.modules` is Python's own way
    to say so: importing raises ModuleNotFoundError and `importlib.util.find_spec` finds nothing.
    """
    hidden: tuple[str, ...] = _PACKAGES
    if config is not None and config.task is Task.TRAIN and config.method.type in _WITHOUT_ADAPTERS:
        hidden += _OF_ADAPTERS
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None is allowed there
    for name in hidden:
        modules.setdefault(name, None)


def reveal(name: str) -> None:
    """Let `name` be imported again."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    if name in modules and modules[name] is None:
        del modules[name]
