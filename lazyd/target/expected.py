# SPDX-License-Identifier: MIT
"""What passes between a session and the attaching to tasks: what the images expect of one, and what was got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lazyd.image.directory import Program, Vma
from lazyd.image.pagemap import ExtentTable
from lazyd.tuples import NamedTuple


class Expected(NamedTuple):
    """What the images say of a task's lazy memory. `filled`: ranges in it that a restorer fills itself, sorted.

    `sources`: descriptors of the pages images that `extents` names.
    """

    image_pid: int
    vmas: Sequence[Vma]
    filled: Sequence[tuple[int, int]]
    program: Program | None
    extents: ExtentTable
    sources: Sequence[int]


class Attached(NamedTuple):
    """A task whose lazy memory is registered. The descriptor is whoever's who serves it."""

    image_pid: int
    pid: int
    uffd: int


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same ranges sorted and disjoint."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def empty_ranges(lazy: Iterable[tuple[int, int]], filled: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what of the lazy ranges is not filled; all are sorted and disjoint."""
    holes = iter([*filled, (1 << 64, 1 << 64)])
    hole = next(holes)
    for start, end in lazy:
        at = start
        while at < end:
            while hole[1] <= at:
                hole = next(holes)
            if at < hole[0]:
                yield at, min(end, hole[0])
            at = max(at, hole[1]) if hole[0] < end else end
