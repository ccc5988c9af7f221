# SPDX-License-Identifier: MIT
"""Dumped pages that their pages image may not hold any more: holes of the file, which read as zeros.

`dump --auto-dedup`, criu's and ours, punches them into the parent where the child has the page anew; that parent
looks whole. So does a file that was copied as a sparse one, whose holes are zeros rightly: nothing tells the two
apart, and to find holes is no proof.
"""

from __future__ import annotations

import bisect
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lazyd.errors import SystemCallError
from lazyd.image.checkpoint import PagesImage, load, load_shared
from lazyd.image.pagemap import ExtentTable, Kind
from lazyd.limits import raise_descriptor_limit
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, counted

_SHARED = re.compile(r"pagemap-shmem-(0|[1-9][0-9]*)\.img")


class Doubt(NamedTuple):
    """A pages image with holes in what is to be read of it; str() is the line for people."""

    path: Path
    offset: int
    """Where the first of these pages is in it."""
    pages: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {counted(self.pages, 'dumped page')} in holes of the file, from offset {self.offset} on,"
            " which read as zeros: lost, if a dump with --auto-dedup freed them (restore that one instead);"
            " as they were, if the file was copied as a sparse one"
        )


def find_freed(path: Path) -> list[Doubt]:
    """Return the doubtful pages images that a directory uses, its own and its parents'. verify() has found it good."""
    raise_descriptor_limit()  # as serving does: a long chain has many images
    with load(path) as checkpoint:
        found = _look(checkpoint.sources, [task.extents for task in checkpoint.tasks])
    names = [_SHARED.fullmatch(entry.name) for entry in path.iterdir()]
    shared = load_shared(path, [int(name[1]) for name in names if name is not None])
    try:
        found += _look(shared.sources, list(shared.tables.values()))
    finally:
        shared.close()
    return sorted(found)


def _look(sources: Sequence[PagesImage], tables: Sequence[ExtentTable]) -> list[Doubt]:
    all_holes = [_holes(source) for source in sources]
    if not any(all_holes):
        return []
    ends = [[end for _, end in holes] for holes in all_holes]
    pages, first = [0] * len(sources), [source.size for source in sources]
    for table in tables:
        for _, count, kind, _, source, offset in table.rows():
            if kind != Kind.DUMPED.value:
                continue
            holes, stop = all_holes[source], offset + count * PAGE_SIZE
            for number in range(bisect.bisect_right(ends[source], offset), len(holes)):
                hole_start, hole_end = holes[number]
                if hole_start >= stop:
                    break
                # Only whole pages: blocks may be smaller.
                start = max(offset, -(-hole_start // PAGE_SIZE) * PAGE_SIZE)
                length = min(stop, hole_end) - start
                if length >= PAGE_SIZE:
                    pages[source] += length // PAGE_SIZE
                    first[source] = min(first[source], start)
    return [Doubt(source.path, first[n], pages[n]) for n, source in enumerate(sources) if pages[n]]


def _holes(source: PagesImage) -> list[tuple[int, int]]:
    """Return the holes of a file, as (start, end) in bytes (lseek(2)); none where its filesystem does not tell."""
    found = []
    at = 0
    try:
        # The end of the file counts as one, and beyond there is none to seek.
        while at < source.size and (start := os.lseek(source.fd, at, os.SEEK_HOLE)) < source.size:
            try:
                at = os.lseek(source.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data after it
                    raise
                at = source.size
            found.append((start, at))
    except OSError as error:
        raise SystemCallError("lseek", error.errno or 0, path=source.path) from error
    return found
