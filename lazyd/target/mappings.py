# SPDX-License-Identifier: MIT
"""The mappings of a task, as images describe them.

Facts: /proc/PID/smaps names every mapping with its flags (proc(5), VmFlags); the links in /proc/PID/map_files lead to
the mapped file itself, whatever its path is now, and their permissions are the mode that the file was opened with.
Shared anonymous memory is a file of the kernel's own, named /dev/zero and deleted, or a memfd that nobody has a
descriptor of any more (which is what `criu restore` makes of it); its inode number tells one object from another.
System V shared memory has its identifier for an inode number, and the first one of a machine is 0: it is by the device
that a mapping of a file is known from one of none.
vvar is in two parts on current kernels; images have it as one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lazyd.enums import Enum
from lazyd.hints import BinaryIO
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE

# mmap(2), asm-generic.
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 0x01, 0x02, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE = 0x100, 0x2000, 0x4000
_FLAGS = {b"gd": MAP_GROWSDOWN, b"lo": MAP_LOCKED, b"nr": MAP_NORESERVE}
# madvise(2); images keep one bit a number.
_ADVICE = {b"rr": 1, b"sr": 2, b"dc": 10, b"mg": 12, b"hg": 14, b"nh": 15, b"dd": 16, b"wf": 18}
# VmFlags has `gu` from 6.18 on; guard pages are there from 6.13 on.
_FLAGS_TELL_GUARDS = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 18)
# include/uapi/linux/fs.h: struct pm_scan_arg, struct page_region
_PAGEMAP_SCAN, _PRESENT, _SWAPPED, _GUARD = 0xC0606610, 1 << 3, 1 << 4, 1 << 8
_SCAN, _REGION, _REGIONS = struct.Struct("12Q"), struct.Struct("3Q"), 512
_DEVICE_ZERO = os.makedev(1, 5)
_NO_DEVICE = b"00:00"


class MappingKind(Enum):
    """What a mapping is; the word is for people."""

    PRIVATE = "private memory"
    PRIVATE_FILE = "private mapping of a file"
    SHARED = "shared memory"
    SHARED_FILE = "shared mapping of a file"
    VDSO = "vdso"
    VVAR = "vvar"
    VSYSCALL = "vsyscall"
    OTHER = "a mapping that is not memory"


_MAY_BE_GUARDED = (MappingKind.PRIVATE, MappingKind.PRIVATE_FILE, MappingKind.SHARED, MappingKind.SHARED_FILE)


class MappedFile(NamedTuple):
    """The file behind a mapping. `open_flags`: as it was opened, O_RDONLY or O_RDWR."""

    path: str
    device: int
    inode: int
    open_flags: int


class Mapping(NamedTuple):
    """A mapping. `flags` are mmap's, `advice` has bit n for madvise(n), `problem` says why it is not plain."""

    start: int
    end: int
    protection: int
    flags: int
    offset: int
    kind: MappingKind
    advice: int
    name: str
    file: MappedFile | None
    shared_inode: int
    problem: str
    may_have_guards: bool
    """Guard pages may be in it (MADV_GUARD_INSTALL): see find_guards."""
    is_write_protected: bool
    """Registered with a userfaultfd for write protection: a tracker's, ours or another's."""

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x} {self.name or self.kind.value}"


def _scan(pagemap: BinaryIO, start: int, end: int, *, anyof: int, but: int = 0) -> Iterator[tuple[int, int]]:
    """Yield what of a range has any of some categories and none of others, as PAGEMAP_SCAN says. OSError."""
    regions = ctypes.create_string_buffer(_REGIONS * _REGION.size)
    address = ctypes.addressof(regions)
    while start < end:
        asked = _SCAN.pack(_SCAN.size, 0, start, end, 0, address, _REGIONS, 0, but, but, anyof, anyof)
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(asked))
        got = [_REGION.unpack_from(regions, index * _REGION.size)[:2] for index in range(count)]
        yield from got
        start = got[-1][1] if count == _REGIONS else end


def find_guards(pid: int, mappings: Sequence[Mapping]) -> list[tuple[int, int]]:
    """Return the ranges of guard pages in a stopped task's mappings.

    Where the kernel does not know PAGEMAP_SCAN's category for them (before 6.15) there are none that can be seen.
    """
    areas = [mapping for mapping in mappings if mapping.may_have_guards and mapping.kind in _MAY_BE_GUARDED]
    if not areas:
        return []
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        try:
            return [found for area in areas for found in _scan(pagemap, area.start, area.end, anyof=_GUARD)]
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTTY):
                return []
            raise


