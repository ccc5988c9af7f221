# SPDX-License-Identifier: MIT
"""Wires one restore together: log, images, socket, and, if asked for, the step into the background.

Everything that can fail for a reason the user can mend fails before the socket listens, and in the
foreground: the parent of a --daemon leaves with 0 only when its child listens.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lazyd.errors import LazydError, SystemCallError
from lazyd.hints import Protocol
from lazyd.keeper import Guard, Life, Work, flush, keep
from lazyd.report import (
    Log,
    Moments,
    Outcome,
    Progress,
    Show,
    check_statistics,
    human_seconds,
    statistics,
    summary_lines,
    write_statistics,
)
from lazyd.restore_socket import Listener
from lazyd.session import Session, Settings
from lazyd.session.signals import hold_signals
from lazyd.target import Attached
from lazyd.tuples import NamedTuple
from lazyd.uffd import check_permission


class Options(NamedTuple):
    """What the command line says of one restore.

    `log_file` and `pidfile` are relative to the work directory, as in criu, `statistics` to the current one.
    """

    settings: Settings
    work: Path
    log_file: Path | None
    pidfile: Path | None
    status_fd: int | None
    statistics: Path | None
    is_daemon: bool
    show: Show
    attach: Attach | None = None
    restore: Restore | None = None
    """The task is built here, and nobody comes to the socket."""


class Attach(NamedTuple):
    """Whom to attach to. `image_pid` 0: the images know the task by its pid."""

    pid: int
    image_pid: int
    with_children: bool
    drop_pages: bool


class Restore(NamedTuple):
    """How a task is built. `rewinds` is its pid if it is there already and is put back; 0: it is made."""

    rewinds: int = 0


class Announcement:
    """Where others learn that the socket listens; files are opened early, so that none fails too late."""

    def __init__(self, pidfile: Path | None, status_fd: int | None) -> None:
        """Open what is to be written."""
        self._status_fd = status_fd
        self._path = pidfile
        self._pidfile: int | None = None
        if self._path is not None:
            try:
                self._pidfile = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise SystemCallError("opening the pidfile", error.errno or 0, path=self._path) from error

    def succeed(self) -> None:
        """Write this process's pid where that of the one in whose place it is stands."""
        if self._path is None:
            return
        from lazyd.outputs import write_whole  # noqa: PLC0415  few need it

        try:
            if self._path.exists():
                write_whole(self._path, str(os.getpid()))
        except OSError as error:
            raise SystemCallError("writing the pidfile", error.errno or 0, path=self._path) from error

    def write(self) -> None:
        """Write this process's pid and the status byte, and close both."""
        if self._pidfile is not None:
            try:
                os.write(self._pidfile, str(os.getpid()).encode())
            except OSError as error:
                raise SystemCallError("writing the pidfile", error.errno or 0, path=self._path) from error
            os.close(self._pidfile)
        if self._status_fd is not None:
            # Whoever waited there and has gone does not wait any more.
            with contextlib.suppress(OSError):
                os.write(self._status_fd, b"\0")
            if self._status_fd > 2:  # the next descriptor would take a standard stream's number, and get its lines
                os.close(self._status_fd)


def check_outputs(status_fd: int | None, statistics_path: Path | None) -> None:
    """Refuse what could not be written later.

    Call it before anything is opened: a number that nobody passed would be one of our own descriptors then. The
    statistics are written when the restore is over, which is too late to hear of a wrong path.
    """
    if status_fd is not None:
        try:
            os.set_inheritable(status_fd, False)  # noqa: FBT003  its only way
        except (OSError, OverflowError) as error:
            raise SystemCallError(f"--status-fd {status_fd}", getattr(error, "errno", errno.EBADF)) from error
    if statistics_path is not None:
        check_statistics(statistics_path)


def serve(options: Options, log: Log) -> int:
    """Serve one restore and return the exit code."""
    statistics_path = options.statistics.absolute() if options.statistics is not None else None
    try:
        check_outputs(options.status_fd, statistics_path)
    except LazydError as error:
        log.error(str(error))
        return error.exit_code
    try:
        if options.log_file is not None:
            log.open(options.work / options.log_file)
        return _serve(options, log, statistics_path)
    except LazydError as error:
        log.error(str(error))
        moments = Moments(end=log.elapsed())
        reason, path = str(error), str(options.settings.images)
        outcome = Outcome(1, reason, path, None, None, moments, None, (), (reason,))
        return _conclude(outcome, log, statistics_path)


