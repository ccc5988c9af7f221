# SPDX-License-Identifier: MIT
"""ptrace(2) of python-ptrace, imported in half the time.

To find libc, python-ptrace imports ctypes.util, which takes longer than all else of it together. Every process of
Python's has libc loaded, so the symbols of the process are enough. Seen in python-ptrace 0.9.9: ptrace.ctypes_libc
holds libc and the name of its file, and nothing else.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType

_LIBC = "ptrace.ctypes_libc"

if _LIBC not in sys.modules:
    _module = ModuleType(_LIBC)
    vars(_module).update(libc=ctypes.CDLL(None, use_errno=True), LIBC_FILENAME=None)
    sys.modules[_LIBC] = _module

from ptrace import PtraceError  # noqa: E402  after what it would import
from ptrace.binding.func import ptrace  # noqa: E402

__all__ = ["PtraceError", "ptrace"]
