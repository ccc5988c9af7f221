# SPDX-License-Identifier: MIT
"""One dump, from its settings to the images under their name.

The order is made for the task: all that may fail or take its time is done while it runs, or when it runs again.

1. While it runs: what it has beyond a plain task is listed and refused, the parent is loaded, the directory is made.
   If it has much memory, that is copied, and what it writes from then on is tracked: for this it is stopped twice, for
   a moment.
2. While it is stopped: it is looked at again, its state is read, its memory is classified and copied. smaps is read by
   one thread while another looks at the pages of the mappings that were there before: either walks all page tables.
3. When it runs again (--leave-running), else while it waits: pagemaps and small images are written, and the directory
   appears. Only then the task is killed or left stopped; a dump that fails before that leaves it running.

A lazyd that is killed at any moment leaves the task running, and beside the images a hidden folder that the next dump
to the same name removes. SIGINT and SIGTERM end a dump in the orderly way: nothing appears, and the task goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.dump import tracker
from lazyd.dump.areas import areas_of
from lazyd.dump.core import Track, track_method
from lazyd.dump.images import BuildIds, TaskImages, compose
from lazyd.dump.memory import Area, LocalImages, Looked, MemoryCounts, MemoryDump, PagemapFormat
from lazyd.dump.page_server import PageServer
from lazyd.dump.tracker import Tracker
from lazyd.dump.watch import Watch
from lazyd.enums import Enum
from lazyd.errors import DumpError, ImageError, LazydError, SystemCallError
from lazyd.hints import Any, TypeVar
from lazyd.image.directory import ImagesDirectory
from lazyd.image.pagemap import Dialect
from lazyd.image.stats import DumpStats, write_stats
from lazyd.image.writer import ImagesWriter
from lazyd.report import Log, Show, human_seconds, version
from lazyd.target.descriptors import find_owners
from lazyd.target.mappings import Mapping, find_guards
from lazyd.target.others import Others
from lazyd.target.process import children, descendants
from lazyd.target.state import TaskState, read_state
from lazyd.target.survey import Look, Survey, check_is_process, look_at_all, refuse, started_at
from lazyd.target.tracing import StoppedTask, changes_too_fast, has_ended, thread_ids
from lazyd.target.userfault import UFFD_USER_MODE_ONLY, open_userfaultfd
from lazyd.tls.settings import Files
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, counted, human_bytes
from lazyd.wire import HeaderSize

_T = TypeVar("_T")


class After(Enum):
    """What becomes of the task once its images are there."""

    KILL = "killed"
    STOP = "stopped"
    RUN = "running"


class Settings(NamedTuple):
    """What is dumped, where to, and how."""

    pid: int
    images: Path
    parent: Path | None = None
    with_children: bool = False
    after: After = After.KILL
    is_tracking: bool = False
    """Track writes from this dump on, for the next one on top of it."""
    form: PagemapFormat = PagemapFormat()
    auto_dedup: bool = False
    page_server: tuple[str, int, int] | None = None
    """Host, port and size of headers of whom the memory goes to; None: into the images."""
    tls: Files | None = None
    """How to speak TLS with the page server; None: not at all."""
    may_hold: Sequence[str] = ()
    """Names that may be in the directory: our own log."""
    show: Show = Show.NOTHING


class Times(NamedTuple):
    """Seconds. stopped: from the first thread that was asked to stop until the tasks were let go or killed.

    The stops before an early copy are in it, too.
    """

    freezing: float
    stopped: float
    total: float


class Dumped(NamedTuple):
    """What a dump has made."""

    settings: Settings
    tasks: list[TaskState]
    counts: MemoryCounts
    times: Times
    punched_bytes: int


class _Task:
    """One of the tasks of a dump."""

    def __init__(self, pid: int, known: Sequence[int], settings: Settings) -> None:
        self.pid = pid
        self.pagemap_name = f"pagemap-{pid}.img"
        self._settings = settings
        to_track = settings.is_tracking
        self.tracker: Tracker | None = tracker.take(pid, settings.parent, self.pagemap_name, to_track=to_track)
        self.survey = Survey(pid, tasks=known, has_tracker=self.tracker is not None)
        self.stopped: StoppedTask | None = None
        self.images: TaskImages | None = None
        self._stopped_early = 0.0
        self._areas: tuple[list[Mapping], list[Area]] | None = None

    def stop(self) -> None:
        """Stop it."""
        self.stopped = StoppedTask(self.pid)

    def copy_early(self, memory: MemoryDump, look: Look) -> float:
        """Copy its memory while it runs, if it stands for less time then; return for how long it has stood for that."""
        if not memory.is_worth_early(self.pid, len(thread_ids(self.pid))) or track_method() is not Track.UFFD:
            return 0.0
        if self.tracker is None:
            self.tracker = self._make_tracker()
        if self.tracker is not None and self.tracker.is_free:
            areas = areas_of(look.mappings, ())
            self.survey.has_tracker = True
            if not memory.copy_early(self.pid, areas, self.tracker, lambda: self._pause(lambda _: None)):
                self.tracker.close()
                self.tracker = None
        return self._stopped_early

    def _make_tracker(self) -> Tracker | None:
        """Make a tracker, or none if the task cannot open what it needs: nothing else fails for that."""
        try:
            uffd = self._pause(lambda stopped: open_userfaultfd(stopped, UFFD_USER_MODE_ONLY))
            return Tracker.start(self.pid, uffd)
        except SystemCallError:
            return None

    def _pause(self, do: Callable[[StoppedTask], _T]) -> _T:
        """Stop it for a moment."""
        begun = time.monotonic()
        try:
            with StoppedTask(self.pid) as stopped:
                return do(stopped)
        finally:
            self._stopped_early += time.monotonic() - begun

    def areas(self, look: Look) -> list[Area]:
        """Return what of it is dumped how; it is stopped."""
        assert self.stopped is not None
        if self._areas is None or self._areas[0] != look.mappings:
            self._areas = look.mappings, areas_of(look.mappings, [thread.registers().sp for thread in self.stopped])
        return self._areas[1]

    def dump(self, memory: MemoryDump, look: Look, looked: Looked) -> None:
        """Read its state and dump its memory; it is stopped."""
        assert self.stopped is not None
        state = read_state(self.stopped)
        guards = find_guards(self.pid, look.mappings)
        self.images = TaskImages(state, look.mappings, guards, look.descriptors)
        if self._settings.is_tracking and self.tracker is None:
            needs_uffd = tracker.needs_uffd()
            uffd = open_userfaultfd(self.stopped, UFFD_USER_MODE_ONLY) if needs_uffd else -1
            self.tracker = Tracker.start(self.pid, uffd)
        keeps = self._settings.is_tracking
        memory.dump(self.pid, self.areas(look), tracker=self.tracker, keep_tracking=keeps, looked=looked)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, while it is stopped and held."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def release(self) -> None:
        """Let it go, or see it end; a second call does nothing."""
        if self.stopped is not None:
            self.stopped.release()

    def close(self) -> None:
        """Let it go and forget what tracks it, unless that was left to somebody."""
        self.release()
        if self.tracker is not None:
            self.tracker.close()


def dump(settings: Settings, log: Log) -> Dumped:
    """Make one dump; LazydError in one line if it cannot be made, and then the tasks run on as they did."""
    begun = time.monotonic()
    check_is_process(settings.pid)
    if settings.is_tracking:
        tracker.needs_uffd()  # says so if this kernel tracks nothing
    pids = [settings.pid, *(descendants(settings.pid) if settings.with_children else ())]
    if settings.parent is not None:
        _check_parent(settings.parent, pids)
    tasks: list[_Task] = []
    try:
        for pid in pids:
            check_is_process(pid)
            tasks.append(_Task(pid, pids, settings))
        return _dump_tasks(settings, tasks, log, begun)
    except (OSError, LazydError) as error:
        # Whatever could not be read then is not what the user wants to hear of.
        for task in tasks:
            task.release()
        if len(tasks) == len(pids) and any(has_ended(pid) for pid in pids):
            raise DumpError(f"process {settings.pid} was killed while it was dumped") from error
        if isinstance(error, LazydError):
            raise
        if isinstance(error, ProcessLookupError):  # not the process, so a thread of it
            raise changes_too_fast(settings.pid) from error
        where = f"{error.filename}: " if error.filename else ""
        raise DumpError(f"process {settings.pid}: {where}{error.strerror}; it was not dumped") from error
    finally:
        for task in tasks:
            task.close()


def _dump_tasks(settings: Settings, tasks: list[_Task], log: Log, begun: float) -> Dumped:
    endpoint = None
    if settings.tls is not None:
        from lazyd.tls.handshake import Endpoint, Side  # noqa: PLC0415  few want it, and ssl takes its time

        endpoint = Endpoint(settings.tls, Side.CLIENT)
    build_ids = BuildIds()
    others = Others([task.pid for task in tasks])
    problems = others.find()
    looks, found = look_at_all([task.survey for task in tasks])
    refuse(settings.pid, problems + found)
    for look in looks:
        build_ids.warm_up(mapping.file.path for mapping in look.mappings if mapping.file is not None)
    with ImagesWriter(settings.images, parent=settings.parent, may_hold=settings.may_hold) as writer:
        destination: LocalImages | PageServer
        if settings.page_server is not None:
            host, port, header = settings.page_server
            destination = PageServer.connect(host, port, settings.form, header=HeaderSize(header), tls=endpoint)
        else:
            destination = LocalImages(writer, settings.form, auto_dedup=settings.auto_dedup)
        with MemoryDump(destination) as memory:
            for task in tasks:
                is_incremental = task.tracker is not None and task.tracker.has_baseline
                memory.prepare(task.pid, is_incremental=is_incremental)
                if settings.parent is not None and not is_incremental:
                    since = f"what process {task.pid} wrote since {settings.parent} was not tracked"
                    log.warning(f"{since}: all of its memory is dumped again")
            return _dump_stopped(settings, tasks, looks, others, log, begun, writer, destination, memory, build_ids)


def _dump_stopped(  # noqa: PLR0917  one dump's parts, made one by one by its callers
    settings: Settings,
    tasks: list[_Task],
    looks: list[Look],
    others: Others,
    log: Log,
    begun: float,
    writer: ImagesWriter,
    destination: LocalImages | PageServer,
    memory: MemoryDump,
    build_ids: BuildIds,
) -> Dumped:
    with Watch(log, memory, settings.show) as watch:
        early = sum(task.copy_early(memory, look) for task, look in zip(tasks, looks, strict=True))
        watch.check()
        if early:
            # What has changed meanwhile need not be found out while they are stopped.
            looks, problems = look_at_all([task.survey for task in tasks])
            refuse(settings.pid, problems)
        stopping = time.monotonic()
        _stop_all(tasks, settings)
        stopped = time.monotonic()
        with _PagesAside(memory, tasks, looks) as aside:
            looks, problems = look_at_all([task.survey for task in tasks])
            refuse(settings.pid, others.find_again() + problems)
            for task, look, looked in zip(tasks, looks, aside.wait(), strict=True):
                task.dump(memory, look, looked)
        memory.dump_shared()
        images = [task.images for task in tasks if task.images is not None]
        owners = find_owners({image.state.pid: image.descriptors for image in images})
        watch.check()
        if settings.after is After.RUN:
            for task in tasks:
                task.release()
        frozen = early + time.monotonic() - stopped
        counts = memory.finish()
        try:
            for name, kind, records in compose(images, owners, build_ids):
                writer.write_small(name, kind.magics, kind.encode(records))
        except FileNotFoundError as error:
            raise DumpError(f"{error.filename}: in use by the task, but it is gone") from error
        write_stats(writer, _stats(counts, stopped - stopping, frozen), settings.form.dialect)
        watch.check()
        writer.publish()
    for image in images:
        if image.guards:
            log.warning(f"process {image.state.pid} has guard pages: only criu 4.2 or later restores these images")
    # The images are there. Whatever fails from here on does not take them away.
    if settings.after is not After.RUN:
        for task in tasks:
            task.send(signal.SIGKILL if settings.after is After.KILL else signal.SIGSTOP)
        frozen = early + time.monotonic() - stopped
        for task in tasks:
            task.release()
    punched = 0
    if isinstance(destination, LocalImages) and settings.auto_dedup:
        punched = destination.punch_parents()
    if settings.is_tracking:
        for task in tasks:
            assert task.tracker is not None, "a dump that is to track has made one"
            if why := task.tracker.leave(writer.path, task.pagemap_name):
                log.warning(f"writes of process {task.pid} are not tracked: {why}; the next dump will be a full one")
    times = Times(stopped - stopping, stopped - stopping + frozen, time.monotonic() - begun)
    return Dumped(settings, [image.state for image in images], counts, times, punched)


class _PagesAside:
    """Looks at the pages of stopped tasks on a thread of its own, in the mappings that they had before.

    As a context manager it waits for the end, and closes what nobody has taken.
    """

    def __init__(self, memory: MemoryDump, tasks: list[_Task], looks: list[Look]) -> None:
        self._memory = memory
        self._found: list[Looked] = []
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        try:
            for task, look in zip(tasks, looks, strict=True):
                self._found.append(memory.look(task.pid, task.areas(look), task.tracker))
        except BaseException:
            self._close()
            raise

    def _run(self) -> None:
        try:
            for looked in self._found:
                self._memory.finish_look(looked)
        except Exception as error:  # raised where it is waited for
            self._failed = error

    def _close(self) -> None:
        for looked in self._found:
            looked.close()

    def wait(self) -> list[Looked]:
        """Return what there is, by task."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._found

    def __enter__(self) -> _PagesAside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join()
        self._close()


