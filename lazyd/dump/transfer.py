# SPDX-License-Identifier: MIT
"""Where the memory of a dump goes: one interface, into local images here, to a page server in page_server.

A destination opens one transfer for each image of memory: a task, or an object of shared memory. A transfer gets
one page pipe: first its holes, to be checked; then, while the task is stopped, its pages; last, and that may be
when the task runs again, its pagemap. Bytes go from the task to their place in C.

Images that are here take pages early, too: while the task runs, in the order of a pipe of their own. The pipe that
comes when it is stopped then has holes for what is clean since, and its dumped pages go into a file without a name.
"""

from __future__ import annotations

import abc
import contextlib
import os
from pathlib import Path

from lazyd.dump.core import (
    EarlyPages,
    PageKind,
    PagemapFormat,
    PagePipe,
    Progress,
    Room,
    Source,
    copy_early,
    copy_pages,
)
from lazyd.enums import IntEnum
from lazyd.errors import DumpError, SystemCallError
from lazyd.image import ExtentTable
from lazyd.image.parent import ParentTable, load_parent
from lazyd.image.writer import ImagesWriter, write_error
from lazyd.tuples import NamedTuple

_THREADS_MAX = 4


class ImageType(IntEnum):
    """What an image of memory is of, as the page server's protocol numbers it."""

    TASK = 1
    SHARED = 2


class MemoryImage(NamedTuple):
    """An image of memory: of a task by its pid as its images have it, or of shared memory by its id."""

    type: ImageType
    number: int

    @property
    def pagemap_name(self) -> str:
        """The name of its pagemap."""
        return f"pagemap-{self.number}.img" if self.type is ImageType.TASK else f"pagemap-shmem-{self.number}.img"


class Transfer(abc.ABC):
    """One image of memory on its way."""

    takes_early = False
    """Whether write_early() does anything."""

    def __init__(self, image: MemoryImage) -> None:
        self.image = image

    @property
    @abc.abstractmethod
    def parent(self) -> ExtentTable | None:
        """What the parent has of this image, as far as that is known here."""

    @property
    @abc.abstractmethod
    def may_have_parent_holes(self) -> bool:
        """Say whether the destination has a parent of this image."""

    def write_early(self, pipe: PagePipe, pid: int, progress: Progress) -> bool:
        """Take pages of a task while it runs; False if that cannot be. DumpError if the dump was cancelled."""
        return False

    def reserve_late(self, expected_bytes: int) -> None:  # noqa: B027  nothing to do where nothing is taken early
        """Make room, before the task is stopped, for what was written since the early pages were taken."""

    @abc.abstractmethod
    def write_hole(self, pipe: PagePipe) -> None:
        """Take the holes of a pipe. DumpError for a parent hole that the parent does not have."""

    @abc.abstractmethod
    def write_pages(self, pipe: PagePipe, source: Source, progress: Progress) -> None:
        """Take the bytes of the dumped pages."""

    @abc.abstractmethod
    def write_pagemap(self, pipe: PagePipe) -> None:
        """Write the entries: runs and holes in order of address."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the transfer, complete or not; a second call does nothing."""


class Destination(abc.ABC):
    """Where the images of memory of one dump go."""

    form: PagemapFormat

    @abc.abstractmethod
    def open(self, image: MemoryImage, expected_bytes: int = 0) -> Transfer:
        """Start an image, before the task is stopped; `expected_bytes` are made room for."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the destination: all that belongs to the dump is there."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give up, so that nobody takes what is there for a whole dump; after close() this does nothing."""


class LocalImages(Destination):
    """A directory of images in the making."""

    def __init__(
        self,
        writer: ImagesWriter,
        form: PagemapFormat | None = None,
        *,
        auto_dedup: bool = False,
        threads: int | None = None,
    ) -> None:
        """Put images into `writer`, over those of its parent.

        auto_dedup: punch_parents() will be called. threads: that copy; None: as many as help.
        """
        self.form = form or PagemapFormat()
        self._writer = writer
        self._auto_dedup = auto_dedup
        self._threads = threads or min(_THREADS_MAX, len(os.sched_getaffinity(0)))
        self._next_pages_id = 1
        self._transfers: list[LocalTransfer] = []

    def open(self, image: MemoryImage, expected_bytes: int = 0) -> Transfer:
        """Start an image: its parent is loaded whole, its pages image is made and room reserved."""
        parent = None
        if self._writer.parent is not None:
            parent = load_parent(self._writer.parent, image.pagemap_name, self.form.dialect)
        pages_id = self._next_pages_id
        self._next_pages_id += 1
        transfer = LocalTransfer(image, self._writer, self.form, pages_id=pages_id, parent=parent)
        transfer.threads = self._threads
        transfer.reserve(expected_bytes)
        self._transfers.append(transfer)
        return transfer

    def close(self) -> None:
        """Close what is open; the images are complete once every pagemap is written."""
        for transfer in self._transfers:
            transfer.close()

    def abort(self) -> None:
        """Close what is open; it is the writer who publishes or not."""
        self.close()

    def punch_parents(self) -> int:
        """Free in the parents what this dump replaces; return how many bytes.

        Only after publish(): before, the parents are all there is. The images are whole whether this works or not.
        """
        assert self._auto_dedup
        return sum(transfer.punch_parent() for transfer in self._transfers)


