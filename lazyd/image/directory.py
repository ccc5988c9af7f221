# SPDX-License-Identifier: MIT
"""One images directory: its inventory, its tasks, and their address spaces.

The small images are read with protobuf. What is imported here is on the way to the listening socket, whose
delay users feel: nothing heavier than it must be.
"""

from __future__ import annotations

import os
from pathlib import Path

from google.protobuf.message import DecodeError

from lazyd.enums import Enum
from lazyd.errors import ImageError
from lazyd.hints import Any
from lazyd.image.framing import (
    CORE_MAGICS,
    INVENTORY_MAGICS,
    MM_MAGICS,
    PSTREE_MAGICS,
    Record,
    read_error,
    read_small_image,
    split_records,
)
from lazyd.image.pb import inventory_pb2, mm_pb2, pstree_pb2
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, USER_SPACE_END, ImageAddress

# protobuf makes the classes of a generated module at run time: type checkers cannot see them.
_inventory: Any = inventory_pb2
_pstree: Any = pstree_pb2
_mm: Any = mm_pb2

# Image versions: 1 had one magic a file, 2 ("1.1") is what every CRIU since 2014 writes.
KNOWN_VERSIONS = (1, 2)

# mmap(2) flags, asm-generic; x86-64 and aarch64 agree.
MAP_PRIVATE = 0x02
MAP_ANONYMOUS = 0x20
MAP_LOCKED = 0x2000
MADV_WIPEONFORK = 18  # include/uapi/asm-generic/mman-common.h
MAP_HUGETLB = 0x40000

# Bits of a VMA's status.
VMA_VSYSCALL = 1 << 2
VMA_VDSO = 1 << 3
VMA_VVAR = 1 << 12
VMA_GUARD = 1 << 16
_STATUS_WORDS = (
    (1 << 1, "stack"),
    (VMA_VSYSCALL, "vsyscall"),
    (VMA_VDSO, "vdso"),
    (1 << 5, "heap"),
    (1 << 6, "file private"),
    (1 << 7, "file shared"),
    (1 << 10, "System V shared memory"),
    (VMA_VVAR, "vvar"),
    (1 << 13, "aio ring"),
    (1 << 14, "memfd"),
    (1 << 8, "anonymous shared"),
    (1 << 9, "anonymous private"),
)


class TaskState(Enum):
    """The states of a task that its core image can hold."""

    ALIVE = 1
    DEAD = 2
    STOPPED = 3
    ZOMBIE = 6


class Vma(NamedTuple):
    """A virtual memory area as it was dumped."""

    start: ImageAddress
    end: ImageAddress
    prot: int
    flags: int
    status: int
    pgoff: int
    shmid: int
    fd: int
    madv: int

    @property
    def is_lazy(self) -> bool:
        """Say whether restore leaves this area to lazy pages: private, anonymous, not locked or huge."""
        return (
            self.flags & (MAP_ANONYMOUS | MAP_PRIVATE) == MAP_ANONYMOUS | MAP_PRIVATE
            and not self.flags & (MAP_LOCKED | MAP_HUGETLB)
            and not self.status & (VMA_VDSO | VMA_VVAR | VMA_VSYSCALL)
        )

    @property
    def is_wiped_on_fork(self) -> bool:
        """Say whether the child of a fork finds zeros here: criu keeps advice as a mask, one bit a number."""
        return bool(self.madv >> MADV_WIPEONFORK & 1)

    @property
    def kind(self) -> str:
        """What the area is, in words for people."""
        return next((word for bit, word in _STATUS_WORDS if self.status & bit), "other")


class Program(NamedTuple):
    """Where the parts of a program are: exec puts them at random places."""

    start_code: int
    start_stack: int
    start_brk: int


class TaskEntry(NamedTuple):
    """A task as `pstree.img` lists it. Ids are those of its innermost pid namespace; ppid 0 is the root."""

    pid: int
    ppid: int
    threads: tuple[int, ...]


class CoreState(NamedTuple):
    """What a core image says about its task; `state` is None for a number that TaskState does not have."""

    state: TaskState | None
    state_number: int
    comm: str


