# SPDX-License-Identifier: MIT
# ruff: noqa: ANN401  what comes from cffi has no static type
"""The typed face of the dumping core (cbits/{scan,track,pipe,copy}.c), and the only importer of its compiled module.

Pages never pass through here: what Python sees of them is how many of which kind there are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from types import TracebackType

from lazyd.dump._memory import ffi, lib
from lazyd.enums import Enum, IntEnum
from lazyd.errors import DumpError, SystemCallError
from lazyd.hints import Any
from lazyd.image import Dialect, ExtentTable
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE


class PageKind(IntEnum):
    """What a page is to a dump (enum lz_page); a page that is not mapped is none of these."""

    ZERO = lib.LZ_PAGE_ZERO
    PARENT = lib.LZ_PAGE_PARENT
    DUMPED = lib.LZ_PAGE_DUMPED


class AreaKind(Enum):
    """How the pages of an area are dumped."""

    PRIVATE_ANON = "private anonymous"
    """What is mapped."""
    PRIVATE_FILE = "private file"
    """What is the task's own copy: the rest is in the file."""
    SHARED_ANON = "shared anonymous"
    """What its object of shared memory holds, once for each object, in an image of its own."""
    WHOLE = "whole"
    """Every page, mapped or not: the vdso."""


class Area(NamedTuple):
    """A run of a task's address space to dump: page-aligned and inside one VMA.

    A VMA may be cut into several, so that single pages are not lazy. A shared area is a whole VMA; `shmid` and
    `pgoff` (bytes) are those of its VMA entry: the object it shows, and from where on.
    """

    start: int
    end: int
    kind: AreaKind
    lazy: bool = False
    shmid: int = 0
    pgoff: int = 0


class Track(IntEnum):
    """By what a page is known to be clean (enum lz_track)."""

    NONE = lib.LZ_TRACK_NONE
    UFFD = lib.LZ_TRACK_UFFD
    SOFT_DIRTY = lib.LZ_TRACK_SOFT_DIRTY


class ScanMethod(IntEnum):
    """How page tables are read (enum lz_scan_method)."""

    AUTO = lib.LZ_SCAN_AUTO
    IOCTL = lib.LZ_SCAN_IOCTL
    PAGEMAP = lib.LZ_SCAN_PAGEMAP


class Run(NamedTuple):
    """A run of pages of one kind."""

    start: int
    pages: int
    kind: PageKind
    lazy: bool

    @property
    def end(self) -> int:
        """The first address behind the run."""
        return self.start + self.pages * PAGE_SIZE


class PagemapFormat(NamedTuple):
    """How pagemap entries are written.

    wide: page counts in field 5, which only criu from 4.2 on reads; field 2 both eras read. lazy_holes: parent holes
    say that they may be restored lazily; a stock daemon does not answer faults in those, a restorer without one reads
    them like any other.
    """

    dialect: Dialect = Dialect.FLAGS
    wide: bool = False
    lazy_holes: bool = True

    @property
    def has_zero_holes(self) -> bool:
        """Say whether zero holes are entries; else they are left out, which reads the same."""
        return self.dialect is Dialect.BOOLEANS


