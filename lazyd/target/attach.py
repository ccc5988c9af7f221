# SPDX-License-Identifier: MIT
"""Attach to a task whose mappings are restored and whose pages are not: a userfaultfd, with no restorer's help.

The order is made so that a lazyd that dies at any moment leaves the task as it was: nothing of it is changed but what
the last descriptor's end undoes (the registrations), and it goes on only when somebody is there who serves it. Until
then it is stopped, and its faults after that wait in the userfaultfd.

Facts, and what follows:

- A thread that waits for its child after vfork cannot be stopped: nothing but the child's exec or end wakes it. But
  the two share their memory, so the child opens the userfaultfd, and as long as it is stopped the parent waits.
- Filters (seccomp) would judge system calls that are not the task's own, and may kill it for them. A tracer with
  CAP_SYS_ADMIN can suspend them (ptrace(2), PTRACE_O_SUSPEND_SECCOMP, with CONFIG_CHECKPOINT_RESTORE); without that
  such a task is refused.
- The kernel writes a thread's area of rseq(2) whenever it returns to user mode, also from a call that we have it do:
  in empty memory that makes a page of zeros, which no fault asks for any more. So pages with such an area are filled
  from the images while the task is stopped; what the kernel has to say in them it says again when the thread goes on.
- madvise drops pages that should not be there, before the range is registered: later it would wait for its event.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.errors import AttachError
from lazyd.image.directory import Program, Vma
from lazyd.target.descriptors import KCMP_VM, kcmp
from lazyd.target.expected import Attached, Expected, empty_ranges, merge_ranges
from lazyd.target.mappings import Known, Mapping, MappingKind, find_pages, read_mappings
from lazyd.target.process import children, descendants, namespace_pids, stat_fields
from lazyd.target.remote import Call, RemoteCalls, find_room
from lazyd.target.survey import check_is_process
from lazyd.target.tracing import StoppedTask, state_of, status_fields
from lazyd.target.userfault import enable_missing, open_userfaultfd, register_missing
from lazyd.units import PAGE_SIZE

_SYS_MADVISE, _MADV_DONTNEED = 28, 4
# What a thread is inside of that waits for its child: clone, vfork, clone3.
_FORKING = {"56", "58", "435"}
_PROTECTIONS = ((1, "r"), (2, "w"), (4, "x"))


class Attachment:
    """Tasks that are stopped and registered. As a context manager it gives up what was not released."""

    def __init__(self) -> None:
        self.tasks: list[Attached] = []
        self._stopped: list[StoppedTask] = []

    def add(self, pid: int, expected: Expected, known: Known, *, drop_pages: bool) -> None:
        """Stop a task and register its lazy memory; AttachError, and then it is as it was once this is closed."""
        stopped, beside = _stop(pid)
        self._stopped.append(stopped)
        mappings = read_mappings(pid, known)
        _check_program(pid, expected)
        check_memory(pid, expected.vmas, mappings)
        lazy = [(int(vma.start), int(vma.end)) for vma in expected.vmas if vma.is_lazy]
        kernel_written = _rseq_pages(stopped, expected.vmas)
        filled = merge_ranges([*expected.filled, *kernel_written])
        present = find_pages(pid, empty_ranges(lazy, filled))
        if present and not drop_pages:
            pages = sum(count for _, _, count in present)
            start, end, _ = present[0]
            raise AttachError(
                f"process {pid}: {pages} pages are there where the images say that it is empty, the first in"
                f" {start:#x}-{end:#x}; is it restored already? --drop-pages drops them"
            )
        _fill(pid, kernel_written, expected)
        with _without_filters(stopped, beside):
            if present:
                _drop(stopped, [(start, end) for start, end, _ in present])
            uffd = open_userfaultfd(stopped, 0)
        self.tasks.append(Attached(expected.image_pid, pid, uffd))
        enable_missing(uffd, pid)
        for start, end in lazy:
            register_missing(uffd, start, end - start, pid)
        # Whoever has read /proc/PID/cmdline meanwhile, as ps does, has made a page of zeros of it.
        if late := find_pages(pid, empty_ranges(lazy, filled)):
            start, end, _ = late[0]
            raise AttachError(
                f"process {pid}: somebody looked into its empty memory, {start:#x}-{end:#x}, before it was registered;"
                " try again with --drop-pages"
            )

    def release(self) -> None:
        """Let the tasks go: somebody serves them. A second call does nothing."""
        stopped, self._stopped = self._stopped, []
        for task in reversed(stopped):
            task.release()
        self.tasks = []

    def close(self) -> None:
        """Give up: the tasks go on as they were. Does nothing after release()."""
        for task in self.tasks:
            with contextlib.suppress(OSError):
                os.close(task.uffd)
        self.release()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_tasks(pid: int, image_pid: int, *, with_children: bool) -> dict[int, int]:
    """Return whom to attach to: pids here, each with the pid that the images know it by; parents first.

    Images know a task by its pid in its innermost pid namespace, unless `image_pid` says otherwise.
    """
    found = {pid: image_pid or _inner_pid(pid)}
    if with_children:
        found |= {child: _inner_pid(child) for child in descendants(pid)}
    return found


def _inner_pid(pid: int) -> int:
    pids = namespace_pids(pid)
    if not pids:
        raise AttachError(f"there is no process {pid}")
    return pids[-1]


def attach_all(tasks: Sequence[tuple[int, Expected]], *, drop_pages: bool) -> Attachment:
    """Attach to tasks, parents first. LazydError in one line if any cannot be: then all are as they were."""
    known: list[Known] = []
    for pid, expected in tasks:
        # All that may fail, and all that takes its time, while they run.
        check_is_process(pid)
        known.append({})
        with _as_attach_error(pid):
            check_memory(pid, expected.vmas, read_mappings(pid, known[-1]))
    attachment = Attachment()
    try:
        for (pid, expected), mappings in zip(tasks, known, strict=True):
            with _as_attach_error(pid):
                attachment.add(pid, expected, mappings, drop_pages=drop_pages)
    except BaseException:
        attachment.close()
        raise
    return attachment


@contextlib.contextmanager
def _as_attach_error(pid: int) -> Iterator[None]:
    try:
        yield
    except (ProcessLookupError, FileNotFoundError):
        raise AttachError(f"process {pid} has ended; nothing was attached") from None
    except PermissionError as error:
        what = f": {error.filename}" if error.filename else ""
        raise AttachError(f"process {pid}: no permission to look at it{what}; run as root") from None


def _stop(pid: int) -> tuple[StoppedTask, int]:
    """Stop who can make system calls on a task's memory: the task, or else the child that it waits for."""
    child = _vfork_child(pid)
    if not child:
        return StoppedTask(pid), pid
    if len(os.listdir(f"/proc/{pid}/task")) > 1:  # noqa: PTH208  names
        reason = f"waits for process {child} after vfork while other threads of it run; try again later"
        raise AttachError(f"process {pid} {reason}")
    stopped = StoppedTask(child)
    if _vfork_child(pid) != child:
        stopped.release()
        return StoppedTask(pid), pid
    return stopped, child


