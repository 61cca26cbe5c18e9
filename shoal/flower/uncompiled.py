"""PyTorch's compiler, imported only where somebody compiles.

The first step of any optimizer imports it, which takes longer than PyTorch itself: to say that its own functions are
not to be compiled, and where a graph would end. As long as nothing has been compiled both say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["compiler_later", "import_torch"]

NAME = "torch._dynamo"


class _Later(ModuleType):
    """Stands for the compiler until anything else is asked of it."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.__dict__["_disabled"] = list[Any]()

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        """There is no graph."""

    def disable(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        self._disabled.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks at all modules
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        compiler = import_module(NAME)
        for function in self._disabled:  # PyTorch has kept them: now it must ask again
            vars(function).pop("__dynamo_disable", None)
        self._disabled.clear()
        return getattr(compiler, name)


def compiler_later() -> None:
    """In a process of our own, before it imports PyTorch."""
    if "torch" not in sys.modules:
        sys.modules[NAME] = _Later()


def import_torch() -> None:
    """For all processes of our own that come of this one."""
    compiler_later()
    with suppress(ImportError):
        import_module("torch")