def find_pages(pid: int, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (start, end, pages) of the ranges that have pages, there or swapped; guard pages are none.

    OSError; ENOTTY before Linux 6.7.
    """
    found = []
    but = _GUARD
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        for start, end in ranges:
            try:
                runs = list(_scan(pagemap, start, end, anyof=_PRESENT | _SWAPPED, but=but))
            except OSError as error:
                if error.errno != errno.EINVAL or not but:
                    raise
                but = 0  # Linux before 6.15 has guard pages among the swapped ones
                runs = list(_scan(pagemap, start, end, anyof=_PRESENT | _SWAPPED))
            if pages := sum(last - first for first, last in runs) // PAGE_SIZE:
                found.append((start, end, pages))
    return found


Known = dict[tuple[bytes, bytes], Mapping]


def read_mappings(pid: int, known: Known | None = None) -> list[Mapping]:
    """Return the mappings of a task, sorted; OSError if it is gone or may not be looked at.

    `known` keeps what was found out of each line, so that the next call, when the task is stopped, is quick: a mapping
    whose lines say the same device, inode, path, offset, protection and flags is the same to an image.
    """
    with Path(f"/proc/{pid}/smaps").open("rb") as smaps:
        text = smaps.read()
    known = {} if known is None else known
    found: list[Mapping] = []

    def add(header: bytes, flags: bytes) -> None:
        mapping = known.get((header, flags))
        if mapping is None:
            mapping = known[header, flags] = _read_one(pid, header.split(None, 5), frozenset(flags.split()[1:]))
        if mapping.kind is MappingKind.VVAR and found and found[-1].kind is MappingKind.VVAR:
            mapping = found.pop()._replace(end=mapping.end)
        found.append(mapping)

    for header, flags in _headers_and_flags(text):
        add(header, flags)
    return found


_FLAGS_WORD = b"VmFlags:"
_HEADER = rb"[0-9a-f]+-[0-9a-f]+ "


def _headers_and_flags(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the first line of each mapping of smaps and its flags, empty without any.

    A mapping has two dozen lines, and always the same ones on one machine: then they are counted, not looked at, which
    is several times quicker with ten thousands of mappings. Only what is at the counted places is held to be there.
    """
    is_header = re.compile(_HEADER).match
    lines = text.split(b"\n")
    if not lines[-1]:
        lines.pop()
    each = next((number for number, line in enumerate(lines, 1) if line.startswith(_FLAGS_WORD)), 0)
    if each and not len(lines) % each:
        headers, flags = lines[0::each], lines[each - 1 :: each]
        is_flags = [line.startswith(_FLAGS_WORD) for line in flags]
        if all(is_flags) and all(map(is_header, headers)):
            yield from zip(headers, flags, strict=True)
            return
    header = b""
    for line in lines:
        if line.startswith(_FLAGS_WORD):
            yield header, line
            header = b""
        elif is_header(line):
            if header:
                yield header, b""
            header = line
    if header:
        yield header, b""


def _read_one(pid: int, header: list[bytes], words: frozenset[bytes]) -> Mapping:
    start, end = (int(part, 16) for part in header[0].split(b"-"))
    protection = sum(
        bit for letter, bit in ((b"r", PROT_READ), (b"w", PROT_WRITE), (b"x", PROT_EXEC)) if letter in header[1]
    )
    is_shared = header[1].endswith(b"s")
    name = os.fsdecode(header[5]) if len(header) > 5 else ""
    file = None
    shared_inode = 0
    problem = ""
    kind = _KERNEL_NAMES.get(name)
    if kind is None and (int(header[4]) or header[3] != _NO_DEVICE):
        file, status = _read_file(pid, header[0].decode())
        problem = _file_problem(file.path, status, is_shared=is_shared)
        kind = MappingKind.SHARED_FILE if is_shared else MappingKind.PRIVATE_FILE
        if not problem and is_shared and file.path.endswith(DELETED):
            kind, shared_inode, file = MappingKind.SHARED, file.inode, None
        elif not problem and _is_device_zero(pid, header[0].decode()):
            kind, file = (MappingKind.PRIVATE, None) if not is_shared else (MappingKind.OTHER, file)
    elif kind is None:
        kind = MappingKind.PRIVATE
    if kind not in (MappingKind.VVAR, MappingKind.VSYSCALL, MappingKind.VDSO):
        problem = problem or next((text for word, text in _PROBLEMS.items() if word in words), "")
        if not problem and name == "[uprobes]":
            problem = "probes that a tracer of the system has set"
    is_anonymous = file is None
    flags = (MAP_SHARED if is_shared else MAP_PRIVATE) | (MAP_ANONYMOUS if is_anonymous else 0)
    flags |= sum(bit for word, bit in _FLAGS.items() if word in words)
    return Mapping(
        start=start,
        end=end,
        protection=protection,
        flags=flags,
        offset=int(header[2], 16) if file is not None or shared_inode else 0,
        kind=kind,
        advice=sum(1 << number for word, number in _ADVICE.items() if word in words),
        name=name,
        file=file,
        shared_inode=shared_inode,
        problem=problem,
        may_have_guards=b"gu" in words or not _FLAGS_TELL_GUARDS,
        is_write_protected=b"uw" in words,
    )


_KERNEL_NAMES = {
    "[vdso]": MappingKind.VDSO,
    "[vvar]": MappingKind.VVAR,
    "[vvar_vclock]": MappingKind.VVAR,
    "[vsyscall]": MappingKind.VSYSCALL,
}
SERVED = "served by a userfaultfd"
_PROBLEMS = {
    b"ht": "huge pages (hugetlb)",
    b"um": SERVED,
    b"ui": SERVED,
    b"io": "memory of a device",
    b"pf": "memory of a device",
    b"mm": "memory of a device",
    b"sl": "sealed (mseal)",
    b"ss": "a shadow stack",
}
DELETED = " (deleted)"
"""What the kernel writes behind the path of a file that has none any more."""
_SHARED_MEMORY = ("/dev/zero (", "/memfd:")
_NAMED_PROBLEMS = {
    "/SYSV": "System V shared memory",
    "/memfd:": "a memfd",
    "/anon_hugepage": "huge pages (hugetlb)",
    "/[aio]": "asynchronous I/O (io_setup)",
    "anon_inode:[io_uring]": "an io_uring",
    "anon_inode:[perf_event]": "performance counters",
    "anon_inode:": "memory of a device",
    "socket:": "a socket's ring",
}


def path_problem(path: str, status: os.stat_result) -> str:
    """Say why a file cannot be found again by its path; empty if it can. A task of another root is refused before."""
    try:
        path.encode()
        if os.path.samestat(status, os.stat(path)):  # noqa: PTH116  text as it is
            return ""
    except UnicodeEncodeError:
        return "its path is not UTF-8, and images hold no other"
    except OSError:
        pass
    return "its path leads elsewhere now"


def _link(pid: int, area: str) -> str:
    """Return the path of a mapping's link: its name has no leading zeros, as maps has for low addresses."""
    return f"/proc/{pid}/map_files/" + "-".join(part.lstrip("0") or "0" for part in area.split("-"))


def _read_file(pid: int, area: str) -> tuple[MappedFile, os.stat_result]:
    """Follow the link of a mapping; proc(5): it needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN."""
    link = _link(pid, area)
    mode = os.lstat(link).st_mode
    path = os.readlink(link)  # noqa: PTH115  Path would drop a final slash and cost
    status = os.stat(link)  # noqa: PTH116  the same
    open_flags = os.O_RDWR if mode & stat.S_IWUSR else os.O_RDONLY
    return MappedFile(path, status.st_dev, status.st_ino, open_flags), status


def _is_device_zero(pid: int, area: str) -> bool:
    status = os.stat(_link(pid, area))  # noqa: PTH116  as above
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE_ZERO


def _file_problem(path: str, status: os.stat_result, *, is_shared: bool) -> str:
    """Say why a mapped file cannot be mapped again by its path; empty if it can."""
    if is_shared and path.startswith(_SHARED_MEMORY) and path.endswith(DELETED):
        return ""
    for prefix, text in _NAMED_PROBLEMS.items():
        if path.startswith(prefix):
            return text
    if path.endswith(DELETED):
        return "its file is deleted"
    if path.startswith("/dev/") and path != "/dev/zero":
        return "memory of a device"
    return path_problem(path, status)
