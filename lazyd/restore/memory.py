# SPDX-License-Identifier: MIT
"""The address space of a task in the making: its mappings, and the pages that must be there before it runs.

The task itself maps, and reads the pages images into its memory (pread): the kernel copies from the page cache to where
the bytes belong, and nothing passes through Python. An area that the task may not write to is mapped writable first.

Which pages must be there when the task is served lazily: those that the images do not call lazy (of mapped files, of
locked memory, where a stack pointer is), and those that hold an area of rseq(2): the kernel writes to such an area by
itself whenever the thread was scheduled, and would make a page of zeros of it that no fault asks for.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lazyd.errors import ImageError, RestoreError
from lazyd.image import Extent, ExtentTable, Kind, SharedImages, load_shared
from lazyd.image.directory import MAP_ANONYMOUS, MAP_PRIVATE
from lazyd.restore.files import Files
from lazyd.restore.plan import Plan
from lazyd.restore.vma import Area
from lazyd.restore.vma import Kind as AreaKind
from lazyd.target.mappings import MAP_SHARED
from lazyd.target.puppet import Part, Pointing, Puppet, Step, own_code
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE

_SYS_MMAP, _SYS_MPROTECT, _SYS_MUNMAP, _SYS_MADVISE, _SYS_PREAD, _SYS_PRCTL = 9, 10, 11, 28, 17, 157
_PROT_WRITE, _MAP_FIXED = 2, 0x10
_MAP_GROWSDOWN, _MAP_LOCKED, _MAP_NORESERVE = 0x100, 0x2000, 0x4000
_MADV_GUARD_INSTALL = 102
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_NO_FILE = (1 << 64) - 1
_SAME_PROGRAM = (1 << 32) - 1
_MOST_AT_ONCE = 1 << 30
_LIMITS = (
    *("start_code", "end_code", "start_data", "end_data", "start_brk", "brk"),
    *("start_stack", "arg_start", "arg_end", "env_start", "env_end"),
)


class Memory(NamedTuple):
    """What the pages images hold of private memory. `sources`: their descriptors here."""

    extents: ExtentTable
    sources: Sequence[int]


def prepare(plan: Plan, files: Files, memory: Memory) -> dict[int, int]:
    """Hand down what is to be mapped and read; return the numbers of the objects of shared memory."""
    for path, flags in mapped_files(plan):
        files.add_path(path, flags)
    files.add_path(plan.program, os.O_RDONLY)
    for index, fd in enumerate(memory.sources):
        files.add(("source", index), fd, is_owned=False)
    sizes = shared_sizes(plan)
    objects: dict[int, int] = {}
    if not sizes:
        return objects
    shared = load_shared(plan.images, list(sizes))
    try:
        for shared_id, size in sizes.items():
            objects[shared_id] = files.add(("shared", shared_id), _make_object(plan, shared_id, size, shared))
    finally:
        shared.close()
    return objects


def _open_flags(area: Area) -> int:
    if area.file_flags >= 0:
        return area.file_flags & os.O_ACCMODE
    return os.O_RDWR if area.kind is AreaKind.SHARED_FILE and area.prot & _PROT_WRITE else os.O_RDONLY


def mapped_files(plan: Plan) -> list[tuple[str, int]]:
    """Return the files that are mapped, each with how it was opened for that."""
    found = [(str(plan.files[area.file].reg.name), _open_flags(area)) for area in plan.vmas if area.file]
    return list(dict.fromkeys(found))


def shared_sizes(plan: Plan) -> dict[int, int]:
    """Return the objects of shared memory that are mapped, by their id, with their size."""
    sizes: dict[int, int] = {}
    for area in plan.vmas:
        if area.kind is AreaKind.SHARED:
            size = max(area.shared_size, area.offset + area.end - area.start)
            sizes[area.shared_id] = max(size, sizes.get(area.shared_id, 0))
    return sizes


def _make_object(plan: Plan, shared_id: int, size: int, shared: SharedImages) -> int:
    """Return a file with the bytes of an object of shared memory."""
    fd = os.memfd_create("shared", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        for extent in shared.tables[shared_id]:
            if extent.kind is Kind.DUMPED:
                path = plan.images / f"pagemap-shmem-{shared_id}.img"
                send(shared.sources[extent.source].fd, extent, fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def send(source: int, extent: Extent, fd: int, path: Path) -> None:
    """Copy a run of pages to where it belongs in a file. ImageError, that names `path`."""
    at, left = extent.offset, extent.pages * PAGE_SIZE
    os.lseek(fd, extent.start, os.SEEK_SET)
    while left:
        count = os.sendfile(fd, source, at, left)
        if not count:
            raise ImageError(path, "its pages image is shorter than it was", address=extent.start)
        at, left = at + count, left - count


def pages_to_fill(plan: Plan, extents: ExtentTable, *, is_eager: bool) -> list[Extent]:
    """Return what must be read before the task runs, in order of address and inside of one area each."""
    areas = [area for area in plan.vmas if area.kind in (AreaKind.PRIVATE, AreaKind.PRIVATE_FILE)]
    if is_eager:
        return list(_cut(areas, (extent for extent in extents if extent.kind is Kind.DUMPED)))
    wanted = [(start, end) for start, end in extents.filled_by_restorer()]
    wanted += [(area.start, area.end) for area in areas if not area.is_lazy]
    wanted += rseq_pages(plan)
    return list(_cut(areas, extents.within(wanted)))


def rseq_pages(plan: Plan) -> list[tuple[int, int]]:
    """Return the pages that hold a thread's area of rseq(2)."""
    found = []
    for _, core in plan.threads:
        entry = core.thread_core.rseq_entry
        if entry.rseq_abi_pointer:
            start = entry.rseq_abi_pointer & -PAGE_SIZE
            found.append((start, (entry.rseq_abi_pointer + entry.rseq_abi_size + PAGE_SIZE - 1) & -PAGE_SIZE))
    return found


