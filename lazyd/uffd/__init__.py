# SPDX-License-Identifier: MIT
"""The typed face of the engine, and the only importer of its compiled module.

All pages move in C threads; a call here costs a call. Task numbers are the engine's own, dealt out by `prepare` and,
for the children of forks, by the engine itself (their notice is FORKED).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.enums import IntEnum
from lazyd.errors import LazydError, SystemCallError
from lazyd.hints import Any
from lazyd.tuples import NamedTuple
from lazyd.uffd._engine import ffi, lib

_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
_CAP_SYS_PTRACE = 19


class Fill(IntEnum):
    """What happens to pages that nobody has asked for."""

    OFF = lib.LZ_FILL_OFF
    FULL = lib.LZ_FILL_FULL


class NoticeKind(IntEnum):
    """What a worker has to tell; cbits/lz.h says what each carries."""

    TASK_FILLED = lib.LZ_NOTICE_TASK_FILLED
    TASK_GONE = lib.LZ_NOTICE_TASK_GONE
    FORKED = lib.LZ_NOTICE_FORKED
    UNREADABLE = lib.LZ_NOTICE_UNREADABLE
    HELD = lib.LZ_NOTICE_HELD
    SOURCE_CHANGED = lib.LZ_NOTICE_SOURCE_CHANGED
    TASK_FAILED = lib.LZ_NOTICE_TASK_FAILED
    LOST = lib.LZ_NOTICE_LOST
    SUSPECT = lib.LZ_NOTICE_SUSPECT
    LINK = lib.LZ_NOTICE_LINK


class TaskStatus(IntEnum):
    """How far a task is."""

    PREPARED = lib.LZ_TASK_PREPARED
    SERVING = lib.LZ_TASK_SERVING
    FILLED = lib.LZ_TASK_FILLED
    GONE = lib.LZ_TASK_GONE
    FAILED = lib.LZ_TASK_FAILED


class LinkReason(IntEnum):
    """Why a link to a page server is of no use any more; cbits/lz.h says what `detail` is."""

    NONE = 0
    FAILED = lib.LZ_LINK_FAILED
    ENDED = lib.LZ_LINK_ENDED
    COMMAND = lib.LZ_LINK_COMMAND
    PID = lib.LZ_LINK_PID
    ADDRESS = lib.LZ_LINK_ADDRESS
    PAGES = lib.LZ_LINK_PAGES
    UNASKED = lib.LZ_LINK_UNASKED
    UNCOUNTED = lib.LZ_LINK_UNCOUNTED


class LinkInfo(NamedTuple):
    """How the link to a page server is. `fd` -1: there is none; `waiting`: requests that are not answered yet.

    `error` is a negative errno, 0 as long as it is up; `rate` is bytes a second.
    """

    bytes: int
    requests: int
    waiting: int
    round_trip_ns: int
    rate: int
    error: int
    reason: LinkReason
    detail: tuple[int, int]
    speaks_lazyd: bool
    header_bytes: int
    fd: int


class OnFork(IntEnum):
    """What the child of a fork finds in a range."""

    COPY = 0
    ZEROS = lib.LZ_REGION_WIPED_ON_FORK


class Served(NamedTuple):
    """A range to serve, in image addresses."""

    start: int
    end: int
    on_fork: OnFork = OnFork.COPY


class Descriptor(IntEnum):
    """What a descriptor is to the state that outlives a process."""

    UNKNOWN = lib.LZ_DESCRIPTOR_UNKNOWN
    SERVED = lib.LZ_DESCRIPTOR_SERVED
    DONE = lib.LZ_DESCRIPTOR_DONE
    """Of a task that had ended, and was to be closed."""


class Notice(NamedTuple):
    """One thing worth telling. `address` is a run address, `error` a negative errno or 0."""

    kind: NoticeKind
    task: int
    address: int
    value: int
    source: int
    error: int


class TaskInfo(NamedTuple):
    """One task as the engine sees it; `run_pid` is 0 and `parent` -1 where there is none to name."""

    image_pid: int
    run_pid: int
    status: TaskStatus
    parent: int
    image_pages: int
    left_pages: int


class Totals:
    """Sums over all tasks and workers, one attribute a field of `struct lz_totals`."""

    def __init__(self, raw: Any) -> None:  # noqa: ANN401  a cffi struct has no static type
        self._raw = raw
        for name, _ in ffi.typeof("struct lz_totals").fields:
            if name != "fault_ns":
                setattr(self, name, int(getattr(raw, name)))

    faults: int
    fault_copied_pages: int
    fill_copied_pages: int
    zero_pages: int
    present_pages: int
    poisoned_pages: int
    dropped_pages: int
    image_pages: int
    left_pages: int
    forks: int
    remaps: int
    removes: int
    unmaps: int
    again: int
    unregistered_pages: int
    fault_ns_max: int
    fault_ns_sum: int
    fill_ns: int
    tasks: int
    serving: int

    def quantile(self, share: float) -> int:
        """Return the latency in ns that the given share of faults did not exceed; 0 without faults."""
        return int(lib.lz_latency_quantile(self._raw, share))


class Engine:
    """Serves the tasks of one restore. Not thread-safe: one thread controls it."""

    def __init__(self, *, workers: int = 0, fill: Fill = Fill.FULL, fill_rate: int = 0) -> None:
        """Make an engine whose threads do not run yet.

        0 workers: one a core, at most four. `fill_rate` is bytes a second over all tasks, 0 without limit.
        """
        count = workers or min(len(os.sched_getaffinity(0)), 4)
        config = ffi.new(
            "struct lz_config *",
            {"workers": count, "fill": int(fill), "fill_rate": fill_rate, "fault_around_pages": 16},
        )
        error = ffi.new("int *")
        self._engine = lib.lz_engine_new(config, error)
        if self._engine == ffi.NULL:
            raise SystemCallError("engine start", -error[0])

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_source(self, fd: int) -> int:
        """Map a pages image and return its number; the descriptor stays the caller's."""
        return _check("mmap of a pages image", lib.lz_engine_add_source(self._engine, fd))

    def add_remote(self, fd: int, header_bytes: int) -> int:
        """Have remote pages come over a connection, and return the number of their source; before any `prepare`.

        The descriptor is the engine's on success. Nothing may be on its way on the connection.
        """
        return _check("page server", lib.lz_engine_add_remote(self._engine, fd, header_bytes))

    def relink(self, fd: int, header_bytes: int) -> None:
        """Go on over another connection, in the place of one that broke; as add_remote."""
        _check("page server", lib.lz_engine_relink(self._engine, fd, header_bytes))

    def link(self) -> LinkInfo:
        """Return how the link to the page server is."""
        raw = ffi.new("struct lz_link_info *")
        lib.lz_engine_link(self._engine, raw)
        return LinkInfo(
            bytes=raw.bytes,
            requests=raw.requests,
            waiting=raw.waiting,
            round_trip_ns=raw.round_trip_ns,
            rate=raw.rate,
            error=raw.error,
            reason=LinkReason(raw.reason),
            detail=(raw.detail[0], raw.detail[1]),
            speaks_lazyd=bool(raw.speaks_lazyd),
            header_bytes=raw.header_bytes,
            fd=raw.fd,
        )

    def prepare(self, image_pid: int, extents: memoryview, vmas: Sequence[Served]) -> int:
        """Load a task's table and served ranges and return its number.

        `extents` holds rows of `struct lz_extent`; they are checked and copied.
        """
        rows = ffi.from_buffer("struct lz_extent[]", extents)
        result = lib.lz_engine_prepare(
            self._engine,
            image_pid,
            rows,
            len(extents) // ffi.sizeof("struct lz_extent") if extents.itemsize == 1 else len(rows),
            ffi.new("struct lz_vma[]", [tuple(vma) for vma in vmas]),
            len(vmas),
        )
        return _check(f"table of task {image_pid}", result)

    def start(self) -> None:
        """Start the worker threads; after any fork of this process."""
        _check("start of the workers", lib.lz_engine_start(self._engine))

    def resume(self) -> int:
        """Take up what the process that died served, and return how many tasks that is; before `start`.

        Only while no thread of it runs here: in a child of `fork_keeping_fds`, or after `stop`.
        """
        return _check("going on from the arena", lib.lz_engine_resume(self._engine))

    def descriptors(self, count: int) -> list[Descriptor]:
        """Say what each descriptor below `count` is, while no process serves."""
        raw = ffi.new("uint8_t[]", max(1, count))
        lib.lz_engine_descriptors(self._engine, raw, count)
        return [Descriptor(raw[number]) for number in range(count)]

    def spend_reserve(self) -> bool:
        """Free a descriptor number that was held for forks; False: there is none."""
        return bool(lib.lz_engine_spend_reserve(self._engine))

    def release_reserve(self) -> None:
        """Give back the descriptors that are held for forks; after `stop`."""
        lib.lz_engine_release_reserve(self._engine)

    @property
    def is_finished(self) -> bool:
        """Whether `finish_restore` was called, here or by the process that died."""
        return bool(lib.lz_engine_is_finished(self._engine))

    def attach(self, task: int, uffd: int, run_pid: int) -> None:
        """Begin to serve a prepared task; the descriptor is the engine's from here on."""
        _check(f"attach of task {task}", lib.lz_engine_attach(self._engine, task, uffd, run_pid))

    def finish_restore(self) -> None:
        """Say that every range is registered: background fill may start."""
        lib.lz_engine_finish_restore(self._engine)

    def hurry(self) -> None:
        """Fill everything now, whatever the configuration said."""
        lib.lz_engine_hurry(self._engine)

    def abandon(self) -> None:
        """Poison every missing page of every task and close the userfaultfds; blocks until done."""
        lib.lz_engine_abandon(self._engine)

    def stop(self) -> None:
        """End the threads; the userfaultfds stay open until `close`."""
        lib.lz_engine_stop(self._engine)

    def close(self) -> None:
        """Release everything; idempotent."""
        engine, self._engine = self._engine, ffi.NULL
        lib.lz_engine_free(engine)

    @property
    def notify_fd(self) -> int:
        """Readable while notices are pending; the engine's own."""
        return int(lib.lz_engine_notify_fd(self._engine))

    def notices(self) -> Iterator[Notice]:
        """Take all pending notices."""
        raw = ffi.new("struct lz_notice *")
        while lib.lz_engine_next_notice(self._engine, raw):
            yield Notice(NoticeKind(raw.kind), raw.task, raw.address, raw.value, raw.source, raw.error)

    def totals(self) -> Totals:
        """Return the sums as they are now."""
        raw = ffi.new("struct lz_totals *")
        lib.lz_engine_totals(self._engine, raw)
        return Totals(raw)

    def task(self, number: int) -> TaskInfo:
        """Return one task as it is now; KeyError for a number that was never dealt out."""
        raw = ffi.new("struct lz_task_info *")
        if lib.lz_engine_task(self._engine, number, raw) < 0:
            raise KeyError(number)
        return TaskInfo(raw.image_pid, raw.run_pid, TaskStatus(raw.status), raw.parent, raw.image_pages, raw.left_pages)


