# SPDX-License-Identifier: MIT
"""The signals that would end the daemon, as bytes in a pipe."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


def hold_signals() -> None:
    """Let the signals that would end the daemon wait until run() takes them.

    Who is told that we listen may send one at once, or a task: neither may be lost in between.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class signals_as_bytes:
    """A pipe that gets one byte for each signal that would end the daemon, in place of the ending: its reading end."""

    def __enter__(self) -> int:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
        # They were held back since before anyone was told that we listen.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self._reading

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What comes now comes too late: it must not end a process that has nothing left to do but to say so.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._reading)
        os.close(self._writing)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the byte in the pipe says it."""
