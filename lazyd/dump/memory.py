# SPDX-License-Identifier: MIT
"""Dump the memory of stopped tasks: look, decide, copy, and start to track what is written next.

What happens when, because a stopped task is what users feel:

1. prepare(), while the task runs: the parent is loaded, images are made, room is reserved. Of much memory, copy_early()
   then copies all of it, while writes are tracked.
2. dump(), while it is stopped: every page is classified, holes are checked, bytes are copied, tracking begins. look()
   is the first part of it, for another thread than the one that asks the task what else it is.
3. finish(), when it may run again or is gone: pages copied early are put in order, pagemaps are written.

Early copies are right by the tracking that incremental dumps go by, and one thing more. A page is clean if nothing was
written since it was protected; but a read from a file that was on its way then (O_DIRECT) has its pages already, and is
not seen. So before the copy begins the task is stopped for a moment: a thread in such a read does not stop before the
read is over.

dump_memory() does the three at once, for callers that do not care.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
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
    early: int = 0
    """Of the dumped ones: were copied while the task still ran."""
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


# What is copied early need not be while the task is stopped, which costs 8 ms for so much memory here, and to stop it
# twice more, which costs that much for a thread or two, and more for more.
EARLY_BYTES = 64 << 20
EARLY_BYTES_A_THREAD = 512 << 10


class Looked:
    """What a stopped task's pages are; to be closed."""

    def __init__(self, pid: int, areas: Sequence[Area], method: ScanMethod) -> None:
        self.pid = pid
        self.areas = areas
        self.private = _private(areas)
        self.pipe = PagePipe()
        self.scanner = Scanner(pid, method)
        self.track = Track.NONE
        self.seconds = 0.0

    def close(self) -> None:
        """Close the task's page tables."""
        self.scanner.close()


def _private(areas: Sequence[Area]) -> AreaList:
    return AreaList([area for area in areas if area.kind is not AreaKind.SHARED_ANON])


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
        self._resident: dict[int, int] = {}
        self._early: set[int] = set()
        self._pending: list[_Pending] = []
        self._shared: dict[int, _SharedObject] = {}

    def prepare(self, pid: int, image_pid: int | None = None, *, is_incremental: bool = False) -> None:
        """Do for a task what can be done while it runs. `image_pid` is its pid as its images have it.

        is_incremental: most of it will not be dumped, so no room is made for it.
        """
        self._resident[pid] = expected = 0 if is_incremental else _resident_bytes(pid)
        image = MemoryImage(ImageType.TASK, image_pid or pid)
        self._prepared[pid] = self._to.open(image, expected)

    def is_worth_early(self, pid: int, threads: int) -> bool:
        """Say whether a prepared task has so much memory that the task stands for less time if it is copied early."""
        is_much = self._resident[pid] >= EARLY_BYTES + threads * EARLY_BYTES_A_THREAD
        return is_much and self._prepared[pid].takes_early

    def copy_early(self, pid: int, areas: Sequence[Area], tracker: Tracker, pause: Callable[[], None]) -> bool:
        """Copy a prepared task's private memory while it runs; say whether that was done.

        tracker: a new one, or one that nobody goes by any more; dump() is to get it. pause: stops the task for a
        moment. areas: as they were a moment ago; what is not so any more is copied by dump().
        """
        transfer = self._prepared[pid]
        private = _private(areas)
        try:
            with Scanner(pid, self._method) as scanner:
                if not tracker.arm(scanner, private):
                    return False
                pause()
                pipe = PagePipe()
                scanner.scan(private, pipe)
                self.expected_bytes += pipe.dumped_bytes
                if not transfer.write_early(pipe, pid, self.progress):
                    return False
                self._early.add(pid)
                # What has been written by now is a guess at what will have been written then.
                if tracker.check(scanner, private):
                    written = PagePipe()
                    scanner.scan(private, written, tracker.track)
                    transfer.reserve_late(written.dumped_bytes + written.dumped_bytes // 4)
        except SystemCallError:
            pass  # it has other memory by now, by exec, or none: dump() finds out
        finally:
            if pid not in self._early:
                tracker.has_baseline = False  # it knows of writes since now, not since any images
        return pid in self._early

    def look(self, pid: int, areas: Sequence[Area], tracker: Tracker | None = None) -> Looked:
        """Begin to look at a stopped task's pages; finish_look() does the rest. Areas and tracker as for dump().

        This waits until nobody reads the task's smaps.
        """
        looked = Looked(pid, areas, self._method)
        begun = time.monotonic()
        try:
            may_be_clean = pid in self._early or self._prepared[pid].may_have_parent_holes
            if tracker is not None and may_be_clean and tracker.check(looked.scanner, looked.private):
                looked.track = tracker.track
        except BaseException:
            looked.close()
            raise
        looked.seconds = time.monotonic() - begun
        return looked

    def finish_look(self, looked: Looked) -> None:
        """Classify the pages; any thread may."""
        begun = time.monotonic()
        looked.scanner.scan(looked.private, looked.pipe, looked.track)
        parent = self._prepared[looked.pid].parent
        if looked.track is Track.SOFT_DIRTY and parent is not None:
            looked.pipe.require_parent(parent)
        looked.seconds += time.monotonic() - begun

    def dump(
        self,
        pid: int,
        areas: Sequence[Area],
        *,
        image_pid: int | None = None,
        tracker: Tracker | None = None,
        keep_tracking: bool = False,
        looked: Looked | None = None,
    ) -> MemoryCounts:
        """Dump a stopped task's memory; areas are sorted and disjoint. Shared areas wait for dump_shared().

        tracker: says what is clean; None: nothing is. keep_tracking: begin to track, for the next dump on top of
        this one; after that the tracker says nothing about dumps before, so that this one must not fail any more
        without the tracker being given up. looked: by look() and finish_look(), since the task was stopped; it is
        closed here, and looked for again if it was in other areas.
        """
        if pid not in self._prepared:
            self.prepare(pid, image_pid)
        transfer = self._prepared[pid]
        for area in areas:
            if area.kind is AreaKind.SHARED_ANON:
                self._note_shared(pid, area)
        if looked is not None and looked.areas is not areas and looked.areas != areas:
            looked.close()
            looked = None
        if looked is None:
            looked = self.look(pid, areas, tracker)
            self.finish_look(looked)
        pipe = looked.pipe
        begun = time.monotonic()
        try:
            transfer.write_hole(pipe)
            tracked = tracker.arm(looked.scanner, looked.private) if tracker is not None and keep_tracking else 0
        finally:
            looked.close()
        scanned = time.monotonic()
        self._copy(transfer, pipe, Source(pid))
        is_early = pid in self._early
        whole = pipe.settled() if is_early else pipe
        counts = MemoryCounts(
            scanned=whole.scanned_pages,
            dumped=whole.pages(PageKind.DUMPED),
            zero=whole.pages(PageKind.ZERO),
            parent=whole.pages(PageKind.PARENT),
            lazy=whole.lazy_pages,
            early=pipe.pages(PageKind.PARENT) if is_early else 0,
            bytes=whole.dumped_bytes,
            scan_time=looked.seconds + scanned - begun,
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