class PagePipe:
    """Runs of pages and holes in order of address. Its memory is C's: close() gives it back."""

    def __init__(self) -> None:
        self._raw = ffi.gc(ffi.new("struct lz_page_pipe *"), lib.lz_pipe_free)

    def __len__(self) -> int:
        return int(self._raw.count)

    def __iter__(self) -> Iterator[Run]:
        """Yield the runs; for tests and people, not for speed."""
        for index in range(len(self)):
            run = self._raw.runs[index]
            yield Run(run.start, run.pages, PageKind(run.kind), bool(run.lazy))

    def add(self, start: int, pages: int, kind: PageKind, *, lazy: bool = False) -> None:
        """Append pages; ValueError if they do not lie behind all that is in the pipe."""
        result = lib.lz_pipe_add(self._raw, start, pages, kind, lazy)
        if result == -errno.EINVAL:
            raise ValueError(f"{start:#x} does not lie behind what was added before")
        if result < 0:
            raise MemoryError

    @property
    def pointer(self) -> int:
        """The address of its struct lz_page_pipe, for other compiled modules."""
        return int(ffi.cast("uintptr_t", self._raw))

    def pages(self, kind: PageKind) -> int:
        """Return how many pages of a kind there are."""
        return int(self._raw.pages[kind])

    @property
    def scanned_pages(self) -> int:
        """How many mapped pages were looked at, those that are the file's own included."""
        return int(self._raw.scanned_pages)

    @property
    def lazy_pages(self) -> int:
        """How many of the dumped pages may be restored lazily."""
        return int(self._raw.lazy_pages)

    @property
    def dumped_bytes(self) -> int:
        """How long the pages image is."""
        return self.pages(PageKind.DUMPED) * PAGE_SIZE

    def first_hole_not_in(self, parent: ExtentTable) -> int | None:
        """Return the first address of a parent hole for which the parent has no bytes, or None."""
        address = ffi.new("uint64_t *")
        rows = _rows(parent)
        if lib.lz_pipe_check_parent(self._raw, rows, len(parent), address) < 0:
            return int(address[0])
        return None

    def require_parent(self, parent: ExtentTable) -> None:
        """Turn parent holes into dumped pages where the parent has no bytes."""
        rows = _rows(parent)
        if lib.lz_pipe_require_parent(self._raw, rows, len(parent)) < 0:
            raise MemoryError

    def match_early(self, early: EarlyPages) -> None:
        """Leave as parent holes the clean pages that were copied early, and make all other clean ones dumped ones."""
        if lib.lz_early_match(self._raw, early.pipe._raw, early.done) < 0:
            raise MemoryError

    def settled(self) -> PagePipe:
        """Return a pipe of all pages with clean ones as dumped ones."""
        settled = PagePipe()
        if lib.lz_early_settle(self._raw, settled._raw) < 0:
            raise MemoryError
        return settled

    def merge_early(self, early: EarlyPages, image: int, late: int) -> None:
        """Bring what was copied early, in `image`, and what was then, in `late`, into the order of settled(). OSError.

        Both are descriptors open for reading and writing; the image's size is anything afterwards.
        """
        result = lib.lz_early_merge(self._raw, early.pipe._raw, image, late)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def punch(self, parent: ExtentTable, fds: Sequence[int]) -> int:
        """Punch what this pipe replaces out of the parents' pages images; return how many bytes.

        fds: by source of the parent's rows, open for writing. OSError if the filesystem cannot punch.
        """
        rows = _rows(parent)
        result = int(lib.lz_pipe_punch_parent(self._raw, rows, len(parent), ffi.new("int[]", list(fds))))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def write_pagemap(self, fd: int, pages_id: int, form: PagemapFormat) -> int:
        """Write the pagemap image; return its length. OSError if that fails."""
        raw = ffi.new("struct lz_entry_format *")
        raw.dialect = _DIALECTS[form.dialect]
        raw.wide = form.wide
        raw.lazy_holes = form.lazy_holes
        result = int(lib.lz_pagemap_write(fd, pages_id, self._raw, raw))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def close(self) -> None:
        """Free the runs; a second call does nothing."""
        lib.lz_pipe_free(self._raw)


# enum lz_dialect, which the module of pagemaps owns
_DIALECTS = {Dialect.BOOLEANS: 1, Dialect.FLAGS: 2}
_AREA_KINDS = {
    AreaKind.PRIVATE_ANON: lib.LZ_AREA_ANON,
    AreaKind.PRIVATE_FILE: lib.LZ_AREA_FILE,
    AreaKind.WHOLE: lib.LZ_AREA_WHOLE,
}