def _stop_all(tasks: list[_Task], settings: Settings) -> None:
    """Stop all tasks, parents first; a child that was born meanwhile is not one of them."""
    known = {task.pid for task in tasks}
    for task in tasks:
        task.stop()
    for task in tasks:
        if new := [child for child in children(task.pid) if child not in known]:
            if settings.with_children:
                raise DumpError(f"process {task.pid} has just started process {new[0]}; try again")
            raise DumpError(f"process {task.pid} has just started process {new[0]}; --tree dumps it too")


def _stats(counts: MemoryCounts, freezing: float, frozen: float) -> DumpStats:
    return DumpStats(
        freezing=freezing,
        frozen=frozen,
        memdump=counts.scan_time + counts.copy_time,
        memwrite=counts.copy_time,
        pages_scanned=counts.scanned,
        pages_skipped_parent=counts.parent,
        pages_written=counts.dumped,
        pages_zero=counts.zero,
        pages_lazy=counts.lazy,
    )


def _check_parent(path: Path, pids: Sequence[int]) -> None:
    """See that a parent is complete and of these very tasks."""
    try:
        directory = ImagesDirectory.open(path)
    except ImageError as error:
        raise DumpError(f"{error.path}: {error.reason}; --parent names the images of the dump before") from None
    try:
        try:
            uptime = directory.read_dump_uptime()
        except FileNotFoundError:
            raise DumpError(f"{path}: no inventory.img in it: no complete images of a dump") from None
        names = {f"pagemap-{pid}.img" for pid in pids[:1]}
        if missing := [name for name in names if not (path / name).exists()]:
            raise DumpError(f"{path}: images of another task: no {missing[0]} in it")
        if uptime and started_at(pids[0]) > uptime:
            raise DumpError(f"{path}: images of another task: process {pids[0]} was started after that dump")
    finally:
        directory.close()


