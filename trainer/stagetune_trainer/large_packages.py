"""Large packages that others import wherever they find them, hidden until a task needs them.

transformers and peft look for these when they are imported themselves and import what is there,
used or not. That takes about as long as torch, in every process, while a GPU waits for the next
stage. Comes before the first import of either; `reveal` comes before our own import of a package.
"""

import sys

_PACKAGES = ("bitsandbytes", "deepspeed", "torchao")


def hide_large_packages() -> None:
    """Let the packages that nobody has imported yet look as if they were not installed.

    None in `sys.modules` is Python's own way to say so: importing raises ModuleNotFoundError and
    `importlib.util.find_spec` finds nothing.
    """
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None is allowed there
    for name in _PACKAGES:
        modules.setdefault(name, None)


def reveal(name: str) -> None:
    """Let `name` be imported again."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    if name in modules and modules[name] is None:
        del modules[name]