def _cut(areas: Sequence[Area], extents: Iterable[Extent]) -> Iterator[Extent]:
    """Cut extents at the borders of areas; what is in none (the vdso, shared memory) is left out."""
    index = 0
    for extent in extents:
        while index < len(areas) and areas[index].end <= extent.start:
            index += 1
        at = index
        while at < len(areas) and areas[at].start < extent.end:
            start, end = max(areas[at].start, extent.start), min(areas[at].end, extent.end)
            yield extent.part(start, end)
            at += 1


class Opened(NamedTuple):
    """Files that the task has opened itself: their numbers by path and flags."""

    numbers: dict[tuple[str, int], int]

    def add_path(self, path: str, flags: int) -> int:
        """Return the number of one."""
        return self.numbers[path, flags]

    def number_of(self, key: object) -> int:
        """Nothing is read through it."""
        raise KeyError(key)


def map_steps(plan: Plan, files: Files | Opened, objects: dict[int, int], filled: Sequence[Extent]) -> Iterator[Step]:
    """Yield the steps that map all areas, fill what must be filled, and then give them their protection and advice."""
    starts = [extent.start for extent in filled]
    protect: list[Area] = []
    for area in plan.vmas:
        if area.kind in (AreaKind.VDSO, AreaKind.VVAR, AreaKind.VSYSCALL):
            continue
        prot = area.prot & 7
        if not prot & _PROT_WRITE and any(area.start <= start < area.end for start in _near(starts, area)):
            prot |= _PROT_WRITE
            protect.append(area)
        flags = _MAP_FIXED | area.flags & (_MAP_GROWSDOWN | _MAP_LOCKED | _MAP_NORESERVE)
        fd, offset = _NO_FILE, 0
        if area.kind is AreaKind.SHARED:
            flags |= MAP_SHARED
            fd, offset = objects[area.shared_id], area.offset
        elif area.file:
            flags |= MAP_SHARED if area.kind is AreaKind.SHARED_FILE else MAP_PRIVATE
            fd, offset = files.add_path(str(plan.files[area.file].reg.name), _open_flags(area)), area.offset
        else:
            flags |= MAP_PRIVATE | MAP_ANONYMOUS
        arguments = (area.start, area.end - area.start, prot, flags, fd, offset)
        yield Step(f"mmap of {area}", _SYS_MMAP, arguments)
    for extent in filled:
        number = files.number_of(("source", extent.source))
        at, end, offset = int(extent.start), int(extent.end), extent.offset
        while at < end:
            count = min(end - at, _MOST_AT_ONCE)
            yield Step(f"reading the pages at {at:#x}", _SYS_PREAD, (number, at, count, offset))
            at, offset = at + count, offset + count
    for area in protect:
        yield Step(f"mprotect of {area}", _SYS_MPROTECT, (area.start, area.end - area.start, area.prot & 7))
    for area in plan.vmas:
        if area.kind not in (AreaKind.VDSO, AreaKind.VVAR, AreaKind.VSYSCALL):
            yield from advice_steps(area)
    for start, end in plan.guards:
        what = f"guard pages at {start:#x}-{end:#x}"
        yield Step(what, _SYS_MADVISE, (start, end - start, _MADV_GUARD_INSTALL))


