# SPDX-License-Identifier: MIT
"""Outlives the process that serves: holds every userfaultfd, and starts another one when it dies.

When the last descriptor of a userfaultfd closes, the kernel drops the registration and every later fault reads zeros:
silent corruption by a crash, an OOM kill, a kill -9. So the process that the user started only keeps, and a child of
it serves. The two share one table of descriptors (clone with CLONE_FILES): what the child receives, even the
userfaultfd of a fork that arrives with a read() in the moment of its death, stays open here. All state of the engine
is in a mapping that both share. When the child dies, its faults block, another child is made from the keeper, which
never ran a thread, and goes on where the arena says (lz_engine_resume).

Better than the design's sketch, which passes descriptors from one process to the other: there is no moment at which
a descriptor is in one of them only.

What it cannot help: both processes killed at once. A keeper that dies alone leaves a child that serves to the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from enum import Enum

from lazyd.errors import SystemCallError
from lazyd.uffd import fork_keeping_fds

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_DEATHS = 3
_DEATHS_WITHIN_S = 10.0
_RETRY_S = 0.5


class Life(Enum):
    """Why a process serves."""

    FIRST = "first"
    RESUMED = "resumed"  # the one before was killed or crashed
    LAST = "last"  # several in a row did: only to give up in order


def keep(serve: Callable[[Life], int], report: Callable[[str], None], begun: Callable[[], None] | None = None) -> int:
    """Run `serve` in a child, and again when it dies of a signal; return the exit code of the last one.

    Call it while there is one thread. `report` gets a line when a child has died. Signals that would end this
    process go to the child. `begun` is called once, here, when there is a child. Once a child has served, this
    process must not come to its end by an exception: it would take the userfaultfds along. So what can fail here is
    tried again or passed over.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored, no child's end would be heard of
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    deaths: list[float] = []
    life = Life.FIRST
    while True:
        flush()  # what the child would write again
        child = _fork(life)
        if child == 0:
            _serve_and_exit(serve, life, blocked)
        if life is Life.FIRST and begun is not None:
            begun()
        status = _wait(child)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        now = time.monotonic()
        deaths = [then for then in deaths if now - then < _DEATHS_WITHIN_S] + [now]
        # LAST does not serve; if it cannot give up in order either, it is tried again, and the tasks wait.
        life = Life.LAST if life is Life.LAST or len(deaths) >= _DEATHS else Life.RESUMED
        what = "giving up" if life is Life.LAST else "the tasks wait, another goes on"
        with contextlib.suppress(Exception):
            report(f"the serving process {child} died of {_name_of(os.WTERMSIG(status))}: {what}")
        if len(deaths) > _DEATHS:
            time.sleep(_RETRY_S)


def flush() -> None:
    """Write out what is buffered, where there is still someone to take it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _name_of(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _fork(life: Life) -> int:
    """Fork; again and again if a child has served already: its tasks wait for the next."""
    while True:
        try:
            return fork_keeping_fds()
        except SystemCallError:
            if life is Life.FIRST:
                raise
            time.sleep(_RETRY_S)


def _serve_and_exit(serve: Callable[[Life], int], life: Life, mask: set[int | signal.Signals]) -> None:
    """Serve in a child, and never return from it. A bug ends it by SIGABRT: another goes on, as after a crash."""
    try:
        # A terminal's Ctrl-C must come once, through the keeper: not to its whole process group.
        os.setpgid(0, 0)
        # Which makes it a background group, whose writing some terminals answer with a stop.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = serve(life)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback  # noqa: PLC0415  slow to import, and needed by bugs only

        with contextlib.suppress(Exception):
            traceback.print_exc()
        flush()
        os.abort()
    flush()
    os._exit(code)


def _wait(child: int) -> int:
    """Wait for the child's end, forwarding signals to it, and return its wait status."""
    while True:
        number = signal.sigwait({*FORWARDED, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status
