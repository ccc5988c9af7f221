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

import os
import signal
import sys
import time
from collections.abc import Callable
from enum import Enum

from lazyd.uffd import fork_keeping_fds

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_DEATHS = 3
_DEATHS_WITHIN_S = 10.0


class Life(Enum):
    """Why a process serves."""

    FIRST = "first"
    RESUMED = "resumed"  # the one before was killed or crashed
    LAST = "last"  # several in a row did: only to give up in order


def keep(serve: Callable[[Life], int], report: Callable[[str], None]) -> int:
    """Run `serve` in a child, and again when it dies of a signal; return the exit code of the last one.

    Call it while there is one thread. `report` gets a line when a child has died. Signals that would end this
    process go to the child.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    deaths: list[float] = []
    life = Life.FIRST
    try:
        while True:
            # What the child would write again.
            sys.stdout.flush()
            sys.stderr.flush()
            child = fork_keeping_fds()
            if child == 0:
                _serve_and_exit(serve, life, blocked)
            status = _wait(child)
            if os.WIFEXITED(status):
                return os.WEXITSTATUS(status)
            name = signal.Signals(os.WTERMSIG(status)).name
            if life is Life.LAST:
                report(f"the process that was to give up in order died of {name}: kill the restored tasks")
                return 1
            now = time.monotonic()
            deaths = [then for then in deaths if now - then < _DEATHS_WITHIN_S] + [now]
            life = Life.LAST if len(deaths) >= _DEATHS else Life.RESUMED
            what = "giving up" if life is Life.LAST else "the tasks wait, another goes on"
            report(f"the serving process {child} died of {name}: {what}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _serve_and_exit(serve: Callable[[Life], int], life: Life, mask: set[int | signal.Signals]) -> None:
    """Serve in a child, and never return from it. A bug ends it by SIGABRT: another goes on, as after a crash."""
    try:
        # A terminal's Ctrl-C must come once, through the keeper: not to its whole process group.
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = serve(life)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback  # noqa: PLC0415  slow to import, and needed by bugs only

        traceback.print_exc()
        sys.stderr.flush()
        os.abort()
    sys.stdout.flush()
    sys.stderr.flush()
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