class ImagesDirectory:
    """One directory of images, held by its descriptor until close()."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> ImagesDirectory:
        """Open a directory by its path."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise read_error(path, error) from error
        return cls(path, fd)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def records(self, name: str, magics: tuple[int, ...]) -> list[Record]:
        """Return the records of a small image; FileNotFoundError if it is not there."""
        path = self.path / name
        return split_records(path, read_small_image(self.fd, path), magics)

    def _only_record(self, name: str, magics: tuple[int, ...]) -> Record:
        records = self.records(name, magics)
        if len(records) != 1:
            raise ImageError(self.path / name, f"{len(records)} records where there should be one")
        return records[0]

    def _parse(self, name: str, record: Record, message: Any) -> Any:  # noqa: ANN401  see above
        try:
            return message.FromString(record.body)
        except DecodeError as error:
            reason = f"garbled: not a {message.DESCRIPTOR.name} message"
            raise ImageError(self.path / name, reason, offset=record.offset) from error

    def check_inventory(self) -> None:
        """Check that the images have a version that is known; FileNotFoundError without an inventory."""
        name = "inventory.img"
        record = self._only_record(name, INVENTORY_MAGICS)
        version = self._parse(name, record, _inventory.Inventory).img_version
        if version not in KNOWN_VERSIONS:
            known = " and ".join(map(str, KNOWN_VERSIONS))
            reason = f"images of version {version}, of which nothing is known here (known: {known})"
            raise ImageError(self.path / name, reason, offset=record.offset)

    def read_dump_uptime(self) -> int:
        """Return when the images were dumped, in microseconds since the machine was started; 0: they do not say.

        FileNotFoundError without an inventory.
        """
        name = "inventory.img"
        self.check_inventory()
        return int(self._parse(name, self._only_record(name, INVENTORY_MAGICS), _inventory.Inventory).dump_uptime)

    def read_pstree(self) -> list[TaskEntry]:
        """Return the tasks in the order of the image, parents before their children."""
        name = "pstree.img"
        path = self.path / name
        try:
            records = self.records(name, PSTREE_MAGICS)
        except FileNotFoundError as error:
            raise ImageError(path, "missing: without it nobody knows the tasks") from error
        tasks: list[TaskEntry] = []
        seen: set[int] = set()
        for record in records:
            entry = self._parse(name, record, _pstree.PstreeEntry)
            if not 0 < entry.pid < 1 << 31:
                raise ImageError(path, f"{entry.pid} is no pid", offset=record.offset)
            if entry.pid in seen:
                raise ImageError(path, f"task {entry.pid} is listed twice", offset=record.offset)
            if tasks and entry.ppid not in seen:
                reason = f"task {entry.pid} has parent {entry.ppid}, which is not listed before it"
                raise ImageError(path, reason, offset=record.offset)
            seen.add(entry.pid)
            tasks.append(TaskEntry(entry.pid, entry.ppid, tuple(entry.threads)))
        if not tasks:
            raise ImageError(path, "lists no task")
        return tasks

    def read_mm(self, pid: int) -> list[Vma]:
        """Return the VMAs of a task, sorted and disjoint; FileNotFoundError if it has none (a zombie).

        criu from 4.2 on lists guard pages (MADV_GUARD_INSTALL) behind them, as if they were VMAs: they are inside of
        one, and nobody ever needs a page there.
        """
        name = f"mm-{pid}.img"
        record = self._only_record(name, MM_MAGICS)
        mm = self._parse(name, record, _mm.Mm)
        vmas = []
        last_end = 0
        for vma in mm.vmas:
            if vma.status & VMA_GUARD:
                continue
            start, end = vma.start, vma.end
            area = f"the VMA {start:#x}-{end:#x}"
            reason = ""
            if start % PAGE_SIZE or end % PAGE_SIZE:
                reason = f"{area} is not page-aligned"
            elif start >= end:
                reason = f"{area} is empty or backwards"
            elif start < last_end:
                reason = f"{area} is not behind the one before, which ends at {last_end:#x}"
            elif end > USER_SPACE_END and not vma.status & VMA_VSYSCALL:
                reason = f"{area} is not inside user space, which ends at {USER_SPACE_END:#x}"
            if reason:
                raise ImageError(self.path / name, reason, offset=record.offset, address=start)
            last_end = end
            vmas.append(Vma(start, end, vma.prot, vma.flags, vma.status, vma.pgoff, vma.shmid, vma.fd, vma.madv))
        return vmas

    def read_program(self, pid: int) -> Program | None:
        """Return where the parts of a task's program are; None if the image does not say."""
        mm = self._parse(f"mm-{pid}.img", self._only_record(f"mm-{pid}.img", MM_MAGICS), _mm.Mm)
        if not (mm.HasField("mm_start_code") and mm.HasField("mm_start_stack") and mm.HasField("mm_start_brk")):
            return None
        return Program(mm.mm_start_code, mm.mm_start_stack, mm.mm_start_brk)

    def read_core(self, pid: int) -> CoreState:
        """Return what the core image of a task's leading thread says; FileNotFoundError if there is none."""
        from lazyd.image.pb import core_pb2  # noqa: PLC0415  only a task without memory is looked up at start

        core: Any = core_pb2
        name = f"core-{pid}.img"
        message = self._parse(name, self._only_record(name, CORE_MAGICS), core.Core)
        number = message.tc.task_state
        try:
            state = TaskState(number)
        except ValueError:
            state = None
        return CoreState(state, number, message.tc.comm)
