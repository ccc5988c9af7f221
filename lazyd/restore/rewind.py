# SPDX-License-Identifier: MIT
"""Put a live task back to its own checkpoint, in place.

Facts, and what follows:

- What the task was is gone with the first thing that is undone. So all that may be refused is looked at first; from
  then on the task dies with us (PTRACE_O_EXITKILL), and is ended if anything fails: it is never half rewound.
- The kernel writes into areas of rseq(2) whenever it returns to the task, and kills it where it cannot: they are
  unregistered before their memory goes.
- Freeing memory takes time for each page: 256 MiB cost more than all else together. mremap(2) moves whole tables of
  pages where both addresses are alike below 2 MiB. So large private mappings are moved aside, and dropped slice by
  slice when the task runs again. A child does not get them (MADV_DONTFORK). Their addresses are such that after an
  exec only MAP_FIXED could be there: before each slice it is seen that they are there still, in the same program.
- What is moved aside counts twice for a while: where that is limited (RLIMIT_AS, RLIMIT_DATA, strict overcommit) it is
  freed at once.
- A mapping of a file or of shared memory that is still there stays, and loses what the task wrote to it: for that, no
  file has to be opened with the rights that the task has left. Whether it is locked, not inherited or not dumped
  (mlock, MADV_DONTFORK, MADV_DONTDUMP) is put back; that it shall have huge pages or none stays, because nothing
  takes that advice back.
- A task that was stopped (SIGSTOP) stays so when its tracer lets it go. Whether it is to be is the checkpoint's
  business: the stop is ended first.
- A thread that is made again needs its id (clone3, set_tid), and so a task that may choose ids.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress

from lazyd.errors import DumpError, LazydError, RestoreError, SystemCallError
from lazyd.image import Extent, Kind, load_shared
from lazyd.image.directory import MAP_LOCKED
from lazyd.restore import memory as memories
from lazyd.restore.build import Unreleased, check_empty, dress, make_threads, open_userfaultfd
from lazyd.restore.live import (
    TABLE_BYTES,
    Live,
    Staying,
    check_before,
    check_memory,
    check_rights,
    check_stopped,
    find_staying,
    put_aside,
    read_live,
    soft_limits,
)
from lazyd.restore.memory import Memory, Opened
from lazyd.restore.plan import REGULAR, Plan
from lazyd.restore.task import before_mapping_steps, check_values
from lazyd.restore.vma import Area
from lazyd.restore.vma import Kind as AreaKind
from lazyd.target import Attached
from lazyd.target.descriptors import take_descriptor
from lazyd.target.mappings import find_pages
from lazyd.target.process import stat_fields
from lazyd.target.puppet import WORKSHOP_BYTES, Puppet, Step, find_gap, find_workshop
from lazyd.target.remote import Call, RemoteCalls, find_room
from lazyd.target.state import list_timers
from lazyd.target.tracing import StoppedTask
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_OPEN, _SYS_CLOSE, _SYS_LSEEK, _SYS_MPROTECT, _SYS_MUNMAP, _SYS_MREMAP, _SYS_MADVISE = 2, 3, 8, 10, 11, 25, 28
_SYS_SETITIMER, _SYS_RT_SIGTIMEDWAIT, _SYS_TIMER_DELETE, _SYS_MEMFD_CREATE, _SYS_RSEQ = 38, 128, 226, 319, 334
_SYS_MLOCK, _SYS_MUNLOCKALL, _SYS_PRLIMIT = 149, 152, 302
_RSEQ_FLAG_UNREGISTER, _MFD_CLOEXEC = 1, 1
_MREMAP_MAYMOVE_FIXED, _MADV_DONTFORK, _MADV_DONTNEED_LOCKED = 3, 10, 24
_MADV_NORMAL, _MADV_DOFORK, _MADV_DODUMP = 0, 11, 17
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 3
_ALL_SIGNALS = bytes([0xFF] * 8)
_SLICE_BYTES = 16 << 20
_SLICE_PAGES = _SLICE_BYTES // PAGE_SIZE
_PAUSE_S = 0.002
_MOST_FAILURES = 10


class _Slice(NamedTuple):
    start: int
    end: int


class Rewound(Unreleased):
    """A task that is back at its checkpoint and does not run yet."""

    def __init__(self, plan: Plan, memory: Memory) -> None:
        """Stop a task and rewind it. LazydError: it is refused and goes on, or (said so) it failed and is ended."""
        super().__init__(plan, memory)
        self.stopped_s = 0.0
        """How long it did not run: known once it does."""
        self._aside: list[_Slice] = []
        self._slice_bytes = _SLICE_BYTES
        check_before(plan, plan.pid)
        memories.check_vdso(plan, memory)
        check_values(plan)
        shared_ids = sorted({area.shared_id for area in plan.vmas if area.kind is AreaKind.SHARED})
        with closing(load_shared(plan.images, shared_ids)) as self._shared:
            self._program = _program(plan.pid)
            self._began = time.monotonic()
            with StoppedTask(plan.pid) as stopped:
                self._take_over(stopped)

    def _take_over(self, stopped: StoppedTask) -> None:
        plan = self._plan
        try:
            descriptors = check_stopped(plan, stopped)
            timers = [timer.number for timer in list_timers(plan.pid)]
            live = read_live(plan.pid)
            staying = find_staying(plan, live)
            check_rights(plan, staying, len(descriptors))
            check_memory(plan, staying, live)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise RestoreError(f"process {plan.pid} was killed while it was looked at") from error
        except OSError as error:
            raise SystemCallError("looking at it", error.errno or 0, path=f"process {plan.pid}") from error
        ranges = [(one.start, one.end) for one in live] + [(area.start, area.end) for area in plan.vmas]
        workshop = find_workshop(ranges)
        was_stopped = bool(stopped.leader.stop_signal)
        self._puppet = Puppet.take_over(stopped, workshop)
        ranges.append((workshop, workshop + WORKSHOP_BYTES))
        try:
            if was_stopped:
                # Its signals are blocked: the stop ends, and SIGCONT is forgotten with all that is pending.
                os.kill(plan.pid, signal.SIGCONT)
            self._rewind(self._puppet, staying, live, ranges, timers)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                reason = os.strerror(error.errno or 0)
            elif isinstance(error, LazydError):
                reason = str(error)
            else:
                raise
            raise RestoreError(f"process {plan.pid} was ended: half way back, {reason}") from error

    def _rewind(
        self,
        puppet: Puppet,
        staying: Staying,
        live: Sequence[Live],
        ranges: list[tuple[int, int]],
        timers: Sequence[int],
    ) -> None:
        plan = self._plan
        puppet.run(
            Step(f"limit {number}", _SYS_PRLIMIT, (0, number, struct.pack("<2Q", most, most), 0))
            for number, most in soft_limits(plan.pid)
        )
        self._forget_signals(puppet, timers)
        self._end_threads(puppet)
        self._move_aside(puppet, live, ranges)
        kept = [(area.start, area.end) for area in staying.areas]
        puppet.clear(keep=[*kept, *self._aside])
        filled = self._map(puppet, staying)
        make_threads(plan, puppet)
        uffd = open_userfaultfd(puppet)
        self.tasks.append(Attached(plan.pid, plan.pid, uffd))
        self._seek(puppet)
        self.warning = dress(plan, puppet, uffd, filled, with_credentials=False)
        check_empty(plan, filled)

    @staticmethod
    def _forget_signals(puppet: Puppet, timers: Sequence[int]) -> None:
        """Disarm all timers, then take all signals from their queues."""
        steps = [Step("timer_delete", _SYS_TIMER_DELETE, (number,), may_fail=True) for number in timers]
        steps += [Step("setitimer", _SYS_SETITIMER, (which, bytes(32), 0)) for which in range(3)]
        puppet.run(steps)
        for tid, thread in puppet.threads.items():
            count = len(thread.pending_signals(shared=False))
            if tid == puppet.pid:
                count += len(thread.pending_signals(shared=True))
            wait = Step("rt_sigtimedwait", _SYS_RT_SIGTIMEDWAIT, (_ALL_SIGNALS, 0, bytes(16), 8), may_fail=True)
            steps = [wait] * count
            if (rseq := thread.rseq()) is not None:
                arguments = (rseq.address, rseq.size, _RSEQ_FLAG_UNREGISTER, rseq.signature)
                steps.append(Step("rseq", _SYS_RSEQ, arguments))
            puppet.run(steps, tid)

    def _end_threads(self, puppet: Puppet) -> None:
        wanted = {thread.tid for thread in self._plan.threads}
        for tid in [tid for tid in puppet.threads if tid not in wanted]:
            puppet.end_thread(tid)

    def _move_aside(self, puppet: Puppet, live: Sequence[Live], ranges: Sequence[tuple[int, int]]) -> None:
        puppet.run([Step("munlockall", _SYS_MUNLOCKALL)])  # or what is mapped next would have its pages at once
        large = put_aside(self._plan, live)
        if not large:
            return
        total = sum((one.end - one.start + 2 * TABLE_BYTES) & -TABLE_BYTES for one in large) + TABLE_BYTES
        at = (find_gap(ranges, total) + TABLE_BYTES - 1) & -TABLE_BYTES
        steps = []
        for one in large:
            length = one.end - one.start
            to = at + one.start % TABLE_BYTES
            steps.append(Step("mremap", _SYS_MREMAP, (one.start, length, length, _MREMAP_MAYMOVE_FIXED, to)))
            steps.append(Step("madvise", _SYS_MADVISE, (to, length, _MADV_DONTFORK)))
            self._aside.append(_Slice(to, to + length))
            at += (length + 2 * TABLE_BYTES) & -TABLE_BYTES
        puppet.run(steps)

    def _map(self, puppet: Puppet, staying: Staying) -> list[Extent]:
        """Map what the images say and fill what must be there; return that."""
        plan = self._plan
        there = set(staying.areas)
        missing = plan._replace(vmas=[area for area in plan.vmas if area not in there])
        opened, objects, steps = _open_again(missing, puppet)
        filled = memories.pages_to_fill(plan, self._memory.extents, is_eager=False)
        puppet.run(before_mapping_steps(plan))
        puppet.run([*memories.kernel_steps(plan, puppet), memories.limits_step(plan, None)])
        puppet.run(memories.map_steps(missing, opened, objects, ()))
        puppet.run(steps)
        steps = []
        for area in staying.areas:
            if area.kind is AreaKind.PRIVATE_FILE:
                arguments = (area.start, area.end - area.start, _MADV_DONTNEED_LOCKED)
                steps.append(Step(f"madvise of {area}", _SYS_MADVISE, arguments))
            steps += _advise_again(area)
        for area in staying.protect:
            arguments = (area.start, area.end - area.start, area.prot & 7)
            steps.append(Step(f"mprotect of {area}", _SYS_MPROTECT, arguments))
        puppet.run(steps)
        for extent in filled:
            text = os.pread(self._memory.sources[extent.source], extent.pages * PAGE_SIZE, extent.offset)
            if len(text) != extent.pages * PAGE_SIZE or os.pwrite(puppet.memory, text, extent.start) != len(text):
                raise RestoreError(f"the page at {extent.start:#x} cannot be filled from the images")
        self._fill_shared(puppet.pid)
        return filled

    def _fill_shared(self, pid: int) -> None:
        """Give objects of shared memory, which are mapped, what the images say. They are reached by their mappings."""
        first = {area.shared_id: area for area in reversed(self._plan.vmas) if area.kind is AreaKind.SHARED}
        sizes = memories.shared_sizes(self._plan)
        for shared_id, area in first.items():
            piece = next(one for one in read_live(pid) if one.start <= area.start < one.end)
            fd = os.open(f"/proc/{pid}/map_files/{piece.start:x}-{piece.end:x}", os.O_RDWR | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                _punch(fd, size)
                pages_end = -(-size // PAGE_SIZE) * PAGE_SIZE
                if pages_end < sizes[shared_id]:
                    os.ftruncate(fd, sizes[shared_id])
                for extent in self._shared.tables[shared_id]:
                    if extent.kind is Kind.DUMPED:
                        source = self._shared.sources[extent.source].fd
                        memories.send(source, extent, fd, self._plan.images / f"pagemap-shmem-{shared_id}.img")
                if size < pages_end == sizes[shared_id]:
                    os.ftruncate(fd, size)
            finally:
                os.close(fd)

    def _seek(self, puppet: Puppet) -> None:
        steps = []
        for one in self._plan.descriptors:
            file = self._plan.files[one.id]
            if file.type == REGULAR:
                steps.append(Step(f"lseek of {one.fd}", _SYS_LSEEK, (one.fd, file.reg.pos, os.SEEK_SET), may_fail=True))
        puppet.run(steps)

    def release(self, *, stopped: bool = False) -> None:
        """Let the task go: somebody serves it. A second call does nothing."""
        is_first = self._puppet is not None
        super().release(stopped=stopped)
        if is_first:
            self.stopped_s = time.monotonic() - self._began

    def sweep(self) -> str:
        """Free, while the task runs, what was moved aside; return what is to be said if that cannot be."""
        failures = 0
        while self._aside:
            time.sleep(_PAUSE_S * (1 + failures))
            try:
                if not self._sweep_slice():
                    return ""
                failures = 0
            except (DumpError, SystemCallError, OSError) as error:
                if not os.path.exists(f"/proc/{self._plan.pid}"):  # noqa: PTH110  quick
                    return ""
                failures += 1
                if failures == _MOST_FAILURES:
                    left = sum(one.end - one.start for one in self._aside) >> 20
                    return f"task {self._plan.pid} keeps up to {left} MiB that it had before: {error}"
        return ""

    def _sweep_slice(self) -> bool:
        """Free one slice; False if the task has become another program, whose memory is none of ours."""
        pid, area = self._plan.pid, self._aside[-1]
        start = self._slice_start(area)
        with StoppedTask(pid) as stopped:
            if _program(pid) != self._program:
                return False
            found = [one for one in read_live(pid) if one.start < area.end and start < one.end]
            if any(one.start < area.start or one.end > area.end or not one.is_private_memory for one in found):
                return False
            if found:  # or it was freed by a call whose end was not seen
                with RemoteCalls(pid, stopped.leader, find_room(stopped)) as calls:
                    calls.run(Call(_SYS_MUNMAP, (start, area.end - start)))
        self._aside[-1] = _Slice(area.start, start)
        if start == area.start:
            self._aside.pop()
        return True

    def _slice_start(self, area: _Slice) -> int:
        """Return where the last slice begins that has no more pages than a full one: reserved memory has few."""
        size = 2 * self._slice_bytes
        with suppress(OSError):  # Linux before 6.7
            while size > _SLICE_BYTES:
                start = max(area.start, area.end - size)
                if sum(pages for _, _, pages in find_pages(self._plan.pid, [(start, area.end)])) <= _SLICE_PAGES:
                    self._slice_bytes = size
                    return start
                size //= 2
        self._slice_bytes = _SLICE_BYTES
        return max(area.start, area.end - _SLICE_BYTES)


def _program(pid: int) -> tuple[str, ...]:
    """Return what differs between a program and the one that a process executes after it: proc(5), stat."""
    try:
        stat = stat_fields(pid)
    except OSError:
        return ()
    return tuple(stat[number - 3] for number in (26, 27, 28, 48, 50))


def _advise_again(area: Area) -> Iterator[Step]:
    """Yield what takes back how a staying area was advised since, and locks it if it was."""
    where = (area.start, area.end - area.start)
    for number in (_MADV_NORMAL, _MADV_DOFORK, _MADV_DODUMP):
        yield Step(f"madvise({number}) of {area}", _SYS_MADVISE, (*where, number), may_fail=True)
    yield from memories.advice_steps(area)
    if area.flags & MAP_LOCKED:
        yield Step(f"mlock of {area}", _SYS_MLOCK, where)


def _open_again(plan: Plan, puppet: Puppet) -> tuple[Opened, dict[int, int], list[Step]]:
    """Have the task open what it no longer has mapped; return that, and the steps that close it."""
    wanted = memories.mapped_files(plan)
    steps = [
        Step(f"{path}: open", _SYS_OPEN, (os.fsencode(path) + b"\0", flags | os.O_CLOEXEC)) for path, flags in wanted
    ]
    opened = Opened(dict(zip(wanted, puppet.run(steps), strict=True)))
    objects = {}
    for shared_id, size in memories.shared_sizes(plan).items():
        (number,) = puppet.run([Step("memfd_create", _SYS_MEMFD_CREATE, (b"shared\0", _MFD_CLOEXEC))])
        objects[shared_id] = number
        pidfd = os.pidfd_open(puppet.pid)
        try:
            fd = take_descriptor(pidfd, number)
        finally:
            os.close(pidfd)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    numbers = [*opened.numbers.values(), *objects.values()]
    return opened, objects, [Step("close", _SYS_CLOSE, (number,)) for number in numbers]


def _punch(fd: int, size: int) -> None:
    """Make a file of shared memory empty, at its size."""
    import ctypes  # noqa: PLC0415  only here

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, 0, size):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