class LocalTransfer(Transfer):
    """One pagemap and its pages image in a directory in the making."""

    threads = 1
    takes_early = True

    def __init__(
        self,
        image: MemoryImage,
        writer: ImagesWriter,
        form: PagemapFormat,
        *,
        pages_id: int,
        parent: ParentTable | None,
    ) -> None:
        super().__init__(image)
        self._writer = writer
        self._form = form
        self._pages_id = pages_id
        self._parent = parent
        self._pipe: PagePipe | None = None
        self._pages_path = writer.path / f"pages-{pages_id}.img"
        self._fd = writer.create(self._pages_path.name)
        self._room = Room()
        self._early: EarlyPages | None = None
        self._late_fd = -1
        self._late_room = Room()

    @property
    def parent(self) -> ExtentTable | None:
        """What the parent's chain has of this image."""
        return None if self._parent is None else self._parent.extents

    @property
    def may_have_parent_holes(self) -> bool:
        """Say whether the parent has this image at all: a task that is new since has none."""
        return self._parent is not None

    def reserve(self, expected_bytes: int) -> None:
        """Have room and pages ready, so that neither is looked for while the task is stopped.

        Whatever is wrong here shows when the bytes are written, if they are that many at all.
        """
        if expected_bytes:
            with contextlib.suppress(OSError):
                self._room.make(self._fd, expected_bytes, warm=min(expected_bytes, _spare_memory()))

    def write_early(self, pipe: PagePipe, pid: int, progress: Progress) -> bool:
        """Copy pages into the image, where they stay if nothing comes or goes before them."""
        early = EarlyPages(pipe)
        try:
            self._late_fd = self._writer.create_nameless(f"{self._pages_path.name}.late")
            copy_early(pid, early, self._fd, room=self._room, threads=self.threads, progress=progress)
        except OSError:
            return False  # a full disk, that is: the copy that has to be made tells of it
        self._early = early
        return True

    def reserve_late(self, expected_bytes: int) -> None:
        """Make room in the file for what has been written since."""
        if expected_bytes:
            with contextlib.suppress(OSError):
                self._late_room.make(self._late_fd, expected_bytes, warm=min(expected_bytes, _spare_memory()))

    def write_hole(self, pipe: PagePipe) -> None:
        """Check that the parent has the bytes of every parent hole, over its whole length."""
        if self._early is not None:
            pipe.match_early(self._early)
            return
        if not pipe.pages(PageKind.PARENT):
            return
        name = self.image.pagemap_name
        if self._parent is None:
            raise DumpError(f"{self._writer.parent or self._writer.path}: no {name} for the parent holes of this dump")
        address = pipe.first_hole_not_in(self._parent.extents)
        if address is not None:
            reason = "a page that was not written since has no bytes there; dump again without --parent"
            raise DumpError(f"{self._writer.parent}, {name}, address {address:#x}: {reason}")

    def write_pages(self, pipe: PagePipe, source: Source, progress: Progress) -> None:
        """Copy the dumped pages into the pages image."""
        fd, room = (self._fd, self._room) if self._early is None else (self._late_fd, self._late_room)
        try:
            copy_pages(source, pipe, fd, room=room, threads=self.threads, progress=progress)
        except OSError as error:
            raise write_error("write", self._pages_path, error) from error

    def write_pagemap(self, pipe: PagePipe) -> None:
        """Write the pagemap image, and give back the room that was not needed."""
        name = self.image.pagemap_name
        self._room.close()
        self._late_room.close()
        if self._early is not None:
            try:
                pipe.merge_early(self._early, self._fd, self._late_fd)
            except OSError as error:
                raise write_error("write", self._pages_path, error) from error
            pipe = pipe.settled()
        self._pipe = pipe
        try:
            os.ftruncate(self._fd, pipe.dumped_bytes)
        except OSError as error:
            raise write_error("ftruncate", self._pages_path, error) from error
        fd = self._writer.create(name)
        try:
            pipe.write_pagemap(fd, self._pages_id, self._form)
        except OSError as error:
            raise write_error("write", self._writer.path / name, error) from error
        finally:
            os.close(fd)

    def punch_parent(self) -> int:
        """Punch what was dumped, or became zeros, out of the parents' pages images."""
        if self._parent is None or self._pipe is None:
            return 0
        return punch_parent(self._parent, self._pipe)

    def close(self) -> None:
        """Close the pages image."""
        self._room.close()
        self._late_room.close()
        for fd in (self._fd, self._late_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._late_fd = -1


def punch_parent(parent: ParentTable, pipe: PagePipe) -> int:
    """Punch what a pipe replaces out of the parents' pages images; return how many bytes."""
    fds: list[int] = []
    path = Path()
    try:
        for path in parent.sources:
            fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return pipe.punch(parent.extents, fds)
    except OSError as error:
        hint = "the new images are whole; only their parents keep what is not needed any more"
        raise SystemCallError("fallocate", error.errno or 0, path=path, hint=hint) from error
    finally:
        for fd in fds:
            os.close(fd)


def _spare_memory() -> int:
    """Return how many bytes of the page cache may be made dirty without a disk being set to work for it.

    A tenth of what is available is where writing back begins (vm.dirty_background_ratio as it ships).
    """
    with Path("/proc/meminfo").open() as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return (int(line.split()[1]) << 10) // 10
    return 0
