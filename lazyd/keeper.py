# SPDX-License-Identifier: MIT
"""Outlives the process that serves: three processes hold every userfaultfd, and replace each other when one dies.

When the last descriptor of a userfaultfd closes, the kernel drops the registration and every later fault reads zeros:
silent corruption by a crash, an OOM kill, a kill -9. So there are three processes, each with an office:

- the keeper, which the user started: watches over the one that serves, replaces what has died, forwards signals, and
  ends with the exit code;
- the server: runs the session and the engine's threads;
- the standby: does nothing but wait for the keeper's death, and takes its office then.

They share one table of descriptors (clone with CLONE_FILES): what one receives, even the userfaultfd of a fork that
arrives with a read() in the moment of its death, stays open in the others. All state of the engine is in mappings that
they share. Whoever never ran a thread can be forked into another server, which goes on where the arena says
(lz_engine_resume); faults wait meanwhile. So any two may be killed at once, again and again:

| killed | what happens |
|---|---|
| server | the keeper makes another |
| keeper | the standby becomes the keeper, of the same server, and makes another standby |
| standby | the keeper makes another |
| keeper and server | the standby becomes the keeper, and makes another server |
| server and standby | the keeper makes both anew |
| keeper and standby | the server misses its keeper, stops its threads for a moment, forks a standby, and serves on |

Better than the design's sketch, which passes descriptors from one process to the other: there is no moment at which
a descriptor is in one of them only.

How they agree, without a moment at which two hold one office or nobody knows of a process: an office is a word in
shared memory, its holder's pid and the number of a pidfd of it in the shared table. It is taken by one atomic exchange
from a holder whose pidfd says that it is dead, so of several who try one succeeds. A pidfd cannot take another process
for a dead one, and needs nobody to be anyone's parent; so who reaps does not matter either. A server serves only once
its office says so. One whose maker died before that becomes a standby, of which there may be any number.

Nor does anybody wait for a pidfd for long without looking again who holds the office. poll(2) looks its numbers up anew
whenever it wakes, and finds another file if the number has been given away in the shared table meanwhile: seen, on a
busy machine, was a standby that slept for ever, woken by its keeper's death when the number was another server's.

What cannot be helped: all three killed at once, as by the kill of a whole control group. Then the kernel lets the
tasks read zeros.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lazyd.enums import Enum, IntEnum
from lazyd.errors import SystemCallError
from lazyd.hints import NoReturn
from lazyd.tuples import NamedTuple
from lazyd.uffd import SharedWords, fork_keeping_fds, open_signals

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_SIGNAL_BYTES = 128
_DEATHS = 3
_DEATHS_WITHIN_NS = 10_000_000_000
_RETRY_S = 0.5
_SOON_S = 0.002
_LOOK_S = 1.0
_HALT_AFTER_S = 10.0
_RESERVE = 2


class Life(Enum):
    """Why a process serves."""

    FIRST = "first"
    RESUMED = "resumed"  # the one before was killed or crashed
    LAST = "last"  # several in a row did: only to give up in order


class Work(NamedTuple):
    """What is kept, as functions.

    serve: serve, and return the exit code; in a process of its own, again when that dies.
    report: tell people one line.
    sweep: close the descriptors that nobody knows of, before `serve` runs again. Given are those that were open when
        keep() was called, of which some were closed since and may be others now, and those of the keeping itself.
    halt: stop the tasks with SIGSTOP, for nobody can be made to serve them.
    begun: called once, in the process that called keep(), when there is a process that serves.
    succeed: called in a process that has become the keeper; whether `begun` was done.
    """

    serve: Callable[[Life, Guard], int]
    report: Callable[[str], None]
    sweep: Callable[[frozenset[int], frozenset[int]], None]
    halt: Callable[[], None]
    begun: Callable[[], None]
    succeed: Callable[[bool], None]


class _Word(IntEnum):
    """What is shared, a word each."""

    KEEPER = 0  # holder of the office, as _Holder
    SERVER = 1  # as well; 0: there was none yet
    ENDED = 2  # the exit code plus 1: nothing is left to be kept
    LAST = 3  # 1: given up
    BEGUN = 4  # 1: begun() was called, 2: and has returned
    DEATHS = 5  # and those after it: when servers died, in ns; the latest _DEATHS
    NOTED = 8  # the holder of SERVER whose death was written down last
    RESERVE = 9  # and those after it: a descriptor plus 1 that is held for when no other is left


class _Holder(NamedTuple):
    """A process that holds an office."""

    pid: int
    pidfd: int

    @classmethod
    def of(cls, word: int) -> _Holder:
        return cls(word >> 32, word & 0xFFFF_FFFF)

    def word(self) -> int:
        return self.pid << 32 | self.pidfd

    def is_dead(self, wait_s: float = 0) -> bool:
        """Wait for its death for so long. True may be of another: see that the office has the same holder still."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(wait_s * 1000))