def _vfork_child(pid: int) -> int:
    """Return the child that a task waits for after vfork; 0: it waits for none."""
    with contextlib.suppress(OSError):
        if state_of(pid) == "D" and Path(f"/proc/{pid}/syscall").read_text().split()[0] in _FORKING:
            for child in children(pid):
                if not kcmp(pid, child, KCMP_VM):
                    return child
    return 0


def _check_program(pid: int, expected: Expected) -> None:
    """See that a task is what the images are of: parts of a program lie where chance has put them at its exec."""
    if expected.program is None:
        return
    fields = stat_fields(pid)
    # proc(5): 26 startcode, 28 startstack, 47 start_brk
    found = Program(*(int(fields[number - 3]) for number in (26, 28, 47)))
    if found != expected.program:
        what = f"its code starts at {found.start_code:#x} and its stack at {found.start_stack:#x}"
        says = f"{expected.program.start_code:#x} and {expected.program.start_stack:#x}"
        raise AttachError(f"process {pid} runs another program than task {expected.image_pid}: {what}, not {says}")


def _rseq_pages(stopped: StoppedTask, vmas: Sequence[Vma]) -> list[tuple[int, int]]:
    """Return the lazy pages that hold an area of rseq(2)."""
    pages = set()
    for thread in stopped:
        if (rseq := thread.rseq()) is not None:
            pages |= set(range(rseq.address & -PAGE_SIZE, rseq.address + rseq.size, PAGE_SIZE))
    return [
        (page, page + PAGE_SIZE) for page in sorted(pages) if any(v.is_lazy and v.start <= page < v.end for v in vmas)
    ]


