# SPDX-License-Identifier: MIT
"""Defers what other packages import and nobody here uses: users wait for the first page, or for the task.

In the place of such a module stands one that is loaded when something of it is asked for. So where it is needed after
all, by another release or because somebody calls what needs it, it is just loaded later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType


class _Deferred(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by the import system, of any module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer(name: str) -> None:
    """Defer a module that others import as a whole, from now on."""
    sys.modules.setdefault(name, _Deferred(name))


class _Called(ModuleType):
    """Stands for a module of functions until one of them is called."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*values: object, **named: object) -> object:
            result: object = getattr(importlib.import_module(self.__name__), name)(*values, **named)
            return result

        return call


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Defer modules of which others import functions, for as long as this lasts."""
    stand_ins = {name: _Called(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


@contextmanager
def untranslated() -> Iterator[None]:
    """Have what is imported meanwhile speak English, as all here does, without asking gettext for its translations."""
    if "gettext" in sys.modules:
        yield
        return
    plain = ModuleType("gettext")
    vars(plain).update(gettext=str, ngettext=lambda one, many, number: one if number == 1 else many)
    sys.modules["gettext"] = plain
    try:
        yield
    finally:
        del sys.modules["gettext"]
