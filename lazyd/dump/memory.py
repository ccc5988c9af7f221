# SPDX-License-Identifier: MIT
"""Dump the memory of stopped tasks: look, decide, copy, and start to track what is written next.

What happens when, because a stopped task is what users feel:

1. prepare(), while the task runs: the parent is loaded, images are made, room is reserved.
2. dump(), while it is stopped: every page is classified, holes are checked, bytes are copied, tracking begins.
3. finish(), when it may run again or is gone: pagemaps are written.

dump_memory() does the three at once, for callers that do not care.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from lazyd.dump.core import (
    Area,
    AreaKind,
    AreaList,
    PageKind,
    PagemapFormat,
    PagePipe,
    Progress,
    ScanMethod,
    Scanner,
    Source,
    Track,
    scan_file,
)
from lazyd.dump.tracker import Tracker
from lazyd.dump.transfer import Destination, ImageType, LocalImages, MemoryImage, Transfer
from lazyd.errors import DumpError, SystemCallError
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE

__all__ = ["Area", "AreaKind", "LocalImages", "MemoryCounts", "MemoryDump", "PagemapFormat", "dump_memory"]


class MemoryCounts(NamedTuple):
    """What became of memory. Pages of private memory, unless named shared; times in seconds."""

    scanned: int = 0
    """Mapped pages, those that are a file's own included."""
    dumped: int = 0
    zero: int = 0
    parent: int = 0
    lazy: int = 0
    """Of the dumped ones: may be restored lazily."""
    shared_dumped: int = 0
    bytes: int = 0
    """In pages images, shared memory included."""
    scan_time: float = 0.0
    copy_time: float = 0.0
    tracked_areas: int = 0
    """In how many areas writes are tracked from here on."""

    def plus(self, other: MemoryCounts) -> MemoryCounts:
        """Return the sums."""
        return MemoryCounts._make(one + another for one, another in zip(self, other, strict=True))


class _Pending(NamedTuple):
    transfer: Transfer
    pipe: PagePipe


class _SharedObject(NamedTuple):
    pid: int
    start: int
    end: int
    size: int


