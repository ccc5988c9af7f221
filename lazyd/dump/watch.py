# SPDX-License-Identifier: MIT
"""What goes on beside a dump: progress is shown, and signals that are to end it are waited for.

The thread that dumps is in C or in a system call most of the time, where Python runs no handler of a signal; so SIGINT
and SIGTERM are blocked and a thread waits for them. It cancels the copy; what is not the copy takes milliseconds, and
check() is called between.
"""

from __future__ import annotations

import signal
import threading
from types import TracebackType

from lazyd.dump.memory import MemoryDump
from lazyd.errors import DumpError
from lazyd.report import DRAW_INTERVAL_S, CopyProgress, Log, Show

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_WAKE = signal.SIGUSR1


class Watch:
    """A thread for as long as a dump lasts. As a context manager it ends at the end."""

    def __init__(self, log: Log, memory: MemoryDump, show: Show) -> None:
        self._memory = memory
        self._progress = CopyProgress(log, show)
        self._signal: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_SIGNALS, _WAKE})
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._is_over.is_set():
            info = signal.sigtimedwait({*_SIGNALS, _WAKE}, DRAW_INTERVAL_S)
            if info and info.si_signo in _SIGNALS:
                self._signal = info.si_signo
                self._memory.progress.cancel()
            self._progress.update(self._memory.progress.copied_bytes, self._memory.expected_bytes)

    def check(self) -> None:
        """Raise DumpError if a signal has come."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise DumpError(f"given up because of {name}: no images were written, the process goes on")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, _WAKE)
        self._thread.join()
        self._progress.end()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
