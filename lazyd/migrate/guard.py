# SPDX-License-Identifier: MIT
"""Stands between the dumper and the link: pages and requests go through, the link's end does not.

Beside it stands a process that does nothing but hold the dumper's connection too. If the guard is killed while the task
must not go on, the task stands still, and that process asks what is to be done, as the guard would have. If it dies
itself, the guard makes another: a guard that nobody stands by is taken for success when it is killed.

Kernel facts (socket(7), tcp(7)): a TCP socket with SO_LINGER of no time is reset when it is closed, also by the end of
its process; without, its peer sees an end of input. What either means to the dumper is in this package's head.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path

from lazyd.hints import NoReturn
from lazyd.migrate.brake import Brake
from lazyd.tuples import NamedTuple

_PIPE_BYTES = 1 << 20
_LOOK_MS = 200
ENDS_WITHIN_S = 10.0
"""How long a task may take to end that its dumper has ended."""
_HOLDER_NAME = "migrate-holder"  # who ends all by the name of lazyd leaves it to ask
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_HOLD, _LET_GO, _DONE = b"h", b"l", b"d"
_NO_TIME, _ANY_TIME = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class Guard:
    """Two threads that move bytes. The link is somebody else's; `brake` is of the task that is guarded."""

    def __init__(self, link: socket.socket, brake: Brake) -> None:
        self._link = link
        self.brake = brake
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._inner = socket.create_connection(listener.getsockname())
            self.for_dumper, address = listener.accept()
            if address != self._inner.getsockname():  # somebody else was faster
                raise ConnectionAbortedError("another program connected to the dumper's port")
        for one in (self._inner, self.for_dumper):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.holds = False
        self._has_ended = False
        self._holder = 0
        self._to_holder = -1
        self.holder_fd = -1
        """Readable once look() has something to do; -1: it has."""
        self._held: _Held | None = None
        self.let_go_at_end()
        link.settimeout(None)
        self.link_ended = threading.Event()
        """The destination, or the link, is gone."""
        self._threads = [
            threading.Thread(target=self._pass_pages, daemon=True),
            threading.Thread(target=self._pass_requests, daemon=True),
        ]

    def start(self, dumper: int) -> None:
        """Begin to move bytes, once the dumper has its end: a child of this process."""
        self.for_dumper.close()
        self._held = _Held(os.pidfd_open(dumper), self.brake)
        self._make_holder()
        for thread in self._threads:
            thread.start()

    def _make_holder(self) -> None:
        """Make the process that stands by; OSError. It needs nothing that one of the threads here might hold."""
        assert self._held is not None
        reading, writing = os.pipe()
        # Held back until it ignores them, and until it is known here.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            holder = os.fork()
            if not holder:
                _hold_too(self._inner, reading, self._held, _HOLD if self.holds else _LET_GO)
            try:
                self.holder_fd = os.pidfd_open(holder)
            except OSError:
                os.kill(holder, signal.SIGKILL)
                os.waitpid(holder, 0)
                raise
            self._holder, self._to_holder = holder, writing
        except OSError:
            os.close(writing)
            raise
        finally:
            os.close(reading)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def look(self) -> None:
        """See that there is somebody who stands by: call it again and again."""
        if self._has_ended or self._held is None:
            return
        if self._holder:
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(self._holder, os.WNOHANG)[0]:
                    return
            self._forget_holder()
        with contextlib.suppress(OSError):  # tried again the next time
            self._make_holder()

    def _forget_holder(self) -> None:
        os.close(self._to_holder)
        os.close(self.holder_fd)
        self._holder, self._to_holder, self.holder_fd = 0, -1, -1

    def let_go_at_end(self) -> None:
        """Have the source's task go on, should this process end."""
        if self.holds:
            self.brake.take_off()
        self.holds = False
        self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_TIME)
        self._tell_holder(_LET_GO)

    def hold_at_end(self) -> None:
        """Have the source's task never go on, whatever happens to this process, or to the dumper."""
        self.holds = True
        self.brake.put_on()
        self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ANY_TIME)
        self._tell_holder(_HOLD)

    def _tell_holder(self, word: bytes) -> None:
        if self._holder:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._to_holder, word)

    def hang_up(self) -> None:
        """End the link: what the destination still lacks cannot come."""
        # A thread in a system call holds the socket open: shutting down what it reads wakes it.
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """End the dumper's connection in the way that was said last; a second call does nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        self.hang_up()
        if self.holds:
            with contextlib.suppress(OSError):
                self._inner.shutdown(socket.SHUT_RDWR)
        else:
            _reset(self._inner)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._inner.close()
        self.for_dumper.close()
        if self._holder:
            self._tell_holder(_DONE)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._holder, 0)
            self._forget_holder()
        if self._held is not None:
            os.close(self._held.dumper)
            self._held = None

    def _pass_pages(self) -> None:
        self._pass_on(self._inner, self._link)
        with contextlib.suppress(OSError):  # the dumper's end is no secret
            self._link.shutdown(socket.SHUT_WR)

    def _pass_requests(self) -> None:
        self._pass_on(self._link, self._inner)
        self.link_ended.set()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        """Move bytes until there are no more; their end is not passed on."""
        reading, writing = os.pipe()
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            while left := os.splice(one.fileno(), writing, _PIPE_BYTES):
                while left:
                    left -= os.splice(reading, other.fileno(), left)
        except OSError:
            pass
        finally:
            os.close(reading)
            os.close(writing)


def _reset(connection: socket.socket) -> None:
    """Reset a connection now, whoever is in a system call on it: what connecting it to nobody does (connect(2))."""
    import ctypes  # noqa: PLC0415  Python's connect has no such address

    nobody = struct.pack("H14x", socket.AF_UNSPEC)
    ctypes.CDLL(None).connect(connection.fileno(), nobody, len(nobody))


class _Held(NamedTuple):
    """What stands still while the guard holds it."""

    dumper: int
    """A pidfd of the dumper."""
    brake: Brake


def _hold_too(inner: socket.socket, reading: int, held: _Held, last: bytes) -> NoReturn:
    """Hold the dumper's connection; if whoever writes to `reading` dies, do as was said last."""
    try:
        for number in _GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(_HOLDER_NAME)
        kept = sorted({2, reading, inner.fileno(), held.dumper, *held.brake.descriptors})
        for low, high in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low + 1, high)
        while (said := os.read(reading, 1)) not in (b"", _DONE):
            last = said
            if last == _HOLD:
                held.brake.remember()  # to stop them is the guard's: here it might be too late
        if not said:
            _decide(inner, held, last)
    except BaseException:
        # To end would look like success. Whoever has a look finds this process, and can end it.
        while last == _HOLD and not held.brake.has_ended():
            time.sleep(_LOOK_MS / 1000)
    finally:
        os._exit(0)