def fork_keeping_fds() -> int:
    """Fork a child that shares this process's descriptors, as `os.fork` otherwise; only with one thread.

    Python's own fork hooks do not run: they mend locks and threads, and there are none.
    """
    return _check("clone", lib.lz_fork_keeping_fds())


class SharedWords:
    """Whole numbers of 64 bits that processes share, each read and written in one step; 0 at first."""

    def __init__(self, count: int) -> None:
        self._map = ffi.from_buffer(mmap.mmap(-1, 8 * count))  # the memory lives as long as this does
        self._words = ffi.cast("uint64_t *", self._map)

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def swap(self, index: int, old: int, changed: int) -> bool:
        """Write `changed` if `old` is there; say whether it was. Of several who try, one succeeds."""
        return bool(lib.lz_swap(self._words + index, old, changed))


def open_signals(numbers: Sequence[int]) -> int:
    """Return a descriptor that gives whoever reads it the signals that wait, blocked, for that process (signalfd(2)).

    What comes for each is 128 bytes that begin with its number.
    """
    return _check("signalfd", lib.lz_signals_open(list(numbers), len(numbers)))


def _check(what: str, result: int) -> int:
    if result < 0:
        raise SystemCallError(what, -result)
    return result


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def check_permission() -> None:
    """Raise SystemCallError, naming what is missing, when this process may not use userfaultfd.

    A restorer opens the descriptors, but it runs with our rights at most; what fails here fails there. The sysctl
    matters only to the system call, and only without CAP_SYS_PTRACE (kernel: admin-guide/mm/userfaultfd).
    """
    through = ffi.new("int *")
    uffd = lib.lz_uffd_open(through)
    if uffd >= 0:
        os.close(uffd)
        return
    if uffd == -errno.ENOSYS:
        raise LazydError("userfaultfd: this kernel was built without CONFIG_USERFAULTFD")
    device = Path("/dev/userfaultfd")
    missing = []
    if not device.exists():
        missing.append(f"{device} does not exist")
    elif not os.access(device, os.R_OK | os.W_OK):
        missing.append(f"{device} may not be opened")
    if not _has_capability(_CAP_SYS_PTRACE):
        missing.append("CAP_SYS_PTRACE is not held")
    if _SYSCTL.exists() and _SYSCTL.read_text().strip() != "1":
        missing.append("vm.unprivileged_userfaultfd is not 1")
    raise SystemCallError(
        "userfaultfd", -uffd, hint="one of these must change: " + "; ".join(missing) if missing else ""
    )