def _fill(pid: int, pages: Sequence[tuple[int, int]], expected: Expected) -> None:
    """Fill pages from the images, over whatever the kernel has made of them."""
    with Path(f"/proc/{pid}/mem").open("r+b", 0) as memory:
        for extent in expected.extents.within(pages):
            text = os.pread(expected.sources[extent.source], extent.pages * PAGE_SIZE, extent.offset)
            if len(text) != extent.pages * PAGE_SIZE or os.pwrite(memory.fileno(), text, extent.start) != len(text):
                raise AttachError(f"process {pid}: the page at {extent.start:#x} cannot be filled from the images")


def check_memory(pid: int, vmas: Sequence[Vma], mappings: Sequence[Mapping]) -> None:
    """See that each lazy VMA is mapped as the images say, or raise AttachError about the first that is not."""
    starts = {vma.start for vma in vmas}
    index = 0
    for vma in vmas:
        if not vma.is_lazy:
            continue
        at = int(vma.start)
        while index < len(mappings) and mappings[index].end <= at:
            index += 1
        position = index
        while at < vma.end:
            mapping = mappings[position] if position < len(mappings) else None
            if mapping is None or mapping.start > at:
                end = vma.end if mapping is None else min(vma.end, mapping.start)
                raise _differs(pid, vma, f"{at:#x}-{end:#x} is not mapped")
            _check_mapping(pid, vma, mapping)
            at = mapping.end
            position += 1
        last = mappings[position - 1]
        if last.end > vma.end and vma.end not in starts:
            raise _differs(pid, vma, f"it ends at {last.end:#x}")
        if mappings[index].start < vma.start and not _follows(vmas, vma):
            raise _differs(pid, vma, f"it starts at {mappings[index].start:#x}")


def _follows(vmas: Sequence[Vma], vma: Vma) -> bool:
    """Say whether another VMA ends where this one starts: then the kernel may have made one of the two."""
    return any(other.end == vma.start for other in vmas)


def _check_mapping(pid: int, vma: Vma, mapping: Mapping) -> None:
    if mapping.kind is not MappingKind.PRIVATE:
        raise _differs(pid, vma, f"it is {mapping.kind.value} ({mapping.name or 'no name'})")
    if mapping.protection != vma.prot & 7:
        raise _differs(pid, vma, f"its protection is {_letters(mapping.protection)}, not {_letters(vma.prot)}")
    if mapping.problem:
        raise AttachError(f"process {pid}: {mapping.start:#x}-{mapping.end:#x} is {mapping.problem} already")
    if mapping.is_write_protected:
        where = f"{mapping.start:#x}-{mapping.end:#x}"
        raise AttachError(f"process {pid}: {where} belongs to a userfaultfd that protects it from writes")


def _letters(protection: int) -> str:
    return "".join(letter if protection & bit else "-" for bit, letter in _PROTECTIONS)


def _differs(pid: int, vma: Vma, what: str) -> AttachError:
    return AttachError(f"process {pid} is not mapped as the images say: {vma.start:#x}-{vma.end:#x}: {what}")


def _drop(stopped: StoppedTask, ranges: Iterable[tuple[int, int]]) -> None:
    asked = [Call(_SYS_MADVISE, (start, end - start, _MADV_DONTNEED)) for start, end in ranges]
    with RemoteCalls(stopped.pid, stopped.leader, find_room(stopped)) as calls:
        for call, result in zip(asked, calls.run(*asked), strict=True):
            if result:
                start = call.arguments[0]
                raise AttachError(
                    f"process {stopped.pid}: its pages at {start:#x} cannot be dropped: {os.strerror(-result)}"
                )


@contextlib.contextmanager
def _without_filters(stopped: StoppedTask, pid: int) -> Iterator[None]:
    """Keep the filters of the thread that is made to do system calls out of it."""
    if status_fields(pid).get("Seccomp", "0") == "0":
        yield
        return
    try:
        stopped.leader.suspend_filters(is_on=True)
    except OSError as error:
        reason = "its filters (seccomp) may kill it for the calls that lazyd has it do, and cannot be suspended"
        raise AttachError(f"process {pid}: {reason} ({os.strerror(error.errno or 0)}); use the socket") from None
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            stopped.leader.suspend_filters(is_on=False)
