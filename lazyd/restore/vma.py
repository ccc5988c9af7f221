# SPDX-License-Identifier: MIT
"""The areas of a task's address space, as a restorer sees them. Bits of a VMA's status: see FACTS of the images."""

from __future__ import annotations

from lazyd.enums import Enum
from lazyd.hints import Any
from lazyd.image.directory import MAP_ANONYMOUS, MAP_HUGETLB, MAP_LOCKED, MAP_PRIVATE, VMA_VDSO, VMA_VSYSCALL, VMA_VVAR
from lazyd.tuples import NamedTuple

_REGULAR, _STACK, _HEAP, _FILE_PRIVATE, _FILE_SHARED = 1, 1 << 1, 1 << 5, 1 << 6, 1 << 7
_ANONYMOUS_SHARED, _ANONYMOUS_PRIVATE, _MEMFD = 1 << 8, 1 << 9, 1 << 14
_PLAIN = _REGULAR | _STACK | _HEAP | _FILE_PRIVATE | _FILE_SHARED | _ANONYMOUS_SHARED | _ANONYMOUS_PRIVATE | _MEMFD
_WORDS = {1 << 10: "System V shared memory", 1 << 11: "a socket's ring", 1 << 13: "asynchronous I/O (io_setup)"}


class Kind(Enum):
    """What an area is."""

    PRIVATE = "private memory"
    PRIVATE_FILE = "private mapping of a file"
    SHARED = "shared memory"
    SHARED_FILE = "shared mapping of a file"
    MEMFD = "a memfd"
    VDSO = "vdso"
    VVAR = "vvar"
    VSYSCALL = "vsyscall"
    OTHER = "something else"


class Area(NamedTuple):
    """An area. `file`: its number in files.img; `shared_id`: of pagemap-shmem-ID.img; 0 where there is none."""

    start: int
    end: int
    prot: int
    flags: int
    offset: int
    kind: Kind
    advice: int
    file: int
    file_flags: int
    shared_id: int
    shared_size: int

    @property
    def is_lazy(self) -> bool:
        """Say whether its pages may come later."""
        return self.kind is Kind.PRIVATE and not self.flags & (MAP_LOCKED | MAP_HUGETLB)

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


def read_area(record: Any) -> Area:  # noqa: ANN401  a protobuf message
    """Return what a record of mm-PID.img means."""
    kind = _kind(record)
    has_file = kind in (Kind.PRIVATE_FILE, Kind.SHARED_FILE)
    return Area(
        start=record.start,
        end=record.end,
        prot=record.prot,
        flags=record.flags,
        offset=record.pgoff,
        kind=kind,
        advice=record.madv,
        file=record.shmid if has_file else 0,
        file_flags=record.fdflags if record.HasField("fdflags") else -1,
        shared_id=record.shmid if kind is Kind.SHARED else 0,
        shared_size=0,
    )


def _kind(record: Any) -> Kind:  # noqa: ANN401
    status = record.status
    if status & VMA_VSYSCALL:
        return Kind.VSYSCALL
    if status & VMA_VDSO:
        return Kind.VDSO
    if status & VMA_VVAR:
        return Kind.VVAR
    if status & ~_PLAIN or record.flags & MAP_HUGETLB:
        return Kind.OTHER
    if status & _MEMFD:
        return Kind.MEMFD if status & _FILE_SHARED else Kind.OTHER
    for bit, kind in (
        (_FILE_PRIVATE, Kind.PRIVATE_FILE),
        (_FILE_SHARED, Kind.SHARED_FILE),
        (_ANONYMOUS_SHARED, Kind.SHARED),
        (_ANONYMOUS_PRIVATE, Kind.PRIVATE),
    ):
        if status & bit:
            return kind
    both = MAP_ANONYMOUS | MAP_PRIVATE
    return Kind.PRIVATE if record.flags & both == both else Kind.OTHER


def why_not_plain(record: Any) -> str:  # noqa: ANN401
    """Say what an area is that is not plain."""
    if record.flags & MAP_HUGETLB:
        return "huge pages (hugetlb)"
    if record.status & _MEMFD:
        return "a private mapping of a memfd"
    return next((word for bit, word in _WORDS.items() if record.status & bit), f"of kind {record.status:#x}")