def keep(work: Work) -> int:
    """Run `work.serve` in a child, and again when it dies; return the exit code of the last one.

    Call it while there is one thread. Signals that would end this process go to the child. Once a child has served,
    this process must not come to its end by an exception: it would take a holder of the userfaultfds along. So what
    can fail here is tried again or passed over.
    """
    gc.freeze()  # what was made to get here stays
    gc.enable()
    return _Family(work).run()


def flush() -> None:
    """Write out what is buffered, where there is still someone to take it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


class Guard:
    """What the process that serves knows of those who keep it."""

    def __init__(self, family: _Family) -> None:
        self._family = family

    def keeper_fd(self) -> int:
        """Readable once the keeper of now is dead."""
        return self._family.keeper().pidfd

    def is_kept(self) -> bool:
        """Say whether there is a keeper. There may be a moment without one, before another takes its place."""
        return not self._family.keeper().is_dead()

    def fork_standby(self) -> None:
        """Make a process that takes the keeper's office; while there is one thread. SystemCallError if it cannot be."""
        self._family.fork_standby()

    def reap(self) -> None:
        """Reap what was made here and has died."""
        self._family.reap()


class _Family:
    """The processes, as each of them sees them: a copy in every one, of which only the words are shared."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._words = SharedWords(_Word.RESERVE + _RESERVE)
        self._children: dict[int, int | None] = {}
        """Made by this process: their wait status once they are reaped."""
        self._standby = 0
        self._undelivered: list[int] = []
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, no child's end would be heard of
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
        try:
            self._signals = open_signals([*FORWARDED, signal.SIGCHLD])
            self._at_first = _open_descriptors()
            self._fill_reserve()
            me = _Holder(os.getpid(), os.pidfd_open(os.getpid()))
        except OSError as error:
            raise SystemCallError("keeping the serving process", error.errno or 0) from error
        self._words[_Word.KEEPER] = me.word()

    # What every process may ask

    def keeper(self) -> _Holder:
        return _Holder.of(self._words[_Word.KEEPER])

    def reap(self) -> None:
        for pid, status in list(self._children.items()):
            if status is None:
                with contextlib.suppress(ChildProcessError):
                    found, wait_status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        self._children[pid] = wait_status

    def fork_standby(self) -> None:
        pid = self._fork()
        if pid == 0:
            self._stand_by()
        self._standby = pid

    def _fork(self) -> int:
        flush()  # what the child would write again
        pid = fork_keeping_fds()
        if pid:
            self._children[pid] = None
        else:
            self._children.clear()
            self._standby = 0
            with contextlib.suppress(OSError):
                # A terminal's Ctrl-C must come once, through the keeper: not to its whole process group.
                os.setpgid(0, 0)
            # Which makes it a background group, whose writing some terminals answer with a stop.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        return pid

    # The keeper

    def run(self) -> int:
        """Be the first keeper."""
        try:
            self.fork_standby()
            self._make_server(Life.FIRST)
        except BaseException:
            self._words[_Word.ENDED] = 1 + 1
            raise
        return self._keep()

    def _keep(self) -> int:
        while True:
            try:
                code = self._look_after()
            except Exception as error:  # whatever it is, the userfaultfds must be held
                self._say(f"keeping the serving process: {error}")
                time.sleep(_RETRY_S)
                continue
            if code is not None:
                self._dismiss_standby()
                return code

    def _look_after(self) -> int | None:
        """Replace who is missing and wait for the next event; the exit code if it is over."""
        word = self._words[_Word.SERVER]
        is_served = bool(word) and not _Holder.of(word).is_dead()
        ended = self._words[_Word.ENDED]
        if ended and not is_served:
            self.reap()
            return ended - 1
        if not self._standby:
            with contextlib.suppress(SystemCallError):  # tried again with every turn
                self.fork_standby()
        if not is_served:
            self._replace_server()
        if not self._words[_Word.BEGUN]:
            self._words[_Word.BEGUN] = 1
            self._work.begun()
            self._words[_Word.BEGUN] = 2
        self._deliver()
        self._wait()
        return None

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        poll.register(_Holder.of(self._words[_Word.SERVER]).pidfd, select.POLLIN)
        poll.poll(_LOOK_S * 1000)
        with contextlib.suppress(BlockingIOError):
            while number := int.from_bytes(os.read(self._signals, _SIGNAL_BYTES)[:4], sys.byteorder):
                if number != signal.SIGCHLD:
                    self._undelivered.append(number)
        self._deliver()
        self.reap()
        status = self._children.get(self._standby)
        if self._standby and status is not None:
            self._say(f"the standby process {self._standby} died of {_cause(status)}: another takes its place")
            del self._children[self._standby]
            self._standby = 0

    def _deliver(self) -> None:
        """Forward signals. Those that come while nobody serves are for the next one."""
        server = _Holder.of(self._words[_Word.SERVER])
        while self._undelivered and not server.is_dead():
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(server.pidfd, self._undelivered[0])
            del self._undelivered[0]

    def _replace_server(self) -> None:
        word = self._words[_Word.SERVER]
        if not word:  # the keeper before this one died before it had made one
            self._make_server(Life.FIRST)
            return
        dead = _Holder.of(word)
        self.reap()
        cause = _cause(self._children.pop(dead.pid, None))
        self._note_death(word)
        is_last = bool(self._words[_Word.LAST])
        what = "giving up" if is_last else "the tasks wait, another goes on"
        self._say(f"the serving process {dead.pid} died of {cause}: {what}")
        since = time.monotonic()
        has_halted = False
        while True:
            try:
                self._fill_reserve()
                # What the dead holder's number means must not change while its office names it.
                kept = frozenset((self.keeper().pidfd, dead.pidfd, *self._reserve()))
                self._work.sweep(self._at_first, kept)
                # LAST does not serve; if it cannot give up in order either, it is tried again, and the tasks wait.
                self._make_server(Life.LAST if self._words[_Word.LAST] else Life.RESUMED)
            except (OSError, SystemCallError) as error:
                if not has_halted and time.monotonic() - since > _HALT_AFTER_S:
                    has_halted = True
                    self._words[_Word.LAST] = 1
                    self._say(f"no process can be made to serve ({error}): stopping the tasks")
                    self._work.halt()
                time.sleep(_RETRY_S)
                continue
            break
        with contextlib.suppress(OSError):
            os.close(dead.pidfd)  # of use to nobody now that the office has another holder

    def _note_death(self, word: int) -> None:
        """Write down that the holder of SERVER died, once; several within a short time are enough.

        A keeper may die after that and before there is another server: the next one finds the same dead holder.
        """
        noted = self._words[_Word.NOTED]
        if noted == word or not self._words.swap(_Word.NOTED, noted, word):
            return
        now = time.monotonic_ns()
        words = range(_Word.DEATHS, _Word.DEATHS + _DEATHS)
        self._words[min(words, key=self._words.__getitem__)] = now
        recent = sum(bool(self._words[word]) and now - self._words[word] < _DEATHS_WITHIN_NS for word in words)
        if self._words[_Word.LAST] or recent >= _DEATHS:
            if self._words[_Word.LAST]:
                time.sleep(_RETRY_S)
            self._words[_Word.LAST] = 1

    def _make_server(self, life: Life) -> None:
        before = self._words[_Word.SERVER]
        maker = self.keeper()
        pid = self._fork()
        if pid == 0:
            self._serve_and_exit(life, maker)
        try:
            holder = _Holder(pid, self._open_pidfd(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)  # it does not serve before it holds the office
            os.waitpid(pid, 0)
            del self._children[pid]
            raise
        self._words.swap(_Word.SERVER, before, holder.word())

    def _open_pidfd(self, pid: int) -> int:
        """Open a pidfd, with a descriptor of the reserve if there is no other: while nobody serves, nobody takes it."""
        try:
            return os.pidfd_open(pid)
        except OSError:
            for word in range(_Word.RESERVE, _Word.RESERVE + _RESERVE):
                held = self._words[word]
                if held and self._words.swap(word, held, 0):
                    os.close(held - 1)
                    return os.pidfd_open(pid)
            raise

    def _fill_reserve(self) -> None:
        for word in range(_Word.RESERVE, _Word.RESERVE + _RESERVE):
            if not self._words[word]:
                self._words[word] = os.dup(self._signals) + 1

    def _reserve(self) -> list[int]:
        words = range(_Word.RESERVE, _Word.RESERVE + _RESERVE)
        return [self._words[word] - 1 for word in words if self._words[word]]

    def _dismiss_standby(self) -> None:
        """End the standby: it is not to be seen any more when this process has ended."""
        if self._standby:
            with contextlib.suppress(OSError):
                os.kill(self._standby, signal.SIGKILL)
                os.waitpid(self._standby, 0)

    def _say(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self._work.report(line)

    # The server

    def _serve_and_exit(self, life: Life, maker: _Holder) -> NoReturn:
        """Serve in a child, and never return from it. A bug ends it by SIGABRT: another goes on, as after a crash."""
        try:
            # Not before the maker has written it down: if it dies before that, someone else makes another.
            soon = time.monotonic() + _SOON_S
            while _Holder.of(self._words[_Word.SERVER]).pid != os.getpid() and time.monotonic() < soon:
                os.sched_yield()  # a wait takes a millisecond, and a task may be waiting for this process
            while _Holder.of(self._words[_Word.SERVER]).pid != os.getpid():
                # Dead it is too if the office is another's; what its number means then is nothing of it.
                is_dead = self.keeper() != maker or maker.is_dead(0.001)
                if is_dead and _Holder.of(self._words[_Word.SERVER]).pid != os.getpid():
                    self._stand_by()
            _name_process("lazyd-server")
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            code = self._work.serve(life, Guard(self))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            _abort()
        self._words[_Word.ENDED] = 1 + code
        flush()
        os._exit(code)

    # The standby

    def _stand_by(self) -> NoReturn:
        """Wait for the keeper's death, take its office, and never return."""
        try:
            _name_process("lazyd-standby")
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            signal.set_wakeup_fd(-1)
            for number in FORWARDED:
                signal.signal(number, signal.SIG_IGN)  # they are the keeper's
            self._await_office()
            signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
            for number in FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            _name_process("lazyd-keeper")
        except BaseException:
            _abort()
        with contextlib.suppress(Exception):
            has_begun, self._words[_Word.BEGUN] = self._words[_Word.BEGUN] == 2, 2
            self._work.succeed(has_begun)
        code = self._keep()
        flush()
        os._exit(code)

    def _await_office(self) -> None:
        while True:
            dead = self.keeper()
            if not dead.is_dead(_LOOK_S) or self.keeper() != dead:
                continue
            if self._words[_Word.ENDED]:
                os._exit(0)
            try:
                me = _Holder(os.getpid(), self._open_own_pidfd())
            except OSError:  # while someone serves who has taken all descriptors, there is time
                time.sleep(_RETRY_S / 10)
                continue
            if self._words.swap(_Word.KEEPER, dead.word(), me.word()):
                break
            os.close(me.pidfd)
        # The dead one's pidfd stays: the server may be waiting for it. It is swept when another serves.
        self._say(f"the keeper {dead.pid} died: process {me.pid} takes its place")

    def _open_own_pidfd(self) -> int:
        server = self._words[_Word.SERVER]
        if server and _Holder.of(server).is_dead():
            return self._open_pidfd(os.getpid())
        return os.pidfd_open(os.getpid())


def _abort() -> NoReturn:
    """End with a trace for whoever mends the bug: as a crash, which others survive."""
    with contextlib.suppress(BaseException):
        import traceback  # noqa: PLC0415  slow to import, and needed by bugs only

        traceback.print_exc()
    flush()
    os.abort()


def _name_process(name: str) -> None:
    """Set the name that ps shows."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _open_descriptors() -> frozenset[int]:
    found = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208  numbers, not paths
    still_open = set()
    for descriptor in found:  # all but the one that the list was read through
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            still_open.add(descriptor)
    return frozenset(still_open)


def _cause(status: int | None) -> str:
    """Say what a process died of, as its wait status does; None: it was nobody's child here."""
    if status is None:
        return "an unknown cause"
    if os.WIFEXITED(status):
        return f"exit {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
