# SPDX-License-Identifier: MIT
"""ptrace(2) of python-ptrace, imported in a third of the time.

To find libc, python-ptrace imports ctypes.util, which takes longer than all else of it together. Every process of
Python's has libc loaded, so the symbols of the process are enough. Seen in python-ptrace 0.9.9: ptrace.ctypes_libc
holds libc and the name of its file, and nothing else; and beside its exception, ptrace.error has functions that write
errors to a logger, for which it imports logging and traceback.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType

from lazyd.deferred import deferred

_LIBC = "ptrace.ctypes_libc"

if _LIBC not in sys.modules:
    _module = ModuleType(_LIBC)
    vars(_module).update(libc=ctypes.CDLL(None, use_errno=True), LIBC_FILENAME=None)
    sys.modules[_LIBC] = _module

with deferred("logging", "traceback", "ptrace.logging_tools"):
    from ptrace import PtraceError
    from ptrace.binding.func import ptrace

__all__ = ["PtraceError", "ptrace"]

WALL = 0x40000000
"""__WALL, include/uapi/linux/wait.h"""
