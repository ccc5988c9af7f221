# SPDX-License-Identifier: MIT
"""Has the tasks at the source stop by themselves should the dumper that holds them die.

Kernel facts (signal(7), ptrace(2); seen with criu 4.1.1 and 4.2.1): a task that the dumper holds is in a stop of its
ptrace. A SIGSTOP sent to it waits until nobody traces it any more; when the kernel takes a dead dumper's tasks off it,
they go from the one stop into the other without running. A SIGCONT takes a SIGSTOP back that waits, and a task with a
handler of SIGCONT has that run when it goes on. To end a task goes on working. (To stop it when it is seen to run again
is too late for one that forks: its children are elsewhere.)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from lazyd.target.process import descendants
from lazyd.target.tracing import has_ended, state_of

_LOOK_S = 0.05


class Brake:
    """For a task and its children. Make it before the dumper holds them, put it on while it does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._stopped_before = frozenset(one for one in (pid, *descendants(pid)) if state_of(one) == "T")
        self._pidfds: dict[int, int] = {}

    @property
    def descriptors(self) -> list[int]:
        """What is open here, in a process that is forked too."""
        return list(self._pidfds.values())

    def remember(self) -> None:
        """Know the tasks from now on, whoever of them ends: call it while they are held."""
        for pid in (self.pid, *descendants(self.pid)):
            if pid not in self._pidfds:
                with contextlib.suppress(ProcessLookupError):
                    self._pidfds[pid] = os.pidfd_open(pid)

    def put_on(self) -> None:
        """Have them stop, at once or when the dumper lets them go."""
        self.remember()
        for pidfd in self._pidfds.values():
            self._signal(pidfd, signal.SIGSTOP)

    def take_off(self) -> None:
        """Have them go on, those that were stopped before excepted."""
        for pid, pidfd in self._pidfds.items():
            if pid not in self._stopped_before:
                self._signal(pidfd, signal.SIGCONT)

    @staticmethod
    def _signal(pidfd: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)

    def has_ended(self, within_s: float = 0) -> bool:
        """Say whether all of them are gone. A dumper does not wait for those that it ends: they take their time.

        It is not waited for where one of them is stopped and nobody traces it: that is not being ended.
        """
        end = time.monotonic() + within_s
        while not self._are_gone():
            if time.monotonic() >= end or any(state_of(pid) == "T" for pid in self._pidfds):
                return False
            time.sleep(_LOOK_S)
        return True

    def _are_gone(self) -> bool:
        if not self._pidfds:
            return has_ended(self.pid)
        poll = select.poll()
        for pidfd in self._pidfds.values():
            poll.register(pidfd, select.POLLIN)
        return len(poll.poll(0)) == len(self._pidfds)

    def how_it_stands(self, copy: str) -> str:
        """Say what an operator is told when the dumper has failed and the copy may run; `copy` is what that does."""
        if self.has_ended():
            return f"process {self.pid} has ended, and its copy {copy}"
        return (
            f"process {self.pid} and its children are stopped, as their copy {copy}:"
            " kill -CONT them if it never will again, else kill -KILL"
        )