def _decide(inner: socket.socket, held: _Held, last: bytes) -> None:
    """Do what the guard would have done: it is dead."""
    if last == _LET_GO:
        _reset(inner)
        return
    wanted = _ask(held)
    if wanted == signal.SIGTERM:
        inner.shutdown(socket.SHUT_RDWR)
    elif wanted == signal.SIGUSR1:
        held.brake.take_off()
        _reset(inner)
    elif not held.brake.has_ended(ENDS_WITHIN_S):  # they would, had the dumper come to its end
        held.brake.put_on()
        _tell(f"criu dump has died; {held.brake.how_it_stands('may run')}")


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it any more
        os.write(2, f"{text}\n".encode())


def _ask(held: _Held) -> int:
    """Return the signal that says what to do; 0: the dumper has ended. If the tasks have, nobody need say anything."""
    wanted: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: wanted.append(number))
    poll = select.poll()
    poll.register(held.dumper, select.POLLIN)
    is_told = False
    while not wanted:
        if poll.poll(_LOOK_MS if is_told else 0):
            return 0
        if held.brake.has_ended():
            return signal.SIGTERM
        if not is_told:
            is_told = True
            _tell(f"lazyd migrate was killed; {how_to_decide(f'process {held.brake.pid}')}")
    return wanted[0]


def how_to_decide(name: str) -> str:
    """Return what an operator is told who has to."""
    pid = os.getpid()
    return f"{name} is held: kill -USR1 {pid} lets it go on (if its copy never will again), kill -TERM {pid} ends it"