def _rows(table: ExtentTable) -> Any:
    return ffi.from_buffer("struct lz_extent[]", table.buffer)


class AreaList:
    """Areas of private memory as C has them, with what is known of each while one dump goes on."""

    def __init__(self, areas: Sequence[Area]) -> None:
        """Take areas that are sorted and disjoint, none of them shared."""
        self.areas = areas
        self._raw = ffi.new("struct lz_area[]", len(areas))
        end = 0
        for raw, area in zip(self._raw, areas, strict=True):
            if area.start < end or area.end <= area.start or (area.start | area.end) % PAGE_SIZE:
                raise ValueError(f"areas must be sorted, disjoint and page-aligned: {area}")
            end = area.end
            raw.start, raw.end, raw.kind = area.start, area.end, _AREA_KINDS[area.kind]
            raw.flags = lib.LZ_AREA_LAZY if area.lazy else 0

    def __len__(self) -> int:
        return len(self.areas)

    def trusted(self) -> list[bool]:
        """Say of each area whether its written pages can be told."""
        return [bool(raw.flags & lib.LZ_AREA_TRUSTED) for raw in self._raw]

    def armed(self) -> list[bool]:
        """Say of each area whether writes to it are tracked from here on."""
        return [bool(raw.flags & lib.LZ_AREA_ARMED) for raw in self._raw]


class Scanner:
    """A task's open page tables. As a context manager it closes them."""

    def __init__(self, pid: int, method: ScanMethod = ScanMethod.AUTO) -> None:
        error = ffi.new("int *")
        raw = lib.lz_scanner_open(pid, method, error)
        if raw == ffi.NULL:
            hint = "the task is gone" if error[0] in (-errno.ENOENT, -errno.ESRCH) else "run as root"
            raise SystemCallError("open", -error[0], path=f"/proc/{pid}/pagemap", hint=hint)
        self.pid = pid
        self._raw = ffi.gc(raw, lib.lz_scanner_close)

    @property
    def method(self) -> ScanMethod:
        """How the tables are read."""
        return ScanMethod(lib.lz_scanner_method(self._raw))

    def scan(self, areas: AreaList, pipe: PagePipe, track: Track = Track.NONE) -> None:
        """Classify the pages of the areas into the pipe. The task must not run."""
        result = lib.lz_scan(self._raw, track, areas._raw, len(areas), pipe._raw)
        if result == -errno.ENOMEM:
            raise MemoryError
        if result < 0:
            raise SystemCallError("read", -result, path=f"/proc/{self.pid}/pagemap")

    def check_trust(self, areas: AreaList, track: Track, uffd: int) -> bool:
        """Find out which areas have been tracked all the time; False if the tracking was lost altogether."""
        return int(lib.lz_track_check(self._raw, track, uffd, areas._raw, len(areas))) == 0

    def arm(self, areas: AreaList, track: Track, uffd: int) -> int:
        """Track writes from here on; return in how many areas. OSError if in none, whatever happens later."""
        result = int(lib.lz_track_arm(self._raw, track, uffd, self.pid, areas._raw, len(areas)))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def close(self) -> None:
        """Close the tables."""
        ffi.release(self._raw)

    def __enter__(self) -> Scanner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track_method() -> Track:
    """Return by what this kernel can track writes."""
    return Track(lib.lz_track_method())


def open_tracking(uffd: int) -> None:
    """Negotiate what tracking needs with a userfaultfd that was opened in the task; OSError if it cannot."""
    result = lib.lz_track_open(uffd)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def scan_file(fd: int, size: int, pipe: PagePipe) -> None:
    """Add what a file of shared memory holds of its first `size` bytes to a pipe; OSError if that fails."""
    result = lib.lz_scan_file(fd, size, pipe._raw)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


