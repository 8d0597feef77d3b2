"""torch's compiler, loaded when somebody compiles and not before.

transformers and torch's optimizers ask it at import, or before their first step, to leave some of
their functions alone. In a process that compiles nothing there is nothing to leave alone, but the
answer costs a quarter of all imports: dynamo, inductor and triton. Comes before the first import of
transformers.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_WANTED = (f"{_NAME}.config", f"{_NAME}._trace_wrapped_higher_order_op")
"""What gradient checkpointing asks, and what attention masks are computed with: both need nothing
of the package."""


class _Deferred(ModuleType):
    """The package without its content, until more is asked of it.

    As with `importlib.util.LazyLoader`, the first look at anything that is not there loads the
    package into this very module. `__path__` is such a thing: it is what an import of another
    submodule begins with, and those want to be imported in the package's own order.
    """

    _allowed: list[Any]
    """Functions that compiled code is to take as they are."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        is_of_imports = name.startswith("__") and name != "__path__"
        if is_of_imports or spec is None or spec.loader is None:
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = list(spec.submodule_search_locations or ())
        spec.loader.exec_module(self)
        for function in self._allowed:
            self.allow_in_graph(function)
        return getattr(self, name)


def defer_compiler() -> None:
    """Put torch's compiler off, if it is not there already and is where it is looked for."""
    import torch

    spec = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Deferred
    allowed: list[Any] = []

    def allow_in_graph(fn: Any) -> Any:
        allowed.append(fn)
        return fn

    vars(module).update(
        _allowed=allowed,
        allow_in_graph=allow_in_graph,
        assume_constant_result=_assume_constant_result,
        disable=_disable,
        graph_break=_graph_break,
    )
    sys.modules[_NAME] = module
    torch._dynamo = module
    for name in _WANTED:
        importlib.import_module(name)
    del module.__path__


def _disable(fn: Any = None, recursive: bool = True, **options: object) -> Any:
    """Return `fn`, or a decorator that does: nothing is compiled, so it is left alone as it is."""
    return (lambda function: function) if fn is None else fn


def _graph_break(*arguments: object, **options: object) -> None:
    """Do nothing: there is no graph."""


def _assume_constant_result(fn: Any) -> Any:
    """Mark `fn` as the compiler itself does."""
    fn._dynamo_marked_constant = True
    return fn
