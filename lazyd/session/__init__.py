# SPDX-License-Identifier: MIT
"""One restore: its tasks, the restorer that hands them over, and how it ends.

Everything waits in one loop: for the restorer, for the engine's notices, for signals and for the next line of
progress. Pages do not pass through here; a slow loop delays a report, never a fault.

How it ends, in the order of what is asked first:

- finished, and every task filled or gone: 0; or 1 if any page could not be had, a task failed, or the
  restorer never handed a task over. What can be served is served to the end all the same.
- the restorer hung up before "finished", or broke the protocol: all that is missing is poisoned, 1.
- a signal before the first task: nothing depends on us, 1 at once (stock dies of the signal, which is not 0
  either).
- the link to a page server broke for good: tasks that miss pages wait, or are killed, as settings.kill_on_loss says.
- a signal later: the fill is finished first, without a limit, and the end is as above. A second one within
  five seconds: the tasks that still depend on us are stopped with SIGSTOP and what is missing is poisoned, so
  that one that is continued gets SIGBUS where a byte is missing, and never zeros; 1. With a page server, whose
  copy of the task would end with us, they are stopped and everything is held; a third one is the end.

Every process of the family (see keeper) has its copy of a session; what they share is the engine's arena and a few
words: the restorer's connection, how far the handshake has come, whether anything failed. This module is longer than
others because all of it is one object's state, moved on by one loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lazyd.enums import Enum
from lazyd.errors import LazydError, ProtocolError, RestoreError, SystemCallError
from lazyd.hints import TYPE_CHECKING
from lazyd.image import Checkpoint, load
from lazyd.keeper import Guard, Life
from lazyd.report import Log, Moments, Outcome, Progress
from lazyd.restore_socket import (
    SOCKET_NAME,
    Connection,
    DescriptorsLost,
    Event,
    Finished,
    Handshake,
    HungUp,
    Listener,
    TaskUffd,
    Zombie,
)
from lazyd.session.held import HeldTasks, stop_unheld, task_infos
from lazyd.session.prepared import prepare
from lazyd.session.signals import SIGNALS, signals_as_bytes
from lazyd.target import Attached, Expected, find_run_pid
from lazyd.tuples import NamedTuple
from lazyd.uffd import (
    Descriptor,
    Engine,
    Fill,
    LinkInfo,
    Notice,
    NoticeKind,
    SharedWords,
    TaskStatus,
)
from lazyd.units import PAGE_SIZE, counted, human_bytes

if TYPE_CHECKING:
    from lazyd.session.remote import RemotePages
    from lazyd.source.page_server import PageServer

SECOND_SIGNAL_S = 5.0
_CONNECTION, _HANDSHAKE, _ACCEPTED, _FAILED = range(4)
"""Words shared with the processes after this one: the connection's descriptor, 0 without one; how far it has come;
the listening descriptor plus 1, once it is not needed any more; 1: the exit code is not 0, whatever follows."""
ALONE_S = 0.2
"""How long a keeper may take to be replaced by its standby, before the server makes one."""
SAME_SIGNAL_S = 0.25
_HOLDING_SIGNALS = 2
_USERFAULTFD = "anon_inode:[userfaultfd]"


class Settings(NamedTuple):
    """What one restore is to be like. `fill_rate`: bytes a second, 0: no limit; `workers` 0: by the cores.

    `attach`: no restorer hands over tasks, they are attached to: of the images these, by image pid; None: as a restore.
    """

    images: Path
    dialect: str
    fill: Fill
    fill_rate: int
    workers: int
    attach: frozenset[int] | None = None
    server: PageServer | None = None
    """Where pages come from that only a page server has."""
    kill_on_loss: bool = False
    """Whether tasks whose pages cannot be had any more are killed; else they wait."""


class _End(Enum):
    """Why the loop ends."""

    SERVED = "served"
    ABANDONED = "abandoned"


class Session:
    """One restore, from the images to the last task. It owns its engine."""

    def __init__(self, settings: Settings, log: Log, progress: Progress) -> None:
        """Load and check the images and prepare every task; ImageError if any of it cannot be trusted."""
        self._settings = settings
        self._log = log
        self._progress = progress
        self._announced: set[int] = set()
        self._to_attach: Sequence[Attached] = ()
        self._moments = Moments()
        self._problems: list[str] = []
        self._reason: str | None = None
        self._is_finished = False
        self._last_signal: float | None = None
        self._end: _End | None = None
        # Not epoll: its state would be shared with, and left behind by, a process that dies (see keeper).
        self._selector = selectors.PollSelector()
        self._shared = SharedWords(4)
        self._connection: Connection | None = None
        self._guard: Guard | None = None
        self._alone_since: float | None = None
        # Before the images: it raises the limit of open files, and a long chain has many of them.
        self._engine = Engine(workers=settings.workers, fill=settings.fill, fill_rate=settings.fill_rate)
        self._held = HeldTasks(self._engine)
        self._remote: RemotePages | None = None
        self._signals = 0
        """How many have come within a few seconds of each other."""
        self._checkpoint: Checkpoint | None = None
        """Kept open as long as somebody reads the images beside the engine: until what is attached to is."""
        try:
            self._checkpoint = load(settings.images, settings.dialect)
            if settings.server is not None:
                self._remote = self._connect(settings.server, self._checkpoint)
            self._prepared = prepare(self._engine, self._checkpoint, settings.attach, self._remote)
            self._tasks = dict(self._prepared.tasks)
            """Image pid to the engine's number, of the tasks that have not been announced yet."""
            if settings.attach is None:
                self._close_images()
            self._moments = self._moments._replace(loaded=log.elapsed())
        except BaseException:
            if self._remote is not None:
                self._remote.part(has_run=False, has_all=False)
            self.close()
            raise

    def _connect(self, server: PageServer, checkpoint: Checkpoint) -> RemotePages:
        from lazyd.session.remote import RemotePages  # noqa: PLC0415  most have none, and would wait for the import
        from lazyd.wire import HeaderSize  # noqa: PLC0415

        pids = [task.pid for task in checkpoint.tasks if not task.is_zombie]
        header = HeaderSize.WIDE if checkpoint.wide_header else HeaderSize.NARROW
        return RemotePages(self._engine, server, header, pids, self._log)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None and self._remote is not None and not self._engine.is_finished:
            # Nobody has served, nor will: at the source it must not look like the end of a transfer.
            with contextlib.suppress(OSError):
                self._remote.part(has_run=False, has_all=False)
        self.close()

    def close(self) -> None:
        """Release everything."""
        self._close_images()
        if self._connection is not None:
            self._connection.close()
        self._held.close()
        self._selector.close()
        self._engine.close()

    def _close_images(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()

    @property
    def expected(self) -> Mapping[int, Expected]:
        """What is needed to attach to a task, by image pid; until note_attached."""
        return self._prepared.expected

    def note_attached(self, tasks: Sequence[Attached]) -> None:
        """Take over tasks that are attached to; they are served as soon as this runs."""
        self._to_attach = list(tasks)
        self._close_images()
        self._prepared.expected.clear()
        self._moments = self._moments._replace(listening=self._log.elapsed())
        self._log.info(self._prepared.said)

    def note_listening(self) -> None:
        """Tell those who wait for the socket."""
        self._moments = self._moments._replace(listening=self._log.elapsed())
        self._log.message(f"listening on {SOCKET_NAME}")
        self._log.info(self._prepared.said)

    def run(self, listener: Listener | None, guard: Guard) -> Outcome:
        """Serve one restorer, or what was attached to, to the end.

        Starts the engine's threads: this process must not be forked again, but by the guard.
        """
        self._guard = guard
        self._engine.start()
        if listener is None:
            self._take_attached()
            self._restore_finished()
        else:
            self._wait(listener, lambda: self._on_restorer(listener))
        return self._serve_to_the_end()

    def _take_attached(self) -> None:
        """Serve the tasks that are attached to, those apart that a process that died has taken already."""
        for task in self._to_attach:
            if task.image_pid in self._tasks:
                self._announced.add(task.image_pid)
                self._begin_to_serve(task.image_pid, task.uffd, task.pid)

    def resume(self, life: Life, listener: Listener | None, guard: Guard) -> Outcome:
        """Go on in the place of a process that died; this one is a copy of another in which no thread runs."""
        self._guard = guard
        self._forget()
        if self._shared[_FAILED] and self._reason is None:
            self._reason = "something failed before the serving process died"
        for info in task_infos(self._engine):
            if info.status is not TaskStatus.PREPARED and self._tasks.pop(info.image_pid, None) is not None:
                self._announced.add(info.image_pid)
        if life is Life.LAST:  # before what the others may have died of
            self._held.find()
            for pid in [*self._stop_untaken_tasks(), *self._held.stop_all()]:
                self._log.debug(f"pid {pid} is stopped")
        served = self._engine.resume()
        self._engine.start()
        if life is Life.LAST:
            self._take_attached()
            self._fail(f"the serving process died again and again: stopping {counted(served, 'task')} and giving up")
            self._stop_tasks()
            return self._finish()
        self._held.find()  # behind what must have a descriptor
        if self._remote is not None:
            self._on_link()
        if not self._engine.is_finished:
            self._log.warning(f"going on in the middle of a restore, {counted(served, 'task')} handed over so far")
            self._resume_handshake(listener)
            return self._serve_to_the_end()
        self._is_finished = True
        if connection := self._shared[_CONNECTION]:  # it died before it had closed it
            self._shared[_CONNECTION] = 0
            os.close(connection)
        self._miss_tasks()
        for number, info in enumerate(task_infos(self._engine)):
            if info.status is TaskStatus.FAILED:  # its notice may have died unread
                self._fail(f"{self._name(number)}: could not be served to the end")
        self._log.warning(f"going on with {counted(served, 'task')}, left by a process that died")
        self._progress.begin()
        self._look_for_the_end()
        return self._serve_to_the_end()

    def _forget(self) -> None:
        """Forget what is another process's, without closing it: it was closed, and its number may be another's."""
        self._selector = selectors.PollSelector()
        if self._connection is not None:
            self._connection.forget()
            self._connection = None
        self._held.forget()
        self._alone_since = None

    def halt(self) -> None:
        """Stop the tasks: nobody can be made to serve them. In a process that does not serve."""
        self._held.forget()
        self._held.find()
        stopped = [*self._stop_untaken_tasks(), *self._held.stop_all()]
        self._log.warning(f"stopped: {', '.join(map(str, stopped))}")

    def sweep(self, at_first: frozenset[int], kept: frozenset[int], listener: Listener | None) -> None:
        """Close what a process that died has left open and nobody knows of; before another one resumes.

        Beside what was open `at_first` and is `kept` by those who keep, the shared state names what is in use. A
        userfaultfd that it does not name is closed only where it is known why: its end would be zeros.
        """
        numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208  numbers, not paths
        known = self._engine.descriptors(max(numbers) + 1)
        handshake = Handshake()
        handshake.restore(self._shared[_HANDSHAKE])
        due = handshake.due_pid
        # Looked at, and not handed over: the message still has its own.
        has_copies = bool(due) and any(
            info.image_pid == due and info.status is TaskStatus.PREPARED for info in task_infos(self._engine)
        )
        in_use = kept | (at_first - {self._shared[_ACCEPTED] - 1})
        unknown = []
        for number in numbers:
            if number in in_use or known[number] is Descriptor.SERVED or number == self._shared[_CONNECTION]:
                continue
            try:
                what = str(Path(f"/proc/self/fd/{number}").readlink())
            except OSError:
                continue  # the list itself was read through it
            if what == _USERFAULTFD and known[number] is not Descriptor.DONE and not has_copies:
                unknown.append(number)
            elif (
                listener is not None and what.startswith("socket:") and not self._shared[_ACCEPTED]
            ) and listener.is_accepted(number):
                self._note_connection(number, listener)  # it died between accept() and this
            else:
                os.close(number)
        if unknown:
            self._log.warning(f"{len(unknown)} userfaultfds are nobody's: who waits for one waits on")

    def _resume_handshake(self, listener: Listener | None) -> None:
        """Take up the connection where the process that died has left it: the descriptor is shared."""
        if listener is None:
            self._take_attached()
            self._restore_finished()
            return
        descriptor = self._shared[_CONNECTION]
        if self._shared[_ACCEPTED] and not descriptor:
            self._abandon(f"{SOCKET_NAME}: the restore had failed when the serving process died")
            return
        if not descriptor:
            self._wait(listener, lambda: self._on_restorer(listener))
            return
        if not self._shared[_ACCEPTED]:
            self._note_connection(descriptor, listener)
            listener.close()
        connection = Connection(socket.socket(fileno=descriptor), self._shared, _HANDSHAKE)
        self._connection = connection
        self._wait(connection, self._on_connection)
        with self._abandoning():
            connection.resume(self._take, lambda pid: pid in self._announced)

    def _serve_to_the_end(self) -> Outcome:
        with signals_as_bytes() as signals:
            self._wait(signals, lambda: self._on_signals(signals))
            self._wait(self._engine.notify_fd, self._on_notices)
            self._watch_keeper()
            try:
                while self._end is None:
                    for key, _ in self._selector.select(self._due_in()):
                        callback: Callable[[], None] = key.data
                        callback()
                    self._look_for_keeper()
                    if self._remote is not None:
                        self._report_loss(self._remote.look())
                    self._progress.update(self._engine.totals)
            except BaseException as error:
                # Whatever it is: closing the engine now would let the tasks read zeros.
                self._fail(str(error) if isinstance(error, LazydError) else _describe(error))
                self._stop_tasks()
        return self._finish()

    def _due_in(self) -> float | None:
        dues = [self._progress.due_in()]
        if self._alone_since is not None:
            dues.append(ALONE_S)
        if self._remote is not None:
            dues.append(self._remote.due_in())
        return min((due for due in dues if due is not None), default=None)

    # Those who keep us

    def _watch_keeper(self) -> None:
        if self._guard is not None:
            fd = self._guard.keeper_fd()

            def on_death() -> None:
                self._selector.unregister(fd)
                self._alone_since = self._log.elapsed()

            self._wait(fd, on_death)

    def _look_for_keeper(self) -> None:
        """See to it that there is a keeper: its standby takes its place, unless that is dead as well."""
        if self._guard is None or self._alone_since is None:
            return
        self._guard.reap()
        if self._guard.is_kept():
            self._alone_since = None
            self._watch_keeper()
        elif self._log.elapsed() - self._alone_since >= ALONE_S:
            self._alone_since = self._log.elapsed()
            self._log.warning("nobody keeps this process: making a keeper")
            self._fork_standby(self._guard)

    def _fork_standby(self, guard: Guard) -> None:
        """Have a standby made, which must be a copy of a process without threads: they end, and begin again."""
        self._engine.stop()
        self._engine.release_reserve()
        for notice in self._engine.notices():
            self._report(notice)
        try:
            guard.fork_standby()
        except SystemCallError as error:
            self._log.error(str(error))  # tried again
        self._engine.resume()
        self._engine.start()

    def _wait(self, source: int | Listener | Connection, callback: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, callback)

    def _finish(self) -> Outcome:
        for notice in self._engine.notices():  # the last task may have ended faster than its notices were read
            self._report(notice)
        now = self._log.elapsed()
        link = self._part()
        totals = self._engine.totals()
        self._moments = self._moments._replace(end=now)
        if self._end is _End.SERVED and self._moments.full is None:
            self._moments = self._moments._replace(full=now)
        if self._reason is None and totals.poisoned_pages:
            self._fail(f"{totals.poisoned_pages} pages could not be had")
        self._progress.end(totals)
        return Outcome(
            exit_code=0 if self._reason is None else 1,
            reason=self._reason,
            images=str(self._settings.images),
            dialect=self._prepared.dialect,
            chain_depth=self._prepared.chain_depth,
            moments=self._moments,
            totals=totals,
            tasks=task_infos(self._engine),
            problems=self._problems,
            link=link,
        )

    # The page server

    def _on_link(self) -> None:
        if self._remote is not None:
            self._report_loss(self._remote.on_notice())

    def _report_loss(self, reason: str | None) -> None:
        """Say that pages cannot be had any more, and what comes of it."""
        if reason is None:
            return
        if not self._is_finished and not self._engine.totals().serving:
            self._abandon(reason)
            return
        if self._settings.kill_on_loss:
            killed = ", ".join(map(str, self._held.kill_all()))
            self._fail(f"{reason}: killed {killed or 'nobody that is known here'}; what is missing is poisoned")
            self._engine.abandon()
            self._end = _End.ABANDONED
        else:
            self._problems.append(reason)
            self._log.error(f"{reason}: the tasks go on as far as they can and wait there; end them by SIGKILL")

    def _part(self) -> LinkInfo | None:
        """End the link to the page server, if there is one, as the end of the session demands. How it was, at last."""
        if self._remote is None:
            return None
        infos = task_infos(self._engine)
        has_all = self._end is _End.SERVED and not self._engine.totals().poisoned_pages
        if has_all:
            self._remote.drain()
        link = self._remote.info
        self._engine.stop()
        if self._remote.is_lost and any(info.status is TaskStatus.GONE for info in infos):
            self._fail(f"{self._remote.name}: {self._problems[0] if self._problems else 'the link was lost'}")
        try:
            # Not only as this process knows: it may be the last, and have come to give up. What is attached to is let
            # go when there is a process that serves.
            has_run = self._is_finished or self._engine.is_finished or bool(self._to_attach)
            reason = self._remote.part(has_run=has_run, has_all=has_all)
        except OSError as error:
            reason = f"{self._remote.name}: {error}"
        if reason:
            self._fail(reason)
        return link

    def _fail(self, reason: str) -> None:
        """Log a problem and make sure that the exit code says so."""
        self._log.error(reason)
        self._problems.append(reason)
        self._shared[_FAILED] = 1
        if self._reason is None:
            self._reason = reason

    # The restorer

    def _on_restorer(self, listener: Listener) -> None:
        try:
            connected = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._spare_descriptor():
                return  # it is still there to be accepted
            raise
        if connected is None:
            return
        self._note_connection(connected.fileno(), listener)
        self._log.debug("the restorer has connected")
        self._selector.unregister(listener)
        listener.close()
        self._connection = Connection(connected, self._shared, _HANDSHAKE)
        self._wait(self._connection, self._on_connection)

    def _note_connection(self, descriptor: int, listener: Listener) -> None:
        self._shared[_CONNECTION] = descriptor
        self._shared[_ACCEPTED] = listener.fileno() + 1

    def _on_connection(self) -> None:
        """Take all that the restorer has sent."""
        with self._abandoning():
            while self._connection is not None:
                try:
                    if not self._connection.receive(self._take):
                        return
                except DescriptorsLost:
                    if not self._spare_descriptor():
                        raise

    def _spare_descriptor(self) -> bool:
        """Give up one of those that are good for something else: a task's userfaultfd comes first."""
        return self._engine.spend_reserve() or self._held.spare_one()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Give up when the restorer does not keep to the protocol."""
        try:
            yield
        except ProtocolError as error:
            self._hang_up()
            self._abandon(str(error))

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._shared[_CONNECTION] = 0
            self._connection.close()
            self._connection = None

    def _take(self, event: Event) -> None:
        match event:
            case TaskUffd(pid, uffd, sender):
                self._attach(pid, uffd, sender)
            case Zombie(pid):
                self._announce(pid, self._prepared.zombies, "zombie")
                self._log.debug(f"task {pid} is a zombie")
            case Finished():
                self._restore_finished()
            case HungUp():
                self._hang_up()
                handed = (
                    f"{len(self._announced)} of {counted(len(self._tasks) + len(self._announced), 'task')} handed over"
                )
                self._abandon(f"{SOCKET_NAME}: the restorer hung up before it had finished, {handed}")

    def _announce(self, pid: int, expected: dict[int, int] | set[int], what: str) -> None:
        if pid in self._announced:
            raise ProtocolError(SOCKET_NAME, f"task {pid} was announced twice")
        if pid not in expected:
            in_images = pid in self._tasks or pid in self._prepared.zombies
            says = f"{'not a ' + what if in_images else 'no such task'} in {self._settings.images}"
            raise ProtocolError(SOCKET_NAME, f"{what} {pid} was announced: {says}")
        self._announced.add(pid)

    def _attach(self, pid: int, uffd: int, sender: int) -> None:
        try:
            self._announce(pid, self._tasks, "task")
            run_pid = find_run_pid(pid, sender)
            self._begin_to_serve(pid, uffd, run_pid)
        except BaseException:
            os.close(uffd)
            raise

    def _begin_to_serve(self, pid: int, uffd: int, run_pid: int) -> None:
        number = self._tasks.pop(pid)
        self._engine.attach(number, uffd, run_pid)
        if self._moments.first_task is None:
            self._moments = self._moments._replace(first_task=self._log.elapsed())
        if run_pid:
            self._held.hold(number, run_pid)
        self._log.debug(f"task {pid} (pid {run_pid or 'unknown'} here) is served")

    def _restore_finished(self) -> None:
        # First: a process that goes on in the place of this one takes a connection that is closed for a failure.
        self._engine.finish_restore()
        self._hang_up()
        self._is_finished = True
        self._moments = self._moments._replace(restored=self._log.elapsed())
        self._miss_tasks()
        self._progress.begin()
        self._log.info(f"restore finished: {counted(len(self._announced), 'task')}")
        self._look_for_the_end()

    def _miss_tasks(self) -> None:
        for pid in self._tasks:
            # If it runs, it runs on zeros, and nobody here can help it.
            self._fail(f"{SOCKET_NAME}: the restorer finished without handing over task {pid}")

    # The engine

    def _on_notices(self) -> None:
        for notice in self._engine.notices():
            self._report(notice)
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if self._is_finished and self._end is None and not self._engine.totals().serving:
            self._moments = self._moments._replace(full=self._log.elapsed())
            self._end = _End.SERVED

    def _report(self, notice: Notice) -> None:
        who = self._name(notice.task)
        pages = f"{notice.value} page{'' if notice.value == 1 else 's'} at {notice.address:#x}"
        why = f"{errno.errorcode.get(-notice.error, -notice.error)}: {os.strerror(-notice.error)}"
        names = self._prepared.source_names
        source = names[notice.source] if notice.source < len(names) else "?"
        match notice.kind:
            case NoticeKind.TASK_FILLED:
                self._log.debug(f"{who}: full")
                self._held.let_go(notice.task)
            case NoticeKind.TASK_GONE:
                self._log.debug(f"{who}: gone")
                self._held.let_go(notice.task)
            case NoticeKind.FORKED:
                self._log.debug(f"{self._name(notice.value)}: forked {who}")
            case NoticeKind.UNREADABLE:
                self._fail(f"{who}: {pages} cannot be read from {source} ({why}): poisoned, touching it is SIGBUS")
            case NoticeKind.HELD:
                self._fail(f"{who}: {pages} cannot be read from {source} ({why}): whoever touches it waits for ever")
            case NoticeKind.SOURCE_CHANGED:
                self._fail(f"{source}: changed while it is being served, it has {notice.value} bytes now")
            case NoticeKind.SUSPECT:
                self._fail(
                    f"{who}: {pages} may be wrong: {source} was cut while they were copied;"
                    f" {self._stop_task(notice.task)}"
                )
            case NoticeKind.TASK_FAILED if notice.error == -errno.ECANCELED and not notice.value:
                self._held.let_go(notice.task)  # given up together with all the others, which was said once
            case NoticeKind.TASK_FAILED:
                missed = f", {notice.value} pages could not be" if notice.value else ""
                self._fail(f"{who}: cannot be served any more ({why}): what was missing is poisoned{missed}")
                self._held.let_go(notice.task)
            case NoticeKind.LINK:
                self._on_link()
            case NoticeKind.LOST:
                self._log.warning(f"{notice.value} notices were lost; the totals have them all")

    def _stop_task(self, number: int) -> str:
        """Stop a task that may hold a wrong byte; what came of it, in words."""
        pid = self._held.stop(number)
        return f"pid {pid} is stopped" if pid else "it could not be stopped: kill it"

    def _name(self, number: int) -> str:
        try:
            info = self._engine.task(number)
        except KeyError:
            return f"task number {number}"
        if info.parent >= 0:
            return f"task {info.image_pid}, forked as number {number}"
        return f"task {info.image_pid}"

    # Signals

    def _on_signals(self, signals: int) -> None:
        for number in os.read(signals, 64):
            if number in SIGNALS and self._end is None:
                self._on_signal(signal.Signals(number))

    def _on_signal(self, number: signal.Signals) -> None:
        self._on_connection()  # a task whose userfaultfd lies in the socket, unread, depends on us as well
        if self._end is not None:
            return
        now = self._log.elapsed()
        totals = self._engine.totals()
        if not totals.serving and not self._is_finished:
            self._fail(f"{number.name}: nothing depends on this daemon yet, it ends")
            self._engine.abandon()
            self._end = _End.ABANDONED
            return
        if number is signal.SIGHUP:
            self._log.warning("SIGHUP: tasks depend on this daemon, it carries on")
            return
        if self._last_signal is not None and now - self._last_signal < SAME_SIGNAL_S:
            # One stop, told to every process of a group: to this one, and to the keeper who forwards it.
            return
        is_again = self._last_signal is not None and now - self._last_signal < SECOND_SIGNAL_S
        self._signals = self._signals + 1 if is_again else 1
        if self._signals == _HOLDING_SIGNALS and self._remote is not None and not self._remote.info.error:
            self._last_signal = now
            stopped = ", ".join(map(str, self._held.stop_all()))
            self._log.warning(
                f"{number.name} again: stopped {stopped or 'nobody'}; {self._remote.name} would end its copy if this"
                " daemon ended, so it holds on: SIGCONT lets them go on, one more signal gives everything up"
            )
            return
        if is_again:
            self._fail(f"{number.name} again: stopping {counted(totals.serving, 'task')} and giving up")
            self._stop_tasks()
            return
        self._last_signal = now
        self._engine.hurry()
        self._log.warning(
            f"{number.name}: {counted(totals.serving, 'task')}, {human_bytes(totals.left_pages * PAGE_SIZE)} to come;"
            f" finishing the fill first (again within {SECOND_SIGNAL_S:.0f} seconds: stop the tasks instead)"
        )

    # Giving up

    def _abandon(self, reason: str) -> None:
        """Poison what is missing and end: the restore has failed."""
        self._fail(str(RestoreError(reason)))
        self._engine.abandon()
        self._end = _End.ABANDONED

    def _stop_tasks(self) -> None:
        """Stop every task that still depends on us, then poison what it misses."""
        stopped = list(self._held.stop_all())
        unknown = sum(info.status is TaskStatus.SERVING and not info.run_pid for info in task_infos(self._engine))
        self._engine.abandon()
        self._end = _End.ABANDONED
        if stopped:
            self._log.warning(
                f"stopped: {', '.join(map(str, stopped))}; SIGCONT lets one go on until it touches a page it"
                " misses, which is SIGBUS"
            )
        if unknown:
            self._log.warning(
                f"{unknown} forked tasks are known to the kernel only: those that were not found among the"
                " children go on until they touch a page they miss, which is SIGBUS"
            )

    def _stop_untaken_tasks(self) -> Iterator[int]:
        """Stop the tasks that were attached to and that no process has come to serve."""
        for task in self._to_attach:
            if task.image_pid in self._tasks and stop_unheld(task.pid):
                yield task.pid


def _describe(error: BaseException) -> str:
    """Return a bug's whole trace: nobody may be there to see it on a terminal."""
    try:
        import traceback  # noqa: PLC0415  slow to import, and needed by bugs only
    except OSError:  # no descriptor is left to read it through
        return repr(error)
    return "".join(traceback.format_exception(error)).rstrip()