def _conclude(outcome: Outcome, log: Log, statistics_path: Path | None) -> int:
    """Say how it went; the exit code."""
    for line in summary_lines(outcome):
        log.info(line)
    if statistics_path is not None:
        try:
            write_statistics(statistics_path, statistics(outcome))
        except LazydError as error:
            log.error(str(error))
            return 1
    return outcome.exit_code


def _serve(options: Options, log: Log, statistics_path: Path | None) -> int:
    work = options.work.absolute()
    check_permission()
    progress = Progress(log, options.show)
    if options.restore is not None and options.restore.rewinds:
        return _serve_rewound(options, options.restore.rewinds, log, progress, statistics_path)
    if options.restore is not None:
        return _serve_restored(options, log, progress, statistics_path)
    if options.attach is not None:
        return _serve_attached(options, options.attach, log, progress, statistics_path)
    with Session(options.settings, log, progress) as session, contextlib.ExitStack() as stack:
        listener = Listener(work)
        # In the parent of a daemon the name must stay.
        stack.callback(listener.close)
        pidfile = None if options.pidfile is None else work / options.pidfile
        try:
            announcement = Announcement(pidfile, options.status_fd)
        except LazydError:
            listener.unlink()
            raise
        ready = None
        if options.is_daemon:
            ready = into_background(listener.unlink)
            if ready is None:
                return 0
        stack.callback(listener.unlink)
        hold_signals()
        announcement.write()
        session.note_listening()
        if ready is not None:
            leave_terminal(log)
            os.write(ready, b"\0")
            os.close(ready)

        def serve_life(life: Life, guard: Guard) -> int:
            # Nothing is closed on the way of an exception: another process goes on with what is open.
            outcome = session.run(listener, guard) if life is Life.FIRST else session.resume(life, listener, guard)
            listener.unlink()
            return _conclude(outcome, log, statistics_path)

        code = keep(
            Work(
                serve=serve_life,
                report=log.error,
                sweep=lambda at_first, kept: session.sweep(at_first, kept, listener),
                halt=session.halt,
                begun=lambda: None,
                succeed=lambda _: announcement.succeed(),
            )
        )
        # The child has closed what was ours: the descriptors are shared. Not one of them may be closed again.
        listener.unlink()
        flush()
        os._exit(code)


class Held(Protocol):
    """Tasks that wait for somebody who serves them. Given up, they are as they were, or there are none."""

    tasks: list[Attached]

    def release(self) -> None:
        """Let them run."""

    def __enter__(self) -> Held: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _serve_attached(
    options: Options, attach: Attach, log: Log, progress: Progress, statistics_path: Path | None
) -> int:
    """Attach to tasks and serve them: as a restore, with nobody at the socket."""
    from lazyd.target.attach import attach_all, find_tasks  # noqa: PLC0415  it brings in what others do not wait for

    pids = find_tasks(attach.pid, attach.image_pid, with_children=attach.with_children)

    def hold(session: Session) -> Held:
        tasks = [(pid, session.expected[image_pid]) for pid, image_pid in pids.items()]
        return attach_all(tasks, drop_pages=attach.drop_pages)

    said = f"attached to {', '.join(map(str, pids))}"
    return _serve_held(options, _Serving(frozenset(pids.values()), hold, said), log, progress, statistics_path)


def _serve_restored(options: Options, log: Log, progress: Progress, statistics_path: Path | None) -> int:
    """Build a task again and serve it from its first instruction on."""
    from lazyd.restore.build import Restored  # noqa: PLC0415  as above
    from lazyd.restore.memory import Memory  # noqa: PLC0415
    from lazyd.restore.plan import make_plan  # noqa: PLC0415

    plan = make_plan(options.settings.images)

    def hold(session: Session) -> Held:
        expected = session.expected[plan.pid]
        restored = Restored(plan, Memory(expected.extents, expected.sources))
        if restored.warning:
            log.warning(restored.warning)
        return restored

    said = f"restored {plan.pid}"
    return _serve_held(options, _Serving(frozenset({plan.pid}), hold, said), log, progress, statistics_path)