def statistics(dumped: Dumped) -> dict[str, Any]:
    """Return what a dump was, as JSON can hold it: bytes and pages as numbers, times in seconds."""
    counts, times, settings = dumped.counts, dumped.times, dumped.settings
    return {
        "version": version(),
        "images": str(settings.images),
        "parent": str(settings.parent) if settings.parent else None,
        "format": settings.form.dialect.value,
        "after": settings.after.value,
        "tasks": [{"pid": state.pid, "name": state.name, "threads": len(state.threads)} for state in dumped.tasks],
        "pages": {
            "scanned": counts.scanned,
            "dumped": counts.dumped,
            "zero": counts.zero,
            "parent": counts.parent,
            "lazy": counts.lazy,
            "early": counts.early,
            "shared": counts.shared_dumped,
        },
        "bytes": counts.bytes,
        "bytes_punched": dumped.punched_bytes,
        "tracked_areas": counts.tracked_areas,
        "seconds": {
            "freezing": times.freezing,
            "stopped": times.stopped,
            "scan": counts.scan_time,
            "copy": counts.copy_time,
            "total": times.total,
        },
    }


def summary_lines(dumped: Dumped) -> list[str]:
    """Return the same for people."""
    counts, times = dumped.counts, dumped.times
    names = ", ".join(f"{state.pid} ({state.name})" for state in dumped.tasks)
    threads = sum(len(state.threads) for state in dumped.tasks)
    kinds = {"dumped": counts.dumped, "zero": counts.zero, "in the parent": counts.parent}
    parts = [f"{word} {pages} ({human_bytes(pages * PAGE_SIZE)})" for word, pages in kinds.items() if pages]
    if counts.early:
        parts.append(f"{counts.early} of them while it ran ({human_bytes(counts.early * PAGE_SIZE)})")
    if counts.shared_dumped:
        parts.append(f"of shared memory {counts.shared_dumped} ({human_bytes(counts.shared_dumped * PAGE_SIZE)})")
    copied = counts.bytes - counts.early * PAGE_SIZE
    rate = copied / counts.copy_time if counts.copy_time else 0.0
    lines = [
        f"process {names}: {counted(threads, 'thread')}, now {dumped.settings.after.value}",
        f"pages: {counts.scanned} scanned; " + (", ".join(parts) or "none to dump"),
        f"stopped for {human_seconds(times.stopped)}: freezing {human_seconds(times.freezing)},"
        f" scan {human_seconds(counts.scan_time)},"
        f" copy {human_seconds(counts.copy_time)} ({human_bytes(copied)}, {human_bytes(rate)}/s)",
    ]
    if dumped.punched_bytes:
        lines.append(f"parents: {human_bytes(dumped.punched_bytes)} freed")
    lines.append(f"images in {dumped.settings.images} after {human_seconds(times.total)}")
    return lines


DIALECTS = {"flags": Dialect.FLAGS, "booleans": Dialect.BOOLEANS}
