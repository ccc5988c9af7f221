# SPDX-License-Identifier: MIT
"""Checkpoint images: files only. What the rest of lazyd needs of them is load() and what it returns.

verify and show are imported by name where they are used: the daemon needs neither.
"""

from __future__ import annotations

import lazyd.image.deferred  # noqa: F401  before anything that imports protobuf
from lazyd.image.checkpoint import (
    Checkpoint,
    MemoryImages,
    PagesImage,
    SharedImages,
    TaskImage,
    load,
    load_memory,
    load_shared,
)
from lazyd.image.directory import Vma
from lazyd.image.pagemap import Dialect, Extent, ExtentTable, Kind

__all__ = [
    "Checkpoint",
    "Dialect",
    "Extent",
    "ExtentTable",
    "Kind",
    "MemoryImages",
    "PagesImage",
    "SharedImages",
    "TaskImage",
    "Vma",
    "load",
    "load_memory",
    "load_shared",
]