class Room:
    """Room for a pages image, made before the task is stopped: blocks on the disk, pages in the page cache."""

    def __init__(self) -> None:
        self._raw = ffi.gc(ffi.new("struct lz_room *"), lib.lz_room_free)

    def make(self, fd: int, length: int, *, warm: int) -> None:
        """Make room for a file that is to become this long, of which `warm` bytes get their pages; once.

        The file's size is anything afterwards. OSError if there is no room, or none of this kind: then the file is
        written as any other.
        """
        result = lib.lz_room_make(fd, length, warm & -PAGE_SIZE, self._raw)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def close(self) -> None:
        """Let go of the pages, which stay the file's; a second call does nothing."""
        lib.lz_room_free(self._raw)


class Source(NamedTuple):
    """Where bytes come from: a task by its pid, or (pid 0) a file by its descriptor."""

    pid: int
    fd: int = -1


class Progress:
    """How far a copy is. Any thread may read it, or cancel the copy."""

    def __init__(self) -> None:
        self._raw = ffi.new("struct lz_copy_state *")

    @property
    def copied_bytes(self) -> int:
        """Bytes copied so far."""
        return int(self._raw.copied_bytes)

    def cancel(self) -> None:
        """Make the copy give up with DumpError."""
        self._raw.cancel = 1

    def error(self, source: Source) -> DumpError | OSError:
        """Return what made a copy fail: DumpError if it was reading, OSError if it was writing."""
        number = int(self._raw.code)
        if number == errno.ECANCELED:
            return DumpError("cancelled")
        if self._raw.writing:
            return OSError(number, os.strerror(number))
        address = int(self._raw.address)
        why = errno.errorcode.get(number, str(number))
        if source.pid:
            return DumpError(f"task {source.pid}: the page at {address:#x} cannot be read ({why}); nothing was dumped")
        return DumpError(f"shared memory: the page at offset {address:#x} cannot be read ({why}); nothing was dumped")


def copy_pages(source: Source, pipe: PagePipe, fd: int, *, room: Room, threads: int, progress: Progress) -> None:
    """Copy the dumped pages of a pipe into the pages image behind fd; errors as Progress.error() returns them."""
    if source.pid:
        result = lib.lz_copy_pages(source.pid, pipe._raw, fd, room._raw, threads, progress._raw)
    else:
        result = lib.lz_copy_file(source.fd, pipe._raw, fd, room._raw, threads, progress._raw)
    if result < 0:
        raise progress.error(source)


class EarlyPages:
    """The pages that were copied while the task still ran, in the order of a pipe."""

    def __init__(self, pipe: PagePipe) -> None:
        self.pipe = pipe
        batches = -(-pipe.dumped_bytes // lib.LZ_EARLY_BATCH_BYTES)
        self.done = ffi.new("uint8_t[]", batches + 1)
        """By batch, whether it was copied."""


def copy_early(pid: int, early: EarlyPages, fd: int, *, room: Room, threads: int, progress: Progress) -> None:
    """Copy pages of a task that runs into the pages image behind fd; those that cannot be read any more are left out.

    Errors as Progress.error() returns them.
    """
    result = lib.lz_copy_early(pid, early.pipe._raw, fd, room._raw, threads, early.done, progress._raw)
    if result < 0:
        raise progress.error(Source(pid))


def stream_pages(
    source: Source,
    pipe: PagePipe,
    fd: int,
    *,
    dst_id: int,
    header_bytes: int,
    form: PagemapFormat,
    progress: Progress,
) -> None:
    """Send the runs of a pipe to a page server, with the bytes of the dumped ones; errors as copy_pages()."""
    raw = ffi.new("struct lz_stream_format *")
    raw.dst_id, raw.header_bytes = dst_id, header_bytes
    raw.zero_holes, raw.lazy_holes = form.has_zero_holes, form.lazy_holes
    result = lib.lz_stream_pages(source.pid, source.fd, pipe._raw, fd, raw, progress._raw)
    if result < 0:
        raise progress.error(source)
