# SPDX-License-Identifier: MIT
"""Wait for threads that another one's exec has killed, while the tracer cannot.

A thread that executes a program takes the task's cred_guard_mutex, kills the other threads and waits until they are
gone (fs/exec.c, de_thread); one that is traced is gone only when its tracer has waited for it. PTRACE_SEIZE of any
thread waits for that mutex (kernel/ptrace.c). So a tracer that has some threads and seizes the next would wait for the
exec, and the exec for the tracer, for ever. But any thread of the tracer's process may wait for its tracees: one of
ours does, as long as threads are being seized. It looks before it waits (WNOWAIT), and takes none but dead ones: to
wait for ends only makes no difference with tracees, whose stops are reported all the same (kernel/exit.c,
wait_task_stopped), and would be lost to the tracer.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from types import TracebackType

from lazyd.target.binding import WALL

_INTERVAL_S = 0.02
_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


class Reaper:
    """A thread, once start() is called. As a context manager it ends at the end."""

    def __init__(self) -> None:
        self._tids: list[int] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """See to it that nobody's end is waited for in vain from now on; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def add(self, tid: int) -> None:
        """Wait for this thread of the traced task too, should it end; not the leading one, for which no exec waits."""
        self._tids.append(tid)

    def _run(self) -> None:
        while not self._is_over.wait(_INTERVAL_S):
            for tid in tuple(self._tids):
                with suppress(ChildProcessError):
                    found = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
                    if found is not None and found.si_code in _ENDS:
                        os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)

    def __enter__(self) -> Reaper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