def advice_steps(area: Area) -> Iterator[Step]:
    """Yield what gives an area the advice that it had: madvise(2), by number."""
    for number in range(area.advice.bit_length()):
        if area.advice >> number & 1:
            what = f"madvise({number}) of {area}"
            yield Step(what, _SYS_MADVISE, (area.start, area.end - area.start, number))


def _near(starts: Sequence[int], area: Area) -> Sequence[int]:
    index = bisect_left(starts, area.start)
    return starts[index : index + 1]


def run_map_steps(puppet: Puppet, steps: Iterable[Step]) -> None:
    """Do the steps; RestoreError if a page could not be read whole."""
    listed = list(steps)
    for step, result in zip(listed, puppet.run(listed), strict=True):
        if step.number == _SYS_PREAD and result != step.arguments[2]:
            raise RestoreError(f"{step.what}: the pages image ends there; it is shorter than it was")


def kernel_steps(plan: Plan, puppet: Puppet) -> list[Step]:
    """Return the steps that move vdso and vvar to where the task had them, or drop them if it had none."""
    steps = []
    for is_code, kind in ((False, AreaKind.VVAR), (True, AreaKind.VDSO)):
        areas = [area for area in plan.vmas if area.kind is kind]
        parts = [part for part in puppet.kernel_parts if part.is_code is is_code]
        if not areas:
            steps += [Step("munmap", _SYS_MUNMAP, (part.start, part.end - part.start)) for part in parts]
            continue
        was, now = areas[-1].end - areas[0].start, _length(parts)
        if was != now:
            raise RestoreError(
                f"task {plan.pid}: the {kind.value} of this kernel has {now} bytes, of the one it ran on {was};"
                " `criu restore` can mend that"
            )
        at = areas[0].start
        for part in parts:
            steps.append(puppet.move_part(part, at))
            at += part.end - part.start
    return steps


def _length(parts: Sequence[Part]) -> int:
    return parts[-1].end - parts[0].start if parts else 0


def check_vdso(plan: Plan, memory: Memory) -> None:
    """See that the vdso that the images hold is this kernel's: programs have its addresses in their memory.

    What stands behind its end is no part of it: a tracer that was killed, ours among them, may have left code there.
    """
    areas = [area for area in plan.vmas if area.kind is AreaKind.VDSO]
    if not areas:
        return
    own = own_code().rstrip(b"\0")
    start = areas[0].start
    for extent in memory.extents.within([(area.start, area.end) for area in areas]):
        was = os.pread(memory.sources[extent.source], extent.pages * PAGE_SIZE, extent.offset)
        code = own[extent.start - start :][: len(was)]
        if was[: len(code)] != code:
            raise RestoreError(
                f"task {plan.pid} was dumped on another kernel: its vdso is not this one's;"
                " `criu restore` can mend that"
            )


def limits_step(plan: Plan, files: Files | None) -> Step:
    """Return the step that tells the kernel where the parts of the program are, and which it is; the stub is gone.

    Without files it stays the program that it is.
    """
    values = [getattr(plan.mm, f"mm_{name}") for name in _LIMITS]
    vector = struct.pack(f"<{len(plan.mm.mm_saved_auxv)}Q", *plan.mm.mm_saved_auxv)
    program = files.add_path(plan.program, os.O_RDONLY) if files is not None else _SAME_PROGRAM
    text = struct.pack("<12Q2I", *values, 0, len(vector), program)
    return Step("prctl(PR_SET_MM_MAP)", _SYS_PRCTL, (_PR_SET_MM, _PR_SET_MM_MAP, Pointing(text, 88, vector), len(text)))
