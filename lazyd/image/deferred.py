# SPDX-License-Identifier: MIT
"""Defers the half of protobuf that is not used: it is a quarter of the time from start to the listening socket.

Seen in protobuf 5.29 to 7.36: google.protobuf.descriptor_pool imports the implementation in pure Python, and that the
text format and much else, also where the one in C (upb) does all the work. In its place stands a module that is loaded
when something of it is asked for, so with another implementation, or another release, it is just loaded later.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_DEFERRED = "google.protobuf.internal.python_message"


class _Deferred(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by the import system, of any module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


sys.modules.setdefault(_DEFERRED, _Deferred(_DEFERRED))