class MemoryDump:
    """The memory of one dump, over all its tasks. As a context manager it gives up unless finish() was called."""

    def __init__(self, to: Destination, method: ScanMethod = ScanMethod.AUTO) -> None:
        self.counts = MemoryCounts()
        self.progress = Progress()
        """Of all copies, for whoever shows it; expected_bytes is where it ends."""
        self.expected_bytes = 0
        self._to = to
        self._method = method
        self._prepared: dict[int, Transfer] = {}
        self._pending: list[_Pending] = []
        self._shared: dict[int, _SharedObject] = {}

    def prepare(self, pid: int, image_pid: int | None = None, *, is_incremental: bool = False) -> None:
        """Do for a task what can be done while it runs. `image_pid` is its pid as its images have it.

        is_incremental: most of it will not be dumped, so no room is made for it.
        """
        expected = 0 if is_incremental else _resident_bytes(pid)
        image = MemoryImage(ImageType.TASK, image_pid or pid)
        self._prepared[pid] = self._to.open(image, expected)

    def dump(
        self,
        pid: int,
        areas: Sequence[Area],
        *,
        image_pid: int | None = None,
        tracker: Tracker | None = None,
        keep_tracking: bool = False,
    ) -> MemoryCounts:
        """Dump a stopped task's memory; areas are sorted and disjoint. Shared areas wait for dump_shared().

        tracker: says what is clean; None: nothing is. keep_tracking: begin to track, for the next dump on top of
        this one; after that the tracker says nothing about dumps before, so that this one must not fail any more
        without the tracker being given up.
        """
        if pid not in self._prepared:
            self.prepare(pid, image_pid)
        transfer = self._prepared[pid]
        private = AreaList([area for area in areas if area.kind is not AreaKind.SHARED_ANON])
        for area in areas:
            if area.kind is AreaKind.SHARED_ANON:
                self._note_shared(pid, area)
        pipe = PagePipe()
        begun = time.monotonic()
        with Scanner(pid, self._method) as scanner:
            trusts = tracker is not None and transfer.may_have_parent_holes and tracker.check(scanner, private)
            track = tracker.track if tracker is not None and trusts else Track.NONE
            scanner.scan(private, pipe, track)
            if track is Track.SOFT_DIRTY and transfer.parent is not None:
                pipe.require_parent(transfer.parent)
            transfer.write_hole(pipe)
            tracked = tracker.arm(scanner, private) if tracker is not None and keep_tracking else 0
        scanned = time.monotonic()
        self._copy(transfer, pipe, Source(pid))
        counts = MemoryCounts(
            scanned=pipe.scanned_pages,
            dumped=pipe.pages(PageKind.DUMPED),
            zero=pipe.pages(PageKind.ZERO),
            parent=pipe.pages(PageKind.PARENT),
            lazy=pipe.lazy_pages,
            bytes=pipe.dumped_bytes,
            scan_time=scanned - begun,
            copy_time=time.monotonic() - scanned,
            tracked_areas=tracked,
        )
        self.counts = self.counts.plus(counts)
        return counts

    def _copy(self, transfer: Transfer, pipe: PagePipe, source: Source) -> None:
        self.expected_bytes += pipe.dumped_bytes
        transfer.write_pages(pipe, source, self.progress)
        self._pending.append(_Pending(transfer, pipe))

    def _note_shared(self, pid: int, area: Area) -> None:
        size = area.pgoff + area.end - area.start
        known = self._shared.get(area.shmid)
        if known is None:
            self._shared[area.shmid] = _SharedObject(pid, area.start, area.end, size)
        elif size > known.size:
            self._shared[area.shmid] = known._replace(size=size)

    def dump_shared(self) -> MemoryCounts:
        """Dump the shared memory of the tasks so far, each object once, while all of them are still stopped.

        Nobody tracks who else writes there: all that an object holds is dumped, up to where the last task sees it.
        """
        total = MemoryCounts()
        for shmid, shared in sorted(self._shared.items()):
            total = total.plus(self._dump_object(shmid, shared))
        self._shared.clear()
        self.counts = self.counts.plus(total)
        return total

    def _dump_object(self, shmid: int, shared: _SharedObject) -> MemoryCounts:
        path = Path(f"/proc/{shared.pid}/map_files/{shared.start:x}-{shared.end:x}")
        begun = time.monotonic()
        pipe = PagePipe()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SystemCallError("open", error.errno or 0, path=path, hint="run as root") from error
        try:
            size = min(shared.size, os.fstat(fd).st_size + PAGE_SIZE - 1 & -PAGE_SIZE)
            scan_file(fd, size, pipe)
            transfer = self._to.open(MemoryImage(ImageType.SHARED, shmid), pipe.dumped_bytes)
            scanned = time.monotonic()
            transfer.write_hole(pipe)
            self._copy(transfer, pipe, Source(0, fd))
        except OSError as error:
            raise SystemCallError("lseek", error.errno or 0, path=path) from error
        finally:
            os.close(fd)
        dumped = pipe.pages(PageKind.DUMPED)
        times = scanned - begun, time.monotonic() - scanned
        return MemoryCounts(shared_dumped=dumped, bytes=pipe.dumped_bytes, scan_time=times[0], copy_time=times[1])

    def finish(self) -> MemoryCounts:
        """Write what does not need the tasks to be stopped, and end the destination; return all counts."""
        if self._shared:
            raise DumpError("shared memory was not dumped")
        for transfer, pipe in self._pending:
            transfer.write_pagemap(pipe)
        self._pending.clear()
        self._to.close()
        return self.counts

    def close(self) -> None:
        """Give up what is not finished; after finish() this does nothing."""
        self._to.abort()

    def __enter__(self) -> MemoryDump:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def dump_memory(
    pid: int,
    areas: Sequence[Area],
    to: Destination,
    *,
    image_pid: int | None = None,
    tracker: Tracker | None = None,
    keep_tracking: bool = False,
) -> MemoryCounts:
    """Dump the memory of one stopped task, shared memory included, in one go."""
    with MemoryDump(to) as memory:
        memory.dump(pid, areas, image_pid=image_pid, tracker=tracker, keep_tracking=keep_tracking)
        memory.dump_shared()
        return memory.finish()


def _resident_bytes(pid: int) -> int:
    """Return how much memory of its own a task has, roughly; 0 if that cannot be said."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "VmSwap:")):
                total += int(line.split()[1]) << 10
    return total
