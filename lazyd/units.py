# SPDX-License-Identifier: MIT
"""The units that every room shares: pages, the two kinds of address, ranges.

An image address says where a page was when it was dumped; a run address says where it is now. mremap makes them
differ, so they are two types that only `session` and the engine may relate.
"""

from __future__ import annotations

from lazyd.hints import NewType
from lazyd.tuples import NamedTuple

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

# First address that user space never has (x86-64, four-level page tables: the last page below 2^47 is a guard page,
# arch/x86/include/asm/page_64_types.h TASK_SIZE_MAX). Another architecture is another number here and in cbits/lz.h.
USER_SPACE_END = (1 << 47) - PAGE_SIZE

ImageAddress = NewType("ImageAddress", int)
RunAddress = NewType("RunAddress", int)


class Range(NamedTuple):
    """A half-open range of bytes of an address space."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """Length in pages."""
        return (self.end - self.start) >> PAGE_SHIFT

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


def counted(count: int, noun: str) -> str:
    """Return a number of things as a person reads it."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_bytes(count: float) -> str:
    """Return a length in bytes as a person reads it, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