def _serve_rewound(options: Options, pid: int, log: Log, progress: Progress, statistics_path: Path | None) -> int:
    """Put a task back to its checkpoint and serve it from there on."""
    from lazyd.errors import RestoreError  # noqa: PLC0415  as above
    from lazyd.restore.memory import Memory  # noqa: PLC0415
    from lazyd.restore.plan import make_plan  # noqa: PLC0415
    from lazyd.restore.rewind import Rewound  # noqa: PLC0415

    plan = make_plan(options.settings.images, is_there=True)
    if plan.pid != pid:
        raise RestoreError(f"{plan.images}: images of task {plan.pid}, not of {pid}")
    held: list[Rewound] = []

    def hold(session: Session) -> Held:
        expected = session.expected[plan.pid]
        held.append(Rewound(plan, Memory(expected.extents, expected.sources)))
        if held[0].warning:
            log.warning(held[0].warning)
        return held[0]

    def after() -> None:
        how_long = f"; it was stopped for {human_seconds(held[0].stopped_s)}" if held[0].stopped_s else ""
        log.message(f"rewound {pid}{how_long}")
        if left := held[0].sweep():
            log.warning(left)

    return _serve_held(options, _Serving(frozenset({pid}), hold, "", after), log, progress, statistics_path)


class _Serving(NamedTuple):
    """Whom to serve: tasks by their image pids, how to get hold of them, and what to say and do when they run."""

    image_pids: frozenset[int]
    hold: Callable[[Session], Held]
    said: str
    after: Callable[[], None] | None = None


def _serve_held(options: Options, serving: _Serving, log: Log, progress: Progress, statistics_path: Path | None) -> int:
    settings = options.settings._replace(attach=serving.image_pids)
    with Session(settings, log, progress) as session:
        pidfile = None if options.pidfile is None else options.work.absolute() / options.pidfile
        announcement = Announcement(pidfile, options.status_fd)
        ready = None
        if options.is_daemon:
            ready = into_background(lambda: None)
            if ready is None:
                return 0
        hold_signals()
        with serving.hold(session) as held:
            session.note_attached(held.tasks)

            def serve_life(life: Life, guard: Guard) -> int:
                outcome = session.run(None, guard) if life is Life.FIRST else session.resume(life, None, guard)
                return _conclude(outcome, log, statistics_path)

            def begun() -> None:
                held.release()
                announce()

            def announce() -> None:
                # Nothing may end this process from here on: what could not be announced is said, and that is all.
                try:
                    announcement.write()
                except LazydError as error:
                    log.error(str(error))
                if serving.said:
                    log.message(serving.said)
                if ready is not None:
                    leave_terminal(log)
                    os.write(ready, b"\0")
                    os.close(ready)
                if serving.after is not None:
                    try:
                        serving.after()
                    except Exception as error:  # what it leaves undone harms nobody
                        log.error(f"{type(error).__name__}: {error}")

            def succeed(has_begun: bool) -> None:  # noqa: FBT001  that is what it is told
                if has_begun:
                    announcement.succeed()
                else:  # the tasks' tracer is dead, which let them go
                    announce()

            code = keep(
                Work(
                    serve=serve_life,
                    report=log.error,
                    sweep=lambda at_first, kept: session.sweep(at_first, kept, None),
                    halt=session.halt,
                    begun=begun,
                    succeed=succeed,
                )
            )
            flush()
            os._exit(code)


def into_background(clean_up: Callable[[], None]) -> int | None:
    """Fork. The child gets where to write one byte once it listens; the parent waits for it and gets None.

    clean_up: what is left to do in the parent if the child has failed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        return writing
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123  a descriptor, not a path
        is_ready = pipe.read(1) == b"\0"
    if is_ready:
        return None
    os.waitpid(child, 0)
    # The child has said on our stderr, which it shares, what went wrong.
    clean_up()
    raise SystemExit(1)


def leave_terminal(log: Log) -> None:
    """Let go of the standard streams: whoever started this does not read them any more."""
    log.detach()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)
